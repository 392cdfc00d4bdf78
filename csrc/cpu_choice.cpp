// Picks the instruction set at run time; also small code that needs none in particular.
#include "cpu.h"

namespace sra {

const Cpu& best_cpu() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return avx512::cpu;
  if (__builtin_cpu_supports("avx2")) return avx2::cpu;
#endif
  return baseline::cpu;
}

double total(const double* sums, std::int64_t count) {
  double threads[NORM_THREADS] = {};
  for (std::int64_t i = 0; i < count; ++i) threads[i % NORM_THREADS] += sums[i];
  for (int half = NORM_THREADS / 2; half; half /= 2) {
    for (int i = 0; i < half; ++i) threads[i] += threads[i + half];
  }
  return threads[0];
}

}  // namespace sra
