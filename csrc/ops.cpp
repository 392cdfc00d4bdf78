// The optimizer as PyTorch operators on LibTorch's stable ABI: one library for every torch from 2.11 on, with or
// without a GPU. Defines schemas, validates arguments and calls cpu.h or cuda.h; kernels/adamw_ema.py documents the
// operators.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu.h"
#include "parameters.h"
#ifdef SRA_CUDA
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include "cuda.h"
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// From this total size on, copies are evicted from the caches before they are read again.
constexpr std::int64_t STREAMING_BYTES = std::int64_t{64} << 20;

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

std::string shape(const Tensor& tensor) {
  std::ostringstream text;
  text << '(';
  for (std::int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << (tensor.dim() == 1 ? ",)" : ")");
  return text.str();
}

std::string device_name(const Tensor& tensor) {
  std::ostringstream text;
  text << (tensor.is_cuda() ? "cuda:" : tensor.is_cpu() ? "cpu" : "another kind of device");
  if (tensor.is_cuda()) text << tensor.get_device_index();
  return text.str();
}

bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (std::int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) != b.size(i)) return false;
  return true;
}

sra::Dtype dtype_of(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  return type == ScalarType::BFloat16 ? sra::Dtype::bfloat16
         : type == ScalarType::Half   ? sra::Dtype::float16
                                      : sra::Dtype::float32;
}

// Requirements of a list: one tensor for each tensor in `like`, or no tensors.
struct Expected {
  const char* op;
  const char* name;
  const Tensors& like;
  const char* like_name;
  bool halves;   // bfloat16 and float16 are allowed besides float32, one dtype for the list
  bool missing;  // a tensor without elements stands for a missing one
};

void check(const Tensors& list, const Expected& expected) {
  const auto& [op, name, like, like_name, halves, missing] = expected;
  if (list.empty()) return;
  if (list.size() != like.size())
    refuse(
        op, ": ", name, " has ", list.size(), " tensors; must have one for each of the ", like.size(), " in ",
        like_name, ", or none");
  for (std::size_t i = 0; i < list.size(); ++i) {
    const Tensor& tensor = list[i];
    const ScalarType type = tensor.scalar_type();
    if (!same_device(tensor, like[0]))
      refuse(
          op, ": ", name, "[", i, "]: on ", device_name(tensor), "; must be on ", device_name(like[0]), " as ",
          like_name, "[0]");
    if (halves ? type != ScalarType::Float && type != ScalarType::BFloat16 && type != ScalarType::Half
               : type != ScalarType::Float)
      refuse(
          op, ": ", name, "[", i, "]: dtype ", torch::headeronly::toString(type), " given; must be Float",
          halves ? ", BFloat16 or Half" : "");
    if (type != list[0].scalar_type())
      refuse(
          op, ": ", name, "[", i, "]: dtype ", torch::headeronly::toString(type), " given; must be that of ", name,
          "[0], ", torch::headeronly::toString(list[0].scalar_type()));
    if (missing && !tensor.numel()) continue;
    if (!same_shape(tensor, like[i]))
      refuse(
          op, ": ", name, "[", i, "]: shape ", shape(tensor), " given; must be that of ", like_name, "[", i, "], ",
          shape(like[i]));
    if (!tensor.is_contiguous()) refuse(op, ": ", name, "[", i, "]: not contiguous");
  }
}

void check_scalar(const char* name, const Tensor& tensor, ScalarType type, const Tensor& like, std::int64_t count = 1) {
  if (tensor.scalar_type() != type || tensor.numel() != count || !tensor.is_contiguous() || !same_device(tensor, like))
    refuse(
        "adamw_ema_: ", name, ": ", torch::headeronly::toString(tensor.scalar_type()), " of shape ", shape(tensor),
        " on ", device_name(tensor), " given; must be ", torch::headeronly::toString(type), " of ", count, " element",
        count == 1 ? "" : "s", ", contiguous, on ", device_name(like));
}

// Memory of tensor i, or null if there is none.
template <class T = void>
T* at(const Tensors& list, std::size_t i) {
  return list.empty() || !list[i].numel() ? nullptr : static_cast<T*>(list[i].mutable_data_ptr());
}

// The validated, device-independent part of a call of adamw_ema_.
struct Call {
  std::vector<sra::Parameter> parameters;
  sra::Update update;
};

Call collect(
    const Tensors& gradients, const Tensors& weights, const Tensors& m, const Tensors& v, const Tensors& ema,
    const Tensors& student, const Tensors& teacher, const Tensor& norm, const Tensor& step, const Tensor& skipped,
    const Tensor& lr, const Tensor& ema_decay, const Tensor& clip, const Tensor& loss_scale,
    const std::vector<std::int64_t>& group, const std::vector<double>& weight_decay, bool zero_gradients) {
  const char* op = "adamw_ema_";
  check(weights, {op, "weights", weights, "weights", false, false});
  for (const auto& [list, name] :
       {std::pair{&gradients, "gradients"},
        {&m, "m"},
        {&v, "v"},
        {&ema, "ema"},
        {&student, "student"},
        {&teacher, "teacher"}}) {
    if (weights.empty() && !list->empty()) refuse(op, ": ", name, " has ", list->size(), " tensors, weights has none");
    const bool copies = list == &student || list == &teacher;
    check(*list, {op, name, weights, "weights", list == &gradients || copies, copies});
  }
  if (gradients.empty() != m.empty() || gradients.empty() != v.empty())
    refuse(
        op, ": gradients, m and v have ", gradients.size(), ", ", m.size(), " and ", v.size(),
        " tensors; AdamW needs all three, the average none");
  if (ema.empty() && !teacher.empty()) refuse(op, ": teacher has ", teacher.size(), " tensors, ema has none to copy");
  if (!student.empty() && !teacher.empty() && student[0].scalar_type() != teacher[0].scalar_type())
    refuse(
        op, ": teacher[0]: dtype ", torch::headeronly::toString(teacher[0].scalar_type()),
        " given; must be that of student[0], ", torch::headeronly::toString(student[0].scalar_type()));
  if (!group.empty() && group.size() != weights.size())
    refuse(
        op, ": group has ", group.size(), " numbers; must have one for each of the ", weights.size(),
        " weights, or none");
  const auto groups = static_cast<std::int64_t>(weight_decay.size());
  for (std::size_t i = 0; i < group.size(); ++i)
    if (group[i] < 0 || group[i] >= groups)
      refuse(op, ": group[", i, "]: ", group[i], " given; must be in [0, ", groups, "), one of weight_decay");
  if (!groups) refuse(op, ": weight_decay is empty; must have one number for each group");
  const Tensor& like = weights.empty() ? norm : weights[0];  // all scalars must be on its device
  check_scalar("norm", norm, ScalarType::Float, like);
  check_scalar("step", step, ScalarType::Long, like);
  check_scalar("skipped", skipped, ScalarType::Long, like);
  check_scalar("lr", lr, ScalarType::Float, like, lr.numel() == 1 ? 1 : groups);
  check_scalar("ema_decay", ema_decay, ScalarType::Float, like);
  check_scalar("clip", clip, ScalarType::Float, like);
  check_scalar("loss_scale", loss_scale, ScalarType::Float, like);

  Call call;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    call.parameters.push_back(
        {at(gradients, i), at<float>(weights, i), at<float>(m, i), at<float>(v, i), at<float>(ema, i), at(student, i),
         at(teacher, i), weights[i].numel(), group.empty() ? 0 : static_cast<std::int32_t>(group[i])});
  }
  const Tensors& copies = student.empty() ? teacher : student;
  call.update = {
      gradients.empty() ? sra::Dtype::float32 : dtype_of(gradients[0]),
      copies.empty() ? sra::Dtype::float32 : dtype_of(copies[0]), zero_gradients};
  return call;
}

// Calls run(parameter, first element, number of elements, chunk) for every chunk of all parameters, on torch's threads.
template <class Run>
void for_each_chunk(const std::vector<sra::Parameter>& parameters, std::int64_t chunk, Run run) {
  std::vector<std::int64_t> first;
  const std::int64_t count = sra::count_chunks(parameters, chunk, first);
  torch::stable::parallel_for(0, count, 1, [&](std::int64_t begin, std::int64_t end) {
    auto which = static_cast<std::size_t>(std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1);
    for (std::int64_t i = begin; i < end; ++i) {
      while (first[which + 1] <= i) ++which;
      const std::int64_t from = (i - first[which]) * chunk;
      run(which, from, std::min(chunk, parameters[which].size - from), i);
    }
  });
}

template <class T>
T& scalar(const Tensor& tensor) {
  return *static_cast<T*>(tensor.mutable_data_ptr());
}

void update_on_cpu(
    Tensors gradients, Tensors weights, Tensors m, Tensors v, Tensors ema, Tensors student, Tensors teacher,
    Tensor norm, Tensor step, Tensor skipped, Tensor lr, Tensor ema_decay, Tensor clip, Tensor loss_scale,
    std::vector<std::int64_t> group, std::vector<double> weight_decay, double beta1, double beta2, double eps,
    bool zero_gradients) {
  const auto [parameters, update] = collect(
      gradients, weights, m, v, ema, student, teacher, norm, step, skipped, lr, ema_decay, clip, loss_scale, group,
      weight_decay, zero_gradients);
  const sra::Settings settings{beta1, beta2, eps};
  const bool finite = sra::finite(scalar<float>(norm));
  const std::int64_t number = scalar<std::int64_t>(step) += finite;
  scalar<std::int64_t>(skipped) += !finite;
  const sra::Rates rates = sra::make_rates(
      settings, number, scalar<float>(norm), scalar<float>(ema_decay), scalar<float>(clip), scalar<float>(loss_scale));
  std::vector<sra::GroupRates> groups;
  for (std::size_t i = 0; i < weight_decay.size(); ++i)
    groups.push_back(sra::make_group(settings, number, (&scalar<float>(lr))[lr.numel() == 1 ? 0 : i], weight_decay[i]));
  std::int64_t copied = 0;
  for (const sra::Parameter& p : parameters) copied += p.size * 2 * (!!p.student + !!p.teacher);
  const bool streaming = copied >= STREAMING_BYTES;
  const sra::Cpu& cpu = sra::best_cpu();
  for_each_chunk(
      parameters, sra::CPU_CHUNK, [&](std::size_t which, std::int64_t begin, std::int64_t size, std::int64_t) {
        const sra::Parameter& p = parameters[which];
        cpu.update(p, begin, size, rates, groups[static_cast<std::size_t>(p.group)], update, finite, streaming);
      });
}

std::vector<sra::Parameter> as_parameters(const Tensors& gradients) {
  if (gradients.empty()) refuse("gradient_norm: gradients is empty");
  check(gradients, {"gradient_norm", "gradients", gradients, "gradients", true, false});
  std::vector<sra::Parameter> parameters;
  for (std::size_t i = 0; i < gradients.size(); ++i) {
    parameters.push_back(
        {at(gradients, i), nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, gradients[i].numel(), 0});
  }
  return parameters;
}

Tensor square_sums_on_cpu(Tensors gradients, std::int64_t chunk) {
  const std::vector<sra::Parameter> parameters = as_parameters(gradients);
  const sra::Dtype dtype = dtype_of(gradients[0]);
  const std::size_t size = dtype == sra::Dtype::float32 ? 4 : 2;
  std::vector<std::int64_t> first;
  const std::int64_t chunks = sra::count_chunks(parameters, chunk, first);
  Tensor result = torch::stable::new_empty(gradients[0], {chunks}, ScalarType::Double);
  double* sums = static_cast<double*>(result.mutable_data_ptr());
  const sra::Cpu& cpu = sra::best_cpu();
  for_each_chunk(parameters, chunk, [&](std::size_t which, std::int64_t begin, std::int64_t count, std::int64_t i) {
    const char* gradient = static_cast<const char*>(parameters[which].gradient);
    sums[i] = cpu.square_sum(gradient + static_cast<std::size_t>(begin) * size, count, dtype);
  });
  return result;
}

Tensor norm_on_cpu(Tensors gradients) {
  const Tensor sums = square_sums_on_cpu(gradients, sra::NORM_CHUNK);
  Tensor norm = torch::stable::new_empty(gradients[0], {}, ScalarType::Float);
  const double sum = sra::total(static_cast<const double*>(sums.const_data_ptr()), sums.numel());
  scalar<float>(norm) = static_cast<float>(std::sqrt(sum));
  return norm;
}

#ifdef SRA_CUDA

using CurrentStream = AOTITorchError (*)(std::int32_t device, void** stream);

// torch's function that returns its current stream, or null if torch has no CUDA. It is looked up in libtorch_cuda.so,
// if that is loaded: a CPU build of torch has no such library, and Python loads it with RTLD_LOCAL, so that even a weak
// symbol would stay null.
CurrentStream current_stream() {
  static const CurrentStream function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<CurrentStream>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  return function;
}

// Makes a tensor's device the current one during its lifetime. Its stream is the one that torch uses there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) {
    const int device = tensor.get_device_index();
    if (!current_stream()) refuse("this torch has no CUDA");
    TORCH_ERROR_CODE_CHECK(current_stream()(device, &stream));
    check(cudaGetDevice(&before_));
    check(cudaSetDevice(device));
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  void* stream = nullptr;

 private:
  static void check(cudaError_t status) {
    if (status != cudaSuccess) refuse(cudaGetErrorString(status));
  }
  int before_ = 0;
};

void update_on_cuda(
    Tensors gradients, Tensors weights, Tensors m, Tensors v, Tensors ema, Tensors student, Tensors teacher,
    Tensor norm, Tensor step, Tensor skipped, Tensor lr, Tensor ema_decay, Tensor clip, Tensor loss_scale,
    std::vector<std::int64_t> group, std::vector<double> weight_decay, double beta1, double beta2, double eps,
    bool zero_gradients) {
  const auto [parameters, update] = collect(
      gradients, weights, m, v, ema, student, teacher, norm, step, skipped, lr, ema_decay, clip, loss_scale, group,
      weight_decay, zero_gradients);
  const OnDevice on(norm);
  const std::int64_t bytes = sra::cuda_workspace_bytes(static_cast<std::int64_t>(weight_decay.size()));
  const Tensor workspace = torch::stable::new_empty(norm, {bytes}, ScalarType::Byte);
  const sra::DeviceScalars scalars{
      .norm = &scalar<float>(norm),
      .step = &scalar<std::int64_t>(step),
      .skipped = &scalar<std::int64_t>(skipped),
      .lr = &scalar<float>(lr),
      .lr_per_group = lr.numel() > 1,
      .ema_decay = &scalar<float>(ema_decay),
      .clip = &scalar<float>(clip),
      .loss_scale = &scalar<float>(loss_scale),
  };
  sra::cuda_update(
      parameters, update, {beta1, beta2, eps}, scalars, weight_decay, workspace.mutable_data_ptr(), on.stream);
}

Tensor square_sums_on_cuda(Tensors gradients, std::int64_t chunk) {
  const std::vector<sra::Parameter> parameters = as_parameters(gradients);
  const OnDevice on(gradients[0]);
  std::vector<std::int64_t> first;
  const std::int64_t chunks = sra::count_chunks(parameters, chunk, first);
  const Tensor sums = torch::stable::new_empty(gradients[0], {chunks}, ScalarType::Double);
  sra::cuda_square_sums(
      parameters, dtype_of(gradients[0]), chunk, static_cast<double*>(sums.mutable_data_ptr()), on.stream);
  return sums;
}

Tensor norm_on_cuda(Tensors gradients) {
  const Tensor sums = square_sums_on_cuda(gradients, sra::NORM_CHUNK);
  const OnDevice on(gradients[0]);
  Tensor norm = torch::stable::new_empty(gradients[0], {}, ScalarType::Float);
  sra::cuda_norm(static_cast<const double*>(sums.const_data_ptr()), sums.numel(), &scalar<float>(norm), on.stream);
  return norm;
}

#endif

// Whether the CUDA code can be called in this process: both this library and torch have it.
bool cuda_is_ready() {
#ifdef SRA_CUDA
  return current_stream() != nullptr;
#else
  return false;
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sra_fast, library) {
  library.def(
      "adamw_ema_(Tensor(a!)[] gradients, Tensor(b!)[] weights, Tensor(c!)[] m, Tensor(d!)[] v, Tensor(e!)[] ema,"
      " Tensor(f!)[] student, Tensor(g!)[] teacher, Tensor norm, Tensor(h!) step, Tensor(i!) skipped, Tensor lr,"
      " Tensor ema_decay, Tensor clip, Tensor loss_scale, int[] group, float[] weight_decay, float beta1, float beta2,"
      " float eps, bool zero_gradients) -> ()");
  library.def("gradient_norm(Tensor[] gradients) -> Tensor");
  library.def("square_sums(Tensor[] gradients, int chunk) -> Tensor");
  library.def("cuda_is_ready() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(sra_fast, CompositeExplicitAutograd, library) {
  library.impl("cuda_is_ready", TORCH_BOX(&cuda_is_ready));
}

STABLE_TORCH_LIBRARY_IMPL(sra_fast, CPU, library) {
  library.impl("adamw_ema_", TORCH_BOX(&update_on_cpu));
  library.impl("gradient_norm", TORCH_BOX(&norm_on_cpu));
  library.impl("square_sums", TORCH_BOX(&square_sums_on_cpu));
}

#ifdef SRA_CUDA
STABLE_TORCH_LIBRARY_IMPL(sra_fast, CUDA, library) {
  library.impl("adamw_ema_", TORCH_BOX(&update_on_cuda));
  library.impl("gradient_norm", TORCH_BOX(&norm_on_cuda));
  library.impl("square_sums", TORCH_BOX(&square_sums_on_cuda));
}
#endif
