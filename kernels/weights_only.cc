// Products of few rows by weights that are kept in bf16, int8 or int4 and widened as they are read, as an XLA custom call
// (typed FFI) on XLA's own threads. Such a product waits for memory: what it reads is a half, a quarter or an eighth of f32's.
//
//   kpx_weights_only(x, weights, scales) -> f32 [rows, columns]
//     x: f32 or bf16 [rows, inner]; scales: f32 [columns, groups], and none of bf16 weights.
//     weights: of 16 bits, bf16 [columns, inner]; of 8, int8 [columns, inner]; of 4, bytes [columns, inner / 2]: a group's first half in the lower four
//       bits, its second half in the upper four, each number plus 8.
// Attribute `sizes`, an array of int64: rows, columns, inner size, bits, and how many numbers of a column share a scale.

#include <stdexcept>
#include <vector>

#include "ffi.h"

namespace {

using kpx::Argument;
using kpx::Attribute;
using kpx::Fail;
using kpx::Result;
using kpx::Span;

float Dot16(const uint16_t* w, const float* x, int64_t count) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(w[i]) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof(wide));
    sum += wide * x[i];
  }
  return sum;
}

float Dot8(const int8_t* w, const float* x, int64_t count) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += static_cast<float>(w[i]) * x[i];
  return sum;
}

constexpr int64_t kHalf = 16;  // numbers of half a group of int4

// A column's groups, each number of a half in a lane of its own, so that sums are added up once.
float Dot4(const uint8_t* w, const float* x, const float* scales, int64_t groups) {
  float lanes[kHalf] = {};
  for (int64_t g = 0; g < groups; ++g) {
    const float scale = scales[g];
#pragma omp simd
    for (int64_t i = 0; i < kHalf; ++i) {
      const int32_t both = w[g * kHalf + i];
      const float low = static_cast<float>((both & 15) - 8), high = static_cast<float>((both >> 4) - 8);
      lanes[i] += scale * (low * x[2 * g * kHalf + i] + high * x[(2 * g + 1) * kHalf + i]);
    }
  }
  float sum = 0;
  for (float lane : lanes) sum += lane;
  return sum;
}

// A bf16 array as f32.
void Widen(const uint16_t* x, int64_t count, float* wide) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(x[i]) << 16;
    std::memcpy(wide + i, &bits, sizeof(bits));
  }
}

constexpr int64_t kTask = 32;  // columns

void Multiply(XLA_FFI_CallFrame* frame) {
  const Span sizes = Attribute(frame->attrs, "sizes");
  if (sizes.size != 5) throw std::runtime_error("sizes that are not such a product's");
  const int64_t rows = sizes.data[0], columns = sizes.data[1], inner = sizes.data[2], bits = sizes.data[3];
  const int64_t group = sizes.data[4], groups = inner / group;
  if (bits == 4 && group != 2 * kHalf) throw std::runtime_error("groups of int4 that are not of 32 numbers");
  const auto* weights = static_cast<const uint8_t*>(Argument(frame, 1)->data);
  const auto* scales = bits == 16 ? nullptr : static_cast<const float*>(Argument(frame, 2)->data);
  auto* y = static_cast<float*>(Result(frame, 0)->data);
  const float* x = static_cast<const float*>(Argument(frame, 0)->data);
  std::vector<float> wide;
  if (Argument(frame, 0)->dtype == XLA_FFI_DataType_BF16) {
    wide.resize(rows * inner);
    Widen(reinterpret_cast<const uint16_t*>(x), rows * inner, wide.data());
    x = wide.data();
  }
  const int64_t bytes = columns * inner * bits / 8, tasks = (columns + kTask - 1) / kTask;
  const int64_t threads = std::min(kpx::Threads(frame), std::max<int64_t>(1, bytes * rows >> 17));
  kpx::Tasks::Run(frame, tasks, threads, [&](int64_t task) {
    for (int64_t c = task * kTask; c < std::min(columns, (task + 1) * kTask); ++c) {
      const uint8_t* w = weights + c * inner * bits / 8;
      for (int64_t r = 0; r < rows; ++r) {
        float sum = 0;
        if (bits == 16) sum = Dot16(reinterpret_cast<const uint16_t*>(w), x + r * inner, inner);
        if (bits == 4) sum = Dot4(w, x + r * inner, scales + c * groups, groups);
        for (int64_t g = 0; bits == 8 && g < groups; ++g) {
          const auto* of = reinterpret_cast<const int8_t*>(w) + g * group;
          sum += Dot8(of, x + r * inner + g * group, group) * scales[c * groups + g];
        }
        y[r * columns + c] = sum;
      }
    }
  });
}

}  // namespace

extern "C" XLA_FFI_Error* kpx_weights_only(XLA_FFI_CallFrame* frame) {
  if (kpx::AsksForVersion(frame)) return nullptr;
  try {
    Multiply(frame);
    return nullptr;
  } catch (const std::exception& error) {
    return Fail(frame->api, error.what());
  }
}
