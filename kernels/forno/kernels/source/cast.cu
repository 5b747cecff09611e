// Element types that models read to those that callers send, and back.
#include "common.cuh"

namespace {

template <class From, class To>
__device__ void cast(const From* from, To* to, i64 elements) {
  for (i64 item = first_item(); item < elements; item += item_stride()) {
    narrow(widened(from[item]), to[item]);
  }
}

}  // namespace

#define CAST(source, target)                                                                                \
  extern "C" __global__ void cast_##source##_##target(const source* from, target* to, i64 elements) {       \
    cast(from, to, elements);                                                                               \
  }                                                                                                         \
  EXPORT(cast_##source##_##target)

CAST(f32, f16)
CAST(f32, bf16)
CAST(f16, f32)
CAST(bf16, f32)
