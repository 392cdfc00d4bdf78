"""The ops of a training step, one file each: formula, reference in plain PyTorch and, where one has earned its place,
a fused kernel in Triton or in the compiled library. `registry.py` lists them. This package imports nothing else of
sra_fast.
"""
