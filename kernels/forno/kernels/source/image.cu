// Images from bytes as they are decoded to tensors as models read them, in one pass.
#include "common.cuh"

namespace {

constexpr int kMostChannels = 4;
// Sides, before and after, are of at most 32767 pixels (`MOST_PIXELS` of the callers): 64-bit divisions would cost more than
// all the rest.

struct Normalise {
  float scale[kMostChannels];
  float bias[kMostChannels];
};

// The source pixels that one target pixel is made of along one axis, by a triangle filter.
//
// Pixels are areas: the centre of target pixel `at` lies at (at + 1/2) * source / target ("half-pixel centres"). The
// filter reaches one pixel to either side, or, with antialiasing, source / target pixels where that is more. What lies
// outside the image is left out and the rest weighed up, which without antialiasing is the same as repeating the edge.
struct Taps {
  int first, last;
  float centre;  // relative to pixel `base`, in [0, 1): small numbers, so that float is exact enough for any size
  int base;
  float reach;

  __device__ Taps(int at, int source, int target, bool antialias) {
    const u32 halves = 2 * static_cast<u32>(target);
    const u32 position = (2 * static_cast<u32>(at) + 1) * static_cast<u32>(source);  // below 2^31, as above
    base = static_cast<int>(position / halves);
    centre = static_cast<float>(position % halves) / static_cast<float>(halves);
    reach = antialias && source > target ? static_cast<float>(source) / static_cast<float>(target) : 1.0f;
    const int from = base + static_cast<int>(ceilf(centre - reach - 0.5f));
    const int to = base + static_cast<int>(floorf(centre + reach - 0.5f));
    first = from > 0 ? from : 0;
    last = to < source ? to : source - 1;
  }

  __device__ float weight(int pixel) const {
    const float distance = fabsf(static_cast<float>(pixel - base) + 0.5f - centre);
    return distance < reach ? 1.0f - distance / reach : 0.0f;
  }
};

// How one image comes to its size: it is resized, and of that a window is taken, [height, width] of the output.
struct Way {
  i32 height, width;                  // of the image
  i32 resized_height, resized_width;  // of all of it, as far as the window lies in it
  i32 top, left;                      // of the window
};

// bytes[offsets[i] ...]: image i, [ways[i].height, ways[i].width, channels], in an arena of images of any sizes
// out: [images, channels, height, width], with `channels_last` [images, height, width, channels];
//      value * scale[channel] + bias[channel]
template <class Out>
__device__ void image_to_tensor(const u8* bytes, const i64* offsets, const Way* ways, Out* out, i32 images,
                                i32 channels, i32 height, i32 width, i32 antialias, i32 channels_last,
                                const Normalise& normalise) {
  const u32 plane = static_cast<u32>(height) * static_cast<u32>(width);
  for (i32 image = blockIdx.y; image < images; image += gridDim.y) {
    const u8* source = bytes + offsets[image];
    const Way way = ways[image];
    Out* target = out + static_cast<i64>(image) * channels * plane;
    for (u32 item = first_item(); item < plane; item += item_stride()) {
      const Taps rows(item / width + way.top, way.height, way.resized_height, antialias != 0);
      const Taps columns(item % width + way.left, way.width, way.resized_width, antialias != 0);
      float sums[kMostChannels] = {0.0f, 0.0f, 0.0f, 0.0f};
      float total = 0.0f;
      for (int row = rows.first; row <= rows.last; ++row) {
        const u8* line = source + static_cast<i64>(row) * way.width * channels;
        const float row_weight = rows.weight(row);
        for (int column = columns.first; column <= columns.last; ++column) {
          const float weight = row_weight * columns.weight(column);
          total += weight;
#pragma unroll
          for (int channel = 0; channel < kMostChannels; ++channel) {
            if (channel < channels) {
              sums[channel] += weight * static_cast<float>(line[static_cast<i64>(column) * channels + channel]);
            }
          }
        }
      }
#pragma unroll
      for (int channel = 0; channel < kMostChannels; ++channel) {
        if (channel < channels) {
          const float value = total > 0.0f ? sums[channel] / total : 0.0f;  // no pixels, no value
          const i64 at = channels_last ? static_cast<i64>(item) * channels + channel : static_cast<i64>(channel) * plane + item;
          Out& element = target[at];
          narrow(value * normalise.scale[channel] + normalise.bias[channel], element);
        }
      }
    }
  }
}

}  // namespace

#define IMAGE_TO_TENSOR(type)                                                                                          \
  extern "C" __global__ void image_to_tensor_##type(const u8* bytes, const i64* offsets, const Way* ways, type* out,   \
                                                    i32 images, i32 channels, i32 height, i32 width, i32 antialias,    \
                                                    i32 channels_last, Normalise normalise) {                          \
    image_to_tensor(bytes, offsets, ways, out, images, channels, height, width, antialias, channels_last, normalise);  \
  }                                                                                                                    \
  EXPORT(image_to_tensor_##type)

IMAGE_TO_TENSOR(f16)
IMAGE_TO_TENSOR(f32)
