"""sra_fast: a kernel-optimized trainer for diffusion transformers with self-representation alignment."""

from pathlib import Path

__version__ = "0.1.0"

# An installation puts kernels/ into this folder. In a tree that nobody installed it stands beside it.
if (Path(__file__).parents[1] / "kernels" / "philox.py").exists():
    __path__.append(str(Path(__file__).parents[1]))
