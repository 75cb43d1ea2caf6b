// Products and convolutions with packed weights, and attention, by oneDNN as XLA custom calls (typed FFI), on XLA's own threads: each
// task is a primitive that runs on one.
//
// Weights are packed once, at load, in the order that oneDNN's kernels read:
//   kpx_onednn_pack(weights) -> bytes, with the attributes `sizes` and `layout` of the call that reads them.
//   kpx_onednn_quantized(x, packed, scales of columns, operands of steps...): weights are int8, x is quantized row by row.
// Attributes, arrays of int64:
//   sizes of a product: rows, columns, inner size, and into how many blocks of columns it is cut for packing;
//   sizes of a convolution, channels last: batch, height, width, channels, the kernel's height and width, channels out,
//     height and width out, strides, padding at the top and left, dilations, groups;
//   layout: 1 where a product's weights are stored transposed, that is as columns x inner size;
//   steps: what follows, in order (see Step), each that has an operand taking the next one;
//   stride: where weights of several layers lie behind each other, the bytes of one layer's. The last operand is then the
//     layer's number (s32).

#include "onednn_attention.h"
#include "onednn_product.h"
#include "onednn_quantized.h"

namespace {

// Convolutions ------------------------------------------------------------------------------------------------------

struct Convolution {
  int64_t batch, height, width, channels, kernel_height, kernel_width, channels_out, height_out, width_out, stride_y,
      stride_x, top, left, dilation_y, dilation_x, groups;
  Type in, out;
  Steps steps;

  memory::dims KernelDims() const {
    memory::dims dims = {channels_out / groups, channels / groups, kernel_height, kernel_width};
    if (groups > 1) dims.insert(dims.begin(), groups);
    return dims;
  }

  // Of weights that are stored as height x width x channels of a group x channels out.
  memory::desc Plain() const {
    const int64_t row = channels / groups * channels_out;
    memory::dims strides = {1, channels_out, kernel_width * row, row};
    if (groups > 1) strides.insert(strides.begin(), channels_out / groups);
    return {KernelDims(), in, strides};
  }

  static memory::desc ChannelsLast(int64_t n, int64_t c, int64_t h, int64_t w, Type type) {
    return {{n, c, h, w}, type, memory::format_tag::nhwc};
  }

  // The rows that rows [from, to) of the result read.
  std::pair<int64_t, int64_t> Reads(int64_t from, int64_t to) const {
    const int64_t first = from * stride_y - top, last = (to - 1) * stride_y - top + (kernel_height - 1) * dilation_y + 1;
    return {first, last};
  }

  Ready Make(int64_t images, int64_t from, int64_t to, const memory::desc& weights, const Steps& then) const {
    const auto [first, last] = Reads(from, to);
    // A whole image has the rows that no window reads, too: the next one lies after them.
    const bool whole = from == 0 && to == height_out;
    const int64_t rows = whole ? height : std::min(last, height) - std::max<int64_t>(first, 0);
    const int64_t right = (width_out - 1) * stride_x - left + (kernel_width - 1) * dilation_x + 1 - width;
    std::vector<std::pair<int, memory::desc>> arguments = {
        {DNNL_ARG_SRC, ChannelsLast(images, channels, rows, width, in)},
        {DNNL_ARG_WEIGHTS, weights},
        {DNNL_ARG_DST, ChannelsLast(images, channels_out, to - from, width_out, out)},
    };
    const memory::desc source = arguments[0].second, result = arguments[2].second;
    memory::desc bias;
    if (then.HasBias()) {
      bias = memory::desc({channels_out}, then.types[0], memory::format_tag::a);
      arguments.emplace_back(DNNL_ARG_BIAS, bias);
    }
    dnnl::primitive_attr attributes;
    const auto like = [&](Type type, bool is_vector) {
      return is_vector ? ChannelsLast(1, channels_out, 1, 1, type)
                       : ChannelsLast(images, channels_out, to - from, width_out, type);
    };
    Append(then, like, &attributes, &arguments);
    const memory::dims before = {std::max<int64_t>(-first, 0), left}, after = {std::max<int64_t>(last - height, 0), std::max<int64_t>(right, 0)};
    const auto pd = dnnl::convolution_forward::primitive_desc(
        Engine(), dnnl::prop_kind::forward_inference, algorithm::convolution_direct, source, weights, bias, result,
        {stride_y, stride_x}, {dilation_y - 1, dilation_x - 1}, before, after, attributes);
    return Finished(pd, arguments);
  }

  Key Base(int64_t kind) const {
    return {kind, height, width, channels, kernel_height, kernel_width, channels_out, height_out, width_out, stride_y,
            stride_x, top, left, dilation_y, dilation_x, groups, static_cast<int64_t>(in), static_cast<int64_t>(out)};
  }

  const Ready& Packing() const {
    return Cached(Base(2), [&] {
      return Make(1, 0, height_out, memory::desc(KernelDims(), in, memory::format_tag::any), Steps{{nullptr, 0}, {}});
    });
  }

  const Ready& For(int64_t images, int64_t from, int64_t to) const {
    // Rows in the middle are alike, wherever they lie.
    const auto [first, last] = Reads(from, to);
    Key key = Base(3);
    key.insert(key.end(), {images, to - from, std::max<int64_t>(-first, 0), std::max<int64_t>(last - height, 0),
                           from == 0 && to == height_out});
    const Steps fused = steps.Fused();
    fused.Describe(&key);
    const memory::desc weights = Packing().weights;
    return Cached(key, [&] { return Make(images, from, to, weights, fused); });
  }
};

// Calls -------------------------------------------------------------------------------------------------------------

Convolution ConvolutionOf(Span sizes, Type in, Type out, Steps steps) {
  if (sizes.size != 16) throw std::runtime_error("sizes that are not a convolution's");
  const int64_t* s = sizes.data;
  return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11], s[12], s[13], s[14], s[15],
          in, out, std::move(steps)};
}

void Reorder(const memory::desc& from, const void* data, const memory::desc& to, void* result) {
  OneThread one;
  memory source(from, Engine(), const_cast<void*>(data)), target(to, Engine(), result);
  dnnl::stream stream(Engine());
  dnnl::reorder(source, target).execute(stream, source, target);
  stream.wait();
}

void Pack(XLA_FFI_CallFrame* frame) {
  const Span sizes = Attribute(frame->attrs, "sizes"), layout = Attribute(frame->attrs, "layout");
  const Type type = TypeOf(Argument(frame, 0));
  const char* weights = static_cast<char*>(Argument(frame, 0)->data);
  char* packed = static_cast<char*>(Result(frame, 0)->data);
  if (sizes.size != kProductSizes) {
    const Convolution c = ConvolutionOf(sizes, type, type, {});
    Reorder(c.Plain(), weights, c.Packing().weights, packed);
    return;
  }
  const Product p = ProductOf(sizes, type, type, {});
  const bool transposed = layout.size == 1 && layout.data[0];
  for (int64_t block = 0; block < p.blocks; ++block) {
    if (!p.Width(block)) continue;
    const int64_t at = p.Start(block) * (transposed ? p.inner : 1) * Size(type);
    const memory::dims strides = transposed ? memory::dims{1, p.inner} : memory::dims{p.columns, 1};
    Reorder({{p.inner, p.Width(block)}, type, strides}, weights + at, p.Packing(p.Width(block)).weights, packed);
    packed += p.Bytes(block);
  }
}

// Runs a primitive over a tile of the result, and the steps that it leaves.
void Run(const Ready& ready, const char* x, const char* weights, const Operands& o, const Steps& steps, Type out,
         const Tile& tile) {
  const std::vector<void*> operands = o.At(tile.at, tile.column, steps);
  const size_t fused = steps.Fused().Operands();
  char* y = o.y + tile.at * Size(out);
  Execute(ready, {x, weights, y}, {operands.begin(), operands.begin() + fused});
  Finish(steps.Unfused(), out, tile, y, operands.data() + fused);
}

void Multiply(XLA_FFI_CallFrame* frame) {
  const Operands o = Read(frame);
  const Product p = ProductOf(Attribute(frame->attrs, "sizes"), TypeOf(Argument(frame, 0)), TypeOf(Result(frame, 0)),
                              {Attribute(frame->attrs, "steps"), o.types});
  CheckUnfused(p.steps.Unfused(), p.out);
  const int64_t threads = UsefulThreads(frame, 2 * p.rows * p.columns * p.inner);
  // More tasks than threads, since a thread may be slower than another or come late, but none of few rows.
  const int64_t wanted = threads == 1 ? 1 : (2 * threads + p.blocks - 1) / p.blocks;
  const int64_t cuts = std::max<int64_t>(1, std::min(wanted, p.rows / 32));
  const int64_t height = ((p.rows + cuts - 1) / cuts + 15) / 16 * 16;
  const int64_t bands = (p.rows + height - 1) / height;
  std::vector<int64_t> starts = {0};
  for (int64_t block = 0; block < p.blocks; ++block) starts.push_back(starts.back() + p.Bytes(block));
  std::vector<const Ready*> whole, rest;  // by block of columns: for whole bands, and for the last
  for (int64_t block = 0; block < p.blocks; ++block) {
    whole.push_back(p.Width(block) ? &p.For(std::min(height, p.rows), p.Width(block)) : nullptr);
    rest.push_back(p.Width(block) ? &p.For(p.rows - (bands - 1) * height, p.Width(block)) : nullptr);
  }
  kpx::Tasks::Run(frame, bands * p.blocks, threads, [&](int64_t task) {
    const int64_t block = task % p.blocks, band = task / p.blocks, row = band * height, column = p.Start(block);
    const Ready* ready = band == bands - 1 ? rest[block] : whole[block];
    if (ready == nullptr) return;
    const int64_t at = row * p.columns + column, rows = std::min(height, p.rows - row);
    OneThread one;
    Run(*ready, o.x + row * p.inner * Size(p.in), o.weights + starts[block], o, p.steps, p.out,
        {at, column, rows, p.Width(block), p.columns});
  });
}

void MultiplyQuantized(XLA_FFI_CallFrame* frame) {
  Operands o = Read(frame);
  const float* scales = reinterpret_cast<const float*>(o.further.at(0));
  o.further.erase(o.further.begin());
  o.types.erase(o.types.begin());
  const QuantizedProduct p = {ProductOf(Attribute(frame->attrs, "sizes"), Type::s8, Type::s32, {}),
                              TypeOf(Argument(frame, 0)), TypeOf(Result(frame, 0)),
                              {Attribute(frame->attrs, "steps"), o.types}};
  p.Run(frame, o, scales);
}

void Convolve(XLA_FFI_CallFrame* frame) {
  const Operands o = Read(frame);
  const Convolution c = ConvolutionOf(Attribute(frame->attrs, "sizes"), TypeOf(Argument(frame, 0)),
                                      TypeOf(Result(frame, 0)), {Attribute(frame->attrs, "steps"), o.types});
  CheckUnfused(c.steps.Unfused(), c.out);
  const int64_t points = c.batch * c.height_out * c.width_out;
  const int64_t flops = 2 * points * c.channels_out * c.channels / c.groups * c.kernel_height * c.kernel_width;
  const int64_t threads = UsefulThreads(frame, flops);
  const int64_t images = std::max<int64_t>(1, c.batch / threads);
  const int64_t parts = (c.batch + images - 1) / images;
  const int64_t cuts = parts >= threads ? 1 : std::min((threads + parts - 1) / parts, c.height_out);
  int64_t rows = (c.height_out + cuts - 1) / cuts;
  // A band of few rows that are mostly padding may have but a plain loop: it is computed with the others.
  for (int64_t from = 0; rows < c.height_out && from < c.height_out; from += rows) {
    if (c.For(1, from, std::min(from + rows, c.height_out)).is_plain) rows = c.height_out;
  }
  const int64_t bands = (c.height_out + rows - 1) / rows;
  kpx::Tasks::Run(frame, parts * bands, threads, [&](int64_t task) {
    const int64_t image = task / bands * images, from = task % bands * rows, to = std::min(from + rows, c.height_out);
    const int64_t count = std::min(images, c.batch - image);
    const int64_t first = std::max<int64_t>(c.Reads(from, to).first, 0);
    OneThread one;
    const bool together = bands == 1;  // else rows of several images do not lie together
    const Ready& ready = c.For(together ? count : 1, from, to);
    for (int64_t i = 0; i < (together ? 1 : count); ++i) {
      const int64_t read = ((image + i) * c.height + first) * c.width * c.channels;
      const int64_t written = ((image + i) * c.height_out + from) * c.width_out * c.channels_out;
      const int64_t points = (together ? count : 1) * (to - from) * c.width_out;
      Run(ready, o.x + read * Size(c.in), o.weights, o, c.steps, c.out,
          {written, 0, points, c.channels_out, c.channels_out});
    }
  });
}

XLA_FFI_Error* Call(XLA_FFI_CallFrame* frame, void (*run)(XLA_FFI_CallFrame*)) {
  if (kpx::AsksForVersion(frame)) return nullptr;
  try {
    run(frame);
    return nullptr;
  } catch (const std::exception& error) {
    return Fail(frame->api, error.what());
  }
}

}  // namespace

extern "C" {

XLA_FFI_Error* kpx_onednn_pack(XLA_FFI_CallFrame* frame) { return Call(frame, Pack); }
XLA_FFI_Error* kpx_onednn_matmul(XLA_FFI_CallFrame* frame) { return Call(frame, Multiply); }
XLA_FFI_Error* kpx_onednn_quantized(XLA_FFI_CallFrame* frame) { return Call(frame, MultiplyQuantized); }
XLA_FFI_Error* kpx_onednn_conv(XLA_FFI_CallFrame* frame) { return Call(frame, Convolve); }
XLA_FFI_Error* kpx_onednn_attention(XLA_FFI_CallFrame* frame) { return Call(frame, Attend); }

// The bytes that packed weights take, or -1 where oneDNN does not compute such a product or convolution.
// Types are of the operand, the result, then of the steps' operands: 1 for bf16, 0 for f32; and by int8 weights, with the
// operand quantized, where `quantized` is not 0.
int64_t kpx_onednn_bytes(const int64_t* sizes, int64_t count, const int64_t* steps, int64_t steps_count,
                         const int64_t* types, int64_t types_count, int64_t quantized) {
  const auto type = [&](int64_t i) { return types[i] ? Type::bf16 : Type::f32; };
  Steps then{{steps, steps_count}, {}};
  for (int64_t i = 2; i < types_count; ++i) then.types.push_back(type(i));
  try {
    CheckUnfused(then.Unfused(), type(1));
    if (count != kProductSizes) {
      const Convolution c = ConvolutionOf({sizes, count}, type(0), type(1), then);
      if (c.For(c.batch, 0, c.height_out).is_plain || c.For(1, 0, c.height_out).is_plain || c.Packing().is_plain) return -1;
      return Aligned(c.Packing().weights.get_size());
    }
    const Product p = quantized ? ProductOf({sizes, count}, Type::s8, Type::s32, {})
                                : ProductOf({sizes, count}, type(0), type(1), then);
    if (quantized) {
      const QuantizedProduct q = {p, type(0), type(1), then};
      if (q.Finisher(q.Band()).is_plain) return -1;
    }
    int64_t bytes = 0;
    for (int64_t block = 0; block < p.blocks; ++block) {
      if (!p.Width(block)) continue;
      const int64_t width = p.Width(block);
      if (p.For(std::min(p.rows, kPackedFor), width).is_plain || p.Packing(width).is_plain) return -1;
      bytes += p.Bytes(block);
    }
    return bytes;
  } catch (const std::exception&) {
    return -1;
  }
}

}  // extern "C"
