"""sra_fast: a kernel-optimized trainer for diffusion transformers with self-representation alignment."""

__version__ = "0.1.0"
