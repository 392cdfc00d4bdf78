"""Random numbers against Random123's published vectors and an implementation in Python integers. Triton's words are
compared in test_perturb_kernel.py."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from update_lists import threads

from sra_fast.kernels.philox import Draw, below, normals, philox, to_uniform, uniforms, words

# Random123 1.14, tests/kat_vectors, "philox 4x32 10": (counter, key, result).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

# (seed, n, draw) -> the first six words. Never to be changed: every run depends on them.
FROZEN_WORDS = {
    (0, 0, Draw.NOISE): [0x2DCE73E5, 0x1348E23F, 0xFCF8E0EC, 0xA287AADB, 0xE9535BE3, 0x510C4549],
    (0x9E3779B97F4A7C15, 5_000_000_007, Draw.TIME): [
        0xA09D24CA,
        0x007CF2C2,
        0x0898C793,
        0x3522F36F,
        0xE42482FA,
        0x7607E02D,
    ],
    (2**64 - 1, 2**63 - 1, Draw.FLIP): [0x6183DDFB, 0x0CB7A149, 0x03818AC8, 0xB8170EF1, 0x2FC18BE4, 0xD331C189],
}
FROZEN_NORMALS = {
    (0, 0, Draw.NOISE): [1.6511778, 0.8456461, -0.1020986, -0.1156361, -0.1749923, 0.3935260],
    (0x9E3779B97F4A7C15, 5_000_000_007, Draw.TIME): [0.9655129, 0.0115668, 0.6864490, 2.5132381, -0.4657160, 0.1162820],
    (2**64 - 1, 2**63 - 1, Draw.FLIP): [1.3222352, 0.4266551, -0.5651447, -2.8743694, 0.8317221, -1.6329062],
}


def philox_in_integers(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Salmon et al., section 3.3, on Python's unbounded integers."""
    (l1, r1, l2, r2), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(l1 * 0xD2511F53, 2**32)
        high1, low1 = divmod(l2 * 0xCD9E8D57, 2**32)
        l1, r1, l2, r2 = high1 ^ r1 ^ k0, low1, high0 ^ r2 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return l1, r1, l2, r2


def word(seed: int, n: int, draw: int, element: int) -> int:
    """counter = (element // 4, n low, n high, draw), key = the seed as two words."""
    counter = (element // 4, n % 2**32, n // 2**32, draw)
    return philox_in_integers(counter, (seed % 2**32, seed // 2**32))[element % 4]


def numbers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def kolmogorov(values: Tensor, cdf: Tensor) -> float:
    """sqrt(n) times the largest distance between the empirical distribution and `cdf`; 1.95 is the 0.1 % point."""
    order = values.argsort()
    theory, n = cdf[order].double(), len(values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return math.sqrt(n) * float(torch.maximum(theory - steps[:-1], steps[1:] - theory).max())


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_random123_known_answers(counter: tuple, key: tuple, result: tuple) -> None:
    assert tuple(int(w) for w in philox(tuple(numbers(c) for c in counter), key)) == result
    assert philox_in_integers(counter, key) == result


@given(
    seed=st.integers(0, 2**64 - 1),
    n=st.integers(0, 2**63 - 1),
    draw=st.sampled_from(Draw),
    call=st.integers(0, 2**31),
    count=st.integers(1, 9),
)
@settings(max_examples=100, deadline=None)
def test_words_follow_the_counter_layout(seed: int, n: int, draw: Draw, call: int, count: int) -> None:
    got = words(seed, numbers(n), draw, count, first=4 * call)[0].tolist()
    assert got == [word(seed, n, draw, 4 * call + i) for i in range(count)]


def test_draws_keep_their_numbers() -> None:
    names = (
        "POSTERIOR NOISE TIME TEACHER_TIME LABEL_DROPOUT ORDER SAMPLER TEACHER_LABEL_DROPOUT REPLACEMENT WEIGHT FLIP"
    )
    assert [draw.name for draw in Draw] == [*names.split(), "HELD_OUT"]
    assert [*Draw] == [*range(12)]


def test_invalid_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="first: 2 given"):
        words(0, numbers(0), Draw.NOISE, 4, first=2)
    for bound in (0, -1, 2**31 + 1):
        with pytest.raises(ValueError, match=f"bound: {bound} given"):
            below(numbers(0), bound)


def test_uniforms_are_exact_open_and_symmetric() -> None:
    some = torch.cat([numbers(0, 511, 512, 2**31, 2**32 - 512, 2**32 - 1), words(3, numbers(1), Draw.TIME, 1000)[0]])
    uniform = to_uniform(some)
    assert uniform.dtype == torch.float32
    assert torch.equal(uniform.double(), ((some // 512).double() + 0.5) / 2**23)
    assert float(uniform.min()) == 2.0**-24
    assert float(uniform.max()) == 1 - 2.0**-24
    assert torch.equal(1 - uniform, to_uniform(0xFFFFFFFF - some))


def test_uniforms_are_uniform_and_uncorrelated() -> None:
    u = uniforms(11, torch.arange(64), Draw.TIME, 1024)
    assert kolmogorov(u.flatten(), u.flatten()) < 1.95
    assert float(u.mean()) == pytest.approx(0.5, abs=4 * math.sqrt(1 / 12 / u.numel()))
    centred = u.double() - 0.5
    for shifted in (centred.roll(1, 0), centred.roll(1, 1), centred.roll(4, 1)):
        assert abs(float((centred * shifted).mean())) < 4 / 12 / math.sqrt(u.numel())


def test_normals_are_normal_and_the_halves_of_a_pair_uncorrelated() -> None:
    z = normals(11, torch.arange(64), Draw.NOISE, 1024).double()
    n = z.numel()
    assert kolmogorov(z.flatten(), torch.special.ndtr(z).flatten()) < 1.95
    # Standard errors of the first four moments of n standard normals.
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert float(z.pow(power).mean()) == pytest.approx(moment, abs=4 * math.sqrt(variance / n))
    cosine, sine = z[:, 0::2], z[:, 1::2]
    assert abs(float((cosine * sine).mean())) < 4 / math.sqrt(n / 2)
    assert abs(float((cosine.square() * sine.square()).mean()) - 1) < 4 * math.sqrt(8 / (n / 2))


def test_normals_are_box_muller_of_the_uniforms() -> None:
    u = uniforms(5, torch.arange(50), Draw.NOISE, 20).double()
    radius, angle = (-2 * u[:, 0::2].log()).sqrt(), 2 * math.pi * u[:, 1::2]
    truth = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(1)
    z = normals(5, torch.arange(50), Draw.NOISE, 20)
    # An angle near 2 pi carries an error of 2^-22; times a radius of at most 5.8, and a few roundings of the result.
    assert float((z - truth).abs().max()) < 5.8 * 2**-22 + 4 * 5.8 * 2**-24
    assert torch.equal(normals(5, torch.arange(50), Draw.NOISE, 7), z[:, :7])


@pytest.mark.parametrize("address", FROZEN_WORDS, ids=str)
def test_frozen_vectors(address: tuple[int, int, Draw]) -> None:
    seed, n, draw = address
    assert words(seed, numbers(n), draw, 6)[0].tolist() == FROZEN_WORDS[address]
    assert uniforms(seed, numbers(n), draw, 6)[0].tolist() == [(w // 512 + 0.5) / 2**23 for w in FROZEN_WORDS[address]]
    # The last bits of log, cos and sin belong to the backend.
    assert normals(seed, numbers(n), draw, 6)[0].tolist() == pytest.approx(FROZEN_NORMALS[address], rel=1e-5, abs=2e-6)


@pytest.mark.parametrize("function", [words, uniforms, normals])
@pytest.mark.parametrize("count", [1, 2, 1001])
def test_a_split_changes_no_bit(function, count: int) -> None:
    n = torch.arange(2**32 - 20, 2**32 + 20)
    together = function(9, n, Draw.NOISE, count)
    for size in (1, 7, 16):
        assert torch.equal(torch.cat([function(9, part, Draw.NOISE, count) for part in n.split(size)]), together)
    order = torch.randperm(len(n), generator=torch.Generator().manual_seed(0))
    assert torch.equal(function(9, n[order], Draw.NOISE, count), together[order])
    if count > 500:
        halves = function(9, n, Draw.NOISE, 500), function(9, n, Draw.NOISE, count - 500, first=500)
        assert torch.equal(torch.cat(halves, dim=1), together)


def test_the_thread_count_changes_no_bit() -> None:
    drawn = []
    for count in (1, 2):
        with threads(count):
            drawn.append(normals(9, torch.arange(37), Draw.NOISE, 4099))  # large enough for several threads
    assert torch.equal(*drawn)


@given(bound=st.integers(1, 2**31), share=st.floats(0, 1, exclude_max=True))
@settings(max_examples=200, deadline=None)
def test_below_gives_every_value_the_same_number_of_words_within_one(bound: int, share: float) -> None:
    value = int(share * bound)
    first = -(-value * 2**32 // bound)  # the smallest word that may map to `value`
    after = -(-(value + 1) * 2**32 // bound)
    assert below(numbers(first, after - 1), bound).tolist() == [value, value]
    if value:
        assert int(below(numbers(first - 1), bound)) == value - 1
    assert int(below(numbers(2**32 - 1), bound)) == bound - 1


# Of 64 words, the first are an arange, whose product must not be folded into its step.
@pytest.mark.parametrize("count", [64, pytest.param(1, marks=pytest.mark.slow)])
def test_compiled_words_are_the_same(count: int) -> None:
    """Integer overflow is undefined in compiled C++, and once gave an image wrong times."""
    arguments = 2**63 + 5, torch.tensor([1 << 33]), Draw.TIME, count
    assert torch.equal(torch.compile(words, dynamic=False)(*arguments), words(*arguments))
