// Runs cuda.cu on the CPU and compares every bit with cpu.cpp, which test_arithmetic.cpp compares with independent
// implementations. The kernels' indices, vectors, tails, barriers and launches are what this file is about.
#include "cuda_on_cpu.h"

#include "cuda.cu"

#include <cstdio>
#include <cstring>

#include "cpu.h"
#include "expect.h"

namespace {

using sra::Dtype, sra::Parameter;

std::mt19937 random_words{2};
std::size_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// `count` elements at `offset` elements behind an aligned address. The allocation ends with the last element.
struct Tensor {
  std::vector<unsigned char> bytes;
  std::size_t begin;

  Tensor(std::size_t count, std::size_t offset, Dtype dtype) : bytes((offset + count) * size_of(dtype)) {
    begin = offset * size_of(dtype);
    for (std::size_t i = 0; i < offset + count; ++i) {
      const float x = std::ldexp(1.0f + float(random_words() % 1024) / 1024, -int(random_words() % 12));
      sra::Bfloat16 brain;
      sra::Float16 half;
      sra::narrow(x, brain), sra::narrow(x, half);
      const void* from = dtype == Dtype::float32    ? static_cast<const void*>(&x)
                         : dtype == Dtype::bfloat16 ? static_cast<const void*>(&brain)
                                                    : static_cast<const void*>(&half);
      std::memcpy(&bytes[i * size_of(dtype)], from, size_of(dtype));
    }
  }

  // Not data() + begin of an empty vector, which may be null: absent and empty tensors differ.
  void* data() { return bytes.empty() ? this : static_cast<void*>(bytes.data() + begin); }
};

struct Sizes {
  std::size_t count, offset;
};

enum Has : unsigned { ADAM = 1, EMA = 2, STUDENT = 4, TEACHER = 8 };

struct Case {
  Dtype gradients = Dtype::bfloat16, copies = Dtype::bfloat16;
  unsigned has = ADAM | EMA | STUDENT | TEACHER;
  bool zeroing = false, lr_per_group = false;
  float norm = 7;
  int groups = 2;
};

// All tensors of all parameters, in one order.
struct State {
  std::vector<std::vector<Tensor>> tensors;
  std::int64_t step = 3, skipped = 1;

  std::vector<Parameter> parameters(const Case& c, const std::vector<Sizes>& sizes) {
    std::vector<Parameter> list;
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      auto of = [&](std::size_t part, unsigned bit) { return c.has & bit ? tensors[i][part].data() : nullptr; };
      auto floats = [&](std::size_t part, unsigned bit) { return static_cast<float*>(of(part, bit)); };
      // Every third parameter has no copy for the teacher, as those behind its tap.
      list.push_back(
          {of(0, ADAM), floats(1, ~0u), floats(2, ADAM), floats(3, ADAM), floats(4, EMA), of(5, STUDENT),
           i % 3 == 2 ? nullptr : of(6, TEACHER), std::int64_t(sizes[i].count),
           std::int32_t(i % std::size_t(c.groups))});
    }
    return list;
  }
};

void test_update(const Case& c, const std::vector<Sizes>& sizes) {
  State gpu;
  const Dtype full = Dtype::float32, dtypes[] = {c.gradients, full, full, full, full, c.copies, c.copies};
  for (const Sizes& size : sizes) {
    gpu.tensors.emplace_back();
    for (const Dtype dtype : dtypes) gpu.tensors.back().emplace_back(size.count, size.offset, dtype);
  }
  State cpu = gpu;
  const sra::Settings settings{0.9, 0.999, 1e-8};
  const sra::Update update{c.gradients, c.copies, c.zeroing};
  std::vector<float> lr;
  std::vector<double> decays;
  for (int i = 0; i < c.groups; ++i) lr.push_back(1e-3f * float(i + 1)), decays.push_back(0.01 * i);
  const float ema_decay = 0.99f, clip = 0.1f, loss_scale = 16;
  const sra::DeviceScalars scalars{&c.norm,        &gpu.step,  &gpu.skipped, lr.data(),
                                   c.lr_per_group, &ema_decay, &clip,        &loss_scale};
  std::vector<double> workspace(std::size_t(sra::cuda_workspace_bytes(c.groups) + 7) / 8);
  sra::cuda_update(gpu.parameters(c, sizes), update, settings, scalars, decays, workspace.data(), nullptr);

  const bool finite = sra::finite(c.norm);
  finite ? ++cpu.step : ++cpu.skipped;
  const sra::Rates rates = sra::make_rates(settings, cpu.step, c.norm, ema_decay, clip, loss_scale);
  for (const Parameter& p : cpu.parameters(c, sizes)) {
    const std::size_t group = std::size_t(p.group);
    const auto factors = sra::make_group(settings, cpu.step, lr[c.lr_per_group ? group : 0], decays[group]);
    sra::baseline::cpu.update(p, 0, p.size, rates, factors, update, finite, false);
  }
  expect(gpu.step == cpu.step && gpu.skipped == cpu.skipped, "the counters, norm %g", c.norm);
  for (std::size_t i = 0; i < sizes.size(); ++i)
    for (std::size_t part = 0; part < 7; ++part)
      expect(
          gpu.tensors[i][part].bytes == cpu.tensors[i][part].bytes,
          "parameter %zu of %zu, tensor %zu: %zu elements, offset %zu, dtypes %d %d, has %#x, norm %g", i, sizes.size(),
          part, sizes[i].count, sizes[i].offset, int(c.gradients), int(c.copies), c.has, c.norm);
}

void test_norm(Dtype dtype, const std::vector<Sizes>& sizes, float last = 0) {
  std::vector<Tensor> tensors;
  for (const Sizes& size : sizes) tensors.emplace_back(size.count, size.offset, dtype);
  if (last != 0) std::memcpy(&tensors[0].bytes[tensors[0].begin], &last, sizeof last);
  std::vector<Parameter> list(sizes.size());
  std::vector<double> chunks;
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    list[i].gradient = tensors[i].data(), list[i].size = std::int64_t(sizes[i].count);
    for (std::int64_t at = 0; at < list[i].size; at += sra::NORM_CHUNK)
      chunks.push_back(
          sra::baseline::cpu.square_sum(
              static_cast<char*>(list[i].gradient) + std::size_t(at) * size_of(dtype),
              std::min(sra::NORM_CHUNK, list[i].size - at), dtype));
  }
  float norm = -1;
  std::vector<double> sums(chunks.size(), -1.0);
  sra::cuda_square_sums(list, dtype, sra::NORM_CHUNK, sums.data(), nullptr);
  sra::cuda_norm(sums.data(), std::int64_t(sums.size()), &norm, nullptr);
  const float right = static_cast<float>(std::sqrt(sra::total(chunks.data(), std::int64_t(chunks.size()))));
  const bool same = std::isnan(right) ? std::isnan(norm) : norm == right;
  expect(same, "the norm of %zu tensors of dtype %d: %a, not %a", sizes.size(), int(dtype), norm, right);
}

}  // namespace

int main() {
  constexpr std::size_t BLOCK = std::size_t(sra::UPDATE_CHUNK), CHUNK = std::size_t(sra::NORM_CHUNK);
  const std::vector<Sizes> edges{{0, 0},    {1, 0},    {3, 0},     {4, 0},         {5, 1},     {1023, 0},
                                 {1024, 2}, {1025, 4}, {BLOCK, 0}, {BLOCK + 1, 0}, {BLOCK, 3}, {2 * BLOCK + 6, 8}};
  std::vector<Sizes> many;  // more than one launch, of the optimizer's and of the groups'
  for (std::size_t i = 0; i < 2 * sra::PER_LAUNCH + 3; ++i) many.push_back({i % 7 * 3, i % 5});

  for (int dtypes = 0; dtypes < 9; ++dtypes) test_update({Dtype{dtypes / 3}, Dtype{dtypes % 3}}, edges);
  Case c;
  test_update(c, many);
  for (const unsigned has : {0u | ADAM, ADAM | STUDENT, 0u | EMA, EMA | TEACHER, ADAM | EMA})
    c.has = has, c.zeroing = has & ADAM, test_update(c, edges);
  c = Case{};
  c.zeroing = c.lr_per_group = true, c.groups = 40;
  test_update(c, many);
  for (const float norm : {INFINITY, NAN}) c.norm = norm, test_update(c, edges), c.zeroing = !c.zeroing;

  for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::float16}) {
    test_norm(dtype, edges);
    test_norm(dtype, many);
    test_norm(dtype, {{CHUNK - 1, 0}, {CHUNK, 1}, {CHUNK + 1, 0}, {2 * CHUNK, 0}});
  }
  test_norm(Dtype::float32, {{0, 0}});
  for (const float last : {3e38f, INFINITY, NAN}) test_norm(Dtype::float32, {{5, 0}}, last);
  std::printf("cuda.cu on the CPU: %d failures\n", failures);
  return failures != 0;
}
