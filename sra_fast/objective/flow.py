"""Flow matching, the objective of SiT: the velocity of an interpolant between data (t = 0) and noise (t = 1).

    x_t    = alpha(t) x + sigma(t) noise
    target = alpha'(t) x + sigma'(t) noise
    loss   = mean (prediction - target)^2

Source: Ma et al., "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant Transformers",
2024, section 2; time runs from data to noise, as there and in SRA's code (the public SiT code has it the other way).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sra_fast.kernels.perturb import interpolate
from sra_fast.objective import Noised


class Flow:
    """SiT's objective on one path, "linear" or "cosine". It never draws."""

    def __init__(self, path: str) -> None:
        self.path = path

    def noised(self, x: Tensor, noise: Tensor, t: Tensor, t_teacher: Tensor) -> Noised:
        """What student and teacher see: the same x and noise at two times.

        Args:
            x, noise: (B, C, H, W) float32.
            t, t_teacher: (B,) float32 in [0, 1].
        """
        x_t, target = interpolate(self.path, x, noise, t)
        x_teacher, _ = interpolate(self.path, x, noise, t_teacher)
        return Noised(x, noise, t, t_teacher, x_t, x_teacher, target)

    def loss(self, prediction: Tensor, noised: Noised) -> Tensor:
        """Mean squared error of the velocity over all elements, in at least float32: a scalar.

        Args:
            prediction: (B, C, H, W).
        """
        compute = torch.promote_types(prediction.dtype, torch.float32)
        return (prediction.to(compute) - noised.target).square().mean()
