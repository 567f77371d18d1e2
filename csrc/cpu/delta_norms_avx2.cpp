#include "cpu/delta_norms_loops.h"

namespace learndrop::cpu {

const DeltaLoops kDeltaAvx2 = delta_loops();

}  // namespace learndrop::cpu
