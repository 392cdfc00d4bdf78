"""Public names and the joined modulations: nothing is lost, nothing is copied without need."""

from __future__ import annotations

import torch

from sra_fast.model.layout import from_public, to_public


def test_to_public_undoes_from_public_in_the_public_order(tiny, awake) -> None:
    public = awake(tiny(qk_norm=True).model)
    back = to_public(from_public(public))
    assert list(back) == list(public)
    assert all(torch.equal(back[name], value) for name, value in public.items())


def test_to_public_gives_views(tiny, awake) -> None:
    tensors = from_public(awake(tiny().model))
    public = to_public(tensors)
    public["blocks.2.adaLN_modulation.1.bias"].fill_(7.0)
    assert torch.equal(tensors["modulation.bias"][12 * 32 : 18 * 32], torch.full((192,), 7.0))  # 6 vectors a block
    others = [name for name in public if "adaLN" not in name]
    assert all(public[name].data_ptr() == tensors[name].data_ptr() for name in others)
