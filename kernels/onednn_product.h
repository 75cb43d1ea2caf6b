// Products with packed weights and what follows them, as primitives of oneDNN.

#ifndef KPX_KERNELS_ONEDNN_PRODUCT_H_
#define KPX_KERNELS_ONEDNN_PRODUCT_H_

#include <cmath>
#include <limits>

#include "onednn.h"

namespace {

inline float ToFloat(float x) { return x; }
inline float ToFloat(uint16_t x) {  // bf16
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

enum Step : int64_t { kBias = 1, kRelu, kGelu, kGeluTanh, kSilu, kTanh, kLogistic, kAdd, kMultiply, kScale, kShift };

struct Steps {
  Span codes;
  std::vector<Type> types;  // of the operands, in order

  static bool TakesVector(int64_t code) { return code == kBias || code == kScale || code == kShift; }
  static bool TakesOperand(int64_t code) { return TakesVector(code) || code == kAdd || code == kMultiply; }
  bool HasBias() const { return codes.size > 0 && codes.data[0] == kBias; }

  // oneDNN's ReLU returns 0 for NaN (x86's `maxps` returns its second operand), so a primitive computes the steps before the
  // first ReLU, and `Finish` the ReLU and what follows, over the tile that the primitive wrote.
  Steps Fused() const { return Part(0, FirstRelu()); }
  Steps Unfused() const { return Part(FirstRelu(), codes.size); }
  size_t Operands() const { return OperandsBefore(codes.size); }

  int64_t FirstRelu() const { return std::find(codes.data, codes.data + codes.size, kRelu) - codes.data; }
  size_t OperandsBefore(int64_t end) const { return std::count_if(codes.data, codes.data + end, TakesOperand); }
  Steps Part(int64_t begin, int64_t end) const {
    return {{codes.data + begin, end - begin},
            {types.begin() + OperandsBefore(begin), types.begin() + OperandsBefore(end)}};
  }
  void Describe(Key* key) const {
    for (int64_t i = 0; i < codes.size; ++i) key->push_back(codes.data[i]);
    for (Type type : types) key->push_back(static_cast<int64_t>(type));
  }
};

// Whether an elementwise primitive returns NaN for NaN, with this machine's instructions.
bool KeepsNan(algorithm function, float alpha) {
  const auto probe = [&] {
    float numbers[16];
    std::fill(std::begin(numbers), std::end(numbers), std::numeric_limits<float>::quiet_NaN());
    const memory::desc desc({16}, Type::f32, memory::format_tag::a);
    const dnnl::eltwise_forward::primitive_desc pd(Engine(), dnnl::prop_kind::forward_inference, function, desc, desc, alpha);
    memory array(desc, Engine(), numbers);
    dnnl::stream stream(Engine());
    dnnl::eltwise_forward(pd).execute(stream, {{DNNL_ARG_SRC, array}, {DNNL_ARG_DST, array}});
    stream.wait();
    return std::all_of(std::begin(numbers), std::end(numbers), [](float x) { return std::isnan(x); });
  };
  static auto* mutex = new std::mutex;
  static auto* known = new std::map<algorithm, bool>;
  std::lock_guard<std::mutex> lock(*mutex);
  auto at = known->find(function);
  if (at == known->end()) at = known->emplace(function, probe()).first;
  return at->second;
}

void AppendActivation(dnnl::post_ops* post, algorithm function, float alpha) {
  if (!KeepsNan(function, alpha)) throw std::runtime_error("oneDNN would lose NaN");
  post->append_eltwise(function, alpha, 0);
}

// Adds the steps after a bias to a primitive's attributes; `like` describes an operand, a vector or as large as the result.
void Append(const Steps& steps, const std::function<memory::desc(Type, bool)>& like, dnnl::primitive_attr* attributes,
            std::vector<std::pair<int, memory::desc>>* arguments) {
  dnnl::post_ops post;
  size_t operand = steps.HasBias() ? 1 : 0;
  for (int64_t i = operand; i < steps.codes.size; ++i) {
    switch (steps.codes.data[i]) {
      case kGelu: AppendActivation(&post, algorithm::eltwise_gelu_erf, 0); break;
      case kGeluTanh: AppendActivation(&post, algorithm::eltwise_gelu_tanh, 0); break;
      case kSilu: AppendActivation(&post, algorithm::eltwise_swish, 1); break;
      case kTanh: AppendActivation(&post, algorithm::eltwise_tanh, 0); break;
      case kLogistic: AppendActivation(&post, algorithm::eltwise_logistic, 0); break;
      case kAdd:
      case kMultiply:
      case kScale:
      case kShift: {
        const int64_t code = steps.codes.data[i];
        const memory::desc desc = like(steps.types.at(operand++), Steps::TakesVector(code));
        const bool adds = code == kAdd || code == kShift;
        const int name = DNNL_ARG_ATTR_MULTIPLE_POST_OP(post.len()) | DNNL_ARG_SRC_1;
        post.append_binary(adds ? algorithm::binary_add : algorithm::binary_mul, desc);
        arguments->emplace_back(name, desc);
        break;
      }
      default: throw std::runtime_error("a step that is not known");
    }
  }
  attributes->set_post_ops(post);
  attributes->set_scratchpad_mode(dnnl::scratchpad_mode::user);
}

// Throws where `Finish` cannot compute steps: a further activation, or sums that bf16 would round once more than asked.
void CheckUnfused(const Steps& steps, Type out) {
  for (int64_t i = 0; i < steps.codes.size; ++i) {
    const int64_t code = steps.codes.data[i];
    if (code != kRelu && (code == kBias || !Steps::TakesOperand(code))) throw std::runtime_error("an activation after a ReLU");
    if (code != kRelu && out != Type::f32) throw std::runtime_error("steps after a ReLU that are rounded in between");
  }
}

template <class T>
void FinishRow(float* y, int64_t columns, int64_t code, const T* operand) {
  if (code == kAdd || code == kShift) {
    for (int64_t j = 0; j < columns; ++j) y[j] += ToFloat(operand[j]);
  } else {
    for (int64_t j = 0; j < columns; ++j) y[j] *= ToFloat(operand[j]);
  }
}

// A part of a result: its first element and column, its size, and the elements from a row to the next.
struct Tile {
  int64_t at, column, rows, columns, leading;
};

// Computes what follows the first ReLU, in place over a tile. NaN stays NaN.
void Finish(const Steps& steps, Type out, const Tile& part, void* tile, void* const* operands) {
  const int64_t rows = part.rows, columns = part.columns, leading = part.leading;
  for (int64_t r = 0; steps.codes.size && r < rows; ++r) {
    size_t operand = 0;
    auto* wide = static_cast<float*>(tile) + r * leading;
    auto* narrow = static_cast<uint16_t*>(tile) + r * leading;
    for (int64_t i = 0; i < steps.codes.size; ++i) {
      const int64_t code = steps.codes.data[i];
      if (code != kRelu) {
        const int64_t at = Steps::TakesVector(code) ? 0 : r * leading;
        const void* array = operands[operand];
        if (steps.types[operand++] == Type::f32) {
          FinishRow(wide, columns, code, static_cast<const float*>(array) + at);
        } else {
          FinishRow(wide, columns, code, static_cast<const uint16_t*>(array) + at);
        }
      } else if (out == Type::f32) {
        for (int64_t j = 0; j < columns; ++j) wide[j] = wide[j] < 0 ? 0 : wide[j];
      } else {  // bf16: from -0.0 to -inf, and no NaN
        for (int64_t j = 0; j < columns; ++j) narrow[j] = narrow[j] >= 0x8000u && narrow[j] <= 0xff80u ? 0 : narrow[j];
      }
    }
  }
}

template <class Description>
Ready Finished(const Description& pd, std::vector<std::pair<int, memory::desc>> arguments) {
  return {dnnl::primitive(pd), std::move(arguments), pd.weights_desc(), pd.scratchpad_desc(), IsPlain(pd)};
}

// Products ----------------------------------------------------------------------------------------------------------

constexpr int64_t kTile = 64;        // columns that packed weights hold together
constexpr int64_t kPackedFor = 128;  // rows of the product that decides how weights are packed

// Packed weights begin at multiples of a cache line.
int64_t Aligned(size_t bytes) { return static_cast<int64_t>((bytes + 63) / 64 * 64); }

struct Product {
  int64_t rows, columns, inner, blocks;
  Type in, out;
  Steps steps;

  // Blocks of columns start at multiples of a tile.
  int64_t Start(int64_t block) const {
    return block == blocks ? columns : std::min(columns, (block * columns / blocks + kTile - 1) / kTile * kTile);
  }
  int64_t Width(int64_t block) const { return Start(block + 1) - Start(block); }

  Ready Make(int64_t height, int64_t width, const memory::desc& weights, const Steps& then) const {
    std::vector<std::pair<int, memory::desc>> arguments = {
        {DNNL_ARG_SRC, RowMajor(height, inner, inner, in)},
        {DNNL_ARG_WEIGHTS, weights},
        {DNNL_ARG_DST, RowMajor(height, width, columns, out)},
    };
    const memory::desc source = arguments[0].second, result = arguments[2].second;
    memory::desc bias;
    if (then.HasBias()) {
      bias = RowMajor(1, width, width, then.types[0]);
      arguments.emplace_back(DNNL_ARG_BIAS, bias);
    }
    dnnl::primitive_attr attributes;
    const auto like = [&](Type type, bool is_vector) {
      return is_vector ? RowMajor(1, width, width, type) : RowMajor(height, width, columns, type);
    };
    Append(then, like, &attributes, &arguments);
    return Finished(dnnl::matmul::primitive_desc(Engine(), source, weights, bias, result, attributes), arguments);
  }

  const Ready& Packing(int64_t width) const {
    return Cached({0, std::min(rows, kPackedFor), width, columns, inner, static_cast<int64_t>(in)}, [&] {
      const memory::desc any({inner, width}, in, memory::format_tag::any);
      return Make(std::min(rows, kPackedFor), width, any, Steps{{nullptr, 0}, {}});
    });
  }

  const Ready& For(int64_t height, int64_t width) const {
    Key key = {1, height, width, columns, inner, std::min(rows, kPackedFor), static_cast<int64_t>(in),
               static_cast<int64_t>(out)};
    const Steps fused = steps.Fused();
    fused.Describe(&key);
    const memory::desc weights = Packing(width).weights;
    return Cached(key, [&] { return Make(height, width, weights, fused); });
  }

  int64_t Bytes(int64_t block) const { return Width(block) ? Aligned(Packing(Width(block)).weights.get_size()) : 0; }
};

constexpr int64_t kProductSizes = 4;

Product ProductOf(Span sizes, Type in, Type out, Steps steps) {
  if (sizes.size != kProductSizes) throw std::runtime_error("sizes that are not a product's");
  const int64_t* s = sizes.data;
  return {s[0], s[1], s[2], s[3], in, in == Type::s8 ? Type::s32 : out, std::move(steps)};
}

// Calls -------------------------------------------------------------------------------------------------------------

struct Operands {
  char *x, *weights, *y;
  std::vector<char*> further;
  std::vector<Type> types;

  // Where the steps' operands are read from: vectors at a place of their own.
  std::vector<void*> At(int64_t at, int64_t vectors_at, const Steps& steps) const {
    std::vector<void*> found;
    for (int64_t i = 0; i < steps.codes.size; ++i) {
      const int64_t code = steps.codes.data[i], place = static_cast<int64_t>(found.size());
      if (!Steps::TakesOperand(code)) continue;
      found.push_back(further.at(place) + (Steps::TakesVector(code) ? vectors_at : at) * Size(types[place]));
    }
    return found;
  }
};

Operands Read(const XLA_FFI_CallFrame* frame) {
  Operands found{static_cast<char*>(Argument(frame, 0)->data), static_cast<char*>(Argument(frame, 1)->data),
                 static_cast<char*>(Result(frame, 0)->data), {}, {}};
  int64_t count = frame->args.size;
  if (const Span stride = Attribute(frame->attrs, "stride"); stride.size == 1) {
    found.weights += *static_cast<int32_t*>(Argument(frame, --count)->data) * stride.data[0];
  }
  for (int64_t i = 2; i < count; ++i) {
    found.further.push_back(static_cast<char*>(Argument(frame, i)->data));
    found.types.push_back(TypeOf(Argument(frame, i)));
  }
  return found;
}

int64_t UsefulThreads(const XLA_FFI_CallFrame* frame, int64_t flops) {
  // Waking a thread may take as long as some MFLOP on this one.
  return std::min(kpx::Threads(frame), std::max<int64_t>(1, flops >> 21));
}

}  // namespace

#endif  // KPX_KERNELS_ONEDNN_PRODUCT_H_
