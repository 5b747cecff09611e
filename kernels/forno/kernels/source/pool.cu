// One embedding of each row out of those of its tokens.
#include "common.cuh"

namespace {

constexpr float kSmallestNorm = 1e-12f;

// hidden: [rows, tokens, dims]; mask: [rows, tokens], 0 = not a token of this row; out: [rows, dims]. One block a row.
// The mean over the row's tokens, and with `normalise` of length 1. A row without tokens is zero. What is masked is not
// read: whatever stands there, NaN included, changes nothing.
template <class In>
__device__ void mean_pool(const In* hidden, const i64* mask, float* out, i32 rows, i32 tokens, i32 dims,
                          i32 normalise) {
  __shared__ float sums[kMostWarps];
  for (i32 row = blockIdx.x; row < rows; row += gridDim.x) {
    const In* own = hidden + static_cast<i64>(row) * tokens * dims;
    const i64* own_mask = mask + static_cast<i64>(row) * tokens;
    float* target = out + static_cast<i64>(row) * dims;
    float squares = 0.0f;
    for (i32 dim = threadIdx.x; dim < dims; dim += blockDim.x) {
      float sum = 0.0f;
      i32 count = 0;
      for (i32 token = 0; token < tokens; ++token) {
        if (own_mask[token] != 0) {
          sum += widened(own[static_cast<i64>(token) * dims + dim]);
          ++count;
        }
      }
      const float mean = count > 0 ? sum / static_cast<float>(count) : 0.0f;
      target[dim] = mean;
      squares += mean * mean;
    }
    const float norm = sqrtf(over_block(squares, Sum(), sums));
    if (normalise) {
      const float divisor = norm < kSmallestNorm ? kSmallestNorm : norm;  // NaN stays NaN
      for (i32 dim = threadIdx.x; dim < dims; dim += blockDim.x) {
        target[dim] /= divisor;  // written by this very thread
      }
    }
  }
}

}  // namespace

#define MEAN_POOL(type)                                                                                          \
  extern "C" __global__ void mean_pool_##type(const type* hidden, const i64* mask, float* out, i32 rows,         \
                                              i32 tokens, i32 dims, i32 normalise) {                             \
    mean_pool(hidden, mask, out, rows, tokens, dims, normalise);                                                 \
  }                                                                                                              \
  EXPORT(mean_pool_##type)

MEAN_POOL(f16)
MEAN_POOL(f32)
