// Shared by the kernels: value types, vectors, the division of rows among threads, the launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "row_ops.h"

namespace learndrop::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
// Vectors that a thread has in flight. By Little's law an H200 needs 4.3 TB/s * 0.7 us / 132 SMs = 23 KB in
// flight per SM; 2048 threads with four loads of 8 bytes have 64 KB.
constexpr int kUnroll = 4;

template <int>
struct Stored;
template <>
struct Stored<0> {
  using type = float;
};
template <>
struct Stored<1> {
  using type = __nv_bfloat16;
};
template <>
struct Stored<2> {
  using type = __half;
};
template <>
struct Stored<3> {
  using type = uint8_t;
};
template <Dtype dtype>
using ValueOf = typename Stored<static_cast<int>(dtype)>::type;
template <Codec codec>
using CodeOf = typename Stored<static_cast<int>(codec)>::type;

// Values per vector of a conversion between two types: the wider side has 16 bytes.
template <class In, class Out>
constexpr int kVector = 16 / static_cast<int>(sizeof(In) > sizeof(Out) ? sizeof(In) : sizeof(Out));

template <class T, int n>
struct alignas(sizeof(T) * n) Pack {
  T v[n];
};

// NaN is 0x7fffffff in the arithmetic of a GPU, and 0x7fc00000 in row_ops.h.
__device__ inline float with_quiet_nan(float v) { return v != v ? __uint_as_float(0x7fc00000u) : v; }

__device__ inline float widen(float v) { return v; }
__device__ inline float widen(__nv_bfloat16 v) {
  return __uint_as_float(static_cast<uint32_t>(__bfloat16_as_ushort(v)) << 16);
}
__device__ inline float widen(__half v) { return with_quiet_nan(__half2float(v)); }

template <class Out, bool saturate>
__device__ inline Out narrow(float v) {
  if constexpr (std::is_same_v<Out, float>) {
    return v;
  } else if constexpr (std::is_same_v<Out, __nv_bfloat16>) {
    return v != v ? __ushort_as_bfloat16(0x7fc0) : __float2bfloat16_rn(v);
  } else {
    const float near = saturate ? fminf(fmaxf(v, -kLargestFp16), kLargestFp16) : v;
    return v != v ? __ushort_as_half(0x7e00) : __float2half_rn(near);
  }
}

template <class Out, bool saturate, class In>
__device__ inline Out convert(In v) {
  if constexpr (std::is_same_v<In, Out> && !saturate) {
    return v;
  } else {
    return narrow<Out, saturate>(widen(v));
  }
}

// n / d for 0 <= n < 2^31 and 1 <= d < 2^31 without a division: with s = ceil(log2 d) and
// m = floor(2^32 * (2^s - d) / d) + 1, n / d is (mulhi(n, m) + n) >> s (Granlund and Montgomery, 1994).
struct Divider {
  uint32_t divisor, multiplier, shift;

  explicit Divider(int64_t d) : divisor(static_cast<uint32_t>(d)), shift(0) {
    while ((uint64_t{1} << shift) < static_cast<uint64_t>(d)) ++shift;
    multiplier = static_cast<uint32_t>((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d) / d + 1);
  }
  __device__ uint32_t divide(uint32_t n) const { return (__umulhi(n, multiplier) + n) >> shift; }
  __device__ uint32_t remainder(uint32_t n) const { return n - divide(n) * divisor; }
};

// A launch takes at most so many bytes of parameters.
constexpr std::size_t kMostParameters = 4096;

// The numbers of a batch's rows, in device memory or in the launch's own parameters. The copy to the device
// that the latter save costs the host as much as the launch, and the stream a gap.
struct RowIndex {
  const int64_t* device = nullptr;
  int32_t held[kHeldRows];

  RowIndex(const int64_t* index, int64_t count, bool on_host) {
    if (on_host) {
      std::transform(index, index + count, held, [](int64_t row) { return static_cast<int32_t>(row); });
    } else {
      device = index;
    }
  }
  __device__ int64_t operator[](int64_t i) const { return device != nullptr ? device[i] : held[i]; }
};

// The cache row of row b of the batch. A bad index traps, as in index_select.
template <class Index>
__device__ inline int64_t checked_row(const Index& index, int64_t b, int64_t rows) {
  const int64_t row = index[b];
  if (static_cast<uint64_t>(row) >= static_cast<uint64_t>(rows)) __trap();
  return row;
}

template <class T>
constexpr T ceil_div(T n, T d) {
  return (n + d - 1) / d;
}

// The vectors of one thread: first, first + step, ... below last in row b.
struct Share {
  int64_t b;
  uint32_t first, last, step;
};

// The division of rows among blocks. Short rows: 2^log_group threads per row, 256 / 2^log_group rows per
// block. Long rows: `columns` blocks per slice of `slice` vectors of a row, each with every `columns`-th
// group of 256 vectors.
struct Split {
  int log_group = 0;
  uint32_t vectors, slice = kThreads * kUnroll, slices, columns = 1;
  int64_t batch;

  // resident: number of blocks that the device runs at once. wanted_columns: for rows of at least two vectors
  // per thread.
  Split(int64_t batch, int64_t values, int vector, int64_t resident, uint32_t wanted_columns = 1)
      : vectors(static_cast<uint32_t>(values / vector)), batch(batch) {
    // A row of up to four vectors for each of a block's 256 threads is not divided (16 KB on the wider side).
    // A shorter row gets so many threads that each has four vectors, or up to a warp with one vector each.
    const uint32_t quarter = ceil_div<uint32_t>(vectors, kUnroll);
    const uint32_t wanted = std::max(quarter, std::min<uint32_t>(vectors, kWarp));
    while ((1u << log_group) < wanted && (1 << log_group) < kThreads) ++log_group;
    if (vectors >= 2 * kThreads * uint64_t{wanted_columns}) columns = wanted_columns;
    slice *= columns;
    slices = ceil_div(vectors, slice);
    if (slices > 1 && columns == 1) fill_waves(resident);
  }

  int64_t blocks() const { return ceil_div<int64_t>(batch, kThreads >> log_group) * slices * columns; }

  __device__ Share share() const {
    const uint32_t threads = 1u << log_group;
    const uint32_t of_row = blockIdx.x % (slices * columns), rows = blockIdx.x / (slices * columns);
    const uint32_t begin = of_row / columns * slice;
    return {.b = static_cast<int64_t>(rows) * (kThreads >> log_group) + (threadIdx.x >> log_group),
            .first = begin + of_row % columns * kThreads + (threadIdx.x & (threads - 1)),
            .last = min(begin + slice, vectors),
            .step = threads * columns};
  }

 private:
  // Shortens slices, to no less than half, to fill the last wave of blocks. 128 rows of 25,088 vectors on an
  // H200 (132 SMs with 8 blocks each): 25 slices are 3,200 blocks, 3.03 waves that take the time of 4 * 1,024
  // vectors; 33 slices of 768 are 4,224 blocks, 4.00 waves, 4 * 768. With 16 waves or more the last one is at
  // most 6 % of the time.
  void fill_waves(int64_t resident) {
    constexpr uint32_t kCandidates = 64;
    const uint32_t fewest = slices, most = fewest + std::min(fewest, kCandidates);
    if (batch * fewest >= 16 * resident) return;
    int64_t least = INT64_MAX;
    for (uint32_t wanted = fewest; wanted <= most; ++wanted) {
      // Whole warps, so that slices begin at multiples of 256 bytes on the wider side.
      const uint32_t length = ceil_div<uint32_t>(ceil_div(vectors, wanted), kWarp) * kWarp;
      const uint32_t count = ceil_div(vectors, length);
      const int64_t time = ceil_div<int64_t>(batch * count, resident) * length;
      if (time >= least) continue;
      least = time;
      slice = length;
      slices = count;
    }
  }
};

// Calls store(at, load(at)) for each vector of the share, with kUnroll loads before their stores.
template <class Load, class Store>
__device__ inline void for_each_vector(const Share& share, const Load& load, const Store& store) {
  for (uint32_t v = share.first; v < share.last; v += share.step * kUnroll) {
    decltype(load(v)) loaded[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const uint32_t at = v + u * share.step;
      if (at < share.last) loaded[u] = load(at);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const uint32_t at = v + u * share.step;
      if (at < share.last) store(at, loaded[u]);
    }
  }
}

// Makes `device` current, and restores the previous device at the end.
class DeviceGuard {
 public:
  DeviceGuard(const char* caller, int device) : caller_(caller), device_(device) {
    check(cudaGetDevice(&before_));
    check(cudaSetDevice(device));
  }
  ~DeviceGuard() {
    if (cudaSetDevice(before_) != cudaSuccess) cudaGetLastError();
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  // Throws std::runtime_error for an error, and clears it, since the runtime would report it to the next
  // call.
  void check(cudaError_t error) const {
    if (error == cudaSuccess) return;
    cudaGetLastError();
    throw std::runtime_error(std::string(caller_) + ": CUDA says " + cudaGetErrorName(error) + ", " +
                             cudaGetErrorString(error));
  }

  // The number of blocks of kThreads threads of a kernel that the device runs at once. The runtime is asked
  // once for each device and kernel.
  template <class Kernel>
  int64_t resident_blocks(Kernel kernel) const {
    static std::mutex mutex;
    static std::map<std::pair<int, Kernel>, int64_t> known;
    const std::lock_guard<std::mutex> lock(mutex);
    int64_t& resident = known[{device_, kernel}];
    if (resident == 0) {
      int processors = 0, blocks = 0;
      check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device_));
      check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, 0));
      resident = int64_t{processors} * blocks;
    }
    return resident;
  }

  // A grid has at most 2^31 - 1 blocks in x.
  unsigned int grid(int64_t blocks) const {
    if (blocks > INT32_MAX)
      throw std::runtime_error(std::string(caller_) + ": the batch needs more than 2^31 blocks");
    return static_cast<unsigned int>(blocks);
  }

 private:
  const char* caller_;
  int device_;
  int before_ = 0;
};

inline bool aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

template <class Call>
void for_dtype(Dtype dtype, const Call& call) {
  if (dtype == Dtype::fp32) return call(std::integral_constant<Dtype, Dtype::fp32>());
  if (dtype == Dtype::bf16) return call(std::integral_constant<Dtype, Dtype::bf16>());
  call(std::integral_constant<Dtype, Dtype::fp16>());
}

template <class Call>
void for_codec(Codec codec, const Call& call) {
  if (codec == Codec::fp32) return call(std::integral_constant<Codec, Codec::fp32>());
  if (codec == Codec::bf16) return call(std::integral_constant<Codec, Codec::bf16>());
  if (codec == Codec::fp16) return call(std::integral_constant<Codec, Codec::fp16>());
  call(std::integral_constant<Codec, Codec::uint8>());
}

// Whether all vectors of n values in a dense row, of which `divided` are contiguous, are aligned to their
// size.
template <class In>
bool admits_vectors(const Append& a, int n, int64_t divided) {
  return divided % n == 0 && a.stride_b % n == 0 && a.cache_stride_bytes % 16 == 0 && aligned(a.cache, 16) &&
         aligned(a.rows, static_cast<int64_t>(sizeof(In)) * n);
}

// append_rows for the codec uint8; the caller checks the launch.
void append_uint8_rows(const Append& append, const DeviceGuard& guard, cudaStream_t stream);

}  // namespace learndrop::cuda
