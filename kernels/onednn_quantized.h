// Products of arrays that are quantized as they are read, row by row, by weights that are int8.

#ifndef KPX_KERNELS_ONEDNN_QUANTIZED_H_
#define KPX_KERNELS_ONEDNN_QUANTIZED_H_

#include "onednn_product.h"

namespace {

// A row as int8 in [-127, 127], rounded to nearest even, and what its numbers are to be multiplied by. A row with an
// infinity or a NaN gives NaN; one of zeros, or of numbers so small that 127 over them is no number, gives zeros.
template <class T>
float QuantizeRow(const T* x, int64_t count, int8_t* q) {
  int32_t bits = 0;  // of the largest magnitude: as integers they have the same order, and what is not finite comes last
  for (int64_t i = 0; i < count; ++i) {
    const float v = ToFloat(x[i]);
    int32_t b;
    std::memcpy(&b, &v, sizeof(b));
    bits = std::max(bits, b & 0x7fffffff);
  }
  float most;
  std::memcpy(&most, &bits, sizeof(most));
  const bool finite = std::isfinite(most), usable = finite && most > 0 && std::isfinite(127.0f / most);
  if (!usable) {
    std::memset(q, 0, count);
    return finite ? 0.0f : std::nanf("");
  }
  const float by = 127.0f / most;
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to nearest even
  for (int64_t i = 0; i < count; ++i) {
    q[i] = static_cast<int8_t>(static_cast<int32_t>((ToFloat(x[i]) * by + kMagic) - kMagic));
  }
  return most / 127.0f;
}

// What a thread works in.
struct Workspace {
  std::vector<int8_t> quantized;
  std::vector<float> scales, sums;  // sums first in int32

  static Workspace& Of(int64_t rows, int64_t inner, int64_t width) {
    thread_local auto* mine = new Workspace;
    const auto grow = [](auto& array, int64_t size) {
      if (array.size() < static_cast<size_t>(size)) array.resize(size);
    };
    grow(mine->quantized, rows * inner);
    grow(mine->scales, rows);
    grow(mine->sums, rows * width);
    return *mine;
  }

  void Quantize(const char* x, int64_t rows, int64_t inner, Type type) {
    for (int64_t r = 0; r < rows; ++r) {
      int8_t* q = quantized.data() + r * inner;
      scales[r] = type == Type::f32 ? QuantizeRow(reinterpret_cast<const float*>(x) + r * inner, inner, q)
                                    : QuantizeRow(reinterpret_cast<const uint16_t*>(x) + r * inner, inner, q);
    }
  }

  // The sums multiplied by the scales of their row and column.
  void Scale(int64_t rows, int64_t width, const float* columns, float* result) const {
    for (int64_t r = 0; r < rows; ++r) {
      const int32_t* counted = reinterpret_cast<const int32_t*>(sums.data()) + r * width;
      const float scale = scales[r];
      for (int64_t c = 0; c < width; ++c) {
        result[r * width + c] = static_cast<float>(counted[c]) * (scale * columns[c]);
      }
    }
  }
};

// The steps of rows of sums, into the result: a primitive that begins with the first, or multiplies by one.
const Ready& Finishing(int64_t rows, int64_t columns, Type out, const Steps& steps) {
  Key key = {6, rows, columns, static_cast<int64_t>(out)};
  steps.Describe(&key);
  return Cached(key, [&] {
    const auto like = [&](Type type, bool is_vector) { return RowMajor(is_vector ? 1 : rows, columns, columns, type); };
    const int64_t first = steps.codes.size ? steps.codes.data[0] : 0;
    const bool takes = Steps::TakesOperand(first);
    const bool adds = first == kBias || first == kShift || first == kAdd;
    const memory::desc sums = like(Type::f32, false), result = like(out, false);
    const memory::desc other = takes ? like(steps.types.at(0), Steps::TakesVector(first)) : RowMajor(1, 1, 1, Type::f32);
    std::vector<std::pair<int, memory::desc>> arguments = {
        {DNNL_ARG_SRC_0, sums}, {DNNL_ARG_SRC_1, other}, {DNNL_ARG_DST, result}};
    const Steps rest = {{steps.codes.data + takes, steps.codes.size - takes},
                        {steps.types.begin() + takes, steps.types.end()}};
    dnnl::primitive_attr attributes;
    Append(rest, like, &attributes, &arguments);
    const auto algorithm = adds ? algorithm::binary_add : algorithm::binary_mul;
    const dnnl::binary::primitive_desc pd(Engine(), algorithm, sums, other, result, attributes);
    return Ready{dnnl::primitive(pd), std::move(arguments), {}, pd.scratchpad_desc(), IsPlain(pd)};
  });
}

// A product by int8 weights, of operands that are quantized row by row as they are read.
struct QuantizedProduct {
  Product product;  // of int8, summed in int32
  Type in, out;
  Steps steps;

  // Few rows are cut by columns; else by rows, a band of which stays in a core's cache.
  bool IsCutByColumns() const { return product.blocks > 1; }
  int64_t Band() const { return IsCutByColumns() ? product.rows : std::min<int64_t>(product.rows, 32); }
  const Ready& Counting(int64_t height, int64_t block) const { return product.For(height, product.Width(block)); }
  const Ready& Finisher(int64_t height) const { return Finishing(height, product.columns, out, steps.Fused()); }

  void Write(const Workspace& space, int64_t rows, const float* scales, char* y, const std::vector<void*>& further) const {
    const Steps fused = steps.Fused(), unfused = steps.Unfused();
    const size_t operands = fused.Operands();
    const Tile tile = {0, 0, rows, product.columns, product.columns};
    if (fused.codes.size == 0 && out == Type::f32) {
      space.Scale(rows, product.columns, scales, reinterpret_cast<float*>(y));
      Finish(unfused, out, tile, y, further.data() + operands);
      return;
    }
    float* sums = const_cast<float*>(space.sums.data());
    space.Scale(rows, product.columns, scales, sums);  // where they were counted
    static const float one = 1.0f;
    const bool takes = fused.codes.size && Steps::TakesOperand(fused.codes.data[0]);
    const void* other = takes ? further[0] : static_cast<const void*>(&one);
    Execute(Finisher(rows), {sums, other, y}, {further.begin() + takes, further.begin() + operands});
    Finish(unfused, out, tile, y, further.data() + operands);
  }

  void Run(const XLA_FFI_CallFrame* frame, const Operands& o, const float* scales) const {
    CheckUnfused(steps.Unfused(), out);
    const int64_t rows = product.rows, inner = product.inner, columns = product.columns;
    const int64_t threads = UsefulThreads(frame, rows * columns * inner);
    if (IsCutByColumns()) {
      Workspace& space = Workspace::Of(rows, inner, columns);
      space.Quantize(o.x, rows, inner, in);
      kpx::Tasks::Run(frame, product.blocks, threads, [&](int64_t block) {
        if (!product.Width(block)) return;
        int64_t start = 0;
        for (int64_t b = 0; b < block; ++b) start += product.Bytes(b);
        OneThread one;
        Execute(Counting(rows, block),
                {space.quantized.data(), o.weights + start, space.sums.data() + product.Start(block)});
      });
      OneThread one;
      Write(space, rows, scales, o.y, o.At(0, 0, steps));
      return;
    }
    const int64_t height = Band(), bands = (rows + height - 1) / height;
    kpx::Tasks::Run(frame, bands, threads, [&](int64_t band) {
      const int64_t first = band * height, count = std::min(height, rows - first), at = first * columns;
      Workspace& space = Workspace::Of(height, inner, columns);
      space.Quantize(o.x + first * inner * Size(in), count, inner, in);
      OneThread one;
      Execute(Counting(count, 0), {space.quantized.data(), o.weights, space.sums.data()});
      Write(space, count, scales, o.y + at * Size(out), o.At(at, 0, steps));
    });
  }
};

}  // namespace

#endif  // KPX_KERNELS_ONEDNN_QUANTIZED_H_
