// The optimizer on an NVIDIA GPU. Both functions launch on the given stream without synchronizing, and can be captured
// in a CUDA graph. The tensors' device must be the current one.
#pragma once

#include <cstdint>
#include <vector>

#include "parameters.h"

namespace sra {

// Scalars of a step, in device memory.
struct DeviceScalars {
  const float* norm;
  std::int64_t* step;
  std::int64_t* skipped;
  const float* lr;  // of each group, or a single one
  bool lr_per_group;
  const float* ema_decay;
  const float* clip;
  const float* loss_scale;
};

// Bytes of device memory that `cuda_update` needs as workspace.
std::int64_t cuda_workspace_bytes(std::int64_t groups);

void cuda_update(
    const std::vector<Parameter>& parameters, const Update& update, Settings settings, const DeviceScalars& scalars,
    const std::vector<double>& decays, void* workspace, void* stream);

// The sums of squares of each `chunk` gradients of each parameter, in the order of arithmetic.h, into `sums`.
void cuda_square_sums(
    const std::vector<Parameter>& parameters, Dtype dtype, std::int64_t chunk, double* sums, void* stream);

// The root of the sum of `count` such sums.
void cuda_norm(const double* sums, std::int64_t count, float* norm, void* stream);

}  // namespace sra
