// append_rows on CUDA: dense rows by vectors, strided images by tiles. uint8 is in row_ops_append_uint8.cu.
#include "cuda/tiles.cuh"

namespace learndrop::cuda {
namespace {

struct DenseLaunch {
  Append a;
  Split split;
};

// A group of threads writes a slice of a row, n values per vector.
//
// Moves H*W*C * value_bytes(dtype) + row_bytes per row, each read or written once. Target: 90 % of the rate
// of a device copy of as many bytes.
template <Dtype dtype, Codec codec, int n>
__global__ void __launch_bounds__(kThreads) append_dense_kernel(const __grid_constant__ DenseLaunch launch) {
  using In = ValueOf<dtype>;
  using Out = CodeOf<codec>;
  const Append& a = launch.a;
  const Share share = launch.split.share();
  if (share.b >= launch.split.batch) return;
  const In* in = static_cast<const In*>(a.rows) + share.b * a.stride_b;
  Out* out = reinterpret_cast<Out*>(static_cast<unsigned char*>(a.cache) +
                                    checked_row(a.index, share.b, a.cache_rows) * a.cache_stride_bytes);
  for_each_vector(
      share,
      [&](uint32_t at) { return *reinterpret_cast<const Pack<In, n>*>(in + static_cast<int64_t>(at) * n); },
      [&](uint32_t at, const Pack<In, n>& values) {
        Pack<Out, n> codes;
#pragma unroll
        for (int i = 0; i < n; ++i) codes.v[i] = convert<Out, codec == Codec::fp16>(values.v[i]);
        *reinterpret_cast<Pack<Out, n>*>(out + static_cast<int64_t>(at) * n) = codes;
      });
}

// A block writes a tile of a row. Three channels fill three quarters of a tile of 4 x 256, and would fill a
// tenth of one of 32 x 32.
//
// Moves as many bytes as append_dense_kernel, by loads and stores of 2 or 4 bytes, at 56 % of the rate of a
// device copy on an H100 for 512 rows of 2048 x 7 x 7.
template <Dtype dtype, Codec codec>
__global__ void __launch_bounds__(kThreads) append_tile_kernel(const __grid_constant__ TileLaunch launch) {
  using In = ValueOf<dtype>;
  using Out = CodeOf<codec>;
  __shared__ In tile[kTile + kWarp];
  const Append& a = launch.a;
  const uint32_t tiles = launch.pixel_tiles * launch.channel_tiles;
  const int64_t b = blockIdx.x / tiles;
  const uint32_t of_row = blockIdx.x % tiles;
  const TileOrigin origin{.channel = of_row % launch.channel_tiles * launch.shape.channels(),
                          .pixel = of_row / launch.channel_tiles * launch.shape.pixels()};
  read_tile(a, launch.width, static_cast<const In*>(a.rows) + b * a.stride_b, launch.shape, origin, tile);
  __syncthreads();
  Out* out = reinterpret_cast<Out*>(static_cast<unsigned char*>(a.cache) +
                                    checked_row(a.index, b, a.cache_rows) * a.cache_stride_bytes);
  write_tile(a, launch.shape, origin, tile,
             [&](uint32_t at, In value) { out[at] = convert<Out, codec == Codec::fp16>(value); });
}

template <Dtype dtype, Codec codec, int n>
void launch_dense(const Append& a, const DeviceGuard& guard, cudaStream_t stream) {
  const auto kernel = append_dense_kernel<dtype, codec, n>;
  const DenseLaunch launch{.a = a,
                           .split = Split(a.batch, a.shape.values(), n, guard.resident_blocks(kernel))};
  append_dense_kernel<dtype, codec, n><<<guard.grid(launch.split.blocks()), kThreads, 0, stream>>>(launch);
}

template <Dtype dtype, Codec codec>
void launch_tiles(const Append& a, const DeviceGuard& guard, cudaStream_t stream) {
  const TileLaunch launch(a);
  const unsigned int blocks = guard.grid(a.batch * launch.pixel_tiles * launch.channel_tiles);
  append_tile_kernel<dtype, codec><<<blocks, kThreads, 0, stream>>>(launch);
}

}  // namespace

void append_rows(const Append& a, int device, void* stream) {
  if (a.batch == 0 || a.shape.values() == 0) return;
  const DeviceGuard guard("append_rows", device);
  const auto to = static_cast<cudaStream_t>(stream);
  for_codec(a.codec, [&](auto codec) {
    if constexpr (codec() == Codec::uint8) {
      append_uint8_rows(a, guard, to);
    } else {
      for_dtype(a.dtype, [&](auto dtype) {
        using In = ValueOf<dtype()>;
        constexpr int n = kVector<In, CodeOf<codec()>>;
        if (!is_dense(a)) return launch_tiles<dtype(), codec()>(a, guard, to);
        if (admits_vectors<In>(a, n, a.shape.values()))
          return launch_dense<dtype(), codec(), n>(a, guard, to);
        launch_dense<dtype(), codec(), 1>(a, guard, to);
      });
    }
  });
  guard.check(cudaGetLastError());
}

}  // namespace learndrop::cuda
