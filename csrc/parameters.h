// Lists of parameters as the CPU and GPU code take them, cut into chunks of one size.
#pragma once

#include <cstdint>
#include <vector>

#include "arithmetic.h"

namespace sra {

// One parameter's tensors, each of `size` contiguous elements; null where a part is absent.
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

// Number of chunks, and for the i-th parameter the number of those before it.
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
