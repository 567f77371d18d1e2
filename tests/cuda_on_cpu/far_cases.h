// Rows in more memory than there is: offsets beyond 2^32 values, and the largest rows.
#pragma once

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <vector>

#include "checks.h"
#include "cuda/row_ops.cuh"
#include "inputs.h"

// Offsets beyond 2^31 and 2^32 values, in memory of which only the pages touched are there.
unsigned char* sparse(int64_t bytes) {
  void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) std::abort();
  return static_cast<unsigned char*>(memory);
}

void far_offsets() {
  const int64_t far = (int64_t{1} << 32) + 48, index[] = {5, 0};
  unsigned char *want = sparse(6 * far), *got = sparse(6 * far);
  Random random{10};
  for (const Codec codec : kAllCodecs)
    for (const Dtype dtype : kAllDtypes)
      for (const Strides s : {Strides{far, 12, 4, 1}, {far, far / 4, far / 16, 1}, {far, 3, 1, far / 8}, {1, 3, far / 16, far / 4}}) {
        const RowShape shape{2, 3, 4};
        const int64_t bytes = (s.b + s.h + 2 * s.w + 3 * s.c + 1) * value_bytes(dtype);
        unsigned char* const in = sparse(bytes);
        for (int64_t b = 0; b < 2; ++b)
          for (int64_t y = 0; y < 2; ++y)
            for (int64_t x = 0; x < 3; ++x)
              for (int64_t c = 0; c < 4; ++c)
                fill(in + (b * s.b + y * s.h + x * s.w + c * s.c) * value_bytes(dtype), 1, dtype, Values::normal, random);
        Append a{want, 6, far, codec, in, dtype, 2, shape, s.b, s.h, s.w, s.c, index};
        cpu::append_rows(a, 1);
        a.cache = got;
        cuda::append_rows(a, 0, kStream);
        expect_fault(Fault::none, "far rows");
        for (const int64_t row : index)
          if (std::memcmp(want + row * far, got + row * far, row_bytes(codec, shape))) fail("far append", name(codec));
        unsigned char out_want[2 * 24 * 4], out_got[2 * 24 * 4];
        Gather g{got, 6, far, codec, out_want, dtype, 2, shape, index};
        cpu::gather_rows(g, 1);
        g.out = out_got;
        cuda::gather_rows(g, 0, kStream);
        if (std::memcmp(out_want, out_got, 48 * value_bytes(dtype))) fail("far gather", name(codec));
        cases += 2;
        munmap(in, bytes);
      }
  munmap(want, 6 * far), munmap(got, 6 * far);
}

// The largest rows there may be: 2^31 - 1 values, and some fewer so that vectors are taken.
void largest_rows() {
  for (const int64_t values : {int64_t{INT32_MAX}, int64_t{INT32_MAX} - 7 - 8, int64_t{INT32_MAX} - 3}) {
    const int64_t zero = 0;
    unsigned char *cache = sparse(2 * values + 128), *out = sparse(2 * values);
    const RowShape shape{1, values, 1};
    const std::vector<int64_t> marks = {0, 1, 1023, values / 2, values - 1025, values - 2, values - 1};
    for (const int64_t at : marks) reinterpret_cast<uint16_t*>(cache)[at] = static_cast<uint16_t>(at % 997 + 1);
    const Gather g{cache, 1, 2 * values + 128 - 2 * values % 128, Codec::fp16, out, Dtype::fp16, 1, shape, &zero};
    cuda::gather_rows(g, 0, kStream);
    ++cases;
    int64_t found = 0;
    for (int64_t i = 0; i < values; ++i) found += reinterpret_cast<uint16_t*>(out)[i] != 0;
    for (const int64_t at : marks)
      if (reinterpret_cast<uint16_t*>(out)[at] != at % 997 + 1) fail("largest row", std::to_string(at));
    if (found != static_cast<int64_t>(marks.size())) fail("largest row", "other values are not 0");
    munmap(cache, 2 * values + 128), munmap(out, 2 * values);
  }
}
