// Primitives of oneDNN: made once, and run by threads of XLA's.

#ifndef KPX_KERNELS_ONEDNN_H_
#define KPX_KERNELS_ONEDNN_H_

#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <unordered_map>
#include <utility>
#include <vector>

#include "ffi.h"
#include "oneapi/dnnl/dnnl.hpp"

extern "C" {
int omp_get_max_threads();
void omp_set_num_threads(int);
}

namespace {  // one file includes this

using dnnl::algorithm;
using dnnl::memory;
using kpx::Argument;
using kpx::Attribute;
using kpx::Fail;
using kpx::Result;
using kpx::Span;
using Key = std::vector<int64_t>;
using Type = memory::data_type;

// oneDNN asks OpenMP how many threads there are; PyTorch does too, so what it finds is put back.
struct OneThread {
  const int before = omp_get_max_threads();
  OneThread() { omp_set_num_threads(1); }
  ~OneThread() { omp_set_num_threads(before); }
};

const dnnl::engine& Engine() {
  static const auto* engine = new dnnl::engine(dnnl::engine::kind::cpu, 0);
  return *engine;
}

// A primitive, and what its arguments are.
struct Ready {
  dnnl::primitive primitive;
  std::vector<std::pair<int, memory::desc>> arguments;
  memory::desc weights, scratch;
  bool is_plain = false;  // oneDNN has but a plain loop for it
};

template <class Description>
bool IsPlain(const Description& pd) { return std::strstr(pd.impl_info_str(), "ref") != nullptr; }

// What a thread needs to run a primitive.
struct Bound {
  std::vector<memory> memories;
  std::vector<dnnl_exec_arg_t> arguments;

  explicit Bound(const Ready& ready) {
    for (const auto& [name, desc] : ready.arguments) Add(name, desc);
    Add(DNNL_ARG_SCRATCHPAD, ready.scratch);
  }
  void Add(int name, const memory::desc& desc) {
    memories.emplace_back(desc, Engine(), nullptr);
    arguments.push_back({name, memories.back().get()});
  }
};

// Runs a primitive over arrays, in the order of its arguments.
inline void Execute(const Ready& ready, std::initializer_list<const void*> data, const std::vector<void*>& further = {}) {
  thread_local auto* stream = new dnnl::stream(Engine());
  thread_local auto* bound = new std::unordered_map<const Ready*, Bound>;
  thread_local auto* scratch = new std::pair<void*, size_t>(nullptr, 0);
  auto found = bound->find(&ready);
  if (found == bound->end()) found = bound->emplace(&ready, Bound(ready)).first;
  Bound& mine = found->second;
  if (const size_t needed = ready.scratch.get_size(); needed > scratch->second) {
    std::free(scratch->first);
    *scratch = {std::aligned_alloc(64, (needed + 63) / 64 * 64), needed};
  }
  size_t i = 0;
  for (const void* array : data) dnnl_memory_set_data_handle(mine.arguments[i++].memory, const_cast<void*>(array));
  for (void* array : further) dnnl_memory_set_data_handle(mine.arguments[i++].memory, array);
  dnnl_memory_set_data_handle(mine.arguments[i].memory, scratch->first);
  dnnl::error::wrap_c_api(dnnl_primitive_execute(ready.primitive.get(), stream->get(), mine.arguments.size(),
                                                 mine.arguments.data()),
                          "oneDNN could not run a primitive");
}

// What was made before for a key, or is made now. Kept as long as the process lives.
const Ready& Cached(const Key& key, const std::function<Ready()>& make) {
  static auto* mutex = new std::mutex;
  static auto* made = new std::map<Key, std::unique_ptr<Ready>>;
  std::lock_guard<std::mutex> lock(*mutex);
  auto& found = (*made)[key];
  if (found == nullptr) {
    OneThread one;
    found = std::make_unique<Ready>(make());
  }
  return *found;
}

memory::desc RowMajor(int64_t rows, int64_t columns, int64_t leading, Type type) {
  return {{rows, columns}, type, memory::dims{leading, 1}};
}

Type TypeOf(const XLA_FFI_Buffer* buffer) {
  switch (buffer->dtype) {
    case XLA_FFI_DataType_F32: return Type::f32;
    case XLA_FFI_DataType_BF16: return Type::bf16;
    case XLA_FFI_DataType_S8: return Type::s8;
    default: throw std::runtime_error("an array that is neither f32, bf16 nor int8");
  }
}

int64_t Size(Type type) { return static_cast<int64_t>(memory::data_type_size(type)); }

}  // namespace

#endif  // KPX_KERNELS_ONEDNN_H_
