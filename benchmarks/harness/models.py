"""The models that benchmarks train."""

from __future__ import annotations

from dataclasses import replace

from sra_fast.config import Config, preset


def sit(size: str, tokens: int = 256, batch: int = 32, depth: int = 0) -> Config:
    """A SiT with patch 2 on 4-channel latents; depth 0 = the size's."""
    base = preset(f"sit-{size}-2")
    side = 2 * round(tokens**0.5)
    model = replace(base.model, input_size=side, channels=4, classes=1000, depth=depth or base.model.depth)
    return replace(base, model=model, train=replace(base.train, batch=batch))
