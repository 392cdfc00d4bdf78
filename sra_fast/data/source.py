"""A run's images: the folder, its split, the decoder, and what the model must fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sra_fast.config import DIGITS_FOLDER, Config, refuse_unless
from sra_fast.data.digits import write_digits
from sra_fast.data.folder import ImageFolder, scan, split
from sra_fast.data.images import Decoder, open_decoder


@dataclass(frozen=True)
class Source:
    """Training and held-out images of one folder."""

    train: ImageFolder
    held_out: ImageFolder
    decoder: Decoder
    fingerprint: str


def open_source(config: Config, device: torch.device) -> tuple[Source, Config]:
    """Scan and split `data.images`, and fill in the model's input size, channels and classes.

    Raises:
        Refused: on a folder that cannot serve, or a model that does not fit it.
    """
    refuse_unless(
        config.data.images != "", "data.images", config.data.images, "must be a folder of class folders of images"
    )
    root = Path(config.data.images)
    if root == Path(DIGITS_FOLDER):
        write_digits(root)
    folder = scan(root)
    train, held_out = split(folder, config.data.held_out)
    facts = {"input_size": config.data.resolution, "channels": config.data.channels, "classes": len(folder.classes)}
    for name, fact in facts.items():
        given = getattr(config.model, name)
        refuse_unless(
            given in (0, fact), f"model.{name.replace('_', '-')}", given, f"must be {fact}, as the data is, or 0"
        )
    config = replace(config, model=replace(config.model, **facts))
    return Source(train, held_out, open_decoder(config.data, device), folder.fingerprint()), config
