"""VAEs of a few thousand random weights, saved as diffusers saves them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch


def save_kl(root: Path, channels: int = 4, seed: int = 0, **config: object) -> Path:
    """An AutoencoderKL that halves the sides twice."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(seed)
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        **config,
    )
    model.save_pretrained(root)
    return root


def save_tiny(root: Path, **config: object) -> Path:
    """An AutoencoderTiny that halves the sides twice."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(1)
    model = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        **config,
    )
    model.save_pretrained(root)
    return root


def reconfigure(root: Path, **changes: object) -> Path:
    """Change fields of a saved VAE's config.json."""
    path = root / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return root
