"""Breakdown of a step: exact on hand-made traces, and against a count of every microsecond on random ones."""

from __future__ import annotations

from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sra_fast.tools.breakdown import CATEGORIES, Span, attribute, breakdown, busy_time, category, stages_of

NVJET = "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_bias_TNN"
FLASH = "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, cutlass::bfloat16_t>, false>(Params)"
ELEMENTWISE = "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>(int)"
FOREACH = "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<2>>(float*)"
NCCL = "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
LAYER_NORM = "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float>(int)"
COPY = "Memcpy DtoD (Device -> Device)"
UPLOAD = "Memcpy HtoD (Pinned -> Device)"


class GpuTrace:
    """Chrome events as Kineto writes them. The host launches from thread 1 and, in the backward pass, from thread 2."""

    def __init__(self):
        self.events = [{"ph": "M", "name": "process_name", "ts": 0, "pid": 1, "tid": 0, "args": {"name": "python"}}]
        self._correlation = count(1)

    def host(self, name, ts, dur, cat="user_annotation", **args):
        tid = args.pop("tid", 1)
        self.events.append(
            {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": tid, "ts": ts, "dur": dur, "args": args}
        )

    def launch(self, ts, tid=1, name="cudaLaunchKernel", cat="cuda_runtime"):
        correlation = next(self._correlation)
        self.host(name, ts, 1, cat, tid=tid, correlation=correlation, **{"External id": correlation})
        return correlation

    def kernel(self, name, ts, dur, correlation, stream=7):
        cat = "gpu_memcpy" if name.startswith("Memcpy") else "kernel"
        args = {"device": 0, "stream": stream, "correlation": correlation, "External id": correlation}
        self.events.append(
            {"ph": "X", "cat": cat, "name": name, "pid": 0, "tid": stream, "ts": ts, "dur": dur, "args": args}
        )


def gpu_trace(names=None, ranges=True, graph=False):
    """Four steps; the host is done with each after 100 us, the device needs 1,000 us for it. `names` renames kernels.

    us    0       300   400   500 550 600   700   800 850 900 920    1000
    s 7   NVJET---|FLASH|ELEM-|   |   FOREACH-----|   |   |COPY|
    s 20          |  NCCL---------|
    s 8           |     |     |   |   |     LAYER_NORM|
    s 30  UPLOAD of the next step's inputs from 100 to 110
    """
    trace, names = GpuTrace(), names or {}
    for step in range(4):
        host, device = 100 * step, 1000 * step + (50 if step == 0 else 0)
        trace.host(f"ProfilerStep#{step + 3}", host, 99)
        if ranges:
            trace.host("sra_fast::student", host + 5, 30)
            trace.host("sra_fast::backward", host + 40, 20)
            trace.host("sra_fast::update", host + 60, 20)
        if step:
            trace.kernel(UPLOAD, 1000 * (step - 1) + 100, 10, trace.launch(host + 1, name="cudaMemcpyAsync"), 30)
        whole = trace.launch(host + 5, name="cudaGraphLaunch") if graph else None
        for name, start, duration, stream, launched, tid in (
            (NVJET, 0, 300, 7, 10, 1),
            (FLASH, 300, 100, 7, 45, 2),
            (NCCL, 350, 200, 20, 70, 1),
            (ELEMENTWISE, 400, 100, 7, 50, 2),
            (FOREACH, 600, 200, 7, 65, 1),
            (LAYER_NORM, 700, 150, 8, 90, 1),
            (COPY, 900, 20, 7, 95, 1),
        ):
            triton = name in (NVJET, LAYER_NORM)
            correlation = whole or trace.launch(
                host + launched, tid, *(("cuLaunchKernelEx", "cuda_driver") if triton else ())
            )
            trace.kernel(names.get(name, name), device + start, duration, correlation, stream)
    return trace.events


EXPECTED = {
    "gemm": 0.3,
    "attention": 0.1,
    "norm_elementwise": 0.1 + 0.15 + 0.02,
    "optimizer": 0.1,  # of 0.2: the other half is hidden behind the normalisation
    "other": 0.0,
    "communication": 0.05,  # of 0.2: 150 us are hidden behind attention and elementwise kernels
    "idle": 0.05 + 0.05 + 0.08,
}


def test_every_moment_of_a_gpu_step_goes_to_one_category():
    result = breakdown(gpu_trace())
    assert (result.steps, result.step_ms) == (2, 1.0)
    assert result.ms == pytest.approx(EXPECTED)
    assert sum(result.ms.values()) == pytest.approx(result.step_ms, abs=1e-12)
    assert result.shares == pytest.approx(EXPECTED)  # of a step of 1 ms
    assert result.busy_ms == pytest.approx(
        {"gemm": 0.3, "attention": 0.1, "norm_elementwise": 0.28, "optimizer": 0.2, "communication": 0.2}
    )
    # Kernels of the backward pass are launched by another thread than the one that holds the range.
    assert result.stages_ms == pytest.approx(
        {"sra_fast::student": 0.3, "sra_fast::backward": 0.2, "sra_fast::update": 0.4, "": 0.18}
    )


def test_kernels_are_listed_with_calls_and_time_per_step():
    result = breakdown(gpu_trace(names={COPY: ELEMENTWISE}))
    assert [kernel.name for kernel in result.kernels] == [NVJET, NCCL, FOREACH, LAYER_NORM, ELEMENTWISE, FLASH, UPLOAD]
    elementwise = result.kernels[4]
    assert (elementwise.category, elementwise.calls) == ("norm_elementwise", 2.0)
    assert (elementwise.ms, elementwise.share) == pytest.approx((0.12, 0.12))


def test_kernels_of_a_cuda_graph_are_known_by_the_steps_launched_one_by_one():
    events = gpu_trace(ranges=False, graph=True)
    stages = stages_of(gpu_trace())
    assert breakdown(events, stages=stages) == breakdown(gpu_trace())
    alone = breakdown(events)
    assert set(alone.stages_ms) == {""}
    assert (alone.ms["optimizer"], alone.ms["idle"]) == (0, pytest.approx(EXPECTED["idle"]))


def test_calls_of_one_kernel_in_several_ranges_keep_their_order():
    names = {FOREACH: ELEMENTWISE, NVJET: ELEMENTWISE}
    stages = stages_of(gpu_trace(names))
    assert stages[ELEMENTWISE] == ["sra_fast::student", "sra_fast::backward", "sra_fast::update"]
    result = breakdown(gpu_trace(names, ranges=False, graph=True), stages=stages)
    assert result.ms["optimizer"] == pytest.approx(EXPECTED["optimizer"])
    assert stages_of(cpu_trace()) == {}


@pytest.mark.parametrize(("step", "inside"), [(0, 150), (2, 100)])
def test_a_kernel_across_the_windows_edge_is_cut_there(step, inside):
    events = gpu_trace()
    chosen = [e for e in events if e["name"] == COPY][step]  # of the step before the window, or of the last one in it
    chosen["dur"] = 200
    copies = next(kernel for kernel in breakdown(events).kernels if kernel.name == COPY)
    others = 20 * (2 if step == 0 else 1)
    assert (copies.calls, copies.ms) == (1.0, pytest.approx((others + inside) / 2000))


@pytest.mark.parametrize(("steps", "skip"), [(0, 0), (1, 0), (2, 1), (4, 3)])
def test_a_trace_without_a_whole_step_is_an_error(steps, skip):
    names = {f"ProfilerStep#{step + 3}" for step in range(steps)}
    events = [e for e in gpu_trace() if not e["name"].startswith("ProfilerStep") or e["name"] in names]
    with pytest.raises(ValueError, match="at least 2 are needed"):
        breakdown(events, skip)


def cpu_trace():
    """Three steps of 100 us, all alike: an op that calls two others, one of them inside the update, and Python."""
    trace = GpuTrace()
    for step in range(3):
        base = 100 * step
        trace.host(f"ProfilerStep#{step}", base, 100)
        trace.host("aten::linear", base + 10, 40, "cpu_op")
        trace.host("aten::addmm", base + 12, 30.001, "cpu_op")  # itself 25.001
        trace.host("aten::copy_", base + 15, 5, "cpu_op")
        trace.host("aten::expand", base + 45, 5.001, "cpu_op")  # rounded beyond the end of its caller
        trace.host("sra_fast::update", base + 60, 30)
        trace.host("aten::mul_", base + 65, 10, "cpu_op")
        trace.host("aten::_foreach_mul_", base + 65, 12, "cpu_op")  # begins with the op it calls; itself 2
        trace.host("aten::_scaled_dot_product_flash_attention_for_cpu", base + 92, 3, "cpu_op")
    return trace.events


def test_ops_of_a_cpu_count_their_own_time():
    result = breakdown(cpu_trace(), skip=0)
    assert result.ms == pytest.approx(
        {
            "gemm": 0.025001,
            "attention": 0.003,
            "norm_elementwise": 0.005,
            "optimizer": 0.012,
            "other": 0.009999,  # the wrapper's 4.999 and the view's 5
            "communication": 0.0,
            "idle": 0.045,
        },
        abs=1e-9,
    )
    assert {kernel.name: (kernel.calls, round(1e6 * kernel.ms)) for kernel in result.kernels} == {  # ns
        "aten::linear": (1, 4999),
        "aten::addmm": (1, 25001),
        "aten::copy_": (1, 5000),
        "aten::expand": (1, 5000),
        "aten::mul_": (1, 10000),
        "aten::_foreach_mul_": (1, 2000),
        "aten::_scaled_dot_product_flash_attention_for_cpu": (1, 3000),
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (NVJET, "gemm"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x128_32x5_nn_align8>(Params)", "gemm"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, true, false, false>(params)", "gemm"),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16, float, 128, 16, 4, 4, false>(params)", "gemm"),
        ("sm80_xmma_fprop_implicit_gemm_bf16f32_bf16f32_f32_nhwckrsc_nhwc_tilesize128x64x32", "gemm"),
        ("triton_tem_fused_addmm_gelu_3", "gemm"),
        ("aten::mm", "gemm"),
        ("aten::mkldnn_convolution", "gemm"),
        ("mkldnn::_linear_pointwise", "gemm"),
        (FLASH, "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass>)", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1", "attention"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, __nv_bfloat16, 128, 64>(Params)", "attention"),
        ("triton_tem_fused_flex_attention_0", "attention"),
        (ELEMENTWISE, "norm_elementwise"),
        ("Memset (Device)", "norm_elementwise"),
        ("void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, float>(Params)", "norm_elementwise"),
        ("triton_per_fused_addmm_native_layer_norm_t_view_2", "norm_elementwise"),
        ("graph_0_cpp_fused_add_mm_t_transpose_view_1", "norm_elementwise"),
        ("cpp_fused__scaled_dot_product_flash_attention_for_cpu_backward_gelu_0", "norm_elementwise"),
        ("_gated_adaln_forward", "norm_elementwise"),
        ("sra_fast::alignment", "norm_elementwise"),
        ("aten::native_layer_norm_backward", "norm_elementwise"),
        ("void sra::(anonymous namespace)::update_kernel<float, sra::Bfloat16>(sra::Launch)", "optimizer"),
        ("sra_fast::adamw_ema_", "optimizer"),
        ("void multi_tensor_apply_kernel<TensorListMetadata<4>, FusedAdamMathFunctor<float, 4>>()", "optimizer"),
        (NCCL, "communication"),
        ("nccl:all_reduce", "communication"),
        ("c10d::allreduce_", "communication"),
        ("aten::view", "other"),
        ("aten::empty_strided", "other"),
        ("aten::linear", "other"),
        ("autograd::engine::evaluate_function: AddmmBackward0", "other"),
        ("some_new_kernel", "other"),
    ],
)
def test_a_name_is_known_for_what_it_is(name, expected):
    assert category(name) == expected
    assert category(name, "sra_fast::update") == ("communication" if expected == "communication" else "optimizer")


NAMES = {category(name): name for name in (NVJET, FLASH, LAYER_NORM, "aten::_fused_adam", "aten::view", NCCL)}
busy = st.tuples(st.integers(0, 60), st.integers(0, 20), st.sampled_from(CATEGORIES[:-1]))


@given(st.lists(busy, max_size=12))
def test_attribution_agrees_with_a_count_of_every_microsecond(times):
    spans = [Span(start, start + length, NAMES[label]) for start, length, label in times]
    first, any_of = dict.fromkeys(CATEGORIES, 0), {span.category: 0 for span in spans}
    for moment in range(82):
        running = {span.category for span in spans if span.start <= moment < span.end}
        for label in running:
            any_of[label] += 1
        if running:
            first[min(running, key=CATEGORIES.index)] += 1
    assert attribute(spans) == first
    assert busy_time(spans, lambda span: span.category) == any_of
