// Attention: for some queries of a head at a time, whose scores stay in the caches.
//
// Attributes of kpx_onednn_attention(query, key, value[, mask]), arrays of int64:
//   sizes: batch, heads, heads of keys, queries, keys, size, size of values;
//   query, key, value, out, mask: strides in elements, of the batch, of heads, of rows (and, a mask's, of columns);
//   numbers: the bits of two f64: the scale, and the score of what bools hide; then 1 where attention is causal.

#ifndef KPX_KERNELS_ONEDNN_ATTENTION_H_
#define KPX_KERNELS_ONEDNN_ATTENTION_H_

#include <cmath>
#include <limits>

#include "onednn.h"

namespace {

constexpr int64_t kScores = 128 << 10;  // f32 numbers: half of a usual core's second cache

// e to the x within 2 ulps for x not above 0; what is below the least normal number is 0.
inline float Exp(float x) {
  const float bounded = x < -87.f ? -87.f : x;
  const float whole = std::nearbyint(bounded * 1.44269504f);
  const float r = std::fma(whole, 2.12194440e-4f, std::fma(whole, -0.693359375f, bounded));
  float y = 1.98412698e-4f;
  y = std::fma(y, r, 1.38888889e-3f);
  y = std::fma(y, r, 8.33333333e-3f);
  y = std::fma(y, r, 4.16666667e-2f);
  y = std::fma(y, r, 1.66666667e-1f);
  y = std::fma(y, r, 0.5f);
  y = std::fma(y, r, 1.f);
  y = std::fma(y, r, 1.f);
  const int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  const float found = x < -87.f ? 0.f : y * power;
  return x != x ? x : found;
}

struct Attention {
  int64_t batch, heads, kv_heads, length, keys, size, value_size;
  Span query, key, value, out, mask;
  double scale, low;
  bool causal;
  Type type;

  memory::desc Rows(int64_t rows, int64_t columns, int64_t stride) const { return RowMajor(rows, columns, stride, type); }

  // Scores of some queries and the first keys, and from those what is read of the values.
  const Ready& Scores(int64_t rows, int64_t seen) const {
    return Cached({4, rows, seen, size, query.data[2], key.data[2], static_cast<int64_t>(type)}, [&] {
      return Plain(Rows(rows, size, query.data[2]), {{size, seen}, type, memory::dims{1, key.data[2]}},
                   RowMajor(rows, seen, seen, Type::f32));
    });
  }
  const Ready& Values(int64_t rows, int64_t seen) const {
    return Cached({5, rows, seen, value_size, value.data[2], out.data[2], static_cast<int64_t>(type)}, [&] {
      return Plain(Rows(rows, seen, seen), Rows(seen, value_size, value.data[2]), Rows(rows, value_size, out.data[2]));
    });
  }

  static Ready Plain(const memory::desc& a, const memory::desc& b, const memory::desc& c) {
    dnnl::primitive_attr attributes;
    attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    const dnnl::matmul::primitive_desc pd(Engine(), a, b, c, attributes);
    return {dnnl::primitive(pd), {{DNNL_ARG_SRC, a}, {DNNL_ARG_WEIGHTS, b}, {DNNL_ARG_DST, c}}, b, pd.scratchpad_desc()};
  }
};

// What a mask makes of a row of scores, which are scaled before; gives the largest.
template <class T>
float Masked(float* row, int64_t count, float scale, const T* mask, int64_t stride, float low) {
  float most = std::numeric_limits<float>::lowest();
  bool has_nan = false;
  const auto one = [&](int64_t j, T given) {
    float score = row[j] * scale;
    if constexpr (std::is_same_v<T, bool>) {
      score = given ? score : low;
    } else if constexpr (std::is_same_v<T, uint16_t>) {
      const uint32_t bits = static_cast<uint32_t>(given) << 16;
      float wide;
      std::memcpy(&wide, &bits, 4);
      score += wide;
    } else {
      score += given;
    }
    row[j] = score;
    has_nan |= score != score;
    return score;
  };
  if (stride == 1) {
#pragma omp simd reduction(max : most) reduction(| : has_nan)
    for (int64_t j = 0; j < count; ++j) most = std::max(most, one(j, mask[j]));
  } else {
#pragma omp simd reduction(max : most) reduction(| : has_nan)
    for (int64_t j = 0; j < count; ++j) most = std::max(most, one(j, mask[0]));
  }
  return has_nan ? std::numeric_limits<float>::quiet_NaN() : most;
}

inline float Scaled(float* row, int64_t count, float scale) {
  float most = std::numeric_limits<float>::lowest();
  bool has_nan = false;
#pragma omp simd reduction(max : most) reduction(| : has_nan)
  for (int64_t j = 0; j < count; ++j) {
    const float score = row[j] * scale;
    row[j] = score;
    has_nan |= score != score;
    most = std::max(most, score);
  }
  return has_nan ? std::numeric_limits<float>::quiet_NaN() : most;
}

// A row of scores becomes weights; zeros where nothing is seen.
inline void Softmax(float* row, int64_t count, float most) {
  float total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < count; ++j) {
    const float weight = Exp(row[j] - most);
    row[j] = weight;
    total += weight;
  }
  const float factor = total == 0 ? 1.f : 1.f / total;
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) row[j] *= factor;
}

inline void Narrow(const float* from, uint16_t* to, int64_t count) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    uint32_t bits;
    std::memcpy(&bits, from + j, 4);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to[j] = static_cast<uint16_t>(from[j] != from[j] ? 0x7fc0u : rounded);
  }
}

void Attend(XLA_FFI_CallFrame* frame) {
  const auto attribute = [&](const char* name) { return Attribute(frame->attrs, name); };
  const Span sizes = attribute("sizes"), numbers = attribute("numbers");
  if (sizes.size != 7 || numbers.size != 3) throw std::runtime_error("attributes that are not attention's");
  const int64_t* s = sizes.data;
  Attention a{s[0], s[1], s[2], s[3], s[4], s[5], s[6], attribute("query"), attribute("key"), attribute("value"),
              attribute("out"), attribute("mask"), 0, 0, numbers.data[2] != 0, TypeOf(Argument(frame, 0))};
  std::memcpy(&a.scale, numbers.data, 8);
  std::memcpy(&a.low, numbers.data + 1, 8);
  const int64_t most_rows = std::max<int64_t>(16, kScores / a.keys / 16 * 16);
  const int64_t cuts = (a.length + most_rows - 1) / most_rows;
  const int64_t height = a.length <= 16 ? a.length : std::min(a.length, ((a.length + cuts - 1) / cuts + 15) / 16 * 16);
  const int64_t bands = (a.length + height - 1) / height, heads = a.batch * a.heads;
  const auto data = [&](int64_t i) { return static_cast<char*>(Argument(frame, i)->data); };
  char* result = static_cast<char*>(Result(frame, 0)->data);
  const XLA_FFI_DataType mask_type = frame->args.size > 3 ? Argument(frame, 3)->dtype : XLA_FFI_DataType_INVALID;
  const int64_t flops = 2 * heads * a.length * a.keys * (a.size + a.value_size);
  const int64_t threads = std::min(kpx::Threads(frame), std::max<int64_t>(1, flops >> 21));
  const auto seen_by = [&](int64_t last) { return a.causal ? std::min(a.keys, last) : a.keys; };
  std::vector<std::pair<const Ready*, const Ready*>> products;  // by band
  for (int64_t first = 0; first < a.length; first += height) {
    const int64_t rows = std::min(height, a.length - first);
    products.emplace_back(&a.Scores(rows, seen_by(first + rows)), &a.Values(rows, seen_by(first + rows)));
  }
  kpx::Tasks::Run(frame, heads * bands, threads, [&](int64_t task) {
    thread_local auto* scores = new std::vector<float>;
    thread_local auto* narrow = new std::vector<uint16_t>;
    const int64_t head = task / bands % a.heads, batch = task / bands / a.heads, first = task % bands * height;
    const int64_t kv_head = head / (a.heads / a.kv_heads), rows = std::min(height, a.length - first);
    const int64_t seen = seen_by(first + rows), width = Size(a.type);
    const auto at = [&](const Span& strides, int64_t h, int64_t row) {
      return batch * strides.data[0] + h * strides.data[1] + row * strides.data[2];
    };
    if (static_cast<int64_t>(scores->size()) < rows * seen) scores->resize(rows * seen);
    OneThread one;
    const auto [scoring, reading] = products[task % bands];
    Execute(*scoring, {data(0) + at(a.query, head, first) * width, data(1) + at(a.key, kv_head, 0) * width,
                       scores->data()});
    for (int64_t i = 0; i < rows; ++i) {
      float* row = scores->data() + i * seen;
      const int64_t count = a.causal ? std::min(seen, first + i + 1) : seen;
      const float scale = static_cast<float>(a.scale), low = static_cast<float>(a.low);
      float most;
      if (mask_type == XLA_FFI_DataType_INVALID) {
        most = Scaled(row, count, scale);
      } else {
        const char* mask = data(3);
        const int64_t start = at(a.mask, head, first + i), stride = a.mask.data[3];
        if (mask_type == XLA_FFI_DataType_PRED) {
          most = Masked(row, count, scale, reinterpret_cast<const bool*>(mask) + start, stride, low);
        } else if (mask_type == XLA_FFI_DataType_BF16) {
          most = Masked(row, count, scale, reinterpret_cast<const uint16_t*>(mask) + start, stride, low);
        } else {
          most = Masked(row, count, scale, reinterpret_cast<const float*>(mask) + start, stride, low);
        }
      }
      Softmax(row, count, most);
      std::fill(row + count, row + seen, 0.f);
    }
    void* weights = scores->data();
    if (a.type == Type::bf16) {
      if (static_cast<int64_t>(narrow->size()) < rows * seen) narrow->resize(rows * seen);
      Narrow(scores->data(), narrow->data(), rows * seen);
      weights = narrow->data();
    }
    Execute(*reading, {weights, data(2) + at(a.value, kv_head, 0) * width, result + at(a.out, head, first) * width});
  });
}

}  // namespace

#endif  // KPX_KERNELS_ONEDNN_ATTENTION_H_
