// The instruction set of the row operations.
#pragma once

#include <string>

#include "cpu/convert.h"

namespace learndrop::cpu {

// The best one of this CPU, unless select_simd has chosen another.
const Converter& converter();

// "portable", "avx2" or "avx512". Throws std::invalid_argument for any other, or one that this CPU lacks.
void select_simd(const std::string& name);

}  // namespace learndrop::cpu
