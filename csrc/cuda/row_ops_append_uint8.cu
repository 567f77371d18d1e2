// append_rows on CUDA for the codec uint8: dense rows by channels, or by vectors if there is one channel;
// strided images by tiles.
#include <math_constants.h>

#include "cuda/tiles.cuh"

namespace learndrop::cuda {
namespace {

// The extent of n channels.
template <int n>
struct Extent {
  Pack<float, n> low, high;
  Pack<uint32_t, n> magnitude;  // bits, which show NaN and infinity

  static __device__ Extent of_nothing() {
    Extent extent;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      extent.low.v[i] = CUDART_INF_F;
      extent.high.v[i] = -CUDART_INF_F;
      extent.magnitude.v[i] = 0;
    }
    return extent;
  }

  __device__ void include(int i, float least, float greatest, uint32_t widest) {
    low.v[i] = fminf(low.v[i], least);
    high.v[i] = fmaxf(high.v[i], greatest);
    magnitude.v[i] = max(magnitude.v[i], widest);
  }
  __device__ void include(int i, float value) {
    include(i, value, value, __float_as_uint(value) & 0x7fffffffu);
  }
  __device__ void include(const Extent& other) {
#pragma unroll
    for (int i = 0; i < n; ++i) include(i, other.low.v[i], other.high.v[i], other.magnitude.v[i]);
  }

  // Joins the extents of all threads of the warp whose lanes are equal modulo `apart`, a power of two.
  __device__ void join_warp(int apart) {
    constexpr unsigned int kAll = 0xffffffffu;
    for (int mask = kWarp / 2; mask >= apart; mask /= 2) {
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const float least = __shfl_xor_sync(kAll, low.v[i], mask);
        const float greatest = __shfl_xor_sync(kAll, high.v[i], mask);
        include(i, least, greatest, __shfl_xor_sync(kAll, magnitude.v[i], mask));
      }
    }
  }
};

// The header and the encoding of a channel.
struct Fit {
  float zero, scale, inverse;

  __device__ uint8_t code(float value) const {
    const float steps = __fmul_rn(__fsub_rn(value, zero), inverse);
    return static_cast<uint8_t>(__float2int_rn(fminf(fmaxf(steps, 0.0f), 255.0f)));
  }
};

// The fit of channel i of an extent, as in cpu/row_ops.cpp.
template <int n>
__device__ inline Fit fit(const Extent<n>& extent, int i) {
  const float low = extent.low.v[i], range = __fsub_rn(extent.high.v[i], low);
  const bool finite = extent.magnitude.v[i] < 0x7f800000u && range <= CUDART_MAX_NORMAL_F;
  const bool constant = finite && range < kSmallestRange;
  return {.zero = finite ? __fadd_rn(low, 0.0f) : 0.0f,
          .scale = !finite    ? __uint_as_float(0x7fc00000u)
                   : constant ? 0.0f
                              : __fdiv_rn(range, 255.0f),
          .inverse = !finite || constant ? 0.0f : __fdiv_rn(255.0f, range)};
}

struct ByteLaunch {
  Append a;
  int log_lanes;           // 2^log_lanes threads are along the channels, the others along the pixels
  uint32_t channel_tiles;  // blocks per row
};

// Writes scale and zero of a channel, and with those of the last one the padding of the header, so that a row
// has the same bytes whatever was there before.
__device__ inline void write_fit(unsigned char* row, uint32_t channels, uint32_t c, const Fit& of) {
  float* table = reinterpret_cast<float*>(row);
  table[c] = of.scale;
  table[channels + c] = of.zero;
  if (c == channels - 1 && channels % 2 == 1) table[2 * channels] = table[2 * channels + 1] = 0.0f;
}

// A block finds the extents of some channels of a dense row, then reads them again and writes their bytes.
//
// Moves H*W*C * value_bytes(dtype) + row_bytes per row from and to memory, and reads the values again from
// L2: 25 KB per block for 128 channels of 7 x 7 fp32. Target: 70 % of the rate of a device copy.
template <Dtype dtype, int n>
__global__ void __launch_bounds__(kThreads) append_uint8_kernel(const __grid_constant__ ByteLaunch launch) {
  using In = ValueOf<dtype>;
  using Part = Extent<n>;
  constexpr int kWarps = kThreads / kWarp;
  __shared__ Part parts[kWarps][kWarp];
  const Append& a = launch.a;
  const int64_t b = blockIdx.x / launch.channel_tiles;
  const uint32_t lanes = 1u << launch.log_lanes, pixel_lanes = kThreads >> launch.log_lanes;
  const uint32_t lane = threadIdx.x & (lanes - 1), pixel_lane = threadIdx.x >> launch.log_lanes;
  const auto pixels = static_cast<uint32_t>(a.shape.pixels()),
             channels = static_cast<uint32_t>(a.shape.channels);
  const uint32_t c = (blockIdx.x % launch.channel_tiles * lanes + lane) * n;
  const bool inside = c < channels;
  const In* in = static_cast<const In*>(a.rows) + b * a.stride_b;
  const auto load = [&](uint32_t p) {
    return *reinterpret_cast<const Pack<In, n>*>(in + static_cast<int64_t>(p) * channels + c);
  };
  const Share share{.b = b, .first = inside ? pixel_lane : pixels, .last = pixels, .step = pixel_lanes};
  Part extent = Part::of_nothing();
  for_each_vector(share, load, [&](uint32_t, const Pack<In, n>& values) {
#pragma unroll
    for (int i = 0; i < n; ++i) extent.include(i, widen(values.v[i]));
  });
  // Each warp holds all channels of the block.
  extent.join_warp(lanes);
  if (threadIdx.x % kWarp < lanes) parts[threadIdx.x / kWarp][threadIdx.x % kWarp] = extent;
  __syncthreads();
  if (!inside) return;
  for (int warp = 0; warp < kWarps; ++warp) extent.include(parts[warp][lane]);
  auto* row =
      static_cast<unsigned char*>(a.cache) + checked_row(a.index, b, a.cache_rows) * a.cache_stride_bytes;
  uint8_t* payload = row + header_bytes(Codec::uint8, a.shape);
  Fit fits[n];
#pragma unroll
  for (int i = 0; i < n; ++i) {
    fits[i] = fit(extent, i);
    if (pixel_lane == 0) write_fit(row, channels, c + i, fits[i]);
  }
  for_each_vector(share, load, [&](uint32_t p, const Pack<In, n>& values) {
    Pack<uint8_t, n> codes;
#pragma unroll
    for (int i = 0; i < n; ++i) codes.v[i] = fits[i].code(widen(values.v[i]));
    *reinterpret_cast<Pack<uint8_t, n>*>(payload + static_cast<int64_t>(p) * channels + c) = codes;
  });
}

// A block finds the extents of a tile's channels of a strided row, each warp one channel at a time along its
// pixels. Then it moves the row tile by tile through shared memory, because the bytes of a pixel are
// contiguous and those of a channel far apart.
//
// Moves as many bytes as append_uint8_kernel.
template <Dtype dtype>
__global__ void __launch_bounds__(kThreads)
    append_uint8_tile_kernel(const __grid_constant__ TileLaunch launch) {
  using In = ValueOf<dtype>;
  __shared__ In tile[kTile + kWarp];
  __shared__ Fit fits[kWarp];
  const Append& a = launch.a;
  const int64_t b = blockIdx.x / launch.channel_tiles;
  const uint32_t channel_0 = blockIdx.x % launch.channel_tiles * launch.shape.channels();
  const auto pixels = static_cast<uint32_t>(a.shape.pixels()),
             channels = static_cast<uint32_t>(a.shape.channels);
  const In* in = static_cast<const In*>(a.rows) + b * a.stride_b;
  auto* row =
      static_cast<unsigned char*>(a.cache) + checked_row(a.index, b, a.cache_rows) * a.cache_stride_bytes;
  const Share share{.b = b, .first = threadIdx.x % kWarp, .last = pixels, .step = kWarp};
  for (uint32_t of_tile = threadIdx.x / kWarp; of_tile < launch.shape.channels();
       of_tile += kThreads / kWarp) {
    const uint32_t c = channel_0 + of_tile;
    if (c >= channels) break;
    const In* from = in + c * a.stride_c;
    Extent<1> extent = Extent<1>::of_nothing();
    for_each_vector(
        share,
        [&](uint32_t p) {
          const int64_t line = launch.width.divide(p);
          return from[line * a.stride_h + (p - line * a.shape.width) * a.stride_w];
        },
        [&](uint32_t, In value) { extent.include(0, widen(value)); });
    extent.join_warp(1);
    if (threadIdx.x % kWarp == 0) {
      fits[of_tile] = fit(extent, 0);
      write_fit(row, channels, c, fits[of_tile]);
    }
  }
  uint8_t* payload = row + header_bytes(Codec::uint8, a.shape);
  for (uint32_t pixel_0 = 0; pixel_0 < pixels; pixel_0 += launch.shape.pixels()) {
    const TileOrigin origin{.channel = channel_0, .pixel = pixel_0};
    __syncthreads();  // the fits are complete, and the previous tile has been written
    read_tile(a, launch.width, in, launch.shape, origin, tile);
    __syncthreads();
    const Fit of = fits[threadIdx.x & (launch.shape.channels() - 1)];
    write_tile(a, launch.shape, origin, tile,
               [&](uint32_t at, In value) { payload[at] = of.code(widen(value)); });
  }
}

// A row of one channel takes one block of up to 1,024 threads: with four loads of 16 bytes they have 64 KB in
// flight, and 23 KB per SM are needed (row_ops.cuh).
constexpr int kMostThreads = 1024;

struct FlatLaunch {
  Append a;
  uint32_t vectors;
};

// A block finds the extent of a dense row of one channel, n values per vector, then reads it again.
//
// Moves D * value_bytes(dtype) + row_bytes per row from and to memory, and reads the values again from L2.
// Target: 70 % of the rate of a device copy for batches of at least as many rows as there are SMs.
template <Dtype dtype, int n>
__global__ void __launch_bounds__(kMostThreads)
    append_uint8_flat_kernel(const __grid_constant__ FlatLaunch launch) {
  using In = ValueOf<dtype>;
  using Part = Extent<1>;
  __shared__ Part parts[kMostThreads / kWarp];
  const Append& a = launch.a;
  const Share share{.b = blockIdx.x, .first = threadIdx.x, .last = launch.vectors, .step = blockDim.x};
  const In* in = static_cast<const In*>(a.rows) + share.b * a.stride_b;
  const auto load = [&](uint32_t at) {
    return *reinterpret_cast<const Pack<In, n>*>(in + static_cast<int64_t>(at) * n);
  };
  Part extent = Part::of_nothing();
  for_each_vector(share, load, [&](uint32_t, const Pack<In, n>& values) {
#pragma unroll
    for (int i = 0; i < n; ++i) extent.include(0, widen(values.v[i]));
  });
  extent.join_warp(1);
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = extent;
  __syncthreads();
  if (threadIdx.x % kWarp < blockDim.x / kWarp) extent.include(parts[threadIdx.x % kWarp]);
  extent.join_warp(1);
  const Fit only = fit(extent, 0);
  auto* row = static_cast<unsigned char*>(a.cache) +
              checked_row(a.index, share.b, a.cache_rows) * a.cache_stride_bytes;
  if (threadIdx.x == 0) {
    float* table = reinterpret_cast<float*>(row);
    table[0] = only.scale;
    table[1] = only.zero;
    table[2] = table[3] = 0.0f;
  }
  uint8_t* payload = row + header_bytes(Codec::uint8, a.shape);
  for_each_vector(share, load, [&](uint32_t at, const Pack<In, n>& values) {
    Pack<uint8_t, n> codes;
#pragma unroll
    for (int i = 0; i < n; ++i) codes.v[i] = only.code(widen(values.v[i]));
    *reinterpret_cast<Pack<uint8_t, n>*>(payload + static_cast<int64_t>(at) * n) = codes;
  });
}

template <Dtype dtype>
void launch_uint8_tiles(const Append& a, const DeviceGuard& guard, cudaStream_t stream) {
  const TileLaunch launch(a);
  const unsigned int blocks = guard.grid(a.batch * launch.channel_tiles);
  append_uint8_tile_kernel<dtype><<<blocks, kThreads, 0, stream>>>(launch);
}

template <Dtype dtype, int n>
void launch_uint8(const Append& a, const DeviceGuard& guard, cudaStream_t stream) {
  const auto kernel = append_uint8_kernel<dtype, n>;
  // A warp across the channels, 512 bytes of a pixel for n = 4 and fp32; fewer channels per block, down to 8
  // vectors, as long as there are fewer blocks than run at once.
  const int64_t resident = guard.resident_blocks(kernel);
  const auto tiles = [&](int log_lanes) { return ceil_div(a.shape.channels, int64_t{n} << log_lanes); };
  int log_lanes = 0;
  while ((1 << log_lanes) < kWarp && tiles(log_lanes) > 1) ++log_lanes;
  while (log_lanes > 3 && a.batch * tiles(log_lanes) < resident) --log_lanes;
  const ByteLaunch launch{
      .a = a, .log_lanes = log_lanes, .channel_tiles = static_cast<uint32_t>(tiles(log_lanes))};
  append_uint8_kernel<dtype, n><<<guard.grid(a.batch * launch.channel_tiles), kThreads, 0, stream>>>(launch);
}

template <Dtype dtype, int n>
void launch_uint8_flat(const Append& a, const DeviceGuard& guard, cudaStream_t stream) {
  const FlatLaunch launch{.a = a, .vectors = static_cast<uint32_t>(a.shape.values() / n)};
  const uint32_t warps = ceil_div<uint32_t>(launch.vectors, kWarp * kUnroll);
  const uint32_t threads = std::min<uint32_t>(warps * kWarp, kMostThreads);
  append_uint8_flat_kernel<dtype, n><<<guard.grid(a.batch), threads, 0, stream>>>(launch);
}

}  // namespace

void append_uint8_rows(const Append& a, const DeviceGuard& guard, cudaStream_t stream) {
  for_dtype(a.dtype, [&](auto dtype) {
    using In = ValueOf<dtype()>;
    constexpr int n = kVector<In, uint8_t>, across = 4;
    if (!is_dense(a)) return launch_uint8_tiles<dtype()>(a, guard, stream);
    if (a.shape.channels == 1) {
      if (admits_vectors<In>(a, n, a.shape.values())) return launch_uint8_flat<dtype(), n>(a, guard, stream);
      return launch_uint8_flat<dtype(), 1>(a, guard, stream);
    }
    if (admits_vectors<In>(a, across, a.shape.channels))
      return launch_uint8<dtype(), across>(a, guard, stream);
    launch_uint8<dtype(), 1>(a, guard, stream);
  });
}

}  // namespace learndrop::cuda
