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

from .philox import Draw, normals, uniforms

PATHS = ("linear", "cosine")
TIME_DISTRIBUTIONS = ("uniform", "lognormal")


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
