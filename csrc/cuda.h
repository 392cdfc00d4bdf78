// The optimizer on an NVIDIA GPU. Launches go to the given stream and nothing waits: both calls can be captured in a
// graph. The device of the tensors has to be the current one.
#pragma once

#include <cstdint>
#include <vector>

#include "parameters.h"

namespace sra {

// Scalars of a step, in the device's memory.
struct DeviceScalars {
  const float* norm;
  std::int64_t* step;
  std::int64_t* skipped;
  const float* lr;  // of each group, or one for all
  bool lr_of_each;
  const float* ema_decay;
  const float* clip;
  const float* loss_scale;
};

// Bytes of device memory that an update needs for what is computed once a step.
std::int64_t cuda_workspace_bytes(std::int64_t groups);

void cuda_update(
    const std::vector<Parameter>& parameters, const Update& update, Settings settings, const DeviceScalars& scalars,
    const std::vector<double>& decays, void* workspace, void* stream);

// Number of float64 that the norm needs room for, at least one.
std::int64_t cuda_norm_sums(const std::vector<Parameter>& parameters);

void cuda_norm(const std::vector<Parameter>& parameters, Dtype dtype, double* sums, float* norm, void* stream);

}  // namespace sra
