"""Counter-based random numbers: Philox-4x32-10 in plain PyTorch.

    words(seed, n, draw)[element] = philox4x32_10(counter, key)[element % 4]
    counter = (element // 4, n low, n high, draw)        key = (seed low, seed high)

Every random number of training and sampling is a pure function of (seed, n, draw, element): n is the image number and
`Draw` names the purpose. Nothing depends on rank, batch split, thread count or earlier draws: a resumed or re-sharded
run draws the same noise, and a GPU kernel can draw it again without communication.

Words and uniforms have the same bits on every backend: they come from integer arithmetic and one exact scaling. Normals
use log, cos and sin, whose last bits differ between backends.

Triton kernels use `quad` (the words of a call), `uniform` and `normal_pair`.

Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011, section 3.3, and Random123's constants.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

from .language import tl, triton

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85  # golden ratio, sqrt(3) - 1: increments of the key per round
_MASK = 0xFFFFFFFF
_ROUNDS = 10


class Draw(IntEnum):
    """Purpose of a random number, the last word of the counter. Values are frozen: append, never renumber."""

    POSTERIOR = 0  # the sample of a VAE posterior
    NOISE = 1  # the Gaussian noise of the interpolant
    TIME = 2  # the student's time
    TEACHER_TIME = 3  # distance from the student's to the teacher's time
    LABEL_DROPOUT = 4
    ORDER = 5  # the data row of the n-th image
    SAMPLER = 6  # initial noise of a generated sample, then the noise of each of its steps
    TEACHER_LABEL_DROPOUT = 7  # if the dropout is not shared
    REPLACEMENT = 8  # the row that replaces an undecodable one
    WEIGHT = 9  # initial weights; n is the parameter's position in the model
    FLIP = 10  # horizontal flip of a training image
    HELD_OUT = 11  # whether a row of a packed set is held out; n is the row


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox-4x32.

    Args:
        counter: four int64 tensors holding 32-bit words, broadcastable to one shape.
        key: two 32-bit words.

    Returns:
        Four int64 tensors of the broadcast shape, each element in [0, 2^32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    # A no-op that keeps torch.compile from folding the first product into an arange: its vectorized C++ stores the
    # step as an int if it fits into 32 bits, and overflows at the third element (torch 2.13).
    c0, c2 = c0 & _MASK, c2 & _MASK
    k0, k1 = key
    for round_index in range(_ROUNDS):
        if round_index:
            k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
        (high_0, low_0), (high_1, low_1) = _product(c0, _MULTIPLIER_0), _product(c2, _MULTIPLIER_1)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
    return c0, c1, c2, c3


def _product(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """(high, low) word of a 32 x 32 bit product.

    The full product overflows a signed 64-bit integer, which is undefined behaviour in compiled C++. So 2^32 is
    subtracted from the multiplier, and the word is added to the high half instead.
    """
    product = word * (multiplier - (1 << 32))  # in (-2^62, 0], as both multipliers exceed 3 * 2^30
    return (product >> 32) + word, product & _MASK


def _split(value: int) -> tuple[int, int]:
    return value & _MASK, (value >> 32) & _MASK


def words(seed: int, number: Tensor, draw: Draw, count: int, first: int = 0) -> Tensor:
    """Random 32-bit words.

    Args:
        seed: the run's 64-bit seed.
        number: (B,) int64, image numbers.
        draw: purpose of the words.
        count: words per image.
        first: element of the first word, a multiple of 4.

    Returns:
        (B, count) int64 in [0, 2^32).
    """
    if first % 4:
        raise ValueError(f"first: {first} given; must be a multiple of 4, the words of one Philox call")
    index = torch.arange(first // 4, first // 4 + (count + 3) // 4, dtype=torch.int64, device=number.device)  # (G,)
    low, high = (number & _MASK)[:, None], ((number >> 32) & _MASK)[:, None]  # (B, 1)
    stream = torch.full_like(low, int(draw))
    quads = philox((index[None], low, high, stream), _split(seed))
    return torch.stack(quads, dim=-1).flatten(1)[:, :count]  # (B, G, 4) -> (B, count)


def to_uniform(word: Tensor) -> Tensor:
    """(word's top 23 bits + 1/2) / 2^23: float32 in the open interval (0, 1), symmetric about 1/2. Every operation is
    exact."""
    return ((word >> 9).to(torch.float32) + 0.5) * 2.0**-23


def uniforms(seed: int, number: Tensor, draw: Draw, count: int = 1, first: int = 0) -> Tensor:
    """Uniform random numbers in (0, 1): (B, count) float32. Arguments as `words`."""
    return to_uniform(words(seed, number, draw, count, first))


def normals(seed: int, number: Tensor, draw: Draw, count: int, first: int = 0) -> Tensor:
    """Standard normal random numbers: (B, count) float32, at most 5.8 in magnitude. Arguments as `words`.

    Box and Muller (1958) on words (2k, 2k + 1) -> (r cos a, r sin a), r = sqrt(-2 ln u_2k), a = 2 pi u_2k+1.
    """
    even = count + count % 2
    pairs = uniforms(seed, number, draw, even, first).unflatten(1, (even // 2, 2))
    radius, angle = (-2.0 * pairs[..., 0].log()).sqrt(), (2.0 * math.pi) * pairs[..., 1]
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(1)[:, :count]


def below(word: Tensor, bound: int) -> Tensor:
    """Integers in [0, bound) from 32-bit words by multiplication and shift (bias below bound / 2^32): int64."""
    if not 0 < bound <= 1 << 31:
        raise ValueError(f"bound: {bound} given; must be in [1, 2^31]")
    return (word * bound) >> 32


@triton.jit
def quad(seed, call, low, high, DRAW: tl.constexpr):
    """The four words of call = element // 4 of image number (low, high), all uint32 in the call's shape. Wider counters
    would silently make this Philox-4x64."""
    zeros = call * 0
    return tl.philox(seed, call, zeros + low, zeros + high, zeros + DRAW)


@triton.jit
def uniform(word):
    """`to_uniform` of a uint32."""
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23


@triton.jit
def turn(v):
    """(cos, sin) of 2 pi v for v in [0, 1], within 2^-23: Cephes' polynomials of the exact distance to the nearest
    quarter turn. CUDA's own functions need stack memory to reduce large angles."""
    quarter = tl.floor(4 * v + 0.5)
    angle = 6.283185307179586 * (v - 0.25 * quarter)
    z = angle * angle
    sine = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * angle + angle
    cosine = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1
    odd = (quarter == 1) | (quarter == 3)
    negative_cosine, negative_sine = (quarter == 1) | (quarter == 2), (quarter == 2) | (quarter == 3)
    cosine, sine = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return tl.where(negative_cosine, -cosine, cosine), tl.where(negative_sine, -sine, sine)


@triton.jit
def normal_pair(first, second):
    """Two standard normals from two words, as in `normals`."""
    radius = tl.sqrt_rn(tl.maximum(-2.0 * tl.log(uniform(first)), 0.0))
    cosine, sine = turn(uniform(second))
    return radius * cosine, radius * sine
