// Compares the arithmetic and the CPU code with slow, independent implementations: conversions by powers of two, every
// operation of the update in float64 and then rounded, the norm's additions in the order defined in arithmetic.h.
#include <algorithm>
#include <cstdio>
#include <vector>

#include "cpu.h"
#include "expect.h"

namespace {

using sra::bits, sra::Dtype;

std::uint32_t random_word() {
  static std::uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<std::uint32_t>(state >> 32);
}

std::vector<const sra::Cpu*> instruction_sets() {
  std::vector<const sra::Cpu*> all{&sra::baseline::cpu};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) all.push_back(&sra::avx2::cpu);
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    all.push_back(&sra::avx512::cpu);
#endif
  return all;
}

// A 16-bit float format: binary digits after the point, smallest and largest exponent of normal numbers.
struct Format {
  int digits, smallest, largest;
};
constexpr Format BFLOAT16{7, -126, 127}, FLOAT16{10, -14, 15};
Format format_of(Dtype dtype) { return dtype == Dtype::bfloat16 ? BFLOAT16 : FLOAT16; }
unsigned infinity(Format f) { return static_cast<unsigned>(f.largest - f.smallest + 2) << f.digits; }

double slow_widen(unsigned word, Format f) {
  const unsigned magnitude = word & 0x7fffu;
  const int exponent = int(magnitude) >> f.digits, fraction = int(magnitude) % (1 << f.digits);
  const int units = fraction + (exponent ? 1 << f.digits : 0);
  double value = std::ldexp(units, std::max(exponent, 1) + f.smallest - 1 - f.digits);
  if (magnitude >= infinity(f)) value = fraction ? NAN : INFINITY;
  return word & 0x8000u ? -value : value;
}

unsigned slow_narrow(double x, Format f) {
  const unsigned sign = std::signbit(x) ? 0x8000u : 0u;
  if (std::isnan(x)) return infinity(f) | 1u << (f.digits - 1);  // quiet, of either sign
  const int exponent = x == 0 ? f.smallest : std::max(std::ilogb(x), f.smallest);
  if (exponent > f.largest) return sign | infinity(f);
  const double units = std::nearbyint(std::ldexp(std::fabs(x), f.digits - exponent));  // ties to even
  // A carry from the digits increments the exponent; beyond the largest exponent it yields infinity.
  return sign | static_cast<unsigned>(units + std::ldexp(exponent - f.smallest, f.digits));
}

// One float32 operation: computed in float64, then rounded.
float round(double x) { return static_cast<float>(x); }
std::uint32_t word_of(double x) { return bits<std::uint32_t>(round(x)); }

template <class Half>
void test_conversions(Format f) {
  auto test_narrowing = [f](float x) {
    Half half;
    sra::narrow(x, half);
    const unsigned word = std::isnan(x) ? half.word & 0x7fffu : half.word;
    expect(word == slow_narrow(x, f), "narrowing %a: %#x, not %#x", x, word, slow_narrow(x, f));
  };
  for (unsigned word = 0; word < 0x10000; ++word) {
    const float wide = sra::widen(Half{static_cast<std::uint16_t>(word)}), slow = round(slow_widen(word, f));
    expect(std::isnan(slow) ? std::isnan(wide) : word_of(wide) == word_of(slow), "%#x: %g, not %g", word, wide, slow);
    test_narrowing(wide);  // and back
    // Every midpoint between two neighbours and the values next to it: float32 has 13 digits more than float16.
    for (unsigned low = 0; low < 0x10000; low += 0x1000)
      for (const unsigned beside : {0u, 1u, 0xfffu}) test_narrowing(bits<float>(word << 16 | low | beside));
  }
}

// Within `units` of 2^-24, half a last bit of float32. Slightly more than one allows for the rounding of float64.
bool near(double got, long double wanted, double units = 1.1) {
  return std::fabs(double(got - wanted)) <= units * std::ldexp(std::fabs(double(wanted)), -24);
}

void test_rates() {
  for (const double beta : {0.0, 0.5, 0.9, 0.95, 0.999, 0.9999, 0.9999999})
    for (const long long n : {1LL, 2LL, 3LL, 7LL, 10LL, 100LL, 999LL, 12345LL, 1000000LL, 123456789LL, 1LL << 40}) {
      const double beta2 = 1 - (1 - beta) / 2;
      auto raised = [n](long double base) { return std::pow(base, static_cast<long double>(n)); };
      // A squaring rounds and doubles the previous error: 2^-53 per factor. The constant allows for underflow.
      const double allowed = std::ldexp(double(n) * double(raised(beta)), -53) + 1e-300;
      expect(std::fabs(double(sra::power(beta, n) - raised(beta))) <= allowed, "%g^%lld is off", beta, n);
      const sra::Rates r = sra::make_rates({beta, beta2, 1e-8}, n, 1, 0.75f, 0, 1);
      const sra::GroupRates group = sra::make_group({beta, beta2, 1e-8}, n, 0.1f, 0.3);
      expect(near(r.bias2, std::sqrt(1 - raised(beta2))), "bias2 of beta2 %g, step %lld: %g", beta2, n, r.bias2);
      expect(near(group.step_size, 0.1f / (1 - raised(beta))), "step size, beta %g, step %lld", beta, n);
      expect(near(r.blend1, 1 - beta) && near(r.blend2, 1 - beta2) && near(r.keep2, beta2), "blends of beta %g", beta);
      expect(near(group.keep, 1 - 0.1f * 0.3L) && r.blend_ema == 0.25f && r.eps == 1e-8f, "decay, average or eps");
    }
  const float clips[][4] = {
      // norm, clip, loss scale, what the gradient's scale is then
      {4, 0, 1, 1},
      {4, 1, 1, 1 / 4.000001f},
      {0.5f, 1, 1, 1},
      {1, 1, 1, 1 / 1.000001f},
      {3e38f, 2, 1, 2 / 3e38f},
      {0, 1, 1, 1},
      {0, 0, 3, 1 / 3.0f},
      {64, 0, 64, 1 / 64.0f},
      {50, 1, 100, 0.01f},
      {400, 1, 100, 0.01f / 4.000001f}};
  for (const auto& [norm, clip, loss_scale, scale] : clips)
    expect(near(sra::make_rates({0.9, 0.999, 1e-8}, 1, norm, 0, clip, loss_scale).scale, scale, 4), "clip of %g", norm);
  for (const float x : {0x1.fffffep127f, 0.0f, 1e-45f, INFINITY, NAN})
    expect(sra::finite(x) == std::isfinite(x) && sra::finite(-x) == std::isfinite(x), "whether %g is finite", x);
}

void slow_adamw(double g, float& w, float& m, float& v, const sra::Rates& r, const sra::GroupRates& group) {
  g = round(g * r.scale);
  m = round(double{m} + round(double{r.blend1} * round(g - m)));
  v = round(double{round(double{r.keep2} * v)} + round(double{r.blend2} * round(g * g)));
  const double root = round(double{round(double{round(std::sqrt(double{v}))} / r.bias2)} + r.eps);
  w = round(double{round(double{group.keep} * w)} - round(double{group.step_size} * round(m / root)));
}

std::size_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

double read(const unsigned char* from, Dtype dtype) {
  std::uint32_t word = 0;
  std::memcpy(&word, from, size_of(dtype));
  return dtype == Dtype::float32 ? bits<float>(word) : slow_widen(word, format_of(dtype));
}

void write(double x, unsigned char* to, Dtype dtype) {
  const std::uint32_t word = dtype == Dtype::float32 ? word_of(x) : slow_narrow(x, format_of(dtype));
  std::memcpy(to, &word, size_of(dtype));
}

// A tensor between guard bytes that must not change. With a sanitizer, the end of the allocation is the guard.
#ifdef __SANITIZE_ADDRESS__
constexpr std::size_t GUARD = 64, BEHIND = 0;
#else
constexpr std::size_t GUARD = 64, BEHIND = 64;
#endif
using Bytes = std::vector<unsigned char>;

Bytes tensor(std::size_t count, std::size_t offset, Dtype dtype, double scale, bool positive = false) {
  Bytes bytes(GUARD + (offset + count) * size_of(dtype) + BEHIND, 0xa5);
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint32_t word = random_word();
    double x = scale * std::ldexp(1 + (word >> 9) * 0x1p-23, -int(word % 12));
    if (word % 61 == 0) x = word & 64u ? 0.0 : 1e-41;  // the latter subnormal
    write(word & 256u && !positive ? -x : x, &bytes[GUARD + (offset + i) * size_of(dtype)], dtype);
  }
  return bytes;
}

enum Has : unsigned { ADAM = 1, EMA = 2, STUDENT = 4, TEACHER = 8, ZEROING = 16, STREAMING = 32, NOT_FINITE = 64 };

void test_update(unsigned has, std::size_t offset, std::size_t begin, std::size_t size, Dtype gradients, Dtype copies) {
  constexpr const char* names[] = {"gradient", "weight", "m", "v", "ema", "student", "teacher"};
  constexpr unsigned parts[] = {ADAM, ~0u, ADAM, ADAM, EMA, STUDENT, TEACHER};
  constexpr Dtype full = Dtype::float32;
  const Dtype dtypes[] = {gradients, full, full, full, full, copies, copies};
  const std::size_t count = begin + size + (size % 2 ? 5 : 0);
  const bool finite = !(has & NOT_FINITE);
  std::vector<Bytes> before;
  for (std::size_t i = 0; i < 7; ++i) before.push_back(tensor(count, offset, dtypes[i], i ? 1 : 100, i == 3));
  const sra::Rates rates = sra::make_rates({0.9, 0.999, 1e-8}, 3, 7, 0.99f, 0.1f, 16);
  const sra::GroupRates group = sra::make_group({0.9, 0.999, 1e-8}, 3, 1e-2f, 0.1);
  auto at = [&](std::vector<Bytes>& all, std::size_t part, std::size_t i) {
    return all[part].data() + GUARD + (offset + i) * size_of(dtypes[part]);
  };
  std::vector<Bytes> wanted = before;
  for (std::size_t i = begin; i < begin + size; ++i) {
    float x[5];
    for (std::size_t part = 1; part < 5; ++part) x[part] = round(read(at(wanted, part, i), full));
    if (finite && has & ADAM) slow_adamw(read(at(wanted, 0, i), gradients), x[1], x[2], x[3], rates, group);
    const double way = round(double{rates.blend_ema} * round(double{x[1]} - x[4]));
    if (finite && has & EMA) x[4] = round(x[4] + way);
    for (std::size_t part = 1; part < 5; ++part) write(x[part], at(wanted, part, i), full);
    if (finite && has & STUDENT) write(x[1], at(wanted, 5, i), copies);
    if (finite && has & TEACHER) write(x[4], at(wanted, 6, i), copies);
    if (has & ZEROING && has & ADAM) write(0, at(wanted, 0, i), gradients);
  }
  for (const sra::Cpu* cpu : instruction_sets()) {
    std::vector<Bytes> got = before;
    auto of = [&](std::size_t part) { return has & parts[part] ? static_cast<void*>(at(got, part, 0)) : nullptr; };
    auto floats = [&](std::size_t part) { return static_cast<float*>(of(part)); };
    const sra::Update update{gradients, copies, bool(has & ZEROING)};
    cpu->update(
        {of(0), floats(1), floats(2), floats(3), floats(4), of(5), of(6), std::int64_t(count), 0}, std::int64_t(begin),
        std::int64_t(size), rates, group, update, finite, has & STREAMING);
    for (std::size_t part = 0; part < 7; ++part)
      expect(
          got[part] == wanted[part], "%s: %s, %zu elements from %zu, offset %zu, dtypes %d %d, has %#x", cpu->name,
          names[part], size, begin, offset, int(gradients), int(copies), has);
  }
}

void test_updates() {
  for (const std::size_t size : {0, 1, 2, 3, 7, 15, 16, 17, 31, 33, 255, 256, 257, 511, 512, 1023, 1283})
    for (const std::size_t offset : {0, 1, 2, 3, 5})
      for (int dtypes = 0; dtypes < 9; ++dtypes)
        for (const unsigned has : {ADAM | EMA | STUDENT | TEACHER | STREAMING, random_word(), random_word()})
          test_update(
              has & (has & EMA ? 0x7fu : 0x7fu - TEACHER), offset, random_word() % 3 ? 0 : 256, size, Dtype{dtypes / 3},
              Dtype{dtypes % 3});
}

double tree(std::vector<double> sums) {
  for (std::size_t half = sums.size() / 2; half; half /= 2)
    for (std::size_t i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}

void test_norm(const sra::Cpu& cpu) {
  for (const std::size_t size : {0, 1, 2, 5, 1023, 1024, 1025, 4099, 40000, 65535, 65536})
    for (const std::size_t offset : {0, 1, 3})
      for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::float16}) {
        const Bytes bytes = tensor(size, offset, dtype, 1e3);
        const unsigned char* first = bytes.data() + GUARD + offset * size_of(dtype);
        std::vector<double> l(1024), fours;
        for (std::size_t i = 0; i < size; ++i) l[i % 1024] += std::pow(read(first + i * size_of(dtype), dtype), 2);
        for (std::size_t i = 0; i < 1024; i += 4) fours.push_back((l[i] + l[i + 1]) + (l[i + 2] + l[i + 3]));
        const double sum = cpu.square_sum(first, std::int64_t(size), dtype);
        expect(sum == tree(fours), "%s: sum of %zu squares: %a, not %a", cpu.name, size, sum, tree(fours));
      }
  for (const float last : {3e38f, -INFINITY, NAN}) {
    std::vector<float> g(3000, 3e38f);  // the squares are beyond float32
    g[2999] = last;
    const double sum = cpu.square_sum(g.data(), 3000, Dtype::float32);
    expect(std::fpclassify(sum) == std::fpclassify(last), "%s: %g among the gradients gives %g", cpu.name, last, sum);
  }
}

void test_total() {
  for (const std::size_t count : {0, 1, 2, 255, 256, 257, 385, 1000, 3000, 10000, 30000, 100000}) {
    std::vector<double> sums(count), threads(256);
    for (double& sum : sums) sum = std::ldexp(int(random_word()), int(random_word() % 40));  // signed: much cancels
    for (std::size_t i = 0; i < count; ++i) threads[i % 256] += sums[i];
    expect(sra::total(sums.data(), std::int64_t(count)) == tree(threads), "the total of %zu sums", count);
  }
}

}  // namespace

int main() {
  test_conversions<sra::Bfloat16>(BFLOAT16);
  test_conversions<sra::Float16>(FLOAT16);
  test_rates();
  test_updates();
  for (const sra::Cpu* cpu : instruction_sets()) test_norm(*cpu);
  test_total();
  expect(&sra::best_cpu() == instruction_sets().back(), "%s is not the best", sra::best_cpu().name);
  std::printf("%zu instruction sets, %d failures\n", instruction_sets().size(), failures);
  return failures != 0;
}
