// Runs CUDA kernels on a CPU, to test them: include this file, then the .cu file. A launch returns when its blocks have
// ended, one after another in random order. The threads of a block are fibres, which take turns in random order, each
// until its next barrier, so that a missing barrier changes the results. Shared memory is filled with garbage before
// each block. The process ends with a message if only some threads of a block reach a barrier; AddressSanitizer
// reports accesses outside of tensors, UndefinedBehaviorSanitizer vectors that are not aligned.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(threads)
#define __shared__ static __attribute__((section("cuda_shared")))  // blocks do not run at the same time

inline struct {
  unsigned x;
} threadIdx, blockIdx;

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) ushort4 {
  unsigned short x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
struct cudaLaunchConfig_t {
  struct {
    unsigned x;
  } gridDim, blockDim;
  cudaStream_t stream;
};

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

using std::min;  // CUDA declares it in the global namespace

extern unsigned char __start_cuda_shared[], __stop_cuda_shared[];  // by the linker

namespace cuda_on_cpu {

constexpr std::size_t STACK = 1 << 17;

struct Fibre {
  ucontext_t context{};
  std::vector<char> stack = std::vector<char>(STACK);
  bool ended = false;
};

inline std::mt19937 random{1};
inline std::vector<Fibre> fibres;
inline std::function<void()> kernel;
inline ucontext_t scheduler;
#ifdef __SANITIZE_ADDRESS__
inline const void* scheduler_stack;
inline std::size_t scheduler_bytes;
#endif

// Switches from a fibre to the scheduler.
inline void leave([[maybe_unused]] bool for_ever) {
  Fibre& self = fibres[threadIdx.x];
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &fake_stack, scheduler_stack, scheduler_bytes);
#endif
  swapcontext(&self.context, &scheduler);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack, &scheduler_bytes);
#endif
}

inline void begin_fibre() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_bytes);
#endif
  kernel();
  fibres[threadIdx.x].ended = true;
  leave(true);
}

// Runs a fibre to its next barrier or its end.
inline void resume(unsigned thread) {
  threadIdx.x = thread;
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fibres[thread].stack.data(), STACK);
#endif
  swapcontext(&scheduler, &fibres[thread].context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

__attribute__((no_sanitize("address"))) inline void fill_shared_memory() {
  for (volatile unsigned char* byte = __start_cuda_shared; byte < __stop_cuda_shared; ++byte) *byte = 0xff;
}

inline void run_block(unsigned threads) {
  fill_shared_memory();
  fibres.resize(threads);
  std::vector<unsigned> order(threads);
  std::iota(order.begin(), order.end(), 0u);
  for (Fibre& fibre : fibres) {
    getcontext(&fibre.context);
    fibre.context.uc_stack = {fibre.stack.data(), 0, STACK};
    fibre.ended = false;
    makecontext(&fibre.context, begin_fibre, 0);
  }
  for (unsigned running = threads; running;) {
    std::shuffle(order.begin(), order.end(), random);
    for (const unsigned thread : order) resume(thread);
    for (const Fibre& fibre : fibres) running -= fibre.ended;
    if (running && running != threads) {
      std::fprintf(stderr, "block %u: %u of %u threads wait at a barrier\n", blockIdx.x, running, threads);
      std::_Exit(1);
    }
  }
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::leave(false); }

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), const Arguments&... arguments) {
  std::vector<unsigned> blocks(config->gridDim.x);
  std::iota(blocks.begin(), blocks.end(), 0u);
  std::shuffle(blocks.begin(), blocks.end(), cuda_on_cpu::random);
  cuda_on_cpu::kernel = [&] { kernel(arguments...); };
  for (const unsigned block : blocks) {
    blockIdx.x = block;
    cuda_on_cpu::run_block(config->blockDim.x);
  }
  return cudaSuccess;
}
