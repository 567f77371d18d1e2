// A CUDA runtime that runs kernels on the CPU, block after block and thread after thread. Kernels with barriers
// have each thread on a stack of its own. Streams do nothing: work is done when it is enqueued.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)

#ifndef CUDART_VERSION
#define CUDART_VERSION 13000
#endif

struct uint3 {
  unsigned int x, y, z;
};
struct alignas(16) uint4 {
  unsigned int x, y, z, w;
};

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorCallRequiresNewerDriver = 36,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
enum cudaMemcpySrcAccessOrder { cudaMemcpySrcAccessOrderStream = 1 };
struct cudaMemLocation {
  int type, id;
};
struct cudaMemcpyAttributes {
  cudaMemcpySrcAccessOrder srcAccessOrder;
  cudaMemLocation srcLocHint, dstLocHint;
  unsigned int flags;
};
constexpr unsigned int cudaHostRegisterPortable = 1, cudaHostRegisterMapped = 2;
using cudaStream_t = struct CUstream_st*;

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetLastError();
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int threads, std::size_t) {
  *blocks = 2048 / threads;
  return cudaSuccess;
}
cudaError_t cudaHostRegister(void* address, std::size_t bytes, unsigned int flags);
cudaError_t cudaHostUnregister(void* address);
cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned int flags);
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaMemcpyBatchAsync(void* const* to, const void* const* from, const std::size_t* bytes, std::size_t count,
                                 cudaMemcpyAttributes* attributes, std::size_t* first, std::size_t attribute_count,
                                 cudaStream_t stream);

namespace cudashim {

constexpr int kDevices = 5;  // device d has 1 + d SMs

extern uint3 thread_index, block_index, block_size, grid_size;

// What a launch may be checked with: orders of blocks and threads, and what goes wrong next.
struct Order {
  bool blocks_backwards = false, threads_backwards = false;
};
extern Order order;
enum class Fault { none, trap, divergent_barrier };
Fault take_fault();                                    // of the kernels since the last call
void fail_call(const char* function, cudaError_t error);  // the next call of a function of the runtime, or "launch"
long launches();

struct Config {
  unsigned int grid, block;
  std::size_t shared;
  cudaStream_t stream;
};
void launch(const Config& config, bool barriers, const std::function<void()>& thread);
[[noreturn]] void trap();
void barrier();
unsigned int shuffle_xor(unsigned int mask, unsigned int value, int lanes);
void* shared_memory(int number, std::size_t bytes);
template <class T>
T& shared(int number) {
  return *static_cast<T*>(shared_memory(number, sizeof(T)));
}

template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
// A GPU's single-precision arithmetic has one NaN, whatever NaN comes in.
inline float one_nan(float v) { return v != v ? bits<float>(0x7fffffffu) : v; }
// Of -0 and 0, -0 is the smaller one.
inline bool less(float a, float b) { return a < b || (a == b && std::signbit(a) > std::signbit(b)); }
inline float least(float a, float b) { return one_nan(a != a ? b : b != b ? a : less(b, a) ? b : a); }
inline float greatest(float a, float b) { return one_nan(a != a ? b : b != b ? a : less(a, b) ? b : a); }

}  // namespace cudashim

#define threadIdx cudashim::thread_index
#define blockIdx cudashim::block_index
#define blockDim cudashim::block_size
#define gridDim cudashim::grid_size
#define __syncthreads() cudashim::barrier()
#define __trap() cudashim::trap()
using std::isfinite;
#define fminf(a, b) cudashim::least(a, b)
#define fmaxf(a, b) cudashim::greatest(a, b)

inline unsigned int min(unsigned int a, unsigned int b) { return b < a ? b : a; }
inline unsigned int max(unsigned int a, unsigned int b) { return a < b ? b : a; }
inline unsigned int __umulhi(unsigned int a, unsigned int b) { return static_cast<unsigned int>(std::uint64_t{a} * b >> 32); }
inline unsigned int __float_as_uint(float v) { return cudashim::bits<unsigned int>(v); }
inline float __uint_as_float(unsigned int v) { return cudashim::bits<float>(v); }
inline float __fadd_rn(float a, float b) { return cudashim::one_nan(a + b); }
inline float __fsub_rn(float a, float b) { return cudashim::one_nan(a - b); }
inline float __fmul_rn(float a, float b) { return cudashim::one_nan(a * b); }
inline float __fdiv_rn(float a, float b) { return cudashim::one_nan(a / b); }
inline unsigned int __shfl_xor_sync(unsigned int mask, unsigned int v, int lanes) {
  return cudashim::shuffle_xor(mask, v, lanes);
}
inline float __shfl_xor_sync(unsigned int mask, float v, int lanes) {
  return __uint_as_float(cudashim::shuffle_xor(mask, __float_as_uint(v), lanes));
}
inline int __float2int_rn(float v) {
  if (v != v) return 0;
  return v >= 0x1p31f ? INT32_MAX : v < -0x1p31f ? INT32_MIN : static_cast<int>(std::nearbyint(v));
}
