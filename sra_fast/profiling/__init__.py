"""What a training step spends its time on: traces for TensorBoard, ranges for Nsight Systems, and figures."""

from sra_fast.profiling.breakdown import CATEGORIES, Breakdown, Kernel, breakdown, category
from sra_fast.profiling.steps import profile

__all__ = ["CATEGORIES", "Breakdown", "Kernel", "breakdown", "category", "profile"]
