// The optimizer on an NVIDIA GPU: many tensors per launch. Their addresses are kernel parameters, so that a CUDA graph
// stores them and no table is copied to the device. cuda_on_cpu.h compiles this file for a CPU, to test it.
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda.h"

namespace sra {
namespace {

constexpr int THREADS = 256;
constexpr int VECTOR = 4;                           // elements per thread and access: 16 bytes of float32
constexpr int UPDATE_CHUNK = 8 * THREADS * VECTOR;  // elements per block of the update
constexpr int PER_LAUNCH = 46;                      // parameters per launch: kernel arguments are limited to 4 KiB
static_assert(THREADS == NORM_THREADS && VECTOR * THREADS == NORM_LANES);

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Launches on threads of which each block has `threads`; `what` is named in errors.
template <class... Parameters, class... Arguments>
void start(
    const char* what, void (*kernel)(Parameters...), int blocks, int threads, cudaStream_t stream,
    const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim.x = static_cast<unsigned>(blocks);
  config.blockDim.x = static_cast<unsigned>(threads);
  config.stream = stream;
  cudaLaunchKernelEx(&config, kernel, arguments...);
  check(cudaGetLastError(), what);
}

struct Part {
  Parameter parameter;
  bool aligned;  // all its tensors are aligned to VECTOR elements
};

// Up to PER_LAUNCH parameters, and the first block of each.
struct Launch {
  Part parts[PER_LAUNCH];
  std::int32_t first[PER_LAUNCH + 1];
  std::int32_t count;
};
static_assert(sizeof(Launch) < 4000);

// VECTOR elements as one load or store. Stores are inline assembly, because nvcc splits those of a struct.
__device__ void read_vector(const float* from, float* to) {
  const float4 word = *reinterpret_cast<const float4*>(from);
  to[0] = word.x, to[1] = word.y, to[2] = word.z, to[3] = word.w;
}

template <class Half>
__device__ void read_vector(const Half* from, Half* to) {
  const ushort4 word = *reinterpret_cast<const ushort4*>(from);
  to[0].word = word.x, to[1].word = word.y, to[2].word = word.z, to[3].word = word.w;
}

__device__ void write_vector(const float* from, float* to) {
#ifdef __CUDACC__
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(from[0]), "f"(from[1]), "f"(from[2]),
               "f"(from[3])
               : "memory");
#else
  *reinterpret_cast<float4*>(to) = {from[0], from[1], from[2], from[3]};
#endif
}

template <class Half>
__device__ void write_vector(const Half* from, Half* to) {
#ifdef __CUDACC__
  asm volatile("st.global.v4.u16 [%0], {%1, %2, %3, %4};" ::"l"(to), "h"(from[0].word), "h"(from[1].word),
               "h"(from[2].word), "h"(from[3].word)
               : "memory");
#else
  *reinterpret_cast<ushort4*>(to) = {from[0].word, from[1].word, from[2].word, from[3].word};
#endif
}

// Computed once per step.
struct State {
  Rates rates;
  std::int32_t finite;
};

__device__ int part_of(const Launch& launch, int block) {
  int low = 0, high = launch.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (launch.first[middle] <= block)
      low = middle;
    else
      high = middle;
  }
  return low;
}

struct Decays {
  double of[16];
  std::int32_t first, count;
};

// Computes the rates of this update and the counters, in one thread. Handles up to 16 groups per launch; the last
// launch updates the counters.
__global__ void begin_kernel(
    Settings settings, DeviceScalars scalars, Decays decays, bool last, State* state, GroupRates* groups) {
  const bool is_finite = finite(*scalars.norm);
  const std::int64_t step = *scalars.step + (is_finite ? 1 : 0);
  for (int i = 0; i < decays.count; ++i) {
    const float lr = scalars.lr[scalars.lr_per_group ? decays.first + i : 0];
    groups[decays.first + i] = make_group(settings, step, lr, decays.of[i]);
  }
  if (!last) return;
  state->finite = is_finite;
  state->rates = make_rates(settings, step, *scalars.norm, *scalars.ema_decay, *scalars.clip, *scalars.loss_scale);
  *scalars.step = step;
  if (!is_finite) ++*scalars.skipped;
}

// COUNT neighbouring elements: VECTOR if all of the parameter's tensors are aligned, otherwise one.
template <int COUNT, class T>
__device__ void read(const void* from, std::int64_t at, T* to) {
  const T* first = static_cast<const T*>(from) + at;
  if constexpr (COUNT == VECTOR)
    read_vector(first, to);
  else
    *to = *first;
}

template <int COUNT, class T>
__device__ void write(const T* from, void* to, std::int64_t at) {
  T* first = static_cast<T*>(to) + at;
  if constexpr (COUNT == VECTOR)
    write_vector(from, first);
  else
    *first = *from;
}

template <int COUNT, class C>
__device__ void write_copy(const float* from, void* to, std::int64_t at) {
  C rounded[COUNT];
  for (int i = 0; i < COUNT; ++i) narrow(from[i], rounded[i]);
  write<COUNT>(rounded, to, at);
}

template <int COUNT, class G, class C>
__device__ void update_elements(
    const Parameter& p, std::int64_t at, const Rates& rates, const GroupRates& group, bool is_finite, bool zero) {
  float weight[COUNT], ema[COUNT];
  if (p.gradient) {
    if (is_finite) {
      G g[COUNT];
      float m[COUNT], v[COUNT];
      read<COUNT>(p.gradient, at, g);
      read<COUNT>(p.weight, at, weight);
      read<COUNT>(p.m, at, m);
      read<COUNT>(p.v, at, v);
      if (p.ema) read<COUNT>(p.ema, at, ema);  // early, so that all loads overlap
      for (int i = 0; i < COUNT; ++i) adamw(widen(g[i]), weight[i], m[i], v[i], rates, group);
      write<COUNT>(weight, p.weight, at);
      write<COUNT>(m, p.m, at);
      write<COUNT>(v, p.v, at);
    }
    if (zero) {
      G zeros[COUNT] = {};
      write<COUNT>(zeros, p.gradient, at);
    }
  } else if (is_finite) {
    read<COUNT>(p.weight, at, weight);
    if (p.ema) read<COUNT>(p.ema, at, ema);
  }
  if (!is_finite) return;
  if (p.ema) {
    for (int i = 0; i < COUNT; ++i) average(weight[i], ema[i], rates);
    write<COUNT>(ema, p.ema, at);
  }
  if (p.student) write_copy<COUNT, C>(weight, p.student, at);
  if (p.teacher) write_copy<COUNT, C>(ema, p.teacher, at);
}

template <class G, class C>
__global__ void __launch_bounds__(THREADS)
    update_kernel(const __grid_constant__ Launch launch, const State* state, const GroupRates* groups, bool zero) {
  const int block = static_cast<int>(blockIdx.x), which = part_of(launch, block);
  const Part& part = launch.parts[which];
  const Parameter& p = part.parameter;
  const bool is_finite = state->finite;
  if (!is_finite && !zero) return;
  const Rates rates = state->rates;
  const GroupRates group = groups[p.group];
  const std::int64_t begin = std::int64_t{block - launch.first[which]} * UPDATE_CHUNK;
  const std::int64_t end = min(begin + UPDATE_CHUNK, p.size);
  std::int64_t scalar = begin;  // start of the elements that are processed one by one
  if (part.aligned) {
    scalar += (end - begin) / VECTOR * VECTOR;
    for (std::int64_t at = begin + VECTOR * threadIdx.x; at < scalar; at += VECTOR * THREADS)
      update_elements<VECTOR, G, C>(p, at, rates, group, is_finite, zero);
  }
  for (std::int64_t at = scalar + threadIdx.x; at < end; at += THREADS)
    update_elements<1, G, C>(p, at, rates, group, is_finite, zero);
}

// Adds a block's sums by a tree of halves; thread 0 has the result.
__device__ double tree(double sum) {
  __shared__ double sums[NORM_THREADS];
  sums[threadIdx.x] = sum;
  for (int half = NORM_THREADS / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  return sums[0];
}

template <class G>
__global__ void __launch_bounds__(THREADS)
    square_sum_kernel(const __grid_constant__ Launch launch, std::int64_t chunk, double* sums) {
  const int block = static_cast<int>(blockIdx.x), which = part_of(launch, block);
  const Part& part = launch.parts[which];
  const std::int64_t begin = std::int64_t{block - launch.first[which]} * chunk;
  const std::int64_t end = min(begin + chunk, part.parameter.size);
  double lanes[VECTOR] = {};
  for (std::int64_t at = begin + VECTOR * threadIdx.x; at < end; at += NORM_LANES) {
    G g[VECTOR] = {};
    if (part.aligned && at + VECTOR <= end)
      read<VECTOR>(part.parameter.gradient, at, g);
    else
      for (int i = 0; i < VECTOR && at + i < end; ++i) read<1>(part.parameter.gradient, at + i, g + i);
    for (int i = 0; i < VECTOR; ++i) {
      const double wide = widen(g[i]);
      lanes[i] += wide * wide;
    }
  }
  const double sum = tree((lanes[0] + lanes[1]) + (lanes[2] + lanes[3]));
  if (threadIdx.x == 0) sums[block] = sum;
}

__global__ void __launch_bounds__(THREADS) total_kernel(const double* sums, std::int64_t count, float* norm) {
  double sum = 0;
  for (std::int64_t i = threadIdx.x; i < count; i += THREADS) sum += sums[i];
  sum = tree(sum);
  if (threadIdx.x == 0) *norm = static_cast<float>(sqrt(sum));
}

bool aligned(const void* address, std::size_t element) {
  return reinterpret_cast<std::uintptr_t>(address) % (VECTOR * element) == 0;
}

// Calls run(launch, blocks, blocks before) for up to PER_LAUNCH parameters at a time.
template <class Run>
void for_each_launch(
    const std::vector<Parameter>& parameters, std::int64_t chunk, std::size_t gradient, std::size_t copy, Run run) {
  Launch launch{};
  std::int64_t before = 0;
  auto flush = [&] {
    const std::int32_t blocks = launch.first[launch.count];
    if (blocks) run(launch, blocks, before);
    before += blocks;
    launch.count = 0;
  };
  for (const Parameter& p : parameters) {
    const std::int64_t chunks = (p.size + chunk - 1) / chunk;
    if (!chunks) continue;
    if (launch.count == PER_LAUNCH || launch.first[launch.count] + chunks > INT32_MAX) flush();
    const bool vectors = aligned(p.gradient, gradient) && aligned(p.weight, 4) && aligned(p.m, 4) && aligned(p.v, 4) &&
                         aligned(p.ema, 4) && aligned(p.student, copy) && aligned(p.teacher, copy);
    launch.parts[launch.count] = {p, vectors};
    launch.first[launch.count + 1] = launch.first[launch.count] + static_cast<std::int32_t>(chunks);
    ++launch.count;
  }
  flush();
}

template <class G, class C>
void update_as(
    const std::vector<Parameter>& parameters, const Update& update, const State* state, const GroupRates* groups,
    cudaStream_t stream) {
  for_each_launch(parameters, UPDATE_CHUNK, sizeof(G), sizeof(C), [&](const Launch& launch, int blocks, std::int64_t) {
    start("update", update_kernel<G, C>, blocks, THREADS, stream, launch, state, groups, update.zero_gradients);
  });
}

template <class G>
void update_for(
    const std::vector<Parameter>& parameters, const Update& update, const State* state, const GroupRates* groups,
    cudaStream_t stream) {
  switch (update.copies) {
    case Dtype::bfloat16: return update_as<G, Bfloat16>(parameters, update, state, groups, stream);
    case Dtype::float16: return update_as<G, Float16>(parameters, update, state, groups, stream);
    case Dtype::float32: return update_as<G, float>(parameters, update, state, groups, stream);
  }
}

template <class G>
void square_sums_of(const std::vector<Parameter>& parameters, std::int64_t chunk, double* sums, cudaStream_t stream) {
  for_each_launch(parameters, chunk, sizeof(G), 1, [&](const Launch& launch, int blocks, std::int64_t before) {
    start("square_sums", square_sum_kernel<G>, blocks, THREADS, stream, launch, chunk, sums + before);
  });
}

}  // namespace

std::int64_t cuda_workspace_bytes(std::int64_t groups) {
  return static_cast<std::int64_t>(sizeof(State) + static_cast<std::size_t>(groups) * sizeof(GroupRates));
}

void cuda_update(
    const std::vector<Parameter>& parameters, const Update& update, Settings settings, const DeviceScalars& scalars,
    const std::vector<double>& decays, void* workspace, void* stream) {
  State* state = static_cast<State*>(workspace);
  GroupRates* groups = reinterpret_cast<GroupRates*>(state + 1);
  cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
  const int count = static_cast<int>(decays.size());
  Decays batch{};
  do {
    batch.count = 0;
    while (batch.first + batch.count < count && batch.count < 16) {
      batch.of[batch.count] = decays[static_cast<std::size_t>(batch.first + batch.count)];
      ++batch.count;
    }
    const bool last = batch.first + batch.count == count;
    start("begin", begin_kernel, 1, 1, cuda_stream, settings, scalars, batch, last, state, groups);
    batch.first += batch.count;
  } while (batch.first < count);
  switch (update.gradients) {
    case Dtype::float32: return update_for<float>(parameters, update, state, groups, cuda_stream);
    case Dtype::bfloat16: return update_for<Bfloat16>(parameters, update, state, groups, cuda_stream);
    case Dtype::float16: return update_for<Float16>(parameters, update, state, groups, cuda_stream);
  }
}

void cuda_square_sums(
    const std::vector<Parameter>& parameters, Dtype dtype, std::int64_t chunk, double* sums, void* stream) {
  cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case Dtype::float32: return square_sums_of<float>(parameters, chunk, sums, cuda_stream);
    case Dtype::bfloat16: return square_sums_of<Bfloat16>(parameters, chunk, sums, cuda_stream);
    case Dtype::float16: return square_sums_of<Float16>(parameters, chunk, sums, cuda_stream);
  }
}

void cuda_norm(const double* sums, std::int64_t count, float* norm, void* stream) {
  start("gradient_norm", total_kernel, 1, THREADS, static_cast<cudaStream_t>(stream), sums, count, norm);
}

}  // namespace sra
