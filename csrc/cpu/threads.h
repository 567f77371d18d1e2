// Threads that sleep between calls and survive fork().
#pragma once

#include <cstdint>
#include <functional>

namespace learndrop::cpu {

// Reading files has its own threads, so that reading ahead takes none from a training step.
enum class Threads { compute, files };

// Calls body(first, last) for pieces of `grain` that cover [0, count), started in this order, on the calling
// thread and at most threads - 1 others. The first exception is rethrown once the pieces in progress have
// ended. While another call uses the threads, all pieces run on the calling thread.
void parallel_for(int64_t count, int64_t grain, int threads,
                  const std::function<void(int64_t, int64_t)>& body, Threads kind = Threads::compute);

}  // namespace learndrop::cpu
