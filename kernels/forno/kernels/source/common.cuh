// What the kernels share. The same text is compiled by nvcc and NVRTC for a GPU, and by any C++17 compiler for the CPU.
//
// Rules of this folder: no includes but our own (NVRTC has no headers), no host code, no return before a barrier, blocks
// of whole warps, `extern "C"` kernels that EXPORT names, one launch free of races between its blocks.
#pragma once

#ifdef __CUDACC__
#define EXPORT(kernel)  // `extern "C"` is enough
#else
#include "cpu.h"
#endif

namespace {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;
using f32 = float;

constexpr int kWarp = 32;
constexpr int kMostWarps = 32;

struct alignas(16) u128 {
  u64 low, high;
};

// Half precision as bits: conversions are all that is needed of it, and this way no header is.
struct f16 {
  u16 bits;
};

struct bf16 {
  u16 bits;
};

__device__ __forceinline__ float widened(float value) { return value; }

__device__ __forceinline__ float widened(f16 value) {
#ifdef __CUDACC__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  return cpu::float_of_half(value.bits);
#endif
}

__device__ __forceinline__ float widened(bf16 value) { return __uint_as_float(static_cast<u32>(value.bits) << 16); }

// Rounds to nearest, ties to even; too large becomes infinite; NaN stays NaN.
__device__ __forceinline__ void narrow(float value, float& to) { to = value; }

__device__ __forceinline__ void narrow(float value, f16& to) {
#ifdef __CUDACC__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(value));
#else
  to.bits = cpu::half_of_float(value);
#endif
}

__device__ __forceinline__ void narrow(float value, bf16& to) {
  const u32 bits = __float_as_uint(value);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to.bits = static_cast<u16>(is_nan ? bits >> 16 | 0x40u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

__device__ __forceinline__ i64 first_item() { return static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; }

__device__ __forceinline__ i64 item_stride() { return static_cast<i64>(gridDim.x) * blockDim.x; }

struct Sum {
  template <class T>
  __device__ T operator()(T left, T right) const {
    return left + right;
  }
};

struct Largest {
  template <class T>
  __device__ T operator()(T left, T right) const {
    return left > right ? left : right;
  }
};

// Combines one value of each thread; every thread gets the result, the same bits in each. `room` is shared, kMostWarps
// long, and free again on return. All threads of the block call it.
template <class T, class Combine>
__device__ __forceinline__ T over_block(T value, Combine combine, T* room) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  if (threadIdx.x % kWarp == 0) {
    room[threadIdx.x / kWarp] = value;
  }
  __syncthreads();
  value = room[0];
  for (int warp = 1; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) {
    value = combine(value, room[warp]);
  }
  __syncthreads();
  return value;
}

}  // namespace
