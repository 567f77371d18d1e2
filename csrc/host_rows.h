// Rows in pinned host memory, brought to a GPU by its copy engines or by a kernel that reads them where they
// lie.
#pragma once

#include <cstdint>

namespace learndrop {

// Row index[i] goes to into + i * into_stride_bytes. All sizes are multiples of 16 bytes.
struct HostRows {
  const void* source;  // [R, source_stride_bytes], pinned by `pin`
  int64_t source_stride_bytes;
  const int64_t* index;  // [count], checked; the host's for copy_rows, the device's for gather_rows
  int64_t count;
  void* into;  // [count, into_stride_bytes] on the device
  int64_t into_stride_bytes;
  int64_t row_bytes;
};

namespace cuda {

// Pins host memory for all GPUs, and gives it back. Throw std::runtime_error.
void pin(void* address, int64_t bytes, int device);
void unpin(void* address);

// Both enqueue on `stream` (a cudaStream_t) and throw std::runtime_error when that fails. The index of
// copy_host_rows is read before it returns.
void copy_host_rows(const HostRows& rows, int device, void* stream);
void gather_host_rows(const HostRows& rows, int device, void* stream);

}  // namespace cuda
}  // namespace learndrop
