// Rows of different lengths, packed one after another, to padded batches and back; rows to other places.
//
// blockIdx.y counts rows and blockIdx.x goes along them, so that nothing is divided.
#include "common.cuh"

namespace {

__device__ __forceinline__ void put_mask(void* mask, i32 mask_bytes, i64 item, bool is_own) {
  switch (mask_bytes) {
    case 1:
      static_cast<u8*>(mask)[item] = is_own;
      break;
    case 4:
      static_cast<i32*>(mask)[item] = is_own;
      break;
    case 8:
      static_cast<i64*>(mask)[item] = is_own;
      break;
    default:
      break;
  }
}

// arena[offsets[r] .. offsets[r + 1]]: row r
// out: [rows, width], filled up with `fill`; what is longer than `width` is cut off
// mask: [rows, width], 1 for a row's own elements and 0 for the others, of integers of `mask_bytes`; 0 = no mask
template <class T>
__device__ void pack_rows(const T* arena, const i64* offsets, T* out, void* mask, i32 mask_bytes, i32 rows, i32 width,
                          T fill) {
  for (i32 row = blockIdx.y; row < rows; row += gridDim.y) {
    const i64 from = offsets[row];
    const i64 own = offsets[row + 1] - from;
    for (i64 column = first_item(); column < width; column += item_stride()) {
      const i64 to = static_cast<i64>(row) * width + column;
      out[to] = column < own ? arena[from + column] : fill;
      put_mask(mask, mask_bytes, to, column < own);
    }
  }
}

// The way back: arena[offsets[r] .. offsets[r + 1]] becomes the leading elements of row r of padded[rows, width].
template <class T>
__device__ void unpack_rows(const T* padded, const i64* offsets, T* arena, i32 rows, i32 width) {
  for (i32 row = blockIdx.y; row < rows; row += gridDim.y) {
    const i64 to = offsets[row];
    const i64 own = offsets[row + 1] - to;
    for (i64 column = first_item(); column < width && column < own; column += item_stride()) {
      arena[to + column] = padded[static_cast<i64>(row) * width + column];
    }
  }
}

// Row r of from[rows, units] becomes row places[r] of to[to_rows, units]; no place outside of `to` is written.
// Places are different from each other.
template <class Unit>
__device__ void scatter_rows(const Unit* from, const i32* places, Unit* to, i32 rows, i32 to_rows, i64 units) {
  for (i32 row = blockIdx.y; row < rows; row += gridDim.y) {
    const i32 place = places[row];
    if (place >= 0 && place < to_rows) {
      for (i64 unit = first_item(); unit < units; unit += item_stride()) {
        to[place * units + unit] = from[row * units + unit];
      }
    }
  }
}

}  // namespace

#define PACK_ROWS(type)                                                                                               \
  extern "C" __global__ void pack_rows_##type(const type* arena, const i64* offsets, type* out, void* mask,           \
                                              i32 mask_bytes, i32 rows, i32 width, type fill) {                       \
    pack_rows(arena, offsets, out, mask, mask_bytes, rows, width, fill);                                              \
  }                                                                                                                   \
  EXPORT(pack_rows_##type)                                                                                            \
  extern "C" __global__ void unpack_rows_##type(const type* padded, const i64* offsets, type* arena, i32 rows,        \
                                                i32 width) {                                                          \
    unpack_rows(padded, offsets, arena, rows, width);                                                                 \
  }                                                                                                                   \
  EXPORT(unpack_rows_##type)

PACK_ROWS(u8)
PACK_ROWS(u16)
PACK_ROWS(u32)
PACK_ROWS(u64)

#define SCATTER_ROWS(unit)                                                                                            \
  extern "C" __global__ void scatter_rows_##unit(const unit* from, const i32* places, unit* to, i32 rows,             \
                                                 i32 to_rows, i64 units) {                                            \
    scatter_rows(from, places, to, rows, to_rows, units);                                                             \
  }                                                                                                                   \
  EXPORT(scatter_rows_##unit)

SCATTER_ROWS(u8)
SCATTER_ROWS(u32)
SCATTER_ROWS(u128)
