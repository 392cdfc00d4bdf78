// Lists of parameters for the CPU and GPU code, and their division into chunks of equal size.
#pragma once

#include <cstdint>
#include <vector>

#include "arithmetic.h"

namespace sra {

// One parameter's tensors, each of `size` contiguous elements; null for an absent part.
struct Parameter {
  void* gradient;  // of the list's dtype
  float* weight;
  float* m;
  float* v;
  float* ema;
  void* student;  // copies, of the copies' dtype
  void* teacher;
  std::int64_t size;
  std::int32_t group;
};

struct Update {
  Dtype gradients, copies;
  bool zero_gradients;
};

// Returns the number of chunks. first[i] becomes the number of chunks before parameter i.
inline std::int64_t count_chunks(
    const std::vector<Parameter>& parameters, std::int64_t chunk, std::vector<std::int64_t>& first) {
  std::int64_t total = 0;
  for (const Parameter& parameter : parameters) {
    first.push_back(total);
    total += (parameter.size + chunk - 1) / chunk;
  }
  first.push_back(total);
  return total;
}

}  // namespace sra
