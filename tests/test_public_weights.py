"""Public checkpoints: read in every layout, written so that others can load them, refused by name where damaged."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sra_fast.config import ModelConfig, ObjectiveConfig
from sra_fast.errors import Refused
from sra_fast.model.public_weights import METADATA_KEY, metadata, read, write_public

OPTIMIZER = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999)}]}


@pytest.fixture
def model(tiny) -> ModelConfig:
    """Small, and with shapes that tell everything: the norms of queries and keys give the number of heads."""
    return tiny(qk_norm=True).model


def same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return list(got) == list(wanted) and all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_reads_the_checkpoints_of_sit_sra_and_dit_sra(model, awake, tmp_path: Path) -> None:
    online, ema = awake(model, 1), awake(model, 2)
    args = argparse.Namespace(exp_name="sitxl", block_out_s=8, path_type="linear", allow_tf32=True, seed=None)
    content = {"model": online, "ema": ema, "opt": OPTIMIZER, "args": args, "epoch": 799, "steps": 4_000_000}
    torch.save(content, tmp_path / "step-4000000.pt")
    assert same(read(tmp_path / "step-4000000.pt").tensors, ema)
    assert same(read(tmp_path / "step-4000000.pt", "model").tensors, online)
    assert read(tmp_path / "step-4000000.pt").config == model


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_reads_bare_state_dicts_with_and_without_wrappers(model, awake, tmp_path: Path, prefix: str) -> None:
    weights = awake(model)
    torch.save(OrderedDict((prefix + name, value) for name, value in weights.items()), tmp_path / "bare.pt")
    loaded = read(tmp_path / "bare.pt")
    assert same(loaded.tensors, weights)
    (note,) = loaded.notes
    assert "by its shapes a sit" in note


@pytest.mark.parametrize("family", ["sit", "dit"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_network_is_inferred_from_the_shapes(tiny, awake, tmp_path: Path, family: str, suffix: str) -> None:
    # A width of the papers, which fixes the number of heads.
    config = tiny("none", family=family, hidden=384, heads=6, depth=2, patch=4, channels=3, classes=7).model
    path = tmp_path / f"weights{suffix}"
    torch.save(awake(config), path) if suffix == ".pt" else save_file(awake(config), path)
    assert read(path).config == config


def test_qk_norm_and_its_heads_are_inferred(tiny, awake, tmp_path: Path) -> None:
    config = tiny(qk_norm=True).model
    torch.save(awake(config), tmp_path / "qk.pt")
    assert read(tmp_path / "qk.pt").config == config


def test_half_precision_is_read_as_fp32(model, awake, tmp_path: Path) -> None:
    weights = {name: value.half() for name, value in awake(model).items()}
    torch.save(weights, tmp_path / "half.pt")
    assert same(read(tmp_path / "half.pt").tensors, {name: value.float() for name, value in weights.items()})


def test_our_safetensors_say_which_network_and_objective_they_are(tiny, awake, tmp_path: Path) -> None:
    config, objective = tiny(heads=4).model, ObjectiveConfig(path="cosine")
    save_file(awake(config), tmp_path / "ours.safetensors", metadata(config, objective))
    loaded = read(tmp_path / "ours.safetensors")
    assert loaded.config == config
    assert loaded.objective == objective


# What we write, loaded by others


class Holder(nn.Module):
    """A module that holds named parts, as the public models do."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name.removesuffix("_"), part)


def public_module(d: int, depth: int, heads: int, p: int, tokens: int, channels: int, outputs: int, classes: int):
    """SiT-SRA's module tree as published, strict about names and shapes."""

    def modulation(vectors: int) -> nn.Sequential:
        return nn.Sequential(nn.SiLU(), nn.Linear(d, vectors * d))

    def block() -> Holder:
        return Holder(
            attn=Holder(qkv=nn.Linear(d, 3 * d), proj=nn.Linear(d, d)),
            mlp=Holder(fc1=nn.Linear(d, 4 * d), fc2=nn.Linear(4 * d, d)),
            adaLN_modulation=modulation(6),
            norm1=nn.LayerNorm(d, elementwise_affine=False),
        )

    network = Holder(
        x_embedder=Holder(proj=nn.Conv2d(channels, d, p, p)),
        t_embedder=Holder(mlp=nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d))),
        y_embedder=Holder(embedding_table=nn.Embedding(classes + 1, d)),
        blocks=nn.ModuleList(block() for _ in range(depth)),
        final_layer=Holder(linear=nn.Linear(d, p * p * outputs), adaLN_modulation=modulation(2)),
        ap_head=Holder(linear1=nn.Linear(d, 2 * d), linear2=nn.Linear(2 * d, d)),
    )
    network.pos_embed = nn.Parameter(torch.zeros(1, tokens, d), requires_grad=False)
    return network


@pytest.mark.parametrize("family", ["sit", "dit"])
def test_what_we_write_loads_strictly_into_the_public_module(tiny, awake, tmp_path: Path, family: str) -> None:
    config = tiny(family=family).model
    online, ema = awake(config, 1), awake(config, 2)
    write_public(tmp_path / "ours.pt", online, ema, steps=7, epoch=3, args={"seed": 0})
    content = torch.load(tmp_path / "ours.pt", weights_only=False)
    assert set(content) == {"model", "ema", "args", "epoch", "steps"}
    assert (content["args"].seed, content["epoch"], content["steps"]) == (0, 3, 7)
    assert [path.name for path in tmp_path.iterdir()] == ["ours.pt"]
    network = public_module(32, 4, 2, 2, 16, 1, config.output_channels, 4)
    for key, wanted in (("model", online), ("ema", ema)):
        network.load_state_dict(content[key], strict=True)
        assert all(torch.equal(value, wanted[name]) for name, value in network.state_dict().items())


def test_a_written_public_file_is_read_back_the_same(model, awake, tmp_path: Path) -> None:
    online, ema = awake(model, 1), awake(model, 2)
    write_public(tmp_path / "ours.pt", online, ema, steps=7, epoch=3, args={"model": {"depth": 4}})
    assert same(read(tmp_path / "ours.pt", "model").tensors, online)
    assert same(read(tmp_path / "ours.pt", "ema").tensors, ema)


# What other projects added


@pytest.mark.parametrize(
    ("foreign", "said"),
    [
        ("projectors.0.0.weight", "projection heads of REPA"),
        ("projectors.4.bias", "projection heads of REPA"),
        ("projectors_final.linear.weight", "velocity head of Self-Transcendence"),
    ],
)
def test_heads_of_other_projects_are_left_out_and_said(model, awake, tmp_path: Path, foreign: str, said: str) -> None:
    weights = awake(model)
    torch.save(weights | {foreign: torch.zeros(3)}, tmp_path / "other.pt")
    loaded = read(tmp_path / "other.pt")
    assert same(loaded.tensors, weights)
    note = loaded.notes[0]
    assert foreign.split(".")[0] in note
    assert said in note


def test_a_file_without_ap_head_is_read_and_said(model, awake, tmp_path: Path) -> None:
    weights = awake(model)
    torch.save({name: v for name, v in weights.items() if not name.startswith("ap_head")}, tmp_path / "plain.pt")
    loaded = read(tmp_path / "plain.pt")
    assert all(torch.equal(loaded.tensors[name], v) for name, v in weights.items() if not name.startswith("ap_head"))
    assert "ap_head" in loaded.notes[-1]


def test_training_begun_from_a_file_without_ap_head_has_a_head_that_learns(tmp_path: Path) -> None:
    from small_run import checkpoints, content, run, small, write_images

    write_images(tmp_path / "data")
    config = small(tmp_path, model__qk_norm=True, train__images=24)
    assert run(config)[0] == 0
    folder = config.path / "checkpoints" / checkpoints(config.path)[-1]
    weights = {name: v for name, v in load_file(folder / "ema.safetensors").items() if not name.startswith("ap_head")}
    torch.save(weights, tmp_path / "plain.pt")
    again = small(tmp_path, model__qk_norm=True, train__images=24, run__name="b", init_from=str(tmp_path / "plain.pt"))
    code, rows = run(again)
    assert code == 0
    assert rows[0]["grad_norm"] < 100  # features of exactly zero have no direction, and a cosine a gradient of 10^7
    last = content(again.path / "checkpoints" / checkpoints(again.path)[-1])["weights"]
    assert any(last["ap_head.linear1.weight"]), "a head of zeros stays one: every product of its layers' gradients is 0"


def test_half_a_head_is_refused(model, awake, tmp_path: Path) -> None:
    weights = awake(model)
    del weights["ap_head.linear2.bias"]
    torch.save(weights, tmp_path / "half.pt")
    with pytest.raises(Refused, match=r"ap_head\.linear2\.bias is missing"):
        read(tmp_path / "half.pt")


# Refusals: one line, the file and the reason


def refusal(path: Path, key: str = "ema") -> str:
    with pytest.raises(Refused) as caught:
        read(path, key)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


def test_self_flow_is_refused_by_name(model, awake, tmp_path: Path) -> None:
    torch.save(awake(model) | {"projector.linear1.weight": torch.zeros(3)}, tmp_path / "flow.pt")
    assert "Self-Flow" in refusal(tmp_path / "flow.pt")


@pytest.mark.parametrize("name", ["blocks.1.mlp.fc1.weight", "ap_head.linear1.weight", "t_embedder.mlp.2.bias"])
def test_a_wrong_shape_is_named_with_the_right_one(model, awake, tmp_path: Path, name: str) -> None:
    weights = awake(model)
    right = tuple(weights[name].shape)
    weights[name] = weights[name][:-1]
    torch.save(weights, tmp_path / "wrong.pt")
    message = refusal(tmp_path / "wrong.pt")
    assert f"{name} has shape {(right[0] - 1, *right[1:])}; must be {right}" in message


def test_a_missing_and_an_unknown_parameter_are_named(model, awake, tmp_path: Path) -> None:
    weights = awake(model)
    torch.save(weights | {"blocks.0.attn.rope": torch.zeros(1)}, tmp_path / "more.pt")
    assert "blocks.0.attn.rope is not a parameter" in refusal(tmp_path / "more.pt")
    del weights["blocks.2.attn.proj.bias"]
    torch.save(weights, tmp_path / "less.pt")
    assert "blocks.2.attn.proj.bias is missing" in refusal(tmp_path / "less.pt")


def test_a_key_that_is_not_there_is_refused_with_those_that_are(model, awake, tmp_path: Path) -> None:
    torch.save({"model": awake(model), "opt": OPTIMIZER}, tmp_path / "no_ema.pt")
    assert "no 'ema' weights; it has model, opt" in refusal(tmp_path / "no_ema.pt")


class Bomb:
    """Pickles into a call."""

    def __init__(self, function: Callable, *arguments: str) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable, tuple]:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["args", "top", "in the namespace"])
@pytest.mark.parametrize("function", [os.mkdir, shutil.copytree])  # of a module PyTorch blocks, and of another
def test_a_file_that_wants_to_run_code_is_refused_and_runs_none(
    model, awake, tmp_path: Path, function: Callable, where: str, zipped: bool
) -> None:
    target, source = tmp_path / "exploded", tmp_path / "source"
    source.mkdir()
    bomb = Bomb(function, *([str(target)] if function is os.mkdir else [str(source), str(target)]))
    content = {
        "args": {"ema": awake(model), "args": bomb},
        "top": bomb,
        "in the namespace": {"ema": awake(model), "args": argparse.Namespace(bomb=bomb)},
    }[where]
    torch.save(content, tmp_path / "bomb.pt", _use_new_zipfile_serialization=zipped)
    message = refusal(tmp_path / "bomb.pt")
    assert function.__name__ in message
    assert not target.exists()
    torch.load(tmp_path / "bomb.pt", weights_only=False)
    assert target.exists(), "the bomb was a dud"


@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_pt_is_refused_wherever_it_was_cut(tiny, awake, tmp_path: Path, zipped: bool) -> None:
    torch.save({"ema": awake(tiny().model)}, tmp_path / "whole", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "whole").read_bytes()
    for size in (0, 1, 2, 10, 100, *range(1000, 20_000, 1111), len(whole) // 2, len(whole) - 100, len(whole) - 1):
        (tmp_path / "cut.pt").write_bytes(whole[:size])
        refusal(tmp_path / "cut.pt")


def test_a_truncated_safetensors_is_refused_wherever_it_was_cut(tiny, awake, tmp_path: Path) -> None:
    save_file(awake(tiny().model), tmp_path / "whole", metadata(tiny().model, ObjectiveConfig()))
    whole = (tmp_path / "whole").read_bytes()
    for size in (0, 1, 7, 8, 100, 1000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole[:size])
        refusal(tmp_path / "cut.safetensors")


@pytest.mark.parametrize(
    "content",
    [[], {}, 3, {"ema": {}}, {"ema": {"a": 1}}, {"ema": {"pos_embed": torch.zeros(3)}}, torch.zeros(3), "text"],
    ids=str,
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "other.pt")
    refusal(tmp_path / "other.pt")


def test_a_missing_file_and_a_file_of_text_are_refused(tmp_path: Path) -> None:
    refusal(tmp_path / "absent.pt")
    for name in ("text.pt", "text.safetensors"):
        (tmp_path / name).write_text("these are no weights\n" * 50)
        refusal(tmp_path / name)


@pytest.mark.parametrize(
    "described",
    ["{", "[]", "{}", json.dumps({"model": {"depht": 4}, "objective": {}}), json.dumps({"model": 3, "objective": {}})],
)
def test_damaged_metadata_is_refused(tiny, awake, tmp_path: Path, described: str) -> None:
    save_file(awake(tiny().model), tmp_path / "ours.safetensors", {METADATA_KEY: described})
    refusal(tmp_path / "ours.safetensors")


def test_a_block_without_a_number_is_refused(model, awake, tmp_path: Path) -> None:
    torch.save(awake(model) | {"blocks.last.mlp": torch.zeros(1)}, tmp_path / "named.pt")
    assert "blocks.last.mlp" in refusal(tmp_path / "named.pt")


def test_a_width_whose_heads_nothing_tells_is_refused(tiny, awake, tmp_path: Path) -> None:
    torch.save(awake(tiny().model), tmp_path / "narrow.pt")
    assert "heads cannot be told" in refusal(tmp_path / "narrow.pt")
