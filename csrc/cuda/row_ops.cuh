// What the append and gather kernels share: value types, vectors, the division of a row's offsets, the
// launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "row_ops.h"

namespace learndrop::cuda {

constexpr int kThreads = 256;
// Vectors that a thread has in flight. Little's law on an H200: 4.3 TB/s * 0.7 us / 132 SMs = 23 KB to be in
// flight on each; 2048 threads with four loads of 8 bytes have 64 KB.
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

// Values of the vectors of a move between two types: the wider side has 16 bytes.
template <class In, class Out>
constexpr int kVector = 16 / static_cast<int>(sizeof(In) > sizeof(Out) ? sizeof(In) : sizeof(Out));

template <class T, int n>
struct alignas(sizeof(T) * n) Pack {
  T v[n];
};

__device__ inline float quiet_nan() { return __uint_as_float(0x7fc00000u); }

__device__ inline float widen(float v) { return v; }
__device__ inline float widen(__nv_bfloat16 v) {
  return __uint_as_float(static_cast<uint32_t>(__bfloat16_as_ushort(v)) << 16);
}
__device__ inline float widen(__half v) {
  const float wide = __half2float(v);
  return wide != wide ? quiet_nan() : wide;
}

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

// The cache row that row b of the batch names; a bad one ends the kernel, as in index_select.
__device__ inline int64_t checked_row(const int64_t* index, int64_t b, int64_t rows) {
  const int64_t row = index[b];
  if (static_cast<uint64_t>(row) >= static_cast<uint64_t>(rows)) __trap();
  return row;
}

// How rows are spread over blocks: 2^log_group threads to a row and 256 / 2^log_group rows to a block while a
// row is short, then one block to a slice of `slice` vectors of one row.
struct Split {
  int log_group;
  uint32_t vectors, slice, slices;
  int64_t batch;

  Split(int64_t batch, int64_t values, int vector)
      : log_group(0),
        vectors(static_cast<uint32_t>(values / vector)),
        slice(kThreads * kUnroll),
        batch(batch) {
    // A row that fits a block's 256 threads at four vectors each is not cut (16 KB on the wider side); a
    // shorter one gets the threads that leave each four vectors, but a warp while it has vectors for one.
    const uint32_t quarter = (vectors + kUnroll - 1) / kUnroll;
    const uint32_t wanted = std::max(quarter, std::min<uint32_t>(vectors, 32));
    while ((1u << log_group) < wanted && (1 << log_group) < kThreads) ++log_group;
    slices = (vectors + slice - 1) / slice;
  }
  int64_t blocks() const {
    const int64_t rows = kThreads >> log_group;
    return (batch + rows - 1) / rows * slices;
  }
};

class DeviceGuard {
 public:
  DeviceGuard(const char* caller, int device) : caller_(caller) {
    check(cudaGetDevice(&before_));
    check(cudaSetDevice(device));
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  void check(cudaError_t error) const {
    if (error == cudaSuccess) return;
    throw std::runtime_error(std::string(caller_) + ": CUDA says " + cudaGetErrorName(error) + ", " +
                             cudaGetErrorString(error));
  }

 private:
  const char* caller_;
  int before_ = 0;
};

inline bool aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// A grid has at most 2^31 - 1 blocks in x.
inline unsigned int grid_of(const char* caller, int64_t blocks) {
  if (blocks > INT32_MAX)
    throw std::runtime_error(std::string(caller) + ": the batch needs more than 2^31 blocks");
  return static_cast<unsigned int>(blocks);
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

}  // namespace learndrop::cuda
