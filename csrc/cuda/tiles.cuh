// Strided rows by tiles through shared memory, for the append kernels of all codecs.
#pragma once

#include "cuda/row_ops.cuh"

namespace learndrop::cuda {

// A tile is 32 channels by 32 pixels; with fewer channels, the next power of two by correspondingly more
// pixels. It is read along the pixels, each thread from one pixel, and written along the channels, each
// thread to one channel, so that a thread computes one address for all its values. (With an address per value
// the kernel was bound by its 100 instructions per value.)
constexpr int kLogTile = 10;
constexpr int kTile = 1 << kLogTile;
constexpr int kOfThread = kTile / kThreads;
// At most 256 pixels, so that a thread's values differ only in the channel.
constexpr int kFewestLogChannels = 2;

struct TileShape {
  int log_channels;

  explicit TileShape(int64_t channels) : log_channels(kFewestLogChannels) {
    while ((1 << log_channels) < channels && (1 << log_channels) < kWarp) ++log_channels;
  }
  LEARNDROP_HOST_DEVICE uint32_t channels() const { return 1u << log_channels; }
  LEARNDROP_HOST_DEVICE uint32_t pixels() const { return static_cast<uint32_t>(kTile) >> log_channels; }
  // The stride between channels is 32 / channels() values more than the pixels, so that threads reading down
  // a column are in 32 banks.
  __device__ uint32_t apart() const { return pixels() + (kWarp >> log_channels); }
};

// The beginning of a tile in its row.
struct TileOrigin {
  uint32_t channel, pixel;
};

template <class In>
__device__ inline void read_tile(const Append& a, const Divider& width, const In* row, const TileShape& shape,
                                 const TileOrigin& origin, In* tile) {
  const int log_pixels = kLogTile - shape.log_channels;
  const uint32_t column = threadIdx.x & (shape.pixels() - 1), first = threadIdx.x >> log_pixels;
  const uint32_t step = static_cast<uint32_t>(kThreads) >> log_pixels;
  const uint32_t pixel = origin.pixel + column;
  if (pixel >= a.shape.pixels()) return;
  const int64_t line = width.divide(pixel);
  const In* from = row + line * a.stride_h + (pixel - line * a.shape.width) * a.stride_w +
                   (int64_t{origin.channel} + first) * a.stride_c;
  const int64_t apart = step * a.stride_c;
  In loaded[kOfThread];
#pragma unroll
  for (int u = 0; u < kOfThread; ++u)
    if (origin.channel + first + u * step < a.shape.channels) loaded[u] = from[u * apart];
#pragma unroll
  for (int u = 0; u < kOfThread; ++u) tile[(first + u * step) * shape.apart() + column] = loaded[u];
}

// Calls write(offset in the row, value) for each value of a tile.
template <class In, class Write>
__device__ inline void write_tile(const Append& a, const TileShape& shape, const TileOrigin& origin,
                                  const In* tile, const Write& write) {
  const uint32_t row = threadIdx.x & (shape.channels() - 1), first = threadIdx.x >> shape.log_channels;
  const uint32_t step = static_cast<uint32_t>(kThreads) >> shape.log_channels;
  const auto channels = static_cast<uint32_t>(a.shape.channels);
  if (origin.channel + row >= channels) return;
  const uint32_t begin = (origin.pixel + first) * channels + origin.channel + row;
#pragma unroll
  for (int u = 0; u < kOfThread; ++u) {
    const uint32_t column = first + u * step;
    if (origin.pixel + column < a.shape.pixels())
      write(begin + u * step * channels, tile[row * shape.apart() + column]);
  }
}

struct TileLaunch {
  Append a;
  Divider width;
  TileShape shape;
  uint32_t pixel_tiles, channel_tiles;

  explicit TileLaunch(const Append& append)
      : a(append),
        width(append.shape.width),
        shape(append.shape.channels),
        pixel_tiles(static_cast<uint32_t>(ceil_div<int64_t>(append.shape.pixels(), shape.pixels()))),
        channel_tiles(static_cast<uint32_t>(ceil_div<int64_t>(append.shape.channels, shape.channels()))) {}
};

}  // namespace learndrop::cuda
