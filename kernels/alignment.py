"""How far the student's features are from the teacher's: one number, with a gradient for the student only.

With s, t of shape (B, T, D):

    cosine          1 - mean over (B, T) of <s, t> / (|s| |t|), norms over D: each token's direction, as in the paper
    cosine_channel  the same with norms over T and mean over (B, D): each channel's map, as in the public code
    smooth_l1       mean over all elements of huber_beta(s - t) / beta, beta = 0.05: the published loss
    l1, l2          mean over all elements of |s - t|, (s - t)^2

Source: Jiang et al., "No Other Representation Component Is Needed: Diffusion Transformers Can Provide Representation
Guidance by Themselves" (SRA), arXiv 2505.02831.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SMOOTH_L1_BETA = 0.05

_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": lambda s, t: (1 - F.cosine_similarity(s, t, dim=-1)).mean(),
    "cosine_channel": lambda s, t: (1 - F.cosine_similarity(s, t, dim=-2)).mean(),
    "smooth_l1": lambda s, t: F.smooth_l1_loss(s, t, beta=SMOOTH_L1_BETA),
    "l1": F.l1_loss,
    "l2": F.mse_loss,
}
DISTANCES = tuple(_DISTANCES)


def alignment_ref(student: Tensor, teacher: Tensor, distance: str) -> Tensor:
    """Reference distance.

    Args:
        student, teacher: (B, T, D), any floating dtype. No gradient reaches `teacher`.
        distance: one of `DISTANCES`.

    Returns:
        A scalar in promote_types(student.dtype, float32).

    Raises:
        ValueError: on shapes that differ or an unknown distance.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"teacher: shape {tuple(teacher.shape)} given; must be the student's, {tuple(student.shape)}")
    if distance not in _DISTANCES:
        raise ValueError(f"distance: {distance!r} given; must be one of {', '.join(DISTANCES)}")
    compute = torch.promote_types(student.dtype, torch.float32)
    return _DISTANCES[distance](student.to(compute), teacher.detach().to(compute))
