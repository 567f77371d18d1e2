// gather_rows on CUDA: a group of threads reads a row, or a block reads a slice of it.
#include <numeric>

#include "cuda/row_ops.cuh"

namespace learndrop::cuda {
namespace {

struct GatherLaunch {
  Gather g;
  RowIndex index;
  Split split;
  Divider channels;
  int64_t header;  // bytes
};
static_assert(sizeof(GatherLaunch) <= kMostParameters);

// Decodes the codes of a row, n at a time.
template <Codec codec, Dtype dtype, int n>
class Decoder {
  using Out = ValueOf<dtype>;

 public:
  __device__ Decoder(const GatherLaunch&, const unsigned char*, const Share&) {}

  // The vector at `at` of the output row. finite: no result is NaN.
  template <bool finite>
  __device__ Pack<Out, n> decoded(uint32_t, const Pack<CodeOf<codec>, n>& in) {
    Pack<Out, n> out;
#pragma unroll
    for (int i = 0; i < n; ++i) out.v[i] = convert<Out, false>(in.v[i]);
    return out;
  }
};

// Scale and zero of a thread's n channels stay in registers if all its vectors begin at the same channel, for
// which long rows are divided into columns. Otherwise they are read for each vector, 16 bytes at a time: on
// an H200 a warp's 8 * 2 scalar loads, 32 bytes apart, would be 16 * 8 lines, 128 cycles for 768 bytes moved,
// 1.4 TB/s; four loads of 16 bytes are 32 cycles.
template <Dtype dtype, int n>
class Decoder<Codec::uint8, dtype, n> {
  using Out = ValueOf<dtype>;
  static constexpr int kLoad = n % 4 == 0 ? 4 : 1;

 public:
  __device__ Decoder(const GatherLaunch& launch, const unsigned char* row, const Share& share)
      : table_(reinterpret_cast<const float*>(row)), channels_(launch.channels) {
    fixed_ = channels_.remainder(share.step * n) == 0;
    load(share.first);
  }

  // Whether scale and zero are the same for all vectors, and finite, so that no result is NaN.
  __device__ bool is_finite() const {
    bool finite = fixed_;
#pragma unroll
    for (int i = 0; i < n; ++i) finite = finite && isfinite(scale_[i]) && isfinite(zero_[i]);
    return finite;
  }

  template <bool finite>
  __device__ Pack<Out, n> decoded(uint32_t at, const Pack<uint8_t, n>& in) {
    if (!finite && !fixed_) load(at);
    Pack<Out, n> out;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float steps = static_cast<float>(in.v[i]);
      const float value = __fadd_rn(zero_[i], __fmul_rn(scale_[i], steps));
      out.v[i] = narrow<Out, false>(finite ? value : with_quiet_nan(value));
    }
    return out;
  }

 private:
  __device__ void load(uint32_t at) {
    const uint32_t channels = channels_.divisor;
    if (channels == 1) {
      const float scale = table_[0], zero = table_[1];
#pragma unroll
      for (int i = 0; i < n; ++i) {
        scale_[i] = scale;
        zero_[i] = zero;
      }
      return;
    }
    const float* scales = table_ + channels_.remainder(at * n);
#pragma unroll
    for (int i = 0; i < n; i += kLoad) {
      const auto scale = *reinterpret_cast<const Pack<float, kLoad>*>(scales + i);
      const auto zero = *reinterpret_cast<const Pack<float, kLoad>*>(scales + channels + i);
#pragma unroll
      for (int k = 0; k < kLoad; ++k) {
        scale_[i + k] = scale.v[k];
        zero_[i + k] = zero.v[k];
      }
    }
  }

  const float* table_;  // scale [C], zero [C]
  const Divider& channels_;
  bool fixed_;
  float scale_[n], zero_[n];
};

// A group of threads reads a slice of a row, n values per vector.
//
// Moves row_bytes + H*W*C * value_bytes(dtype) per row, each read or written once. Target: 90 % of the rate
// of a device copy of as many bytes.
template <Codec codec, Dtype dtype, int n>
__global__ void __launch_bounds__(kThreads) gather_kernel(const __grid_constant__ GatherLaunch launch) {
  using In = Pack<CodeOf<codec>, n>;
  using Out = ValueOf<dtype>;
  const Gather& g = launch.g;
  const Share share = launch.split.share();
  if (share.b >= launch.split.batch || share.first >= share.last) return;
  const auto* row = static_cast<const unsigned char*>(g.cache) +
                    checked_row(launch.index, share.b, g.cache_rows) * g.cache_stride_bytes;
  const In* in = reinterpret_cast<const In*>(row + launch.header);
  auto* out = reinterpret_cast<Pack<Out, n>*>(static_cast<Out*>(g.out) + share.b * g.shape.values());
  Decoder<codec, dtype, n> decode(launch, row, share);
  const auto load = [&](uint32_t at) { return in[at]; };
  const auto decode_all = [&](auto finite) {
    for_each_vector(share, load, [&](uint32_t at, const In& codes) {
      out[at] = decode.template decoded<decltype(finite)::value>(at, codes);
    });
  };
  if constexpr (codec == Codec::uint8 && dtype == Dtype::fp32) {
    // Two instructions per value give NaN its bits. Without them 512 rows of 7 x 7 x 2048 took 71 us on an
    // H200, and 76 with them.
    if (decode.is_finite()) return decode_all(std::true_type());
  }
  decode_all(std::false_type());
}

// The fewest columns with which all vectors of a thread begin at the same channel: the stride of a thread,
// columns * 256 vectors, is a multiple of a pixel's. 512 rows of 7 x 7 x 2048 uint8 to fp32 took 76 us on an
// H200 in two columns and 83 us in one, where scale and zero are read for each vector.
uint32_t channel_columns(int64_t channels, int n) {
  const auto pixel = static_cast<uint32_t>(channels / n);
  return channels % n == 0 ? pixel / std::gcd<uint32_t>(pixel, kThreads) : 1;
}

template <Codec codec, Dtype dtype, int n>
void launch_gather(const Gather& g, const DeviceGuard& guard, cudaStream_t stream) {
  const auto kernel = gather_kernel<codec, dtype, n>;
  const uint32_t columns = codec == Codec::uint8 ? channel_columns(g.shape.channels, n) : 1;
  const GatherLaunch launch{
      .g = g,
      .index = RowIndex(g.index, g.batch, g.index_on_host),
      .split = Split(g.batch, g.shape.values(), n, guard.resident_blocks(kernel), columns),
      .channels = Divider(g.shape.channels),
      .header = header_bytes(g.codec, g.shape)};
  gather_kernel<codec, dtype, n><<<guard.grid(launch.split.blocks()), kThreads, 0, stream>>>(launch);
}

}  // namespace

void gather_rows(const Gather& g, int device, void* stream) {
  if (g.batch == 0 || g.shape.values() == 0) return;
  const DeviceGuard guard("gather_rows", device);
  const auto to = static_cast<cudaStream_t>(stream);
  for_codec(g.codec, [&](auto codec) {
    for_dtype(g.dtype, [&](auto dtype) {
      constexpr int n = kVector<CodeOf<codec()>, ValueOf<dtype()>>;
      const int64_t channels = g.shape.channels;
      const bool by_channel = g.codec == Codec::uint8 && channels > 1;
      const bool vectors = (by_channel ? channels : g.shape.values()) % n == 0 &&
                           g.cache_stride_bytes % 16 == 0 && aligned(g.cache, 16) && aligned(g.out, 16);
      if (vectors) return launch_gather<codec(), dtype(), n>(g, guard, to);
      launch_gather<codec(), dtype(), 1>(g, guard, to);
    });
  });
  guard.check(cudaGetLastError());
}

}  // namespace learndrop::cuda
