"""Public names and the joined modulations: nothing lost, nothing copied that need not be."""

from __future__ import annotations

import torch

from sra_fast.model.initial import initial_weights
from sra_fast.model.layout import apart, joined
from sra_fast.model.transformer import Transformer


def test_apart_undoes_joined_in_the_public_order(tiny, awake) -> None:
    public = awake(tiny(qk_norm=True).model)
    back = apart(joined(public))
    assert list(back) == list(public)
    assert all(torch.equal(back[name], value) for name, value in public.items())


def test_the_names_in_memory_are_the_networks(tiny, awake) -> None:
    config = tiny(depth=5).model
    held = dict(Transformer(config).named_parameters())
    tensors = joined(awake(config))
    assert {name: value.shape for name, value in tensors.items()} == {name: p.shape for name, p in held.items()}


def test_rows_are_the_blocks_in_turn_and_the_final_layer_last(tiny, awake) -> None:
    public = awake(tiny().model)
    rows = joined(public)["modulation.weight"]
    assert rows.shape == (26 * 32, 32)  # four blocks of 6 vectors, and 2
    assert torch.equal(rows[6 * 32 : 12 * 32], public["blocks.1.adaLN_modulation.1.weight"])
    assert torch.equal(rows[-2 * 32 :], public["final_layer.adaLN_modulation.1.weight"])


def test_apart_gives_views(tiny) -> None:
    tensors = joined(initial_weights(tiny().model, 0, torch.device("cpu")))
    public = apart(tensors)
    public["blocks.2.adaLN_modulation.1.bias"].fill_(7.0)
    assert torch.equal(tensors["modulation.bias"][12 * 32 : 18 * 32], torch.full((192,), 7.0))
    others = [name for name in public if "adaLN" not in name]
    assert all(public[name].data_ptr() == tensors[name].data_ptr() for name in others)
