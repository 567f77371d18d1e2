// Rows from the host, by the driver and by the kernel, and what calls that fail leave behind.
#pragma once

#include <algorithm>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "checks.h"
#include "cuda/row_ops.cuh"
#include "hooks.h"
#include "host_rows.h"
#include "inputs.h"

void host_rows() {
  Random random{9};
  for (const int64_t bytes : {16, 48, 128, 512, 4096, 4112, 16384, 65552})
    for (const int64_t count : {0, 1, 2, 15, 16, 17, 31, 32, 33, 64, 300, 896}) {
      const int64_t R = 20, from_stride = bytes + 16 * random.below(3), into_stride = bytes + 16 * random.below(3);
      if (count * bytes > 4 << 20) continue;
      const Exact source((R - 1) * from_stride + bytes, 0, 0), rows(8 * count, 0, 0);
      for (int64_t i = 0; i < source.size(); ++i) source.data()[i] = static_cast<unsigned char>(random.next());
      auto* const index = reinterpret_cast<int64_t*>(rows.data());
      for (int64_t i = 0; i < count; ++i) index[i] = random.below(R);
      cuda::pin(source.data(), source.size(), 1);
      for (int way = 0; way < 5; ++way) {
        const Exact into(std::max<int64_t>(0, count - 1) * into_stride + bytes, 0, 0xcd);
        HostRows move{source.data(), from_stride, index, count, into.data(), into_stride, bytes};
        move.index_on_host = way == 4;
        hooks::watch(into.data(), into.size());
        in_order(way % 2);
        // The batch, row by row on the default stream, row by row where the driver has no batch, the kernel with both indices.
        if (way == 2) cudashim::fail_call("cudaMemcpyBatchAsync", cudaErrorNotSupported);
        if (way < 3)
          cuda::copy_host_rows(move, 1, way == 1 ? nullptr : kStream);
        else
          cuda::gather_host_rows(move, 1, kStream);
        cudashim::fail_call("cudaMemcpyBatchAsync", cudaSuccess);
        ++cases;
        if (way >= 3 && count > 0 && hooks::active) {
          std::vector<uint32_t> wanted(into.size(), 0);
          for (int64_t i = 0; i < count; ++i) std::fill_n(wanted.begin() + i * into_stride, bytes, 1);
          if (hooks::writes(into.data()) != wanted) fail("writes", "gather_host_rows of " + std::to_string(bytes));
        }
        hooks::forget();
        for (int64_t i = 0; i < count; ++i) {
          if (std::memcmp(into.data() + i * into_stride, source.data() + index[i] * from_stride, bytes))
            fail("host rows", std::to_string(bytes) + " bytes, way " + std::to_string(way));
          for (int64_t k = bytes; i + 1 < count && k < into_stride; ++k)
            if (into.data()[i * into_stride + k] != 0xcd) fail("host rows", "a gap was written");
        }
        int device = -1;
        cudaGetDevice(&device);
        if (device != 0) fail("device", "host rows leave device " + std::to_string(device));
      }
      cuda::unpin(source.data());
    }
}

template <class Call>
bool throws(const Call& call) {
  try {
    call();
  } catch (const std::runtime_error&) {
    return true;
  }
  return false;
}

// What a failed call leaves behind: the device that was current, and no error for the next call.
void errors() {
  alignas(16) unsigned char cache[128], out[512], source[128], into[128];
  float values[8] = {};
  const int64_t zero = 0;
  const RowShape shape{1, 8, 1};
  const Append a{cache, 1, 128, Codec::fp16, values, Dtype::fp32, 1, shape, 8, 8, 1, 1, &zero};
  const Gather g{cache, 1, 128, Codec::fp16, out, Dtype::fp32, 1, shape, &zero};
  const HostRows rows{source, 128, &zero, 1, into, 128, 128};
  const auto append = [&] { cuda::append_rows(a, 1, kStream); };
  const auto gather = [&] { cuda::gather_rows(g, 1, kStream); };
  const auto check_failure = [&](const char* function, cudaError_t error, const std::function<void()>& call, const char* what) {
    cudashim::fail_call(function, error);
    ++cases;
    if (!throws(call)) fail("error not thrown", what);
    int device = -1;
    cudaGetDevice(&device);
    if (device != 0) fail("device", std::string(what) + " leaves device " + std::to_string(device));
    if (throws(gather)) fail("the next call throws an error that is not its own", std::string("gather_rows after ") + what);
    cudaGetLastError();
  };
  check_failure("launch", cudaErrorInvalidConfiguration, append, "append_rows whose launch fails");
  check_failure("launch", cudaErrorInvalidConfiguration, gather, "gather_rows whose launch fails");
  check_failure("cudaGetDevice", cudaErrorInvalidDevice, append, "append_rows without a device");
  check_failure("cudaSetDevice", cudaErrorInvalidDevice, append, "append_rows on another device");
  check_failure("cudaHostRegister", cudaErrorMemoryAllocation, [&] { cuda::pin(source, 128, 1); }, "pin");
  cuda::pin(source, 128, 0);
  check_failure("cudaMemcpyBatchAsync", cudaErrorInvalidValue, [&] { cuda::copy_host_rows(rows, 1, kStream); }, "copy_host_rows, batch");
  check_failure("cudaMemcpyAsync", cudaErrorInvalidValue, [&] { cuda::copy_host_rows(rows, 1, nullptr); }, "copy_host_rows, row by row");
  check_failure("launch", cudaErrorInvalidConfiguration, [&] { cuda::gather_host_rows(rows, 1, kStream); }, "gather_host_rows");
  cuda::unpin(source);
  check_failure("cudaHostGetDevicePointer", cudaErrorInvalidValue, [&] { cuda::gather_host_rows(rows, 1, kStream); },
                "gather_host_rows of memory that is not pinned");
  Append many = a;
  many.batch = int64_t{1} << 42;
  if (!throws([&] { cuda::append_rows(many, 0, kStream); })) fail("error not thrown", "a grid of more than 2^31 blocks");
  ++cases;
}
