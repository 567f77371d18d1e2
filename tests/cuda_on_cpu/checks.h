// One case: rows are appended and gathered by the code of csrc/cuda and by csrc/cpu, and compared bit for bit.
#pragma once

#include <cinttypes>
#include <cstdio>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "cuda/row_ops.cuh"
#include "hooks.h"
#include "inputs.h"

using cudashim::Fault;

const auto kStream = reinterpret_cast<cudaStream_t>(0x1000);
long cases, failures;
std::map<std::string, long> classes;

void fail(const std::string& kind, const std::string& what) {
  ++failures;
  if (++classes[kind] <= 3) std::printf("FAIL %s: %s\n", kind.c_str(), what.c_str());
}

void expect_fault(Fault wanted, const std::string& what) {
  const Fault got = cudashim::take_fault();
  if (got != wanted) fail("fault", what + ": fault " + std::to_string(int(got)) + ", wanted " + std::to_string(int(wanted)));
}

// Bytes [begin, end) of every `stride` are written once, no other byte is written.
void expect_writes(const Exact& memory, int64_t begin, int64_t end, const std::vector<int64_t>& rows, int64_t stride,
                   const std::string& what) {
  if (!hooks::active) return;
  std::vector<uint32_t> wanted(memory.size(), 0);
  for (const int64_t row : rows)
    for (int64_t i = begin; i < end; ++i) wanted[row * stride + i] = 1;
  if (hooks::writes(memory.data()) != wanted) fail("writes", what);
}

// Returns another device for each case: their numbers of SMs differ, which changes how rows are divided among blocks.
int in_order(bool backwards) {
  cudashim::order = {backwards, backwards};
  return static_cast<int>(cases % cudashim::kDevices);
}

struct Case {
  Codec codec;
  Dtype dtype;
  RowShape shape;
  int64_t batch;
  Layout layout = Layout::dense;
  Values values = Values::normal;
  int64_t in_offset = 0;     // values
  int64_t cache_offset = 0;  // bytes
  int64_t align = 128;       // of the cache's rows
  bool gathers = true;
};

std::string describe(const Case& c) {
  return std::string(name(c.codec)) + " from " + name(c.dtype) + " " + name(c.shape) + " B=" + std::to_string(c.batch) +
         " layout=" + std::to_string(int(c.layout)) + " values=" + std::to_string(int(c.values)) +
         " in_offset=" + std::to_string(c.in_offset) + " cache_offset=" + std::to_string(c.cache_offset) +
         " align=" + std::to_string(c.align);
}

bool both_nan(Dtype dtype, const unsigned char* a, const unsigned char* b) {
  const auto nan = [dtype](const unsigned char* p) {
    uint32_t v = 0;
    std::memcpy(&v, p, value_bytes(dtype));
    const uint32_t infinity = dtype == Dtype::fp32 ? 0x7f800000 : dtype == Dtype::bf16 ? 0x7f80 : 0x7c00;
    return (v & (dtype == Dtype::fp32 ? 0x7fffffff : 0x7fff)) > infinity;
  };
  return nan(a) && nan(b);
}

void check_gather(const Case& c, const Exact& cache, int64_t stride, int64_t R, Dtype out_dtype, Random& random) {
  std::vector<int64_t> index(c.batch);
  for (int64_t& row : index) row = random.below(R);
  const Exact rows(8 * c.batch, 0, 0);
  std::copy(index.begin(), index.end(), reinterpret_cast<int64_t*>(rows.data()));
  const int64_t row_out = c.shape.values() * value_bytes(out_dtype);
  const int64_t offset = random.below(4) == 0 ? value_bytes(out_dtype) : 0;
  const Exact want(c.batch * row_out, offset, 0x32), got(c.batch * row_out, offset, 0xcd);
  Gather g{cache.data(), R, stride, c.codec, want.data(), out_dtype, c.batch, c.shape,
           reinterpret_cast<const int64_t*>(rows.data())};
  cpu::gather_rows(g, 1);
  g.out = got.data();
  g.index_on_host = c.batch <= kHeldRows && cases % 3 != 0;
  const std::string what = describe(c) + " to " + name(out_dtype) + " out_offset=" +
                           std::to_string(offset) + (g.index_on_host ? " index on host" : "");
  hooks::watch(got.data(), got.size());
  hooks::watch(cache.data(), cache.size());
  cuda::gather_rows(g, in_order(++cases % 2), kStream);
  expect_fault(Fault::none, what);
  if (c.batch > 0) {
    std::vector<int64_t> all(c.batch);
    std::iota(all.begin(), all.end(), 0);
    expect_writes(got, 0, row_out, all, row_out, what);
    expect_writes(cache, 0, 0, {}, stride, what);
  }
  hooks::forget();
  for (int64_t i = 0; i < got.size(); i += value_bytes(out_dtype)) {
    if (std::memcmp(got.data() + i, want.data() + i, value_bytes(out_dtype)) == 0) continue;
    uint32_t a = 0, b = 0;
    std::memcpy(&a, got.data() + i, value_bytes(out_dtype)), std::memcpy(&b, want.data() + i, value_bytes(out_dtype));
    char text[80];
    std::snprintf(text, sizeof text, ": byte %" PRId64 " cuda %x cpu %x", i, a, b);
    const bool nans = both_nan(out_dtype, got.data() + i, want.data() + i);
    fail(nans ? std::string("gather: another NaN, ") + name(c.codec) + " to " + name(out_dtype) : "gather", what + text);
    return;
  }
}

void check(const Case& c, Random& random) {
  const int64_t used = row_bytes(c.codec, c.shape), R = c.batch + 3;
  const int64_t stride = (used + c.align - 1) / c.align * c.align;
  const Strides s = strides_of(c.layout, c.shape);
  const int64_t last = std::max<int64_t>(0, c.batch - 1) * s.b + (c.shape.height - 1) * s.h + (c.shape.width - 1) * s.w +
                       (c.shape.channels - 1) * s.c;
  const int64_t size = value_bytes(c.dtype);
  const Exact in((last + 1) * size, c.in_offset * size, 0);
  fill(in.data(), last + 1, c.dtype, c.values, random);
  const std::vector<int64_t> index = shuffled(R, c.batch, random);
  const Exact rows(8 * c.batch, 0, 0);
  std::copy(index.begin(), index.end(), reinterpret_cast<int64_t*>(rows.data()));
  const Exact want(R * stride, c.cache_offset, 0xab), got(R * stride, c.cache_offset, 0xab);
  Append a{want.data(), R, stride, c.codec, in.data(), c.dtype, c.batch, c.shape, s.b, s.h, s.w, s.c,
           reinterpret_cast<const int64_t*>(rows.data())};
  cpu::append_rows(a, 1);
  a.cache = got.data();
  for (const bool backwards : {false, true}) {
    std::memset(got.data(), 0xab, got.size());
    hooks::watch(got.data(), got.size());
    hooks::watch(in.data(), in.size());
    cuda::append_rows(a, in_order(backwards), kStream);
    ++cases;
    expect_fault(Fault::none, describe(c));
    if (c.batch > 0) expect_writes(got, 0, used, index, stride, describe(c));
    hooks::forget();
    if (std::memcmp(got.data(), want.data(), got.size()) != 0) {
      int64_t at = 0;
      while (got.data()[at] == want.data()[at]) ++at;
      fail("append", describe(c) + ": byte " + std::to_string(at % stride) + " of row " + std::to_string(at / stride));
      break;
    }
  }
  if (!c.gathers) return;
  for (const Dtype out : kAllDtypes) check_gather(c, want, stride, R, out, random);
}
