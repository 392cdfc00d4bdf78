// The optimizer on a CPU, for the instruction set named by SRA_CPU. Functions from headers must always be inlined here,
// see SRA_FUNCTION.
#include "cpu.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace sra::SRA_CPU {
namespace {

// Elements that are processed in all tensors before the next ones. Small, so that few memory streams are active at a
// time and copies are rounded from the first-level cache.
constexpr int PIECE = 256;

template <class T>
inline __attribute__((always_inline)) void widen_all(const T* from, float* to, int count) {
  for (int i = 0; i < count; ++i) to[i] = widen(from[i]);
}

// Rounds `count` values into a copy. A complete piece may bypass the caches, which avoids reading the target first.
template <class T>
inline __attribute__((always_inline)) void write_copy(const float* from, T* to, int count, bool streaming) {
  alignas(64) T rounded[PIECE];
  for (int i = 0; i < count; ++i) narrow(from[i], rounded[i]);
#if defined(__SSE2__)
  if (streaming && count == PIECE && reinterpret_cast<std::uintptr_t>(to) % 16 == 0) {
    for (unsigned i = 0; i < sizeof rounded / 16; ++i)
      _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, reinterpret_cast<const __m128i*>(rounded)[i]);
    return;
  }
#endif
  __builtin_memcpy(to, rounded, static_cast<std::size_t>(count) * sizeof(T));
}

// Updates COUNT elements, or `count` if COUNT is 0.
template <int COUNT, class G, class C>
inline __attribute__((always_inline)) void update_piece(
    const Parameter& p, std::int64_t at, int count, const Rates& rates, const GroupRates& group, const Update& update,
    bool streaming) {
  const int n = COUNT ? COUNT : count;
  float* __restrict__ weight = p.weight + at;
  if (p.gradient) {
    G* gradient = static_cast<G*>(p.gradient) + at;
    float* __restrict__ m = p.m + at;
    float* __restrict__ v = p.v + at;
    float g[PIECE];
    widen_all(gradient, g, n);
    for (int i = 0; i < n; ++i) adamw(g[i], weight[i], m[i], v[i], rates, group);
    if (update.zero_gradients) __builtin_memset(gradient, 0, static_cast<std::size_t>(n) * sizeof(G));
  }
  if (p.ema) {
    float* __restrict__ ema = p.ema + at;
    for (int i = 0; i < n; ++i) average(weight[i], ema[i], rates);
  }
  if (p.student) write_copy(weight, static_cast<C*>(p.student) + at, n, streaming);
  if (p.teacher) write_copy(p.ema + at, static_cast<C*>(p.teacher) + at, n, streaming);
}

template <class G, class C>
void update_chunk(
    const Parameter& p, std::int64_t begin, std::int64_t size, const Rates& rates, const GroupRates& group,
    const Update& update, bool streaming) {
  const std::int64_t end = begin + size;
  std::int64_t at = begin;
  for (; at + PIECE <= end; at += PIECE) update_piece<PIECE, G, C>(p, at, PIECE, rates, group, update, streaming);
  if (at < end) update_piece<0, G, C>(p, at, static_cast<int>(end - at), rates, group, update, false);
#if defined(__SSE2__)
  if (streaming) _mm_sfence();  // makes the streaming stores visible before this thread reports completion
#endif
}

template <class G>
void update_gradients(
    const Parameter& p, std::int64_t begin, std::int64_t size, const Rates& rates, const GroupRates& group,
    const Update& update, bool finite, bool streaming) {
  if (!finite) {
    if (update.zero_gradients && p.gradient)
      __builtin_memset(static_cast<G*>(p.gradient) + begin, 0, static_cast<std::size_t>(size) * sizeof(G));
  } else if (update.copies == Dtype::bfloat16) {
    update_chunk<G, Bfloat16>(p, begin, size, rates, group, update, streaming);
  } else if (update.copies == Dtype::float16) {
    update_chunk<G, Float16>(p, begin, size, rates, group, update, streaming);
  } else {
    update_chunk<G, float>(p, begin, size, rates, group, update, streaming);
  }
}

void update(
    const Parameter& p, std::int64_t begin, std::int64_t size, const Rates& rates, const GroupRates& group,
    const Update& update, bool finite, bool streaming) {
  switch (update.gradients) {
    case Dtype::float32: return update_gradients<float>(p, begin, size, rates, group, update, finite, streaming);
    case Dtype::bfloat16: return update_gradients<Bfloat16>(p, begin, size, rates, group, update, finite, streaming);
    case Dtype::float16: return update_gradients<Float16>(p, begin, size, rates, group, update, finite, streaming);
  }
}

template <class G>
double square_sum_of(const G* gradient, std::int64_t size) {
  alignas(64) double lanes[NORM_LANES] = {};
  alignas(64) float g[NORM_LANES];
  for (std::int64_t begin = 0; begin < size; begin += NORM_LANES) {
    const int count = static_cast<int>(size - begin < NORM_LANES ? size - begin : NORM_LANES);
    widen_all(gradient + begin, g, count);
    for (int i = 0; i < count; ++i) lanes[i] += static_cast<double>(g[i]) * static_cast<double>(g[i]);
  }
  double sums[NORM_THREADS];
  for (int i = 0; i < NORM_THREADS; ++i) {
    sums[i] = (lanes[4 * i] + lanes[4 * i + 1]) + (lanes[4 * i + 2] + lanes[4 * i + 3]);
  }
  for (int half = NORM_THREADS / 2; half; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

double square_sum(const void* gradient, std::int64_t size, Dtype dtype) {
  switch (dtype) {
    case Dtype::bfloat16: return square_sum_of(static_cast<const Bfloat16*>(gradient), size);
    case Dtype::float16: return square_sum_of(static_cast<const Float16*>(gradient), size);
    default: return square_sum_of(static_cast<const float*>(gradient), size);
  }
}

}  // namespace

#define SRA_STRING_OF(x) #x
#define SRA_STRING(x) SRA_STRING_OF(x)
extern const Cpu cpu{SRA_STRING(SRA_CPU), update, square_sum};

}  // namespace sra::SRA_CPU
