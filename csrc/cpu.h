// The optimizer on a CPU. cpu.cpp is compiled once for each instruction set below, and the best one that the processor
// supports is chosen at run time. All give the same bits.
#pragma once

#include <cstdint>

#include "parameters.h"

namespace sra {

constexpr std::int64_t CPU_CHUNK = 1 << 14;  // elements of one parameter per unit of work

// Updates `size` elements of a parameter from element `begin` on. finite: the norm is finite; otherwise the only change
// is that gradients are zeroed if asked for. streaming: copies bypass the caches.
using UpdateChunk = void (*)(
    const Parameter&, std::int64_t begin, std::int64_t size, const Rates&, const GroupRates&, const Update&,
    bool finite, bool streaming);

// Sum of squares of at most NORM_CHUNK gradients, in the order defined in arithmetic.h.
using SquareSum = double (*)(const void* gradient, std::int64_t size, Dtype);

struct Cpu {
  const char* name;
  UpdateChunk update;
  SquareSum square_sum;
};

namespace baseline {
extern const Cpu cpu;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Cpu cpu;
}
namespace avx512 {
extern const Cpu cpu;
}
#endif

// The fastest implementation that this processor supports.
const Cpu& best_cpu();

// Sum of the chunks' sums, in the order defined in arithmetic.h.
double total(const double* sums, std::int64_t count);

}  // namespace sra
