// The arithmetic of the optimizer, element by element: CPUs and GPUs share these functions, and so get the same bits.
//
//     g   = gradient * min(1, clip / (norm + 1e-6)) / loss_scale         norm: of the unscaled gradients
//     m   = m + (1 - beta1) (g - m)           v = beta2 v + (1 - beta2) g^2
//     w   = (1 - lr decay) w - lr / (1 - beta1^step) m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
//     ema = ema + (1 - ema_decay) (w - ema)
//
// Everything is float32, except what is computed once per step, which is float64. Every operation is rounded
// separately: compiler flags forbid contracting a * b + c (-ffp-contract=off, -fmad=false), and division and square
// root follow IEEE 754. Powers are integer powers, so that no library function is involved whose last bits may differ.
//
// Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, algorithm 2.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// Always inlined: the same source is compiled for several instruction sets, and the linker must not merge the copies.
#ifdef __CUDACC__
#define SRA_FUNCTION static __host__ __device__ __forceinline__
#else
#define SRA_FUNCTION static inline __attribute__((always_inline))
#endif

namespace sra {

enum class Dtype : std::int32_t { float32, bfloat16, float16 };

template <class To, class From>
SRA_FUNCTION To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// 16-bit floats in memory. Conversions are branch-free integer arithmetic, which compilers vectorize.
struct Bfloat16 {
  std::uint16_t word;
};
struct Float16 {
  std::uint16_t word;
};

SRA_FUNCTION float widen(float x) { return x; }

SRA_FUNCTION float widen(Bfloat16 x) { return bits<float>(std::uint32_t{x.word} << 16); }

SRA_FUNCTION float widen(Float16 x) {
  const std::uint32_t magnitude = x.word & 0x7fffu, sign = std::uint32_t{x.word & 0x8000u} << 16;
  // Multiplication by 2^112 (0x77800000) rebiases the exponent. It is exact, also for subnormal numbers.
  const float scaled = bits<float>(magnitude << 13) * bits<float>(std::uint32_t{0x77800000u});
  const std::uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;  // infinity and NaN
  return bits<float>(bits<std::uint32_t>(scaled) | special | sign);
}

// Rounds to nearest, ties to even. Every NaN becomes a quiet NaN.
SRA_FUNCTION void narrow(float x, float& to) { to = x; }

SRA_FUNCTION void narrow(float x, Bfloat16& to) {
  const std::uint32_t word = bits<std::uint32_t>(x);
  const std::uint32_t rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
  to.word = static_cast<std::uint16_t>((word & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

SRA_FUNCTION void narrow(float x, Float16& to) {
  const std::uint32_t word = bits<std::uint32_t>(x), magnitude = word & 0x7fffffffu;
  // Normal: rebias the exponent by -112 and round at bit 13. On overflow the carry yields infinity.
  const std::uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal, below 2^-14: adding 1/2 rounds at the last bit of the result.
  const std::uint32_t subnormal = bits<std::uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3f000000u;
  std::uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? 0x7c00u : half;  // 2^16 and above
  half = magnitude > 0x7f800000u ? 0x7e00u : half;   // NaN
  to.word = static_cast<std::uint16_t>(half | (word >> 16 & 0x8000u));
}

// Factors of one step, for all parameters.
struct Rates {
  float scale;   // of the gradient
  float blend1;  // 1 - beta1
  float keep2;   // beta2
  float blend2;  // 1 - beta2
  float bias2;   // sqrt(1 - beta2^step)
  float eps;
  float blend_ema;  // 1 - ema_decay
};

// Factors of one step, for the parameters of one group.
struct GroupRates {
  float step_size;  // lr / (1 - beta1^step)
  float keep;       // 1 - lr decay
};

SRA_FUNCTION bool finite(float x) { return (bits<std::uint32_t>(x) & 0x7f800000u) != 0x7f800000u; }

// base^exponent by repeated squaring: the same bits everywhere.
SRA_FUNCTION double power(double base, std::int64_t exponent) {
  double result = 1;
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) result *= base;
    base *= base;
  }
  return result;
}

struct Settings {
  double beta1, beta2, eps;
};

// Factors of update number `step`, counted from 1. norm: of the gradients as they are, multiplied by the loss scale.
// clip = 0: no clipping.
SRA_FUNCTION Rates
make_rates(Settings settings, std::int64_t step, float norm, float ema_decay, float clip, float loss_scale) {
  Rates rates;
  const float ratio = clip / (norm / loss_scale + 1e-6f);
  rates.scale = (clip > 0 && ratio < 1 ? ratio : 1.0f) / loss_scale;
  rates.blend1 = static_cast<float>(1 - settings.beta1);
  rates.keep2 = static_cast<float>(settings.beta2);
  rates.blend2 = static_cast<float>(1 - settings.beta2);
  rates.bias2 = static_cast<float>(sqrt(1 - power(settings.beta2, step)));
  rates.eps = static_cast<float>(settings.eps);
  rates.blend_ema = static_cast<float>(1 - static_cast<double>(ema_decay));
  return rates;
}

SRA_FUNCTION GroupRates make_group(Settings settings, std::int64_t step, float lr, double decay) {
  const double bias1 = 1 - power(settings.beta1, step);
  return {static_cast<float>(lr / bias1), static_cast<float>(1 - lr * decay)};
}

// AdamW of one weight, in place. g: the gradient before clipping and unscaling.
SRA_FUNCTION void adamw(float g, float& weight, float& m, float& v, const Rates& rates, const GroupRates& group) {
  g *= rates.scale;
  m = m + rates.blend1 * (g - m);
  v = rates.keep2 * v + rates.blend2 * (g * g);
  weight = group.keep * weight - group.step_size * (m / (sqrtf(v) / rates.bias2 + rates.eps));
}

SRA_FUNCTION void average(float weight, float& ema, const Rates& rates) {
  ema = ema + rates.blend_ema * (weight - ema);
}

// The norm's order of additions. A chunk of NORM_CHUNK gradients is added in NORM_LANES sums: gradient i goes to sum
// i mod NORM_LANES. Each four neighbouring sums are added as (a + b) + (c + d), and the remaining NORM_THREADS sums by
// a tree of halves: sum i and sum i + half. The sums of the chunks are added in NORM_THREADS sums, and these by the
// same tree. Everything is float64, in which the square of a float32 is exact. The result does not depend on which
// thread computes which chunk.
constexpr std::int64_t NORM_CHUNK = 1 << 16;
constexpr int NORM_THREADS = 256, NORM_LANES = 4 * NORM_THREADS;

}  // namespace sra
