"""The compiled optimizer's CUDA code: the bits of the CPU code, on the current stream, and in a captured graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sra_fast.kernels import library
from sra_fast.kernels.adamw_ema import Lists, Scalars, adamw_ema
from sra_fast.kernels.gradient_norm import gradient_norm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or bool(library.why_unavailable(on_gpu=True)),
        reason="needs an NVIDIA GPU and a library with GPU code",
    ),
]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# Aligned and not, shorter than a vector, around a block's 8,192 elements and a chunk's 65,536, empty; more parameters
# than one launch takes.
SIZES = [1, 3, 5, 8191, 8192, 8193, 65_535, 65_537, 200_003, 0, *[129] * 90]
OPTIONS = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": (0.1, 0.0), "group": [i % 2 for i in range(len(SIZES))]}


def make_lists(
    device: str, gradients: torch.dtype = FP32, copies: torch.dtype | None = BF16, misaligned: bool = False
) -> Lists:
    """The same numbers on any device. Every third teacher copy is missing."""
    generator = torch.Generator().manual_seed(0)

    def tensors(dtype: torch.dtype = FP32) -> list[Tensor]:
        offsets = [i % 4 if misaligned else 0 for i in range(len(SIZES))]
        return [
            torch.randn(size + offset, generator=generator).to(dtype).to(device)[offset:]
            for size, offset in zip(SIZES, offsets, strict=True)
        ]

    lists = Lists(tensors(gradients), tensors(), tensors(), [v.abs_() for v in tensors()], tensors())
    if copies is None:
        return lists
    teacher = [x if i % 3 else x[:0] for i, x in enumerate(tensors(copies))]
    return lists._replace(student=tensors(copies), teacher=teacher)


def make_scalars(norm: Tensor, groups: int = 2) -> Scalars:
    device = norm.device
    step, skipped = (torch.full((), k, dtype=torch.int64, device=device) for k in (4, 0))
    lr = torch.linspace(1e-2, 2e-2, groups, device=device)
    return Scalars(norm, step, skipped, lr, *(torch.full((), x, device=device) for x in (0.99, 1.0, 128.0)))


def bits(lists: Lists) -> list[Tensor]:
    return [x.cpu().contiguous().view(torch.uint8) for part in lists for x in part]


def assert_same_bits(a: Lists, b: Lists) -> None:
    assert [len(part) for part in a] == [len(part) for part in b]
    for place, (x, y) in enumerate(zip(bits(a), bits(b), strict=True)):
        assert torch.equal(x, y), f"tensor {place}"


@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize("copies", [None, BF16, FP16])
@pytest.mark.parametrize("gradients", [FP32, BF16, FP16])
def test_a_gpu_computes_the_bits_of_a_cpu(gradients: torch.dtype, copies: torch.dtype | None, misaligned: bool) -> None:
    results = []
    for device in ("cpu", "cuda"):
        lists = make_lists(device, gradients, copies, misaligned)
        for zero in (False, True):
            norm = gradient_norm(lists.gradients)
            scalars = make_scalars(norm)
            adamw_ema(lists, scalars, **OPTIONS, zero_gradients=zero)
        results.append((lists, norm, scalars))
    (cpu_lists, cpu_norm, _), (gpu_lists, gpu_norm, scalars) = results
    assert torch.equal(cpu_norm, gpu_norm.cpu())
    assert float(cpu_norm) > 100
    assert_same_bits(cpu_lists, gpu_lists)
    assert (int(scalars.step), int(scalars.skipped)) == (5, 0)


@pytest.mark.parametrize("absent", [("gradients", "m", "v"), ("ema", "teacher")], ids=str)
@pytest.mark.parametrize("groups", [2, 37])  # 37: more than one launch takes
def test_absent_parts_and_many_groups_give_the_bits_of_a_cpu(absent: tuple[str, ...], groups: int) -> None:
    results = []
    decays = [0.01 * i for i in range(groups)]
    options = OPTIONS | {"weight_decay": decays, "group": [i % groups for i in range(len(SIZES))]}
    for device in ("cpu", "cuda"):
        lists = make_lists(device)._replace(**{name: [] for name in absent})
        adamw_ema(lists, make_scalars(torch.tensor(3.0, device=device), groups), **options)
        results.append(lists)
    assert_same_bits(*results)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_no_bit_but_is_zeroed(bad: float) -> None:
    lists, before = make_lists("cuda", BF16), make_lists("cuda", BF16)
    lists.gradients[6][3] = bad
    norm = gradient_norm(lists.gradients)
    scalars = make_scalars(norm)
    adamw_ema(lists, scalars, **OPTIONS, zero_gradients=True)
    assert not norm.isfinite()
    assert (int(scalars.step), int(scalars.skipped)) == (4, 1)
    assert not any(g.any() for g in lists.gradients)
    assert_same_bits(lists._replace(gradients=before.gradients), before)


def test_it_runs_on_the_current_stream() -> None:
    """It sees the work queued before it on a side stream."""
    side, lists, expected = torch.cuda.Stream(), make_lists("cuda"), make_lists("cuda")
    for g in expected.gradients:
        g.mul_(2)
    adamw_ema(expected, make_scalars(gradient_norm(expected.gradients)), **OPTIONS)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # tens of milliseconds
        for g in lists.gradients:
            g.mul_(2)
        adamw_ema(lists, make_scalars(gradient_norm(lists.gradients)), **OPTIONS)
    side.synchronize()
    assert_same_bits(lists, expected)


def test_a_graph_captured_on_a_side_stream_replays_the_same_bits() -> None:
    warm_up, lists, expected = (make_lists("cuda", BF16, misaligned=True) for _ in range(3))
    adamw_ema(warm_up, make_scalars(gradient_norm(warm_up.gradients)), **OPTIONS)  # loads the kernels
    scalars, expected_scalars = (make_scalars(torch.zeros((), device="cuda")) for _ in range(2))
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        adamw_ema(lists, scalars._replace(norm=gradient_norm(lists.gradients)), **OPTIONS)
    assert int(scalars.step) == 4  # a capture runs nothing
    for k in range(3):
        for a, b in zip(lists.gradients, expected.gradients, strict=True):
            a.mul_(1 + k)
            b.mul_(1 + k)
        graph.replay()
        adamw_ema(expected, expected_scalars._replace(norm=gradient_norm(expected.gradients)), **OPTIONS)
    assert int(scalars.step) == int(expected_scalars.step) == 7
    assert_same_bits(lists, expected)


def test_norm_of_more_than_two_to_the_31_gradients() -> None:
    count = 2**31 + 7
    if torch.cuda.mem_get_info()[0] < 2.2 * count * 2:
        pytest.skip("needs 10 GB of GPU memory")
    gradients = torch.full((count,), 0.5, dtype=BF16, device="cuda")
    gradients[-1] = 2.0**15
    expected = (0.25 * (count - 1) + 2.0**30) ** 0.5
    assert float(gradient_norm([gradients])) == pytest.approx(expected, rel=1e-7)


def test_an_update_of_more_than_two_to_the_31_weights() -> None:
    count = 2**31 + 8191
    if torch.cuda.mem_get_info()[0] < 26 * count:
        pytest.skip("needs 56 GB of GPU memory")
    g = torch.full((count,), 0.5, dtype=BF16, device="cuda")
    w, m, v, ema = (torch.zeros(count, device="cuda") for _ in range(4))
    copy = torch.zeros(count, dtype=BF16, device="cuda")
    scalars = make_scalars(torch.ones((), device="cuda"), groups=1)
    adamw_ema(Lists([g], [w], [m], [v], [ema], [copy]), scalars, betas=(0.9, 0.95), eps=1e-8)
    for tensor in (w, m, v, ema, copy):
        low, high = tensor.aminmax()  # all elements are equal, up to the last one
        assert float(low) == float(high) != 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one() -> None:
    results = []
    for device in ("cuda:0", "cuda:1"):
        lists = make_lists(device)
        adamw_ema(lists, make_scalars(gradient_norm(lists.gradients)), **OPTIONS)
        results.append(lists)
    assert torch.cuda.current_device() == 0
    assert_same_bits(*results)


def test_tensors_on_two_devices_are_refused_by_name() -> None:
    lists = make_lists("cuda")
    scalars = make_scalars(torch.ones((), device="cuda"))
    before = bits(lists)
    with pytest.raises(RuntimeError, match=r"adamw_ema_: clip: Float of shape \(\) on cpu"):
        adamw_ema(lists, scalars._replace(clip=torch.zeros(())), **OPTIONS)
    lists.m[2] = lists.m[2].cpu()
    with pytest.raises(RuntimeError, match=r"adamw_ema_: m\[2\]: on cpu; must be on cuda:0 as weights\[0\]"):
        adamw_ema(lists, scalars, **OPTIONS)
    assert all(map(torch.equal, bits(lists), before))
