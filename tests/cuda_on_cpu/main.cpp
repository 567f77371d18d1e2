// Runs the CUDA code on the CPU over many cases and compares it bit for bit with csrc/cpu.
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "checks.h"
#include "cpu/simd.h"
#include "cuda/row_ops.cuh"
#include "far_cases.h"
#include "hooks.h"
#include "host_cases.h"
#include "inputs.h"

namespace {

const std::vector<Values> kAllValues = {Values::normal, Values::any_bits, Values::special, Values::special, Values::small_range,
                                        Values::constant};

int64_t table_bytes(Codec codec) { return codec == Codec::uint8 ? 4 : value_bytes(codec); }

void flat_rows(bool all) {
  std::vector<int64_t> sizes;
  for (int64_t n = 1; n <= 70; ++n) sizes.push_back(n);
  for (const int64_t n : {255, 256, 257, 1023, 1024, 1025, 4095, 4096, 4097, 8200, 65536, 65537}) sizes.push_back(n);
  Random random{1};
  for (const int64_t n : sizes)
    for (const Codec codec : kAllCodecs)
      for (const Dtype dtype : kAllDtypes) {
        Case c{codec, dtype, {1, n, 1}, n > 5000 ? 2 : random.of<int64_t>({1, 2, 3, 31, 32, 33})};
        c.values = random.of(kAllValues);
        check(c, random);
        if (!all) continue;
        for (const Layout layout : {Layout::gaps, Layout::every_second, Layout::same_row}) {
          c.layout = layout;
          c.gathers = false;
          c.values = random.of(kAllValues);
          check(c, random);
        }
        // From where no vector may begin, to rows of just their bytes.
        c.layout = Layout::dense;
        c.in_offset = 1;
        check(c, random);
        c.in_offset = 0;
        c.gathers = true;
        c.align = table_bytes(codec);
        check(c, random);
        c.align = 16;
        c.cache_offset = table_bytes(codec);
        check(c, random);
      }
}

void images(bool all) {
  Random random{2};
  for (const int64_t C : {1, 2, 3, 4, 5, 7, 8, 9, 16, 31, 32, 33, 64})
    for (int64_t H = 1; H <= 9; ++H)
      for (int64_t W = 1; W <= 9; ++W)
        for (const Codec codec : kAllCodecs)
          for (const Dtype dtype : kAllDtypes) {
            if (!all && random.below(24)) continue;
            Case c{codec, dtype, {H, W, C}, random.of<int64_t>({1, 2, 2, 3, 5})};
            c.layout = static_cast<Layout>(random.below(kLayouts));
            c.values = random.of(kAllValues);
            c.in_offset = random.below(4) == 0;
            c.align = random.of<int64_t>({128, 128, 16, table_bytes(codec)});
            check(c, random);
            c.layout = Layout::dense;
            c.in_offset = 0;
            c.gathers = false;
            check(c, random);
          }
}

void batches() {
  Random random{3};
  for (const int64_t B : {0, 1, 2, 31, 32, 33, 1000})
    for (const RowShape shape : {RowShape{1, 1, 1}, {1, 8, 1}, {1, 33, 1}, {2, 3, 4}, {3, 2, 5}, {1, 1, 32}})
      for (const Codec codec : kAllCodecs)
        for (const Dtype dtype : kAllDtypes) {
          Case c{codec, dtype, shape, B, Layout::dense, Values::special};
          check(c, random);
          c.layout = Layout::planes;
          c.gathers = false;
          check(c, random);
        }
}

void larger_images() {
  Random random{4};
  for (const RowShape shape : {RowShape{28, 28, 1}, {14, 14, 64}, {7, 9, 130}, {33, 31, 3}, {1, 1, 2048}, {4, 40, 100}, {65, 1, 40}})
    for (const Codec codec : kAllCodecs)
      for (const Dtype dtype : kAllDtypes)
        for (const Layout layout : {Layout::dense, Layout::planes, Layout::sliced_channels}) {
          Case c{codec, dtype, shape, 2, layout, random.of(kAllValues)};
          c.gathers = layout == Layout::dense;
          check(c, random);
        }
}

// Rows long enough for columns of uint8: 2 * 256 vectors of 4 or of 1 for each of channels / gcd(channels, 256).
void columns() {
  Random random{10};
  for (const RowShape shape : {RowShape{3, 3, 1280}, {2, 3, 2048}, {16, 17, 24}, {13, 20, 40}, {16, 33, 7}, {20, 30, 3},
                               {5, 5, 1024}, {16, 16, 24}, {8, 8, 320}, {1, 5, 4096}})
    for (const Dtype dtype : kAllDtypes)
      for (const int64_t align : {128, 4}) {
        Case c{Codec::uint8, dtype, shape, random.of<int64_t>({1, 2, 3})};
        c.values = random.of(kAllValues);
        c.align = align;
        check(c, random);
      }
}

// Every 16-bit value, many floats, and floats around every place where rounding turns.
void conversions(int64_t float_rows) {
  Random random{5};
  constexpr int64_t n = 65536;
  const Exact in(n * 4, 0, 0);
  for (const Codec codec : {Codec::fp32, Codec::bf16, Codec::fp16})
    for (const Dtype dtype : kAllDtypes) {
      const RowShape shape{1, n, 1};
      const int64_t stride = row_bytes(codec, shape), count = dtype == Dtype::fp32 ? float_rows : 1;
      for (int64_t row = 0; row < count; ++row) {
        for (int64_t i = 0; i < n; ++i) {
          auto* const wide = reinterpret_cast<uint32_t*>(in.data());
          const auto any = static_cast<uint32_t>(random.next());
          if (dtype != Dtype::fp32)
            reinterpret_cast<uint16_t*>(in.data())[i] = static_cast<uint16_t>(i);
          else if (row % 4 == 0)
            wide[i] = any;
          else  // the last 13 or 16 bits are just about half of the last bit kept, at any exponent
            wide[i] = (any & (row % 4 == 1 ? 0xffffe000 : 0xffff0000)) + (row % 4 == 1 ? 0x1000 : 0x8000) + any % 3 - 1;
        }
        const Exact want(stride, 0, 0), got(stride, 0, 1);
        const int64_t zero = 0;
        Append a{want.data(), 1, stride, codec, in.data(), dtype, 1, shape, n, n, 1, 1, &zero};
        cpu::append_rows(a, 1);
        a.cache = got.data();
        cuda::append_rows(a, 0, kStream);
        ++cases;
        if (std::memcmp(want.data(), got.data(), stride)) fail("conversion", std::string(name(dtype)) + " to codec " + name(codec));
        // The other way: what was put in, read as a cache row.
        const auto source = static_cast<Codec>(static_cast<int>(dtype));
        const auto target = static_cast<Dtype>(static_cast<int>(codec));
        Gather g{in.data(), 1, n * value_bytes(source), source, want.data(), target, 1, shape, &zero};
        cpu::gather_rows(g, 1);
        g.out = got.data();
        cuda::gather_rows(g, 0, kStream);
        ++cases;
        if (std::memcmp(want.data(), got.data(), stride)) fail("conversion", std::string("codec ") + name(source) + " to " + name(target));
      }
    }
}

// uint8 rows that no encoder wrote: any finite scale and zero, and the NaN that the encoder writes.
void foreign_rows() {
  Random random{6};
  for (const RowShape shape : {RowShape{1, 100, 1}, {3, 3, 1}, {3, 3, 3}, {5, 4, 4}, {2, 2, 16}, {4, 4, 24}})
    for (int i = 0; i < 20; ++i) {
      Case c{Codec::uint8, Dtype::fp32, shape, 9};
      const int64_t stride = (row_bytes(c.codec, shape) + 15) / 16 * 16;
      const Exact cache(12 * stride, 0, 0);
      for (int64_t at = 0; at < cache.size(); ++at) cache.data()[at] = static_cast<unsigned char>(random.next());
      for (int64_t row = 0; row < 12; ++row)
        for (int64_t k = 0; k < 2 * shape.channels; ++k) {
          float& value = reinterpret_cast<float*>(cache.data() + row * stride)[k];
          value = i % 2 ? value_of(random, Values::normal) : std::isfinite(value) ? value : cudashim::bits<float>(0x7fc00000u);
        }
      for (const Dtype out : kAllDtypes) check_gather(c, cache, stride, 12, out, random);
    }
}

void bad_indices() {
  Random random{7};
  for (const int64_t bad : {int64_t{-1}, int64_t{5}, int64_t{6}, int64_t{1} << 32, INT64_MIN, INT64_MAX})
    for (const RowShape shape : {RowShape{1, 64, 1}, {1, 65, 1}, {4, 4, 8}, {3, 3, 3}, {1, 5000, 1}})
      for (const Codec codec : kAllCodecs)
        for (const Dtype dtype : kAllDtypes)
          for (const Layout layout : {Layout::dense, Layout::planes}) {
            const int64_t stride = (row_bytes(codec, shape) + 127) / 128 * 128, B = 4;
            const Exact cache(5 * stride, 0, 0), in(B * shape.values() * 4, 0, 0), rows(8 * B, 0, 0);
            auto* const index = reinterpret_cast<int64_t*>(rows.data());
            for (int64_t b = 0; b < B; ++b) index[b] = b;
            index[random.below(B)] = bad;
            const Strides s = strides_of(layout, shape);
            const Append a{cache.data(), 5, stride, codec, in.data(), dtype, B, shape, s.b, s.h, s.w, s.c, index};
            cuda::append_rows(a, 0, kStream);
            expect_fault(Fault::trap, "append of a bad index");
            const Gather g{cache.data(), 5, stride, codec, in.data(), dtype, B, shape, index};
            cuda::gather_rows(g, 0, kStream);
            expect_fault(Fault::trap, "gather of a bad index");
            cases += 2;
          }
}

void divisions(bool all) {
  const auto check_at = [](const cuda::Divider& by, uint64_t d, uint64_t n) {
    if (n >= uint64_t{1} << 31) return;
    const auto at = static_cast<uint32_t>(n);
    if (by.divide(at) != n / d || by.remainder(at) != n % d) fail("divider", std::to_string(n) + " / " + std::to_string(d));
  };
  Random random{8};
  const uint64_t top = (uint64_t{1} << 31) - 1;
  const auto check_divisor = [&](uint64_t d) {
    if (d < 1 || d > top) return;
    const cuda::Divider by(static_cast<int64_t>(d));
    const uint64_t most = top / d;
    for (const uint64_t q : {uint64_t{0}, uint64_t{1}, uint64_t{2}, most / 2, most - (most > 0), most, random.next() % (most + 1)})
      for (int64_t i = -2; i <= 2; ++i)
        if (q * d + i < uint64_t{1} << 32) check_at(by, d, q * d + i);
    for (uint64_t i = 0; i < 3; ++i) check_at(by, d, i), check_at(by, d, top - i);
    ++cases;
  };
  for (uint64_t d = 1; d <= 100000; ++d) check_divisor(d), check_divisor(top - d + 1);
  for (int k = 0; k < 32; ++k)
    for (int64_t i = -300; i <= 300; ++i) check_divisor((uint64_t{1} << k) + i);
  for (int i = 0; i < 200000; ++i) check_divisor(1 + random.next() % top);
  if (!all) return;
  // All divisors: with M = 2^32 + multiplier and M d = 2^(32 + shift) + e the quotient is right for n < 2^31 if
  // 0 < e and e (2^31 - 1) < 2^(32 + shift), because n M / 2^(32 + shift) is then above n / d by less than 1 / d.
  for (uint64_t d = 1; d <= top; ++d) {
    const cuda::Divider by(static_cast<int64_t>(d));
    const unsigned __int128 product = static_cast<unsigned __int128>((uint64_t{1} << 32) + by.multiplier) * d;
    const unsigned __int128 power = static_cast<unsigned __int128>(1) << (32 + by.shift);
    if (product < power || (product - power) * top >= power) fail("divider", "of " + std::to_string(d));
  }
}

void part(const char* what, const std::function<void()>& run) {
  const long before = cases, blocks = cudashim::launches();
  run();
  std::printf("%-16s %8ld cases, %8ld launches\n", what, cases - before, cudashim::launches() - blocks);
  std::fflush(stdout);
}

}  // namespace

int main(int count, char** arguments) {
  const std::string wanted = count > 1 ? arguments[1] : "";
  const bool all = wanted == "all" || wanted == "portable";
  if (wanted == "portable") cpu::select_simd("portable");
  if (wanted == "largest") {
    part("divisions", [] { divisions(true); });
    part("largest rows", largest_rows);
  } else {
    part("divisions", [] { divisions(false); });
    part("flat rows", [&] { flat_rows(all); });
    part("images", [&] { images(all); });
    part("batches", batches);
    part("larger images", larger_images);
    part("columns", columns);
    part("conversions", [&] { conversions(all ? 64 : 4); });
    part("foreign rows", foreign_rows);
    part("bad indices", bad_indices);
    part("host rows", host_rows);
    part("errors", errors);
    if (!hooks::active) part("far offsets", far_offsets);
  }
  std::printf("%ld cases, %ld failures, %ld races\n", cases, failures, hooks::races());
  for (const auto& [kind, times] : classes) std::printf("  %6ld %s\n", times, kind.c_str());
  return failures || hooks::races() ? 1 : 0;
}
