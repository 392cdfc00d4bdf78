"""Every random draw of a training step, and what student and teacher see. (sra_fast/data draws the order of images.)

From a VAE's moments, a sample of the posterior; then the latents' own scale, per channel:

    z = mean + std * noise'        x = (z - shift) * scale

Flow matching (SiT), alpha and sigma from `path_coefficients`:

    x_t = alpha(t) x + sigma(t) noise        velocity = alpha'(t) x + sigma'(t) noise        t = 1: noise, t = 0: data
    t_teacher = clamp(t - t_max U, 0, 1)     x_teacher = the same x and noise at t_teacher

Denoising diffusion (DiT), integer steps of `diffusion_steps`:

    t_teacher = clamp(t - floor(t_max diffusion_steps U), 1, diffusion_steps - 1)

as in the published code, in which the teacher of t = 0 is at t = 1, that is, noisier. The noise levels are read from
tables (objective/ddpm.py), without a kernel.

Sources: Ma et al., "SiT", 2024, section 2; Jiang et al., "SRA", arXiv 2505.02831, section 3 (teacher times); Rombach et
al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022, appendix G (posterior and scale).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .language import INTERPRETED, tl, triton, why_unavailable
from .philox import Draw, normal_pair, normals, quad, turn, uniform, uniforms

PATHS = ("linear", "cosine")
TIME_DISTRIBUTIONS = ("uniform", "lognormal")

_CALLS = 256  # Philox calls of one program, each for 4 elements
_DATA_DTYPES = (torch.float32, torch.float16, torch.uint8)


class Settings(NamedTuple):
    """What a run fixes about its draws.

    Attributes:
        seed: the run's, 64 bits.
        path, times: of SiT, see `path_coefficients` and `flow_times`.
        t_max: largest distance between student and teacher times, as a share of the time range.
        null_label: the class that stands for "no label".
        label_dropout: share of labels replaced by it.
        shared_label_dropout: the teacher sees the labels that the student sees (as published); otherwise its labels
            have a dropout of their own.
    """

    seed: int
    path: str
    times: str
    t_max: float
    null_label: int
    label_dropout: float
    shared_label_dropout: bool


class Stored(NamedTuple):
    """How to compute x, the images or latents of training, from stored data.

    Attributes:
        posterior: the data are (B, 2C, H, W) means and standard deviations, of which a sample is drawn, rather than
            (B, C, H, W) values.
        shift, scale: (C,) float32 on the data's device, of x = (z - shift) * scale.
    """

    posterior: bool
    shift: Tensor
    scale: Tensor


class NoisedBatch(NamedTuple):
    """A batch of B training images as student and teacher see it: everything random about a training step."""

    t: Tensor  # (B,) float32, the student's time: in (0, 1) for SiT, an integer-valued step for DiT
    t_teacher: Tensor  # (B,) float32, the teacher's time
    x_t: Tensor  # (B, C, H, W) float32, what the student sees
    x_teacher: Tensor  # (B, C, H, W) float32, what the teacher sees: the same x and noise at t_teacher
    target: Tensor  # (B, C, H, W) float32, what the student must predict at x_t: velocity (SiT) or noise (DiT)
    labels: Tensor  # (B,) int64, some replaced by the null class
    teacher_labels: Tensor  # (B,) int64, the same tensor if label dropout is shared
    x: Tensor | None = None  # (B, C, H, W) float32, the clean images; DiT only, whose loss needs them


class NoiseLevels(NamedTuple):
    """The noise levels of DiT's K diffusion steps: x_t = signal[t] x + noise[t] noise."""

    signal: Tensor  # (K,) float64
    noise: Tensor  # (K,) float64


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


def clean_ref(data: Tensor, number: Tensor, seed: int, stored: Stored | None) -> Tensor:
    """x of training, (B, C, H, W) float32, from what the data set holds: see `Stored`."""
    if stored is None:
        return data
    z = data.float()
    if stored.posterior:
        mean, std = z.chunk(2, dim=1)
        z = mean + std * normals(seed, number, Draw.POSTERIOR, mean[0].numel()).view_as(mean)
    column = (-1, *[1] * (z.ndim - 2))
    return (z - stored.shift.view(column)) * stored.scale.view(column)


def perturb_ref(
    data: Tensor, labels: Tensor, number: Tensor, settings: Settings, stored: Stored | None = None
) -> NoisedBatch:
    """Reference of flow matching (SiT), in plain PyTorch.

    Args:
        data: (B, C, H, W) float32 clean images, or what `stored` says.
        labels: (B,) int64.
        number: (B,) int64, image numbers: the position of each image in the run.
        settings: of the run.
        stored: how data become images.
    """
    x, noise = _draw_images(data, number, settings, stored)
    t, t_teacher = flow_times(settings.seed, number, settings.path, settings.times, settings.t_max)
    x_t, target = interpolate(settings.path, x, noise, t)
    x_teacher, _ = interpolate(settings.path, x, noise, t_teacher)
    return NoisedBatch(t, t_teacher, x_t, x_teacher, target, *_draw_labels(labels, number, settings))


def perturb_ddpm(
    data: Tensor, labels: Tensor, number: Tensor, settings: Settings, stored: Stored | None, levels: NoiseLevels
) -> NoisedBatch:
    """Denoising diffusion (DiT), in plain PyTorch: x_t = sqrt(abar_t) x + sqrt(1 - abar_t) noise (Ho et al., "Denoising
    Diffusion Probabilistic Models", 2020, equation 4). Arguments as `perturb_ref`; `levels` on the data's device."""
    x, noise = _draw_images(data, number, settings, stored)
    t, t_teacher = diffusion_times(settings.seed, number, len(levels.signal), settings.t_max)

    def noised(steps: Tensor) -> Tensor:
        column = (-1, *[1] * (x.ndim - 1))
        signal, sigma = (level[steps.long()].view(column).to(x.dtype) for level in levels)
        return signal * x + sigma * noise

    return NoisedBatch(t, t_teacher, noised(t), noised(t_teacher), noise, *_draw_labels(labels, number, settings), x=x)


def _draw_images(data: Tensor, number: Tensor, settings: Settings, stored: Stored | None) -> tuple[Tensor, Tensor]:
    """(x, noise), each (B, C, H, W) float32."""
    x = clean_ref(data, number, settings.seed, stored)
    return x, normals(settings.seed, number, Draw.NOISE, x[0].numel()).view_as(x)


def _draw_labels(labels: Tensor, number: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """(labels, teacher's labels), each (B,) int64, after dropout."""
    null, rate = settings.null_label, settings.label_dropout
    dropped = drop_labels(settings.seed, number, labels, null, rate)
    if settings.shared_label_dropout:
        return dropped, dropped
    return dropped, drop_labels(settings.seed, number, labels, null, rate, Draw.TEACHER_LABEL_DROPOUT)


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
    alpha, sigma = turn(0.25 * t)
    return alpha, sigma, -1.5707963267948966 * sigma, 1.5707963267948966 * alpha


@triton.jit
def _normals(seed, call, low, high, DRAW: tl.constexpr, BLOCK: tl.constexpr):
    """4 BLOCK standard normals of BLOCK calls, in the order of their elements."""
    w0, w1, w2, w3 = quad(seed, call, low, high, DRAW)
    z0, z1 = normal_pair(w0, w1)
    z2, z3 = normal_pair(w2, w3)
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (4 * BLOCK,))


@triton.jit
def _perturb_kernel(
    data, labels, number, shift, scale,  # (B, C or 2C, AREA), 2 x (B,), 2 x (C,) or None
    t_out, teacher_t_out, x_t_out, x_teacher_out, target_out, labels_out, teacher_labels_out,
    seed, t_max, null_label, label_dropout,
    PATH: tl.constexpr, TIMES: tl.constexpr, SHARED: tl.constexpr, POSTERIOR: tl.constexpr,
    COUNT: tl.constexpr, AREA: tl.constexpr, BLOCK: tl.constexpr,
    SAMPLE: tl.constexpr, NOISE: tl.constexpr, TIME: tl.constexpr, TEACHER_TIME: tl.constexpr,
    LABEL: tl.constexpr, TEACHER_LABEL: tl.constexpr,
):  # fmt: skip
    """BLOCK Philox calls of one image: 4 BLOCK of its COUNT = C AREA elements. An image's first program writes its
    times and labels too."""
    blocks: tl.constexpr = (COUNT + 4 * BLOCK - 1) // (4 * BLOCK)
    sample, part = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    image = tl.load(number + sample)
    low, high = image.to(tl.uint32), (image >> 32).to(tl.uint32)
    nothing = low * 0

    w0, w1, _, _ = quad(seed, nothing, low, high, TIME)
    if TIMES == "uniform":
        t = uniform(w0)
    else:
        normal, _ = normal_pair(w0, w1)
        ratio = tl.exp(normal)
        t = tl.div_rn(ratio, 1 + ratio) if PATH == "linear" else _arctangent(ratio) * 0.6366197723675814
    w0, _, _, _ = quad(seed, nothing, low, high, TEACHER_TIME)
    t_teacher = tl.minimum(tl.maximum(t - t_max * uniform(w0), 0.0), 1.0)

    if part == 0:
        label = tl.load(labels + sample)
        w0, _, _, _ = quad(seed, nothing, low, high, LABEL)
        dropped = tl.where(uniform(w0) < label_dropout, null_label, label)
        tl.store(t_out + sample, t)
        tl.store(teacher_t_out + sample, t_teacher)
        tl.store(labels_out + sample, dropped)
        if not SHARED:
            w0, _, _, _ = quad(seed, nothing, low, high, TEACHER_LABEL)
            tl.store(teacher_labels_out + sample, tl.where(uniform(w0) < label_dropout, null_label, label))

    call = (part * BLOCK + tl.arange(0, BLOCK)).to(tl.uint32)
    element = part * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    inside, at = element < COUNT, sample * COUNT + element
    if POSTERIOR:
        mean = data + at + sample * COUNT  # an image has COUNT means, then COUNT standard deviations
        std = tl.load(mean + COUNT, mask=inside, other=0).to(tl.float32)
        x = tl.load(mean, mask=inside, other=0).to(tl.float32)
        x += std * _normals(seed, call, low, high, SAMPLE, BLOCK)
    else:
        x = tl.load(data + at, mask=inside, other=0).to(tl.float32)
    if shift is not None:
        channel = element // AREA
        x = (x - tl.load(shift + channel, mask=inside, other=0)) * tl.load(scale + channel, mask=inside, other=0)
    noise = _normals(seed, call, low, high, NOISE, BLOCK)
    alpha, sigma, d_alpha, d_sigma = _coefficients(t, PATH)
    tl.store(x_t_out + at, alpha * x + sigma * noise, mask=inside)
    tl.store(target_out + at, d_alpha * x + d_sigma * noise, mask=inside)
    alpha, sigma, _, _ = _coefficients(t_teacher, PATH)
    tl.store(x_teacher_out + at, alpha * x + sigma * noise, mask=inside)


def _check(data: Tensor, labels: Tensor, number: Tensor, settings: Settings, stored: Stored | None) -> None:
    """Raise ValueError, with the argument's name, for what the kernel does not support."""
    if reason := why_unavailable():
        raise ValueError(f"a fused kernel cannot run: {reason}")
    for name, value, choices in (("path", settings.path, PATHS), ("times", settings.times, TIME_DISTRIBUTIONS)):
        if value not in choices:
            raise ValueError(f"{name}: {value!r} given; must be one of {', '.join(choices)}")
    if data.ndim < 2 or data.numel() == 0 or data[0].numel() >= 1 << 31:
        raise ValueError(
            f"data: shape {tuple(data.shape)} given; must be (B, C, ...), not empty, below 2^31 values per image"
        )
    if data.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"data: device {data.device} given; must be a CUDA device")
    if stored is not None and stored.posterior and data.shape[1] % 2:
        raise ValueError(f"data: shape {tuple(data.shape)} given; must be (B, 2C, ...): means, then deviations")
    batch = data.shape[:1]
    expected = [  # (name, tensor, shape, dtypes)
        ("data", data, data.shape, (torch.float32,) if stored is None else _DATA_DTYPES),
        ("labels", labels, batch, (torch.int64,)),
        ("number", number, batch, (torch.int64,)),
    ]
    if stored is not None:
        channels = (data.shape[1] // 2 if stored.posterior else data.shape[1],)
        expected += [(name, getattr(stored, name), channels, (torch.float32,)) for name in ("shift", "scale")]
    for name, tensor, shape, dtypes in expected:
        if tensor.shape != shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)} given; must be {tuple(shape)}")
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name}: {tensor.dtype} given; must be one of {', '.join(map(str, dtypes))}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: strides {tensor.stride()} given; must be contiguous")
        if tensor.device != data.device:
            raise ValueError(f"{name}: device {tensor.device} given; must be that of data, {data.device}")


def _allocate(data: Tensor, posterior: bool, shared: bool) -> tuple[Tensor, ...]:
    batch, channels, *area = data.shape
    shape, device = (batch, channels // 2 if posterior else channels, *area), data.device
    t, t_teacher = (torch.empty(batch, dtype=torch.float32, device=device) for _ in range(2))
    x_t, x_teacher, target = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(3))
    dropped = torch.empty(batch, dtype=torch.int64, device=device)
    teacher_labels = torch.empty(0 if shared else batch, dtype=torch.int64, device=device)
    return t, t_teacher, x_t, x_teacher, target, dropped, teacher_labels


def _launch(
    data: Tensor, labels: Tensor, number: Tensor, shift: Tensor | None, scale: Tensor | None, posterior: bool,
    seed: int, path: str, times: str, t_max: float, null_label: int, label_dropout: float, shared: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The fields of `NoisedBatch` but x; teacher labels are empty if dropout is shared. seed: signed 64-bit."""
    out = _allocate(data, posterior, shared)
    x_t = out[2]
    count = x_t[0].numel()
    with torch.cuda.device_of(data):
        _perturb_kernel[len(x_t) * triton.cdiv(count, 4 * _CALLS),](
            data, labels, number, shift, scale, *out, seed, t_max, null_label, label_dropout,
            PATH=path, TIMES=times, SHARED=shared, POSTERIOR=posterior,
            COUNT=count, AREA=count // x_t.shape[1], BLOCK=_CALLS,
            SAMPLE=int(Draw.POSTERIOR), NOISE=int(Draw.NOISE), TIME=int(Draw.TIME),
            TEACHER_TIME=int(Draw.TEACHER_TIME), LABEL=int(Draw.LABEL_DROPOUT),
            TEACHER_LABEL=int(Draw.TEACHER_LABEL_DROPOUT),
        )  # fmt: skip
    return out


_op = torch.library.custom_op(
    "sra_fast::perturb",
    _launch,
    mutates_args=(),
    schema="(Tensor data, Tensor labels, Tensor number, Tensor? shift, Tensor? scale, bool posterior, int seed,"
    " str path, str times, float t_max, int null_label, float label_dropout, bool shared)"
    " -> (Tensor t, Tensor t_teacher, Tensor x_t, Tensor x_teacher, Tensor target, Tensor labels_out,"
    " Tensor teacher_labels)",
)


@_op.register_fake
def _(data, labels, number, shift, scale, posterior, *settings):
    return _allocate(data, posterior, settings[-1])


def perturb(
    data: Tensor, labels: Tensor, number: Tensor, settings: Settings, stored: Stored | None = None
) -> NoisedBatch:
    """`perturb_ref` in one launch of a Triton kernel that reads the data once. Labels are bitwise equal to the
    reference's, and so are the random words and uniforms.

    Args:
        data: contiguous; (B, C, ...) float32, or with `stored` float32, float16 or uint8, and (B, 2C, ...) moments.
        labels, number: (B,) int64.

    Raises:
        ValueError: on a shape, dtype, device, stride, path or distribution that the kernel does not support.
    """
    _check(data, labels, number, settings, stored)
    posterior, shift, scale = (False, None, None) if stored is None else stored
    seed = settings.seed - (settings.seed >> 63 << 64)  # the same 64 bits as a signed integer
    t, t_teacher, x_t, x_teacher, target, dropped, teacher_labels = _op(
        data, labels, number, shift, scale, posterior, seed, settings.path, settings.times, settings.t_max,
        settings.null_label, settings.label_dropout, settings.shared_label_dropout,
    )  # fmt: skip
    teacher_labels = dropped if settings.shared_label_dropout else teacher_labels
    return NoisedBatch(t, t_teacher, x_t, x_teacher, target, dropped, teacher_labels)
