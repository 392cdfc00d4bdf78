"""Public names and the joined modulations: nothing is lost, nothing is copied without need."""

from __future__ import annotations

import torch

from sra_fast.model.layout import from_public, to_public


def test_to_public_undoes_from_public_in_the_public_order(tiny, awake) -> None:
    public = awake(tiny(qk_norm=True).model)
    back = to_public(from_public(public))
    assert list(back) == list(public)
    assert all(torch.equal(back[name], value) for name, value in public.items())


def test_rows_are_the_blocks_in_turn_and_the_final_layer_last(tiny, awake) -> None:
    public = awake(tiny().model)
    rows = from_public(public)["modulation.weight"]
    assert rows.shape == (26 * 32, 32)  # four blocks of 6 vectors, and 2
    assert torch.equal(rows[6 * 32 : 12 * 32], public["blocks.1.adaLN_modulation.1.weight"])
    assert torch.equal(rows[-2 * 32 :], public["final_layer.adaLN_modulation.1.weight"])


def test_to_public_gives_views(tiny, awake) -> None:
    tensors = from_public(awake(tiny().model))
    public = to_public(tensors)
    public["blocks.2.adaLN_modulation.1.bias"].fill_(7.0)
    assert torch.equal(tensors["modulation.bias"][12 * 32 : 18 * 32], torch.full((192,), 7.0))
    others = [name for name in public if "adaLN" not in name]
    assert all(public[name].data_ptr() == tensors[name].data_ptr() for name in others)
