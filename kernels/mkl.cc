// Matrix products by Intel MKL as XLA custom calls (typed FFI), on the threads that XLA runs everything else on.
//
// One product is batch x (m, k) x (k, n) -> (m, n), every operand strided. Attributes, arrays of int64:
//   sizes: m, n, k, then the batch dimensions;
//   lhs, rhs: 1 where the matrix is stored transposed, its leading dimension, then a stride for each batch dimension;
//   out: the leading dimension, then the batch strides. Strides count elements.
//   epilogue, which may be absent: 1 where an operand more is a vector to add to each row, 1 where the last
//   operand is an array to add that lies as the result does, 1 where negative numbers then become 0.

#include <memory>
#include <vector>

#include "ffi.h"

namespace {

using kpx::Attribute;
using kpx::Fail;
using kpx::Span;

using Sgemm = void (*)(const char*, const char*, const int*, const int*, const int*, const float*, const float*,
                       const int*, const float*, const int*, const float*, float*, const int*);
using GemmBf16 = void (*)(int, int, int, int, int, int, float, const uint16_t*, int, const uint16_t*, int, float,
                          float*, int);
using SetThreads = int (*)(int);

Sgemm sgemm;
GemmBf16 gemm_bf16;
SetThreads set_threads;

constexpr int kRowMajor = 101, kPlain = 111, kTransposed = 112;
constexpr int64_t kSums = 1 << 20;  // f32 numbers: four megabytes

enum class Kind { kF32, kBf16, kF32AsThreeBf16 };

struct Operand {
  int64_t transposed = 0, leading = 0;
  const int64_t* batch_strides = nullptr;
  // Where row i or column j of the matrix starts, in elements.
  int64_t row(int64_t i) const { return transposed ? i : i * leading; }
  int64_t column(int64_t j) const { return transposed ? j * leading : j; }
};

inline uint32_t Bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float Float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline bool Finite(float x) { return (Bits(x) & 0x7f800000u) != 0x7f800000u; }

// The upper 16 bits of a number, rounded to nearest even, and of what is left. Infinities and NaN leave nothing.
inline void Split(float x, uint16_t* high, uint16_t* low) {
  const uint32_t bits = Bits(x);
  const bool finite = Finite(x);
  const uint32_t rounded = finite ? bits + 0x7fffu + ((bits >> 16) & 1u) : bits | ((bits & 0x7fffffu) ? 0x400000u : 0u);
  *high = static_cast<uint16_t>(rounded >> 16);
  const float rest = x - Float(rounded & 0xffff0000u);
  const uint32_t rest_bits = Bits(rest);
  *low = finite ? static_cast<uint16_t>((rest_bits + 0x7fffu + ((rest_bits >> 16) & 1u)) >> 16) : 0;
}

// One product, cut into tasks.
struct Product {
  Kind kind;
  int64_t m, n, k;
  std::vector<int64_t> batch;
  Operand lhs, rhs, out;
  const char *a, *b, *b_low = nullptr;
  float* c;
  const float *bias = nullptr, *addend = nullptr;
  bool relu = false;
  int64_t row_blocks = 1, column_blocks = 1, units = 1, tasks = 1;

  void RunTask(int64_t task) const {
    const int before = set_threads(1);
    for (int64_t unit = task * units / tasks; unit < (task + 1) * units / tasks; ++unit) RunUnit(unit);
    set_threads(before);
  }

  void RunUnit(int64_t unit) const {
    const int64_t column_block = unit % column_blocks, row_block = unit / column_blocks % row_blocks;
    int64_t index = unit / column_blocks / row_blocks, at_a = 0, at_b = 0, at_c = 0;
    for (int64_t d = static_cast<int64_t>(batch.size()) - 1; d >= 0; --d) {
      const int64_t i = index % batch[d];
      index /= batch[d];
      at_a += i * lhs.batch_strides[d];
      at_b += i * rhs.batch_strides[d];
      at_c += i * out.batch_strides[d];
    }
    const int64_t row = Start(row_block, row_blocks, m), rows = Start(row_block + 1, row_blocks, m) - row;
    const int64_t column = Start(column_block, column_blocks, n);
    const int64_t columns = Start(column_block + 1, column_blocks, n) - column;
    if (rows == 0 || columns == 0) return;
    const int64_t at = at_c + row * out.leading + column;
    Multiply(at_a + lhs.row(row), at_b + rhs.column(column), c + at, rows, columns);
    if (HasEpilogue()) Finish(at, column, rows, columns);
  }

  bool HasEpilogue() const { return bias != nullptr || addend != nullptr || relu; }

  // What follows the product. Blocks of rows small enough for the cache were slower: each packs the right operand anew.
  void Finish(int64_t at, int64_t column, int64_t rows, int64_t columns) const {
    for (int64_t i = 0; i < rows; ++i, at += out.leading) {
      float* __restrict row = c + at;
      if (bias != nullptr) {
        for (int64_t j = 0; j < columns; ++j) row[j] += bias[column + j];
      }
      if (addend != nullptr) {
        for (int64_t j = 0; j < columns; ++j) row[j] += addend[at + j];
      }
      if (relu) {
        for (int64_t j = 0; j < columns; ++j) row[j] = row[j] < 0 ? 0 : row[j];  // NaN stays
      }
    }
  }

  // Blocks start at multiples of 16, which the kernels' tiles divide.
  static int64_t Start(int64_t block, int64_t blocks, int64_t size) {
    return block == blocks ? size : std::min(size, (block * size / blocks + 15) / 16 * 16);
  }

  void Multiply(int64_t at_a, int64_t at_b, float* to, int64_t rows, int64_t columns) const {
    if (kind == Kind::kF32) {
      // MKL's Fortran interface is column-major: it computes the transposed product, operands exchanged.
      const int mm = columns, nn = rows, kk = k, lda = rhs.leading, ldb = lhs.leading, ldc = out.leading;
      const float one = 1, zero = 0;
      sgemm(rhs.transposed ? "T" : "N", lhs.transposed ? "T" : "N", &mm, &nn, &kk, &one,
            reinterpret_cast<const float*>(b) + at_b, &lda, reinterpret_cast<const float*>(a) + at_a, &ldb, &zero, to,
            &ldc);
    } else if (kind == Kind::kBf16) {
      Bf16(reinterpret_cast<const uint16_t*>(a) + at_a, lhs.transposed, lhs.leading,
           reinterpret_cast<const uint16_t*>(b) + at_b, 0, to, rows, columns);
    } else {
      InThree(reinterpret_cast<const float*>(a) + at_a, reinterpret_cast<const uint16_t*>(b) + at_b,
              reinterpret_cast<const uint16_t*>(b_low) + at_b, to, rows, columns);
    }
  }

  void Bf16(const uint16_t* x, bool transposed, int64_t leading, const uint16_t* y, float keep, float* to,
            int64_t rows, int64_t columns) const {
    gemm_bf16(kRowMajor, transposed ? kTransposed : kPlain, rhs.transposed ? kTransposed : kPlain, rows, columns, k, 1,
              x, leading, y, rhs.leading, keep, to, out.leading);
  }

  void InThree(const float* x, const uint16_t* high, const uint16_t* low, float* to, int64_t rows,
               int64_t columns) const {
    std::unique_ptr<uint16_t[]> parts(new uint16_t[2 * rows * k]);
    uint16_t *x_high = parts.get(), *x_low = x_high + rows * k;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < k; ++j) Split(x[i * lhs.leading + j], x_high + i * k + j, x_low + i * k + j);
    }
    // A stretch of columns at a time, so that the sums of the three products stay in the cache.
    const int64_t stretch = std::max<int64_t>(256, kSums / rows / 64 * 64);
    for (int64_t j = 0; j < columns; j += stretch) {
      const int64_t width = std::min(stretch, columns - j), at = rhs.column(j);
      Bf16(x_low, false, k, high + at, 0, to + j, rows, width);  // the small parts first
      Bf16(x_high, false, k, low + at, 1, to + j, rows, width);
      for (int64_t i = 0; i < rows; ++i) {  // infinities and NaN come from the product of the high parts alone
        float* row = to + i * out.leading + j;
        for (int64_t c = 0; c < width; ++c) row[c] = Finite(row[c]) ? row[c] : 0;
      }
      Bf16(x_high, false, k, high + at, 1, to + j, rows, width);
    }
  }
};

// Cuts a product so that each thread has work: over the batch where that suffices, else over the longer side.
void Divide(Product* p, int64_t threads) {
  int64_t matrices = 1;
  for (int64_t size : p->batch) matrices *= size;
  // Waking a thread may take as long as some MFLOP on this one.
  const int64_t flops = 2 * matrices * p->m * p->n * p->k;
  const int64_t least = p->kind == Kind::kF32 ? int64_t{1} << 21 : int64_t{1} << 23;
  threads = std::min(threads, std::max<int64_t>(1, flops / least));
  if (threads > 1 && matrices < 2 * threads) {
    const int64_t blocks = (threads + matrices - 1) / matrices;
    (p->m >= p->n ? p->row_blocks : p->column_blocks) = blocks;
  }
  p->units = matrices * p->row_blocks * p->column_blocks;
  p->tasks = std::min(p->units, threads == 1 ? 1 : 2 * threads);
}

XLA_FFI_Error* Run(XLA_FFI_CallFrame* frame, Kind kind) {
  if (kpx::AsksForVersion(frame)) return nullptr;
  const Span epilogue = Attribute(frame->attrs, "epilogue");
  const bool has_bias = epilogue.size == 3 && epilogue.data[0], has_addend = epilogue.size == 3 && epilogue.data[1];
  const int64_t arguments = (kind == Kind::kF32AsThreeBf16 ? 3 : 2) + has_bias + has_addend;
  const Span sizes = Attribute(frame->attrs, "sizes"), lhs = Attribute(frame->attrs, "lhs");
  const Span rhs = Attribute(frame->attrs, "rhs"), out = Attribute(frame->attrs, "out");
  if (frame->args.size != arguments || frame->rets.size != 1 || sizes.size < 3 || lhs.size != sizes.size - 1 ||
      rhs.size != sizes.size - 1 || out.size != sizes.size - 2) {
    return Fail(frame->api, "kpx_matmul: operands or attributes are not those of a product; see kernels/mkl.cc");
  }
  auto data = [&](int64_t i) { return static_cast<char*>(kpx::Argument(frame, i)->data); };
  Product product, *p = &product;
  p->kind = kind;
  p->m = sizes.data[0];
  p->n = sizes.data[1];
  p->k = sizes.data[2];
  p->batch.assign(sizes.data + 3, sizes.data + sizes.size);
  p->lhs = {lhs.data[0], lhs.data[1], lhs.data + 2};
  p->rhs = {rhs.data[0], rhs.data[1], rhs.data + 2};
  p->out = {0, out.data[0], out.data + 1};
  p->a = data(0);
  p->b = data(1);
  if (kind == Kind::kF32AsThreeBf16) p->b_low = data(2);
  if (has_bias) p->bias = reinterpret_cast<float*>(data(arguments - 1 - has_addend));
  if (has_addend) p->addend = reinterpret_cast<float*>(data(arguments - 1));
  p->relu = epilogue.size == 3 && epilogue.data[2];
  p->c = static_cast<float*>(kpx::Result(frame, 0)->data);
  const int64_t threads = kpx::Threads(frame);
  Divide(p, threads);
  kpx::Tasks::Run(frame, p->tasks, threads, [p](int64_t task) { p->RunTask(task); });
  return nullptr;
}

}  // namespace

extern "C" {

void kpx_mkl_bind(void* sgemm_function, void* gemm_bf16_function, void* set_threads_function) {
  sgemm = reinterpret_cast<Sgemm>(sgemm_function);
  gemm_bf16 = reinterpret_cast<GemmBf16>(gemm_bf16_function);
  set_threads = reinterpret_cast<SetThreads>(set_threads_function);
}

XLA_FFI_Error* kpx_matmul_f32(XLA_FFI_CallFrame* frame) { return Run(frame, Kind::kF32); }
XLA_FFI_Error* kpx_matmul_bf16(XLA_FFI_CallFrame* frame) { return Run(frame, Kind::kBf16); }
XLA_FFI_Error* kpx_matmul_f32_as_three_bf16(XLA_FFI_CallFrame* frame) { return Run(frame, Kind::kF32AsThreeBf16); }

}  // extern "C"
