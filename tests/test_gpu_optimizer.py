"""The compiled optimizer's CUDA code: the same bits as on a CPU, on the stream it is called on, in a captured graph."""

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
# Aligned and not, shorter than a vector, around a block's 8,192 elements and a chunk's 65,536, empty; more than fit
# into one launch.
SIZES = [1, 3, 5, 8191, 8192, 8193, 65_535, 65_537, 200_003, 0, *[129] * 90]
SETTINGS = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": (0.1, 0.0), "group": [i % 2 for i in range(len(SIZES))]}


def lists(gradients: torch.dtype, copies: torch.dtype | None, misaligned: bool, device: str) -> Lists:
    """The same numbers on any device."""
    generator = torch.Generator().manual_seed(0)

    def some(dtype: torch.dtype = torch.float32, positive: bool = False) -> list[Tensor]:
        made = []
        for i, size in enumerate(SIZES):
            offset = i % 4 if misaligned else 0
            x = torch.randn(size + offset, generator=generator)
            made.append((x.abs() if positive else x).to(dtype).to(device)[offset:])
        return made

    held = some(gradients), some(), some(), some(positive=True), some()
    if copies is None:
        return Lists(*held)
    teacher = [x if i % 3 else x[:0] for i, x in enumerate(some(copies))]
    return Lists(*held, some(copies), teacher)


def scalars(norm: Tensor, groups: int = 2) -> Scalars:
    device = norm.device
    step, skipped = (torch.full((), k, dtype=torch.int64, device=device) for k in (4, 0))
    lr = torch.linspace(1e-2, 2e-2, groups, device=device)
    return Scalars(norm, step, skipped, lr, *(torch.full((), x, device=device) for x in (0.99, 1.0, 128.0)))


def bits(values: Lists) -> list[Tensor]:
    return [x.cpu().contiguous().view(torch.uint8) for part in values for x in part]


def assert_same_bits(a: Lists, b: Lists) -> None:
    for place, (x, y) in enumerate(zip(bits(a), bits(b), strict=True)):
        assert torch.equal(x, y), f"tensor {place} of {Lists._fields[place // len(SIZES)]}"


@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize("copies", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gradients", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_computes_the_bits_of_a_cpu(gradients: torch.dtype, copies: torch.dtype | None, misaligned: bool) -> None:
    results = []
    for device in ("cpu", "cuda"):
        held = lists(gradients, copies, misaligned, device)
        for zero in (False, True):
            norm = gradient_norm(held.gradients)
            state = scalars(norm)
            adamw_ema(held, state, **SETTINGS, zero_gradients=zero)
        results.append((held, norm, state))
    (on_cpu, norm, _), (on_gpu, gpu_norm, counted) = results
    assert torch.equal(norm, gpu_norm.cpu())
    assert float(norm) > 100
    assert_same_bits(on_cpu, on_gpu)
    assert (int(counted.step), int(counted.skipped)) == (5, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_no_bit_but_is_zeroed(bad: float) -> None:
    held, before = (lists(torch.bfloat16, torch.bfloat16, False, "cuda") for _ in range(2))
    held.gradients[6][3] = bad
    norm = gradient_norm(held.gradients)
    state = scalars(norm)
    adamw_ema(held, state, **SETTINGS, zero_gradients=True)
    assert not norm.isfinite()
    assert (int(state.step), int(state.skipped)) == (4, 1)
    assert not any(g.any() for g in held.gradients)
    assert_same_bits(held._replace(gradients=before.gradients), before)


def test_the_average_alone_and_adamw_alone() -> None:
    for absent in ({"gradients": [], "m": [], "v": []}, {"ema": [], "teacher": []}):
        results = []
        for device in ("cpu", "cuda"):
            held = lists(torch.float32, torch.bfloat16, False, device)._replace(**absent)
            adamw_ema(held, scalars(torch.tensor(3.0, device=device)), **SETTINGS)
            results.append([x.cpu() for part in held for x in part])
        assert all(map(torch.equal, *results))


def test_more_groups_than_one_launch_takes() -> None:
    results = []
    for device in ("cpu", "cuda"):
        held = lists(torch.float32, None, False, device)
        settings = SETTINGS | {
            "weight_decay": [0.01 * i for i in range(37)],
            "group": [i % 37 for i in range(len(SIZES))],
        }
        adamw_ema(held, scalars(torch.tensor(3.0, device=device), groups=37), **settings)
        results.append(held)
    assert_same_bits(*results)


def test_it_runs_on_the_current_stream() -> None:
    """Work queued before on a stream of its own has to be seen, and what comes after has to wait."""
    side, held = torch.cuda.Stream(), lists(torch.float32, torch.bfloat16, False, "cuda")
    right = lists(torch.float32, torch.bfloat16, False, "cuda")
    for g in right.gradients:
        g.mul_(2)
    adamw_ema(right, scalars(gradient_norm(right.gradients)), **SETTINGS)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # tens of milliseconds
        for g in held.gradients:
            g.mul_(2)
        adamw_ema(held, scalars(gradient_norm(held.gradients)), **SETTINGS)
    side.synchronize()
    assert_same_bits(held, right)


def test_a_graph_captured_on_a_side_stream_replays_the_same_bits() -> None:
    held, right = (lists(torch.bfloat16, torch.bfloat16, True, "cuda") for _ in range(2))
    state, stated = (scalars(torch.zeros((), device="cuda")) for _ in range(2))
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    adamw_ema(lists(torch.bfloat16, torch.bfloat16, True, "cuda"), stated, **SETTINGS)  # loads the kernels
    stated = scalars(torch.zeros((), device="cuda"))
    gradient_norm(held.gradients)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        adamw_ema(held, state._replace(norm=gradient_norm(held.gradients)), **SETTINGS)
    assert int(state.step) == 4  # a capture runs nothing
    for k in range(3):
        for a, b in zip(held.gradients, right.gradients, strict=True):
            a.mul_(1 + k)
            b.mul_(1 + k)
        graph.replay()
        adamw_ema(right, stated._replace(norm=gradient_norm(right.gradients)), **SETTINGS)
    assert int(state.step) == int(stated.step) == 7
    assert_same_bits(held, right)


def test_norm_of_more_than_two_to_the_31_gradients() -> None:
    count = 2**31 + 7
    if torch.cuda.mem_get_info()[0] < 2.2 * count * 2:
        pytest.skip("needs 10 GB of GPU memory")
    gradients = torch.full((count,), 0.5, dtype=torch.bfloat16, device="cuda")
    gradients[-1] = 2.0**15
    wanted = (0.25 * (count - 1) + 2.0**30) ** 0.5
    assert float(gradient_norm([gradients])) == pytest.approx(wanted, rel=1e-7)


def test_an_update_of_more_than_two_to_the_31_weights() -> None:
    count = 2**31 + 8191
    if torch.cuda.mem_get_info()[0] < 26 * count:
        pytest.skip("needs 56 GB of GPU memory")
    g = torch.full((count,), 0.5, dtype=torch.bfloat16, device="cuda")
    w, m, v, ema = (torch.zeros(count, device="cuda") for _ in range(4))
    copy = torch.zeros(count, dtype=torch.bfloat16, device="cuda")
    state = scalars(torch.ones((), device="cuda"), groups=1)
    adamw_ema(Lists([g], [w], [m], [v], [ema], [copy]), state, betas=(0.9, 0.95), eps=1e-8)
    for tensor in (w, m, v, ema, copy):
        low, high = tensor.aminmax()  # all elements alike, to the last one
        assert float(low) == float(high) != 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one() -> None:
    results = []
    for device in ("cuda:0", "cuda:1"):
        held = lists(torch.float32, torch.bfloat16, False, device)
        adamw_ema(held, scalars(gradient_norm(held.gradients)), **SETTINGS)
        results.append(held)
    assert torch.cuda.current_device() == 0
    assert_same_bits(*results)


def test_lists_on_two_devices_are_refused_by_name() -> None:
    held = lists(torch.float32, None, False, "cuda")
    held.m[2] = held.m[2].cpu()
    before = bits(held)
    with pytest.raises(RuntimeError, match=r"adamw_ema_: m\[2\]: on cpu; must be on cuda:0 as weights\[0\]"):
        adamw_ema(held, scalars(torch.ones((), device="cuda")), **SETTINGS)
    assert all(map(torch.equal, bits(held), before))
