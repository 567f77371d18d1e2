// Which instruction set the row ops use.
#pragma once

#include <string>

#include "cpu/convert.h"

namespace learndrop::cpu {

// The best that this CPU has, until select_simd names another.
const Converter& converter();

// "portable", "avx2" or "avx512". Throws std::invalid_argument for another name or one that this CPU lacks.
void select_simd(const std::string& name);

}  // namespace learndrop::cpu
