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

from sra_fast.kernels.perturb import NoisedBatch


class Flow:
    """SiT's objective. The interpolant and its velocity are computed with the draws, in kernels/perturb.py."""

    def loss(self, prediction: Tensor, batch: NoisedBatch) -> Tensor:
        """Mean squared error of the velocity over all elements, in at least float32: a scalar.

        Args:
            prediction: (B, C, H, W).
        """
        compute = torch.promote_types(prediction.dtype, torch.float32)
        return (prediction.to(compute) - batch.target).square().mean()
