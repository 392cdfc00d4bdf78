"""What the network learns: flow.py (SiT) or ddpm.py (DiT), and alignment.py (SRA) beside either. Objectives never
draw."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Noised(NamedTuple):
    """One batch as the two networks see it."""

    t: Tensor  # (B,) float32, the student's time
    t_teacher: Tensor  # (B,) float32, the teacher's
    x_t: Tensor  # (B, C, H, W) float32, what the student sees
    x_teacher: Tensor  # (B, C, H, W) float32, what the teacher sees: the same x and noise at t_teacher
    target: Tensor  # (B, C, H, W) float32, what the student must predict at x_t
    x: Tensor | None = None  # (B, C, H, W) float32, clean, for the objective that needs it (DiT)
