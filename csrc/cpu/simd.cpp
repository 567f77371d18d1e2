#include "cpu/simd.h"

#include <atomic>
#include <stdexcept>
#include <vector>

namespace learndrop::cpu {
namespace {

// The instruction sets of this CPU, the best first.
const std::vector<const Converter*>& admitted() {
  static const std::vector<const Converter*> list = [] {
    std::vector<const Converter*> found;
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl");
    if (avx512) found.push_back(&kAvx512);
    if (avx2) found.push_back(&kAvx2);
#endif
    found.push_back(&kPortable);
    return found;
  }();
  return list;
}

std::atomic<const Converter*>& selected() {
  static std::atomic<const Converter*> current{admitted().front()};
  return current;
}

}  // namespace

const Converter& converter() { return *selected().load(std::memory_order_relaxed); }

void select_simd(const std::string& name) {
  std::string names;
  for (const Converter* candidate : admitted()) {
    if (name == candidate->name) {
      selected() = candidate;
      return;
    }
    names += (names.empty() ? "" : ", ") + std::string(candidate->name);
  }
  throw std::invalid_argument("LEARNDROP_SIMD must be one of what this CPU has (" + names + "), got '" +
                              name + "'");
}

}  // namespace learndrop::cpu
