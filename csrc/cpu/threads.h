// Threads that sleep between calls and survive fork().
#pragma once

#include <cstdint>
#include <functional>

namespace learndrop::cpu {

// Threads that wait for files are others than those that compute: rows that are read ahead of a training step
// take none of its threads away.
enum class Threads { compute, files };

// Calls body(first, last) over [0, count) in pieces of `grain`, begun in this order, on the calling thread
// and at most threads - 1 others. The first exception that a piece throws is thrown here, after the pieces in
// progress have ended. A call that finds the threads taken by another one runs on its own thread.
void parallel_for(int64_t count, int64_t grain, int threads,
                  const std::function<void(int64_t, int64_t)>& body, Threads kind = Threads::compute);

}  // namespace learndrop::cpu
