// gather_rows on CUDA: one group of threads reads one row, or one block one slice of it.
#include "cuda/row_ops.cuh"

namespace learndrop::cuda {
namespace {

struct GatherLaunch {
  Gather g;
  Split split;
  Divider channels, width;
  int64_t header;  // bytes
};

constexpr uint32_t kOutside = 0xffffffffu;

// The offset in the cached row of the value at offset `o` of the output row, or kOutside.
__device__ inline uint32_t moved_offset(const GatherLaunch& launch, uint32_t o, bool flip, int64_t dy,
                                        int64_t dx) {
  const uint32_t pixel = launch.channels.divide(o);
  const uint32_t line = launch.width.divide(pixel);
  const int64_t width = launch.g.shape.width;
  const int64_t y = static_cast<int64_t>(line) - dy;
  const int64_t x = static_cast<int64_t>(pixel) - line * width - dx;
  if (y < 0 || y >= launch.g.shape.height || x < 0 || x >= width) return kOutside;
  const int64_t from = y * width + (flip ? width - 1 - x : x);
  return static_cast<uint32_t>(from * launch.g.shape.channels + (o - pixel * launch.channels.divisor));
}

// scale and zero of n channels from c on; a row of one channel gives that one to all.
template <int n>
__device__ inline void load_channels(const float* table, uint32_t channels, uint32_t c, float (&to)[n]) {
  if (channels == 1) {
#pragma unroll
    for (int i = 0; i < n; ++i) to[i] = table[0];
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) to[i] = table[c + i];
  }
}

template <Codec codec, Dtype dtype, int n>
__device__ inline Pack<ValueOf<dtype>, n> decode(const GatherLaunch& launch, const unsigned char* row,
                                                 uint32_t offset, const Pack<CodeOf<codec>, n>& in) {
  using Out = ValueOf<dtype>;
  Pack<Out, n> out;
  if constexpr (codec == Codec::uint8) {
    const uint32_t channels = launch.channels.divisor;
    const float* table = reinterpret_cast<const float*>(row);
    float scale[n], zero[n];
    const uint32_t c = launch.channels.remainder(offset);
    load_channels<n>(table, channels, c, scale);
    load_channels<n>(table + channels, channels, c, zero);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float steps = static_cast<float>(in.v[i]);
      out.v[i] = narrow<Out, false>(__fadd_rn(zero[i], __fmul_rn(scale[i], steps)));
    }
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) out.v[i] = convert<Out, false>(in.v[i]);
  }
  return out;
}

// One group of threads reads one slice of one row, n values to a vector; a moved vector lies in one pixel.
template <Codec codec, Dtype dtype, int n, bool moved>
__global__ void __launch_bounds__(kThreads) gather_kernel(const __grid_constant__ GatherLaunch launch) {
  using In = CodeOf<codec>;
  using Out = ValueOf<dtype>;
  const Gather& g = launch.g;
  const Split& split = launch.split;
  const uint32_t threads = 1u << split.log_group;
  const uint32_t lane = threadIdx.x & (threads - 1);
  const int64_t b = static_cast<int64_t>(blockIdx.x / split.slices) * (kThreads >> split.log_group) +
                    (threadIdx.x >> split.log_group);
  if (b >= split.batch) return;
  const auto* row = static_cast<const unsigned char*>(g.cache) +
                    checked_row(g.index, b, g.cache_rows) * g.cache_stride_bytes;
  const In* in = reinterpret_cast<const In*>(row + launch.header);
  Out* out = static_cast<Out*>(g.out) + b * g.shape.values();
  bool flip = false;
  int64_t dy = 0, dx = 0;
  if constexpr (moved) {
    flip = g.flip != nullptr && g.flip[b] != 0;
    if (g.shift != nullptr) {
      dy = g.shift[2 * b];
      dx = g.shift[2 * b + 1];
    }
  }
  const uint32_t first = blockIdx.x % split.slices * split.slice;
  const uint32_t last = min(first + split.slice, split.vectors);
  for (uint32_t v = first + lane; v < last; v += threads * kUnroll) {
    Pack<In, n> packs[kUnroll];
    uint32_t offsets[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const uint32_t at = v + u * threads;
      offsets[u] = kOutside;
      if (at < last) offsets[u] = moved ? moved_offset(launch, at * n, flip, dy, dx) : at * n;
      if (offsets[u] != kOutside) packs[u] = *reinterpret_cast<const Pack<In, n>*>(in + offsets[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const uint32_t at = v + u * threads;
      if (at >= last) break;
      Pack<Out, n> values{};
      if (offsets[u] != kOutside) values = decode<codec, dtype, n>(launch, row, offsets[u], packs[u]);
      *reinterpret_cast<Pack<Out, n>*>(out + static_cast<int64_t>(at) * n) = values;
    }
  }
}

template <Codec codec, Dtype dtype, int n, bool moved>
void launch_gather(const Gather& g, cudaStream_t stream) {
  const GatherLaunch launch{g, Split(g.batch, g.shape.values(), n), Divider(g.shape.channels),
                            Divider(g.shape.width), header_bytes(g.codec, g.shape)};
  gather_kernel<codec, dtype, n, moved>
      <<<grid_of("gather_rows", launch.split.blocks()), kThreads, 0, stream>>>(launch);
}

}  // namespace

void gather_rows(const Gather& g, int device, void* stream) {
  if (g.batch == 0 || g.shape.values() == 0) return;
  const DeviceGuard guard("gather_rows", device);
  const bool moved = g.flip != nullptr || g.shift != nullptr;
  for_codec(g.codec, [&](auto codec) {
    for_dtype(g.dtype, [&](auto dtype) {
      constexpr int n = kVector<CodeOf<codec()>, ValueOf<dtype()>>;
      const int64_t channels = g.shape.channels;
      const bool by_channel = moved || (g.codec == Codec::uint8 && channels > 1);
      const bool vectors = (by_channel ? channels : g.shape.values()) % n == 0 &&
                           g.cache_stride_bytes % 16 == 0 && aligned(g.cache, 16) && aligned(g.out, 16);
      const auto to = static_cast<cudaStream_t>(stream);
      if (vectors && moved) return launch_gather<codec(), dtype(), n, true>(g, to);
      if (vectors) return launch_gather<codec(), dtype(), n, false>(g, to);
      if (moved) return launch_gather<codec(), dtype(), 1, true>(g, to);
      launch_gather<codec(), dtype(), 1, false>(g, to);
    });
  });
  guard.check(cudaGetLastError());
}

}  // namespace learndrop::cuda
