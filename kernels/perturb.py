"""Every random draw of a training batch, and the interpolant: the only place of a training step that draws.

Flow matching (SiT), alpha and sigma from `path_coefficients`:

    x_t = alpha(t) x + sigma(t) noise        velocity = alpha'(t) x + sigma'(t) noise        t = 1: noise, t = 0: data
    t_teacher = clamp(t - t_max U, 0, 1)     x_teacher = the same x and noise at t_teacher

Denoising diffusion (DiT), integer steps of `diffusion_steps`:

    t_teacher = clamp(t - floor(t_max diffusion_steps U), 1, diffusion_steps - 1)

as published: t = 0 gets a noisier teacher.

Sources: Ma et al., "SiT", 2024, section 2; Jiang et al., "SRA", arXiv 2505.02831, section 3 (teacher times).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .language import INTERPRETED, missing, tl, triton
from .philox import Draw, normals, uniforms

PATHS = ("linear", "cosine")
TIME_DISTRIBUTIONS = ("uniform", "lognormal")

_CALLS = 256  # Philox calls of one program, each for 4 elements


class Drawn(NamedTuple):
    """Everything random about a batch of B training images."""

    x: Tensor  # (B, C, H, W) float32: the clean image, or a sample of its VAE posterior
    noise: Tensor  # (B, C, H, W) float32, standard normal
    t: Tensor  # (B,) float32 in (0, 1); integer-valued steps for diffusion
    t_teacher: Tensor  # (B,) float32, the teacher's lower noise
    labels: Tensor  # (B,) int64, some replaced by the null class
    teacher_labels: Tensor  # (B,) int64, the same tensor where label dropout is shared


def path_coefficients(path: str, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(alpha, sigma, d alpha/dt, d sigma/dt) of an interpolant, in t's shape and dtype. SiT, section 2.3: linear and
    GVP ("cosine")."""
    if path == "linear":
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    if path == "cosine":
        angle = 0.5 * math.pi * t
        alpha, sigma = angle.cos(), angle.sin()
        return alpha, sigma, -0.5 * math.pi * sigma, 0.5 * math.pi * alpha
    raise ValueError(f"path: {path!r} given; must be one of {', '.join(PATHS)}")


def interpolate(path: str, x: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(x_t, velocity) for x, noise of shape (B, ...) and t of shape (B,)."""
    column = t.view(-1, *[1] * (x.ndim - 1))
    alpha, sigma, d_alpha, d_sigma = path_coefficients(path, column)
    return alpha * x + sigma * noise, d_alpha * x + d_sigma * noise


def flow_times(seed: int, number: Tensor, path: str, distribution: str, t_max: float) -> tuple[Tensor, Tensor]:
    """(t, t_teacher), each (B,) float32, for images `number`.

    uniform: t = U. lognormal: s = exp(N(0, 1)) is the ratio sigma / alpha at t, so t = s / (1 + s) on the linear path
    and 2/pi atan(s) on the cosine path (the public SRA code).
    """
    if distribution == "uniform":
        t = uniforms(seed, number, Draw.TIME)[:, 0]
    elif distribution == "lognormal":
        s = normals(seed, number, Draw.TIME, 1)[:, 0].exp()
        t = s / (1 + s) if path == "linear" else s.atan() * (2 / math.pi)
    else:
        raise ValueError(f"times: {distribution!r} given; must be one of {', '.join(TIME_DISTRIBUTIONS)}")
    return t, (t - t_max * uniforms(seed, number, Draw.TEACHER_TIME)[:, 0]).clamp(0, 1)


def diffusion_times(seed: int, number: Tensor, steps: int, t_max: float) -> tuple[Tensor, Tensor]:
    """(t, t_teacher), each (B,) integer-valued float32 in [0, steps), for images `number`. The offset is in [0, t_max
    steps)."""
    t = (uniforms(seed, number, Draw.TIME)[:, 0] * steps).floor()
    offset = (uniforms(seed, number, Draw.TEACHER_TIME)[:, 0] * int(t_max * steps)).floor()
    return t, (t - offset).clamp(1, steps - 1)


def drop_labels(
    seed: int, number: Tensor, labels: Tensor, null: int, rate: float, draw: Draw = Draw.LABEL_DROPOUT
) -> Tensor:
    """Labels (B,) with a share `rate` replaced by the null class, for classifier-free guidance."""
    return torch.where(uniforms(seed, number, draw)[:, 0] < rate, null, labels)


def draw_ref(
    x: Tensor,
    labels: Tensor,
    number: Tensor,
    *,
    seed: int,
    family: str,
    path: str,
    times: str,
    diffusion_steps: int,
    t_max: float,
    null_label: int,
    label_dropout: float,
    shared_label_dropout: bool,
) -> Drawn:
    """Every random draw of a training batch, in plain PyTorch.

    Args:
        x: (B, C, H, W) float32, clean images.
        labels: (B,) int64.
        number: (B,) int64, image numbers: the position of each image in the run.
        seed: the run's seed.
        family: "sit" (continuous times) or "dit" (integer steps).
        path, times: of SiT, see `path_coefficients` and `flow_times`.
        diffusion_steps: of DiT.
        t_max: largest distance between student and teacher times, as a share of the whole.
        null_label: the class that stands for "no label".
        label_dropout: share of labels replaced by it.
        shared_label_dropout: whether the teacher sees the student's dropped labels (published) or the true ones' own
            dropout.
    """
    noise = normals(seed, number, Draw.NOISE, x[0].numel()).view_as(x)
    if family == "sit":
        t, t_teacher = flow_times(seed, number, path, times, t_max)
    else:
        t, t_teacher = diffusion_times(seed, number, diffusion_steps, t_max)
    dropped = drop_labels(seed, number, labels, null_label, label_dropout)
    teacher_labels = dropped
    if not shared_label_dropout:
        teacher_labels = drop_labels(seed, number, labels, null_label, label_dropout, Draw.TEACHER_LABEL_DROPOUT)
    return Drawn(x, noise, t, t_teacher, dropped, teacher_labels)


class Perturbed(NamedTuple):
    """What a step of flow matching makes of a batch of B training images."""

    noise: Tensor  # (B, C, H, W) float32, standard normal
    t: Tensor  # (B,) float32, the student's time
    t_teacher: Tensor  # (B,) float32, the teacher's lower noise
    x_t: Tensor  # (B, C, H, W) float32, what the student sees
    x_teacher: Tensor  # (B, C, H, W) float32, the same x and noise at t_teacher
    target: Tensor  # (B, C, H, W) float32, the velocity at x_t
    labels: Tensor  # (B,) int64, some replaced by the null class
    teacher_labels: Tensor  # (B,) int64


def perturb_ref(
    x: Tensor,
    labels: Tensor,
    number: Tensor,
    *,
    seed: int,
    path: str,
    times: str,
    t_max: float,
    null_label: int,
    label_dropout: float,
    shared_label_dropout: bool,
) -> Perturbed:
    """Reference of flow matching: `draw_ref` and the interpolant. Arguments as there."""
    drawn = draw_ref(
        x,
        labels,
        number,
        seed=seed,
        family="sit",
        path=path,
        times=times,
        diffusion_steps=0,
        t_max=t_max,
        null_label=null_label,
        label_dropout=label_dropout,
        shared_label_dropout=shared_label_dropout,
    )
    x_t, target = interpolate(path, drawn.x, drawn.noise, drawn.t)
    x_teacher, _ = interpolate(path, drawn.x, drawn.noise, drawn.t_teacher)
    return Perturbed(*drawn[1:4], x_t, x_teacher, target, drawn.labels, drawn.teacher_labels)


@triton.jit
def _uniform(word):
    """`to_uniform` of a uint32."""
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23


@triton.jit
def _turn(v):
    """(cos, sin) of 2 pi v for v in [0, 1], within 2^-23: Cephes' polynomials on the exact distance to the nearest
    quarter turn. CUDA's own keep a reduction for large angles on the stack."""
    quarter = tl.floor(4 * v + 0.5)
    angle = 6.283185307179586 * (v - 0.25 * quarter)
    z = angle * angle
    sine = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * angle + angle
    cosine = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1
    odd = (quarter == 1) | (quarter == 3)
    left, lower = (quarter == 1) | (quarter == 2), (quarter == 2) | (quarter == 3)
    cosine, sine = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return tl.where(left, -cosine, cosine), tl.where(lower, -sine, sine)


@triton.jit
def _normal_pair(first, second):
    """Two standard normals of two words, as `normals`."""
    radius = tl.sqrt_rn(tl.maximum(-2.0 * tl.log(_uniform(first)), 0.0))
    cosine, sine = _turn(_uniform(second))
    return radius * cosine, radius * sine


@triton.jit
def _arctangent(x):
    """Of x >= 0, within 3 ulp: Cephes' atanf."""
    steep, middle = x > 2.414213562373095, x > 0.4142135623730950
    reduced = tl.where(steep, tl.div_rn(x * 0 - 1.0, x), tl.where(middle, tl.div_rn(x - 1, x + 1), x))
    base = tl.where(steep, 1.5707963267948966, tl.where(middle, 0.7853981633974483, 0.0))
    z = reduced * reduced
    series = ((8.05374449538e-2 * z - 1.38776856032e-1) * z + 1.99777106478e-1) * z - 3.33329491539e-1
    return base + (series * z * reduced + reduced)


@triton.jit
def _coefficients(t, PATH: tl.constexpr):
    """`path_coefficients`."""
    if PATH == "linear":
        return 1 - t, t, t * 0 - 1.0, t * 0 + 1.0
    alpha, sigma = _turn(0.25 * t)
    return alpha, sigma, -1.5707963267948966 * sigma, 1.5707963267948966 * alpha


@triton.jit
def _perturb_kernel(
    x, labels, number,
    noise_out, t_out, teacher_t_out, x_t_out, x_teacher_out, target_out, labels_out, teacher_labels_out,
    seed, t_max, null_label, label_dropout,
    PATH: tl.constexpr, TIMES: tl.constexpr, SHARED: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
    NOISE: tl.constexpr, TIME: tl.constexpr, TEACHER_TIME: tl.constexpr,
    LABEL: tl.constexpr, TEACHER_LABEL: tl.constexpr,
):  # fmt: skip
    """BLOCK Philox calls of one image: 4 BLOCK of its COUNT elements. An image's first program writes its times and
    labels too. Counters are four 32-bit words: wider ones would silently make this Philox-4x64."""
    blocks: tl.constexpr = (COUNT + 4 * BLOCK - 1) // (4 * BLOCK)
    sample, part = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    image = tl.load(number + sample)
    low, high, call = image.to(tl.uint32), (image >> 32).to(tl.uint32), part * BLOCK + tl.arange(0, BLOCK)
    nothing = low * 0

    w0, w1, _, _ = tl.philox(seed, nothing, low, high, nothing + TIME)
    if TIMES == "uniform":
        t = _uniform(w0)
    else:
        normal, _ = _normal_pair(w0, w1)
        ratio = tl.exp(normal)
        t = tl.div_rn(ratio, 1 + ratio) if PATH == "linear" else _arctangent(ratio) * 0.6366197723675814
    w0, _, _, _ = tl.philox(seed, nothing, low, high, nothing + TEACHER_TIME)
    t_teacher = tl.minimum(tl.maximum(t - t_max * _uniform(w0), 0.0), 1.0)

    if part == 0:
        label = tl.load(labels + sample)
        w0, _, _, _ = tl.philox(seed, nothing, low, high, nothing + LABEL)
        dropped = tl.where(_uniform(w0) < label_dropout, null_label, label)
        tl.store(t_out + sample, t)
        tl.store(teacher_t_out + sample, t_teacher)
        tl.store(labels_out + sample, dropped)
        if not SHARED:
            w0, _, _, _ = tl.philox(seed, nothing, low, high, nothing + TEACHER_LABEL)
            tl.store(teacher_labels_out + sample, tl.where(_uniform(w0) < label_dropout, null_label, label))

    zeros = call.to(tl.uint32) * 0
    w0, w1, w2, w3 = tl.philox(seed, call.to(tl.uint32), zeros + low, zeros + high, zeros + NOISE)
    z0, z1 = _normal_pair(w0, w1)
    z2, z3 = _normal_pair(w2, w3)
    noise = tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (4 * BLOCK,))
    element = part * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    inside, at = element < COUNT, sample * COUNT + element
    tl.store(noise_out + at, noise, mask=inside)
    clean = tl.load(x + at, mask=inside, other=0.0)
    alpha, sigma, d_alpha, d_sigma = _coefficients(t, PATH)
    tl.store(x_t_out + at, alpha * clean + sigma * noise, mask=inside)
    tl.store(target_out + at, d_alpha * clean + d_sigma * noise, mask=inside)
    alpha, sigma, _, _ = _coefficients(t_teacher, PATH)
    tl.store(x_teacher_out + at, alpha * clean + sigma * noise, mask=inside)


def _check(x: Tensor, labels: Tensor, number: Tensor, path: str, times: str) -> None:
    """Refuse what the kernel cannot compute, by name."""
    if obstacle := missing():
        raise ValueError(f"a fused kernel cannot run: {obstacle}")
    if path not in PATHS:
        raise ValueError(f"path: {path!r} given; must be one of {', '.join(PATHS)}")
    if times not in TIME_DISTRIBUTIONS:
        raise ValueError(f"times: {times!r} given; must be one of {', '.join(TIME_DISTRIBUTIONS)}")
    if x.ndim < 2 or x.numel() == 0 or x[0].numel() >= 1 << 31:
        raise ValueError(f"x: shape {tuple(x.shape)} given; must be (B, ...), none of them 0, under 2^31 an image")
    if x.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"x: device {x.device} given; must be a CUDA device")
    for name, value in (("labels", labels), ("number", number)):
        if value.shape != x.shape[:1]:
            raise ValueError(f"{name}: shape {tuple(value.shape)} given; must be one per image, ({len(x)},)")
    dtypes = {"x": torch.float32, "labels": torch.int64, "number": torch.int64}
    for (name, dtype), value in zip(dtypes.items(), (x, labels, number), strict=True):
        if value.dtype != dtype:
            raise ValueError(f"{name}: {value.dtype} given; must be {dtype}")
        if not value.is_contiguous():
            raise ValueError(f"{name}: strides {value.stride()} given; must be contiguous")
        if value.device != x.device:
            raise ValueError(f"{name}: device {value.device} given; must be that of x, {x.device}")


@torch.library.custom_op("sra_fast::perturb", mutates_args=())
def _perturb(
    x: Tensor,
    labels: Tensor,
    number: Tensor,
    seed: int,
    path: str,
    times: str,
    t_max: float,
    null_label: int,
    label_dropout: float,
    shared_label_dropout: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `Perturbed`; the teacher's labels are empty where the dropout is shared. seed as a signed int64."""
    _check(x, labels, number, path, times)
    out = _outputs(x, labels, shared_label_dropout)
    count = x[0].numel()
    with torch.cuda.device_of(x):
        _perturb_kernel[len(x) * triton.cdiv(count, 4 * _CALLS),](
            x, labels, number, *out, seed, t_max, null_label, label_dropout,
            PATH=path, TIMES=times, SHARED=shared_label_dropout, COUNT=count, BLOCK=_CALLS,
            NOISE=int(Draw.NOISE), TIME=int(Draw.TIME), TEACHER_TIME=int(Draw.TEACHER_TIME),
            LABEL=int(Draw.LABEL_DROPOUT), TEACHER_LABEL=int(Draw.TEACHER_LABEL_DROPOUT),
        )  # fmt: skip
    return out


@_perturb.register_fake
def _outputs(
    x: Tensor, labels: Tensor, *settings: object
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Empty outputs; the last of `settings` is whether the label dropout is shared."""
    times, shared = (len(x),), settings[-1]
    t, t_teacher = (torch.empty(times, dtype=torch.float32, device=x.device) for _ in range(2))
    noise, x_t, x_teacher, target = (torch.empty(x.shape, dtype=torch.float32, device=x.device) for _ in range(4))
    dropped = torch.empty(times, dtype=torch.int64, device=x.device)
    teacher_labels = torch.empty((0,) if shared else times, dtype=torch.int64, device=x.device)
    return noise, t, t_teacher, x_t, x_teacher, target, dropped, teacher_labels


def perturb(
    x: Tensor,
    labels: Tensor,
    number: Tensor,
    *,
    seed: int,
    path: str,
    times: str,
    t_max: float,
    null_label: int,
    label_dropout: float,
    shared_label_dropout: bool,
) -> Perturbed:
    """`perturb_ref` in one launch of a Triton kernel that reads x once. Labels, and the
    words and uniforms of which all else is made, are equal in every bit.

    Args:
        x: (B, C, H, W) float32, contiguous.
        labels, number: (B,) int64.
        seed: 64 bits.

    Raises:
        ValueError: on a shape, dtype, device, stride, path or distribution that it cannot serve.
    """
    signed = seed - (seed >> 63 << 64)  # the same 64 bits as an int64
    made = _perturb(x, labels, number, signed, path, times, t_max, null_label, label_dropout, shared_label_dropout)
    return Perturbed(*made[:7], made[6] if shared_label_dropout else made[7])
