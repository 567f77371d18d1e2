#include "host_rows.h"

#include <vector>

#include "cuda/row_ops.cuh"

namespace learndrop::cuda {
namespace {

// PCIe 5 x16 at 55 GB/s and about 1.5 us needs 83 KB in flight; 16 blocks of 256 threads with four loads of
// 16 bytes have 262 KB, and leave the other SMs to the training step.
constexpr int kHostBlocks = 16;
constexpr int kHostUnroll = 4;

struct HostGather {
  const unsigned char* source;
  int64_t source_stride_bytes;
  const int64_t* index;
  int64_t count;
  unsigned char* into;
  int64_t into_stride_bytes;
  int64_t vectors;  // of 16 bytes in a row
};

// One block brings one row at a time, whole vectors by neighbouring threads.
__global__ void __launch_bounds__(kThreads) gather_host_kernel(const __grid_constant__ HostGather g) {
  for (int64_t i = blockIdx.x; i < g.count; i += gridDim.x) {
    const auto* from = reinterpret_cast<const uint4*>(g.source + g.index[i] * g.source_stride_bytes);
    auto* to = reinterpret_cast<uint4*>(g.into + i * g.into_stride_bytes);
    for (int64_t v = threadIdx.x; v < g.vectors; v += kThreads * kHostUnroll) {
      uint4 packs[kHostUnroll];
#pragma unroll
      for (int u = 0; u < kHostUnroll; ++u) {
        if (v + u * kThreads < g.vectors) packs[u] = from[v + u * kThreads];
      }
#pragma unroll
      for (int u = 0; u < kHostUnroll; ++u) {
        if (v + u * kThreads < g.vectors) to[v + u * kThreads] = packs[u];
      }
    }
  }
}

const void* source_of(const HostRows& rows, int64_t i) {
  return static_cast<const char*>(rows.source) + rows.index[i] * rows.source_stride_bytes;
}

void* target_of(const HostRows& rows, int64_t i) {
  return static_cast<char*>(rows.into) + i * rows.into_stride_bytes;
}

// One call for all rows: false where the driver has none, and for the default stream, which may not take it.
// (CUDA 12.8 and 12.9 have it with other arguments: rows are copied one by one there.)
bool copy_batch(const HostRows& rows, cudaStream_t stream, const DeviceGuard& guard) {
#if CUDART_VERSION >= 13000
  if (stream == nullptr) return false;
  std::vector<const void*> sources(rows.count);
  std::vector<void*> targets(rows.count);
  const std::vector<std::size_t> sizes(rows.count, rows.row_bytes);
  for (int64_t i = 0; i < rows.count; ++i) {
    sources[i] = source_of(rows, i);
    targets[i] = target_of(rows, i);
  }
  cudaMemcpyAttributes attributes{};
  attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
  std::size_t first = 0;
  const cudaError_t error = cudaMemcpyBatchAsync(targets.data(), sources.data(), sizes.data(), rows.count,
                                                 &attributes, &first, 1, stream);
  if (error == cudaErrorNotSupported || error == cudaErrorCallRequiresNewerDriver) {
    cudaGetLastError();
    return false;
  }
  guard.check(error);
  return true;
#else
  static_cast<void>(rows), static_cast<void>(stream), static_cast<void>(guard);
  return false;
#endif
}

}  // namespace

void pin(void* address, int64_t bytes, int device) {
  const DeviceGuard guard("pin", device);
  const cudaError_t error =
      cudaHostRegister(address, bytes, cudaHostRegisterPortable | cudaHostRegisterMapped);
  // The runtime keeps the error for its next call, which is not at fault.
  if (error != cudaSuccess) cudaGetLastError();
  guard.check(error);
}

void unpin(void* address) {
  if (cudaHostUnregister(address) != cudaSuccess) cudaGetLastError();
}

void copy_host_rows(const HostRows& rows, int device, void* stream) {
  if (rows.count == 0) return;
  const DeviceGuard guard("copy_host_rows", device);
  const auto to = static_cast<cudaStream_t>(stream);
  if (copy_batch(rows, to, guard)) return;
  for (int64_t i = 0; i < rows.count; ++i) {
    guard.check(
        cudaMemcpyAsync(target_of(rows, i), source_of(rows, i), rows.row_bytes, cudaMemcpyHostToDevice, to));
  }
}

void gather_host_rows(const HostRows& rows, int device, void* stream) {
  if (rows.count == 0) return;
  const DeviceGuard guard("gather_host_rows", device);
  void* source = nullptr;
  guard.check(cudaHostGetDevicePointer(&source, const_cast<void*>(rows.source), 0));
  const HostGather gather{
      static_cast<const unsigned char*>(source), rows.source_stride_bytes, rows.index,         rows.count,
      static_cast<unsigned char*>(rows.into),    rows.into_stride_bytes,   rows.row_bytes / 16};
  const auto blocks = static_cast<unsigned int>(std::min<int64_t>(rows.count, kHostBlocks));
  gather_host_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(gather);
  guard.check(cudaGetLastError());
}

}  // namespace learndrop::cuda
