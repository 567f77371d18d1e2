// The runtime of include/cuda_runtime.h. x86-64 only: the switch from one thread's stack to another's is assembly.
#include "cuda_runtime.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <map>
#include <string>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

extern "C" void cudashim_switch(void** save, void* load);
asm(R"(
.text
.globl cudashim_switch
cudashim_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

// hooks.cpp: a kernel begins or ends, a block ended, a barrier was passed, memory that a block's threads share
void shim_kernel(bool begins);
void shim_block();
void shim_interval();
void shim_shared(const void* begin, std::size_t bytes);

namespace cudashim {

uint3 thread_index, block_index, block_size, grid_size;
Order order;

namespace {

struct Trap {};

constexpr std::size_t kStackBytes = 64 << 10;

struct Fiber {
  char* stack = static_cast<char*>(
      mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  void* at = nullptr;
  void* fake = nullptr;  // ASan's
  bool ended = true;
  bool at_barrier = false, at_shuffle = false;
};

unsigned int exchanged[1024];  // what each thread of a block gives to a shuffle

std::vector<Fiber> fibers;
Fiber* current;
void* scheduler;
const std::function<void()>* body;
Fault fault = Fault::none;
bool stopped;  // by a trap: the other threads of the launch do nothing
std::map<std::pair<int, std::size_t>, void*> shared_blocks;
std::map<std::string, cudaError_t> failures;
std::map<char*, std::size_t> pinned;
cudaError_t last = cudaSuccess;
int device;
long launched;

#ifdef __SANITIZE_ADDRESS__
const void* main_stack;
std::size_t main_bytes;
void leave(void** fake, const void* stack, std::size_t bytes) { __sanitizer_start_switch_fiber(fake, stack, bytes); }
void arrive(void* fake, bool first) {
  __sanitizer_finish_switch_fiber(fake, first ? &main_stack : nullptr, first ? &main_bytes : nullptr);
}
#else
const void* main_stack = nullptr;
std::size_t main_bytes = 0;
void leave(void**, const void*, std::size_t) {}
void arrive(void*, bool) {}
#endif

void run_thread() {
  try {
    if (!stopped) (*body)();
  } catch (const Trap&) {
    stopped = true;
  }
}

void fiber_main() {
  arrive(nullptr, true);
  run_thread();
  current->ended = true;
  leave(nullptr, main_stack, main_bytes);
  cudashim_switch(&current->at, scheduler);
  std::abort();
}

void prepare(Fiber& fiber) {
  fiber.ended = false;
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes - 8);
  *--top = reinterpret_cast<void*>(&fiber_main);  // where the switch returns to
  fiber.at = top - 6;                             // the registers that it pops
}

void resume(Fiber& fiber) {
  current = &fiber;
  void* fake = nullptr;
  leave(&fake, fiber.stack, kStackBytes);
  cudashim_switch(&scheduler, fiber.at);
  arrive(fake, false);
}

// A warp's threads up to the next barrier, through the shuffles before it. A shuffle is no barrier: other warps
// do not wait, and what threads of a warp write to memory is not ordered by it.
unsigned int run_warp(unsigned int first, unsigned int last) {
  unsigned int ended = 0;
  for (bool again = true; again;) {
    unsigned int shuffling = 0, others = 0;
    for (unsigned int i = first; i < last; ++i) {
      thread_index.x = order.threads_backwards ? first + last - 1 - i : i;
      Fiber& fiber = fibers[thread_index.x];
      if (fiber.ended || fiber.at_barrier) {
        ++others;
        continue;
      }
      fiber.at_shuffle = false;
      resume(fiber);
      ended += fiber.ended;
      ++(fiber.at_shuffle ? shuffling : others);
    }
    again = shuffling > 0;
    if (shuffling > 0 && others > 0 && !stopped) fault = Fault::divergent_barrier;
  }
  return ended;
}

// All threads up to the next barrier, again and again.
void run_with_barriers(unsigned int threads) {
  if (fibers.size() < threads) fibers.resize(threads);
  for (unsigned int i = 0; i < threads; ++i) prepare(fibers[i]);
  const unsigned int warps = (threads + 31) / 32;
  for (unsigned int left = threads; left > 0;) {
    unsigned int ended = 0;
    for (unsigned int i = 0; i < threads; ++i) fibers[i].at_barrier = fibers[i].at_shuffle = false;
    for (unsigned int i = 0; i < warps; ++i) {
      const unsigned int first = 32 * (order.threads_backwards ? warps - 1 - i : i);
      ended += run_warp(first, std::min(first + 32, threads));
    }
    left -= ended;
    if (ended > 0 && left > 0 && !stopped) fault = Fault::divergent_barrier;
    shim_interval();
  }
}

cudaError_t result(const char* function, cudaError_t error = cudaSuccess) {
  const auto found = failures.find(function);
  if (found != failures.end()) {
    error = found->second;
    failures.erase(found);
  }
  if (error != cudaSuccess) last = error;
  return error;
}

bool is_pinned(const void* address, std::size_t bytes) {
  const auto* at = static_cast<const char*>(address);
  for (const auto& [begin, size] : pinned)
    if (begin <= at && at + bytes <= begin + size) return true;
  return false;
}

}  // namespace

Fault take_fault() { return std::exchange(fault, Fault::none); }
void fail_call(const char* function, cudaError_t error) { failures[function] = error; }
long launches() { return launched; }

void launch(const Config& config, bool barriers, const std::function<void()>& thread) {
  const bool fits = config.grid > 0 && config.grid <= INT32_MAX && config.block > 0 && config.block <= 1024;
  if (result("launch", fits ? cudaSuccess : cudaErrorInvalidConfiguration) != cudaSuccess) return;
  ++launched;
  body = &thread;
  stopped = false;
  grid_size = {config.grid, 1, 1};
  block_size = {config.block, 1, 1};
  shim_kernel(true);
  for (unsigned int i = 0; i < config.grid && !stopped; ++i) {
    block_index = {order.blocks_backwards ? config.grid - 1 - i : i, 0, 0};
    for (const auto& [key, memory] : shared_blocks) std::memset(memory, 0xa5, key.second);
    if (barriers) {
      run_with_barriers(config.block);
    } else {
      for (unsigned int t = 0; t < config.block; ++t) {
        thread_index.x = order.threads_backwards ? config.block - 1 - t : t;
        run_thread();
      }
    }
    shim_block();
  }
  shim_kernel(false);
  for (const auto& [key, memory] : shared_blocks) std::free(memory);
  shared_blocks.clear();
}

void trap() {
  fault = Fault::trap;
  throw Trap();
}

static void wait(bool Fiber::* where) {
  Fiber* const fiber = current;
  fiber->*where = true;
  leave(&fiber->fake, main_stack, main_bytes);
  cudashim_switch(&fiber->at, scheduler);
  arrive(fiber->fake, false);
  if (stopped) throw Trap();
}

void barrier() { wait(&Fiber::at_barrier); }

unsigned int shuffle_xor(unsigned int mask, unsigned int value, int lanes) {
  if (mask != 0xffffffffu || lanes <= 0 || lanes >= 32) trap();
  const unsigned int thread = thread_index.x;
  exchanged[thread] = value;
  wait(&Fiber::at_shuffle);
  const unsigned int other = exchanged[thread ^ static_cast<unsigned int>(lanes)];
  wait(&Fiber::at_shuffle);
  return other;
}

void* shared_memory(int number, std::size_t bytes) {
  void*& memory = shared_blocks[{number, bytes}];
  if (memory == nullptr) {
    memory = std::memset(std::malloc(bytes), 0xa5, bytes);
    shim_shared(memory, bytes);
  }
  return memory;
}

}  // namespace cudashim

using namespace cudashim;

cudaError_t cudaGetDevice(int* number) { return *number = device, result("cudaGetDevice"); }
cudaError_t cudaSetDevice(int number) {
  const bool known = number >= 0 && number < kDevices;
  const cudaError_t error = result("cudaSetDevice", known ? cudaSuccess : cudaErrorInvalidDevice);
  if (error == cudaSuccess) device = number;
  return error;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  return *value = 1 + device, result("cudaDeviceGetAttribute");
}
cudaError_t cudaGetLastError() { return std::exchange(last, cudaSuccess); }
const char* cudaGetErrorName(cudaError_t) { return "an error"; }
const char* cudaGetErrorString(cudaError_t) { return "of the shim"; }

cudaError_t cudaHostRegister(void* address, std::size_t bytes, unsigned int) {
  const cudaError_t error = result("cudaHostRegister", bytes ? cudaSuccess : cudaErrorInvalidValue);
  if (error == cudaSuccess) pinned[static_cast<char*>(address)] = bytes;
  return error;
}
cudaError_t cudaHostUnregister(void* address) {
  return result("cudaHostUnregister", pinned.erase(static_cast<char*>(address)) ? cudaSuccess : cudaErrorInvalidValue);
}
cudaError_t cudaHostGetDevicePointer(void** to, void* host, unsigned int) {
  *to = host;
  return result("cudaHostGetDevicePointer", is_pinned(host, 1) ? cudaSuccess : cudaErrorInvalidValue);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t) {
  const cudaError_t error = result("cudaMemcpyAsync", is_pinned(from, bytes) ? cudaSuccess : cudaErrorInvalidValue);
  if (error == cudaSuccess) std::memcpy(to, from, bytes);
  return error;
}
cudaError_t cudaMemcpyBatchAsync(void* const* to, const void* const* from, const std::size_t* bytes, std::size_t count,
                                 cudaMemcpyAttributes* attributes, std::size_t* first, std::size_t attribute_count,
                                 cudaStream_t stream) {
  bool valid = stream != nullptr && count > 0 && attribute_count == 1 && first[0] == 0 &&
               attributes[0].srcAccessOrder == cudaMemcpySrcAccessOrderStream && attributes[0].flags == 0;
  for (std::size_t i = 0; valid && i < count; ++i) valid = bytes[i] > 0 && is_pinned(from[i], bytes[i]);
  const cudaError_t error = result("cudaMemcpyBatchAsync", valid ? cudaSuccess : cudaErrorInvalidValue);
  // In any order: the last first.
  for (std::size_t i = count; error == cudaSuccess && i-- > 0;) std::memcpy(to[i], from[i], bytes[i]);
  return error;
}
