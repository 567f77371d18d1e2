#include "cpu/delta_norms_loops.h"

namespace learndrop::cpu {

const DeltaLoops kDeltaPortable = delta_loops();

}  // namespace learndrop::cpu
