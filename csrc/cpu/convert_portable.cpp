#include "cpu/convert_loops.h"

namespace learndrop::cpu {

const Converter kPortable = converter<Scalar>("portable");

}  // namespace learndrop::cpu
