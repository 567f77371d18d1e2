#include "cpu/threads.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

namespace learndrop::cpu {
namespace {

using Body = std::function<void(int64_t, int64_t)>;

struct Job {
  const Body& body;
  const int64_t count, grain;
  std::atomic<int64_t> next{0};
  std::mutex error_mutex{};
  std::exception_ptr error{};

  void work() noexcept {
    for (;;) {
      const int64_t first = next.fetch_add(grain);
      if (first >= count) return;
      try {
        body(first, std::min(first + grain, count));
      } catch (...) {
        const std::lock_guard<std::mutex> lock(error_mutex);
        if (!error) error = std::current_exception();
        next.store(count);
      }
    }
  }
};

class Pool {
 public:
  const pid_t process = getpid();

  // Returns false if another call uses the threads.
  bool run(Job& job, int helpers) {
    const std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return false;
    grow(helpers);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      places_ = std::min(helpers, workers_);
      helpers = places_;
    }
    for (int i = 0; i < helpers; ++i) wake_.notify_one();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    // Threads that wake up later do not take part, so nobody waits for them.
    places_ = 0;
    idle_.wait(lock, [this] { return active_ == 0; });
    return true;
  }

 private:
  void grow(int helpers) {
    while (workers_ < helpers) {
      try {
        std::thread([this] { serve(); }).detach();
      } catch (const std::system_error&) {
        return;
      }
      ++workers_;
    }
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return places_ > 0; });
      --places_;
      ++active_;
      Job* const job = job_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--active_ == 0) idle_.notify_one();
    }
  }

  std::mutex turn_;  // held by the call that has the threads
  std::mutex mutex_;
  std::condition_variable wake_, idle_;
  Job* job_ = nullptr;
  int workers_ = 0, places_ = 0, active_ = 0;
};

// A forked child has the parent's pool but not its threads, and its mutexes may stay locked, so it gets a
// pool of its own. Pools are never deleted, because their threads sleep in them until the process ends.
Pool& pool(Threads kind) {
  static std::atomic<Pool*> pools[2];
  std::atomic<Pool*>& current = pools[static_cast<int>(kind)];
  Pool* found = current.load();
  while (found == nullptr || found->process != getpid()) {
    Pool* const made = new Pool;
    if (current.compare_exchange_strong(found, made)) return *made;
    delete made;
  }
  return *found;
}

}  // namespace

void parallel_for(int64_t count, int64_t grain, int threads, const Body& body, Threads kind) {
  if (count <= 0) return;
  const int64_t pieces = (count + grain - 1) / grain;
  const int helpers = static_cast<int>(std::min<int64_t>(threads, pieces)) - 1;
  Job job{.body = body, .count = count, .grain = grain};
  if (helpers < 1 || !pool(kind).run(job, helpers)) job.work();
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace learndrop::cpu
