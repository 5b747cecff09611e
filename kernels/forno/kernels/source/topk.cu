// The few best classes of each row, so that only they are copied back.
#include "common.cuh"

namespace {

// A number that orders elements: larger values first, NaN before all, equal values by their index.
__device__ __forceinline__ u64 rank(float value, i32 index) {
  u32 bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    bits = 0xff800001u;  // just above +infinity
  } else if (bits == 0x80000000u) {
    bits = 0x80000000u;  // -0 is 0
  } else {
    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  }
  return static_cast<u64>(bits) << 32 | (0xffffffffu - static_cast<u32>(index));
}

// logits: [rows, classes]; values, indices: [rows, k], best first; 1 <= k <= classes. One block a row.
// With `softmax` the values are probabilities, as NumPy computes them: NaN or +infinity in a row makes all of them NaN.
template <class In>
__device__ void softmax_topk(const In* logits, float* values, i32* indices, i32 rows, i32 classes, i32 k, i32 softmax) {
  __shared__ u64 ranks[kMostWarps];
  __shared__ float sums[kMostWarps];
  for (i32 row = blockIdx.x; row < rows; row += gridDim.x) {
    const In* own = logits + static_cast<i64>(row) * classes;
    float largest = 0.0f;
    float total = 1.0f;
    u64 previous = ~0ull;
    for (i32 place = 0; place < k; ++place) {
      u64 best = 0;
      for (i32 index = threadIdx.x; index < classes; index += blockDim.x) {
        const u64 candidate = rank(widened(own[index]), index);
        best = candidate < previous && candidate > best ? candidate : best;
      }
      previous = over_block(best, Largest(), ranks);
      const i32 index = static_cast<i32>(0xffffffffu - static_cast<u32>(previous));
      const float value = widened(own[index]);
      if (place == 0 && softmax) {
        largest = value;
        float sum = 0.0f;
        for (i32 other = threadIdx.x; other < classes; other += blockDim.x) {
          sum += expf(widened(own[other]) - largest);
        }
        total = over_block(sum, Sum(), sums);
      }
      if (threadIdx.x == 0) {
        values[static_cast<i64>(row) * k + place] = softmax ? expf(value - largest) / total : value;
        indices[static_cast<i64>(row) * k + place] = index;
      }
    }
  }
}

}  // namespace

#define SOFTMAX_TOPK(type)                                                                                         \
  extern "C" __global__ void softmax_topk_##type(const type* logits, float* values, i32* indices, i32 rows,        \
                                                 i32 classes, i32 k, i32 softmax) {                                \
    softmax_topk(logits, values, indices, rows, classes, k, softmax);                                              \
  }                                                                                                                \
  EXPORT(softmax_topk_##type)

SOFTMAX_TOPK(f16)
SOFTMAX_TOPK(f32)
