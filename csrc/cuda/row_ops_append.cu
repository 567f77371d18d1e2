// append_rows on CUDA: dense rows by vectors, strided images by tiles through shared memory, uint8 by
// channels.
#include <math_constants.h>

#include "cuda/row_ops.cuh"

namespace learndrop::cuda {
namespace {

struct DenseLaunch {
  Append a;
  Split split;
};

// One group of threads writes one slice of one row, n values to a vector.
template <Dtype dtype, Codec codec, int n>
__global__ void __launch_bounds__(kThreads) append_dense_kernel(const __grid_constant__ DenseLaunch launch) {
  using In = ValueOf<dtype>;
  using Out = CodeOf<codec>;
  const Append& a = launch.a;
  const Split& split = launch.split;
  const uint32_t threads = 1u << split.log_group;
  const uint32_t lane = threadIdx.x & (threads - 1);
  const int64_t b = static_cast<int64_t>(blockIdx.x / split.slices) * (kThreads >> split.log_group) +
                    (threadIdx.x >> split.log_group);
  if (b >= split.batch) return;
  const In* in = static_cast<const In*>(a.rows) + b * a.stride_b;
  Out* out = reinterpret_cast<Out*>(static_cast<unsigned char*>(a.cache) +
                                    checked_row(a.index, b, a.cache_rows) * a.cache_stride_bytes);
  const uint32_t first = blockIdx.x % split.slices * split.slice;
  const uint32_t last = min(first + split.slice, split.vectors);
  for (uint32_t v = first + lane; v < last; v += threads * kUnroll) {
    Pack<In, n> packs[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const uint32_t at = v + u * threads;
      if (at < last) packs[u] = *reinterpret_cast<const Pack<In, n>*>(in + static_cast<int64_t>(at) * n);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const uint32_t at = v + u * threads;
      if (at >= last) break;
      Pack<Out, n> codes;
#pragma unroll
      for (int i = 0; i < n; ++i) codes.v[i] = convert<Out, codec == Codec::fp16>(packs[u].v[i]);
      *reinterpret_cast<Pack<Out, n>*>(out + static_cast<int64_t>(at) * n) = codes;
    }
  }
}

constexpr int kTile = 32;
constexpr int kTileRows = kThreads / kTile;

struct TileLaunch {
  Append a;
  Divider width;
  uint32_t pixel_tiles, channel_tiles;
};

// One block writes 32 pixels by 32 channels of one row: read along the pixels, written along the channels.
template <Dtype dtype, Codec codec>
__global__ void __launch_bounds__(kThreads) append_tile_kernel(const __grid_constant__ TileLaunch launch) {
  using In = ValueOf<dtype>;
  using Out = CodeOf<codec>;
  // A column more keeps the 32 threads that read down a column in 32 banks.
  __shared__ In tile[kTile][kTile + 1];
  const Append& a = launch.a;
  const uint32_t tiles = launch.pixel_tiles * launch.channel_tiles;
  const int64_t b = blockIdx.x / tiles;
  const uint32_t of_row = blockIdx.x % tiles;
  const uint32_t pixel_0 = of_row / launch.channel_tiles * kTile,
                 channel_0 = of_row % launch.channel_tiles * kTile;
  const auto pixels = static_cast<uint32_t>(a.shape.pixels()),
             channels = static_cast<uint32_t>(a.shape.channels);
  const uint32_t across = threadIdx.x % kTile, down = threadIdx.x / kTile;
  const uint32_t pixel = pixel_0 + across;
  const int64_t line = launch.width.divide(pixel);
  const In* in = static_cast<const In*>(a.rows) + b * a.stride_b + line * a.stride_h +
                 (pixel - line * a.shape.width) * a.stride_w;
  for (uint32_t i = down; i < kTile; i += kTileRows) {
    const uint32_t c = channel_0 + i;
    if (pixel < pixels && c < channels) tile[i][across] = in[c * a.stride_c];
  }
  __syncthreads();
  Out* out = reinterpret_cast<Out*>(static_cast<unsigned char*>(a.cache) +
                                    checked_row(a.index, b, a.cache_rows) * a.cache_stride_bytes);
  const uint32_t c = channel_0 + across;
  for (uint32_t i = down; i < kTile; i += kTileRows) {
    const uint32_t p = pixel_0 + i;
    if (p < pixels && c < channels) {
      out[static_cast<int64_t>(p) * channels + c] = convert<Out, codec == Codec::fp16>(tile[across][i]);
    }
  }
}

struct ByteLaunch {
  Append a;
  Divider width;
  int log_lanes;           // 2^log_lanes threads lie along the channels, the others along the pixels
  uint32_t channel_tiles;  // blocks to a row
};

// zero, scale and inverse of one channel, as in cpu/row_ops.cpp.
__device__ inline void fit(float low, float high, uint32_t magnitude, float& zero, float& scale,
                           float& inverse) {
  const float range = __fsub_rn(high, low);
  const bool finite = magnitude < 0x7f800000u && range <= CUDART_MAX_NORMAL_F;
  const bool constant = finite && range < kSmallestRange;
  zero = finite ? __fadd_rn(low, 0.0f) : 0.0f;
  scale = !finite ? quiet_nan() : constant ? 0.0f : __fdiv_rn(range, 255.0f);
  inverse = !finite || constant ? 0.0f : __fdiv_rn(255.0f, range);
}

// One block finds the extent of some channels of one row, then reads them again (from L2) and writes their
// bytes.
template <Dtype dtype, int n, bool dense>
__global__ void __launch_bounds__(kThreads) append_uint8_kernel(const __grid_constant__ ByteLaunch launch) {
  using In = ValueOf<dtype>;
  __shared__ float lows[kThreads][n], highs[kThreads][n];
  __shared__ uint32_t magnitudes[kThreads][n];
  const Append& a = launch.a;
  const int64_t b = blockIdx.x / launch.channel_tiles;
  const uint32_t lanes = 1u << launch.log_lanes, pixel_lanes = kThreads >> launch.log_lanes;
  // Neighbouring threads read neighbouring channels of a dense row, neighbouring pixels of a strided one.
  const uint32_t lane = dense ? threadIdx.x & (lanes - 1) : threadIdx.x / pixel_lanes;
  const uint32_t pixel_lane = dense ? threadIdx.x >> launch.log_lanes : threadIdx.x % pixel_lanes;
  const auto pixels = static_cast<uint32_t>(a.shape.pixels()),
             channels = static_cast<uint32_t>(a.shape.channels);
  const uint32_t c = (blockIdx.x % launch.channel_tiles * lanes + lane) * n;
  const bool inside = c < channels;
  const In* in = static_cast<const In*>(a.rows) + b * a.stride_b;
  const auto load = [&](uint32_t p) {
    if constexpr (dense) {
      return *reinterpret_cast<const Pack<In, n>*>(in + static_cast<int64_t>(p) * channels + c);
    } else {
      const int64_t line = launch.width.divide(p);
      return Pack<In, 1>{in[line * a.stride_h + (p - line * a.shape.width) * a.stride_w + c * a.stride_c]};
    }
  };
  float low[n], high[n];
  uint32_t magnitude[n];
#pragma unroll
  for (int i = 0; i < n; ++i) {
    low[i] = CUDART_INF_F;
    high[i] = -CUDART_INF_F;
    magnitude[i] = 0;
  }
  for (uint32_t p = pixel_lane; inside && p < pixels; p += pixel_lanes) {
    const auto pack = load(p);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float value = widen(pack.v[i]);
      low[i] = fminf(low[i], value);
      high[i] = fmaxf(high[i], value);
      magnitude[i] = max(magnitude[i], __float_as_uint(value) & 0x7fffffffu);
    }
  }
  // Thread (lane, pixel_lane) sits at slot pixel_lane * lanes + lane; the halves of the pixel lanes are
  // joined in turn.
  const uint32_t slot = pixel_lane * lanes + lane;
  for (uint32_t half = pixel_lanes;; half /= 2) {
    if (pixel_lane < half) {
#pragma unroll
      for (int i = 0; i < n; ++i) {
        lows[slot][i] = low[i];
        highs[slot][i] = high[i];
        magnitudes[slot][i] = magnitude[i];
      }
    }
    __syncthreads();
    if (half == 1) break;
    if (pixel_lane < half / 2) {
      const uint32_t other = slot + half / 2 * lanes;
#pragma unroll
      for (int i = 0; i < n; ++i) {
        low[i] = fminf(low[i], lows[other][i]);
        high[i] = fmaxf(high[i], highs[other][i]);
        magnitude[i] = max(magnitude[i], magnitudes[other][i]);
      }
    }
    __syncthreads();
  }
  if (!inside) return;
  auto* row =
      static_cast<unsigned char*>(a.cache) + checked_row(a.index, b, a.cache_rows) * a.cache_stride_bytes;
  float* table = reinterpret_cast<float*>(row);
  uint8_t* payload = row + header_bytes(Codec::uint8, a.shape);
  float zero[n], inverse[n];
#pragma unroll
  for (int i = 0; i < n; ++i) {
    float scale;
    fit(lows[lane][i], highs[lane][i], magnitudes[lane][i], zero[i], scale, inverse[i]);
    if (pixel_lane == 0) {
      table[c + i] = scale;
      table[channels + c + i] = zero[i];
    }
  }
  // The header's padding is written too, so that a row is the same bytes whatever lay there.
  if (pixel_lane == 0 && c == 0 && channels % 2 == 1) table[2 * channels] = table[2 * channels + 1] = 0.0f;
  for (uint32_t p = pixel_lane; p < pixels; p += pixel_lanes) {
    const auto pack = load(p);
    Pack<uint8_t, n> codes;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float steps = __fmul_rn(__fsub_rn(widen(pack.v[i]), zero[i]), inverse[i]);
      codes.v[i] = static_cast<uint8_t>(__float2int_rn(fminf(fmaxf(steps, 0.0f), 255.0f)));
    }
    *reinterpret_cast<Pack<uint8_t, n>*>(payload + static_cast<int64_t>(p) * channels + c) = codes;
  }
}

template <Dtype dtype, Codec codec, int n>
void launch_dense(const Append& a, cudaStream_t stream) {
  const DenseLaunch launch{a, Split(a.batch, a.shape.values(), n)};
  append_dense_kernel<dtype, codec, n>
      <<<grid_of("append_rows", launch.split.blocks()), kThreads, 0, stream>>>(launch);
}

template <Dtype dtype, Codec codec>
void launch_tiles(const Append& a, cudaStream_t stream) {
  const TileLaunch launch{a, Divider(a.shape.width),
                          static_cast<uint32_t>((a.shape.pixels() + kTile - 1) / kTile),
                          static_cast<uint32_t>((a.shape.channels + kTile - 1) / kTile)};
  const int64_t blocks = a.batch * launch.pixel_tiles * launch.channel_tiles;
  append_tile_kernel<dtype, codec><<<grid_of("append_rows", blocks), kThreads, 0, stream>>>(launch);
}

template <Dtype dtype, int n, bool dense>
void launch_uint8(const Append& a, cudaStream_t stream) {
  ByteLaunch launch{a, Divider(a.shape.width), 0, 0};
  // 32 channels to a block: 128 bytes of a dense fp32 pixel. A strided row is read along its pixels by whole
  // warps.
  const int most = dense ? kTile / n : kThreads / kTile;
  while ((1 << launch.log_lanes) < most && (int64_t{n} << launch.log_lanes) < a.shape.channels)
    ++launch.log_lanes;
  const int64_t channels = int64_t{n} << launch.log_lanes;
  launch.channel_tiles = static_cast<uint32_t>((a.shape.channels + channels - 1) / channels);
  const int64_t blocks = a.batch * launch.channel_tiles;
  append_uint8_kernel<dtype, n, dense><<<grid_of("append_rows", blocks), kThreads, 0, stream>>>(launch);
}

}  // namespace

void append_rows(const Append& a, int device, void* stream) {
  if (a.batch == 0 || a.shape.values() == 0) return;
  const DeviceGuard guard("append_rows", device);
  const auto to = static_cast<cudaStream_t>(stream);
  for_dtype(a.dtype, [&](auto dtype) {
    for_codec(a.codec, [&](auto codec) {
      using In = ValueOf<dtype()>;
      constexpr bool bytes = codec() == Codec::uint8;
      constexpr int n = bytes ? 4 : kVector<In, CodeOf<codec()>>;
      const int64_t divided = bytes ? a.shape.channels : a.shape.values();
      const bool vectors = divided % n == 0 && a.stride_b % n == 0 && a.cache_stride_bytes % 16 == 0 &&
                           aligned(a.cache, 16) && aligned(a.rows, sizeof(In) * n);
      if constexpr (bytes) {
        if (!is_dense(a)) return launch_uint8<dtype(), 1, false>(a, to);
        if (vectors) return launch_uint8<dtype(), n, true>(a, to);
        launch_uint8<dtype(), 1, true>(a, to);
      } else {
        if (!is_dense(a)) return launch_tiles<dtype(), codec()>(a, to);
        if (vectors) return launch_dense<dtype(), codec(), n>(a, to);
        launch_dense<dtype(), codec(), 1>(a, to);
      }
    });
  });
  guard.check(cudaGetLastError());
}

}  // namespace learndrop::cuda
