"""Public checkpoints: read in every layout, written so that others can load them, refused by name where damaged."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_run import checkpoints, content, full_disk, run, small, write_images
from torch import Tensor

from sra_fast.config import ModelConfig, ObjectiveConfig, to_dict
from sra_fast.errors import Refused
from sra_fast.model.public_weights import METADATA_KEY, read, write_public, write_safetensors

OPTIMIZER = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999)}]}


@pytest.fixture
def model(tiny) -> ModelConfig:
    """Small, and with shapes that tell everything: the norms of queries and keys give the number of heads."""
    return tiny(qk_norm=True).model


@pytest.fixture
def weights(model, awake) -> dict[str, Tensor]:
    return awake(model)


def assert_same(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(tensors) == list(expected)
    for name, value in expected.items():
        assert tensors[name].dtype == value.dtype
        assert torch.equal(tensors[name], value), name


def test_reads_the_checkpoints_of_sit_sra_and_dit_sra(model, awake, tmp_path: Path) -> None:
    online, ema = awake(model, 1), awake(model, 2)
    args = argparse.Namespace(exp_name="sitxl", block_out_s=8, path_type="linear", allow_tf32=True, seed=None)
    content = {"model": online, "ema": ema, "opt": OPTIMIZER, "args": args, "epoch": 799, "steps": 4_000_000}
    torch.save(content, tmp_path / "step-4000000.pt")
    assert_same(read(tmp_path / "step-4000000.pt").tensors, ema)
    assert_same(read(tmp_path / "step-4000000.pt", "model").tensors, online)
    assert read(tmp_path / "step-4000000.pt").config == model


@pytest.mark.parametrize("prefix", ["", "module._orig_mod."])
def test_reads_bare_state_dicts_in_half_precision_with_and_without_wrappers(weights, tmp_path: Path, prefix: str):
    torch.save(OrderedDict((prefix + name, value.half()) for name, value in weights.items()), tmp_path / "bare.pt")
    loaded = read(tmp_path / "bare.pt")
    assert_same(loaded.tensors, {name: value.half().float() for name, value in weights.items()})
    (note,) = loaded.notes
    assert "by its shapes a sit" in note


@pytest.mark.parametrize(("family", "suffix"), [("sit", ".pt"), ("dit", ".safetensors")])
def test_the_network_is_inferred_from_the_shapes(tiny, awake, tmp_path: Path, family: str, suffix: str) -> None:
    # A width of the papers, which fixes the number of heads.
    config = tiny("none", family=family, hidden=384, heads=6, depth=2, patch=4, channels=3, classes=7).model
    path = tmp_path / f"weights{suffix}"
    torch.save(awake(config), path) if suffix == ".pt" else save_file(awake(config), path)
    assert read(path).config == config


def test_our_safetensors_describe_their_network_and_objective(tiny, awake, tmp_path: Path) -> None:
    config, objective = tiny(heads=4).model, ObjectiveConfig(path="cosine")
    write_safetensors(tmp_path / "ours.safetensors", awake(config), config, objective)
    loaded = read(tmp_path / "ours.safetensors")
    assert (loaded.config, loaded.objective) == (config, objective)


def test_what_we_write_has_the_layout_of_public_checkpoints(model, awake, tmp_path: Path) -> None:
    online, ema = awake(model, 1), awake(model, 2)
    write_public(tmp_path / "ours.pt", online, ema, 7, 3, args={"seed": 0})
    content = torch.load(tmp_path / "ours.pt", weights_only=False)
    assert set(content) == {"model", "ema", "args", "epoch", "steps"}
    assert (content["args"].seed, content["steps"], content["epoch"]) == (0, 7, 3)
    assert_same(content["model"], online)
    assert_same(content["ema"], ema)
    assert [path.name for path in tmp_path.iterdir()] == ["ours.pt"]


# Files of other projects


@pytest.mark.parametrize(
    ("foreign", "note"),
    [
        ("projectors.0.0.weight", "left out projectors.* (the projection heads of REPA"),
        ("projectors_final.linear.weight", "left out projectors_final.* (the velocity head of Self-Transcendence"),
    ],
)
def test_heads_of_other_projects_are_left_out_with_a_note(weights, tmp_path: Path, foreign: str, note: str) -> None:
    torch.save(weights | {foreign: torch.zeros(3)}, tmp_path / "other.pt")
    loaded = read(tmp_path / "other.pt")
    assert_same(loaded.tensors, weights)
    assert note in loaded.notes[0]


def test_a_file_without_ap_head_is_read_with_a_note(weights, tmp_path: Path) -> None:
    rest = {name: value for name, value in weights.items() if not name.startswith("ap_head")}
    torch.save(rest, tmp_path / "plain.pt")
    loaded = read(tmp_path / "plain.pt", family="sit")
    assert all(torch.equal(loaded.tensors[name], value) for name, value in rest.items())
    assert loaded.without_head
    assert "ap_head" in loaded.notes[-1]


def test_training_from_a_file_without_ap_head_has_a_head_that_learns(tiny, awake, tmp_path: Path) -> None:
    weights = awake(tiny(depth=3, qk_norm=True).model, std=0.05)
    path = tmp_path / "plain.pt"
    torch.save({name: value for name, value in weights.items() if not name.startswith("ap_head")}, path)
    write_images(tmp_path / "data")
    config = small(tmp_path, model__qk_norm=True, train__images=24, init_from=str(path), weights_family="sit")
    code, rows = run(config)
    assert code == 0
    assert rows[0]["grad_norm"] < 100  # features of exactly zero have no direction, and a cosine a gradient of 10^7
    last = content(config.path / "checkpoints" / checkpoints(config.path)[-1])["weights"]
    assert any(last["ap_head.linear1.weight"]), "a head of zeros stays one: every product of its layers' gradients is 0"


# Refusals: one line with the file and the reason


def refusal(path: Path) -> str:
    with pytest.raises(Refused) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


WRONG = {  # change of the state dict -> what the message says
    "self-flow": ({"projector.linear1.weight": torch.zeros(3)}, "Self-Flow"),
    "shape": ({"t_embedder.mlp.2.bias": torch.zeros(31)}, "t_embedder.mlp.2.bias has shape (31,); must be (32,)"),
    "unknown": ({"blocks.0.attn.rope": torch.zeros(1)}, "blocks.0.attn.rope is not a parameter"),
    "block without a number": ({"blocks.last.mlp": torch.zeros(1)}, "blocks.last.mlp"),
    "missing": ({"blocks.2.attn.proj.bias": None}, "blocks.2.attn.proj.bias is missing"),
    "half a head": ({"ap_head.linear2.bias": None}, "ap_head.linear2.bias is missing"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_another_networks_state_dict_is_refused(weights, tmp_path: Path, change: dict, message: str) -> None:
    tensors = {name: value for name, value in (weights | change).items() if value is not None}
    torch.save(tensors, tmp_path / "wrong.pt")
    assert message in refusal(tmp_path / "wrong.pt")


def test_a_width_that_does_not_tell_the_heads_is_refused(tiny, awake, tmp_path: Path) -> None:
    torch.save(awake(tiny().model), tmp_path / "narrow.pt")
    assert "number of heads" in refusal(tmp_path / "narrow.pt")


def test_a_missing_key_is_refused_with_those_present(tmp_path: Path) -> None:
    torch.save({"model": {}, "opt": OPTIMIZER}, tmp_path / "no_ema.pt")
    assert "no 'ema' weights; it has model, opt" in refusal(tmp_path / "no_ema.pt")


class Bomb:
    """Pickles into a call."""

    def __init__(self, function: Callable, *arguments: str) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable, tuple]:
        return self.call


@pytest.mark.parametrize("where", ["args", "top", "in the namespace"])
@pytest.mark.parametrize(("function", "zipped"), [(os.mkdir, True), (shutil.copytree, False)])
def test_a_file_that_would_run_code_is_refused_and_runs_none(
    weights, tmp_path: Path, function: Callable, where: str, zipped: bool
) -> None:
    target, source = tmp_path / "exploded", tmp_path / "source"
    source.mkdir()
    bomb = Bomb(function, *([str(target)] if function is os.mkdir else [str(source), str(target)]))
    content = {
        "args": {"ema": weights, "args": bomb},
        "top": bomb,
        "in the namespace": {"ema": weights, "args": argparse.Namespace(bomb=bomb)},
    }[where]
    torch.save(content, tmp_path / "bomb.pt", _use_new_zipfile_serialization=zipped)
    assert (function.__name__ if zipped else "not a zip file") in refusal(tmp_path / "bomb.pt")
    assert not target.exists()
    torch.load(tmp_path / "bomb.pt", weights_only=False)
    assert target.exists(), "the file was harmless"


@pytest.mark.parametrize("kind", ["zip", "pickle", "safetensors"])
def test_a_truncated_file_is_refused_wherever_it_is_cut(weights, tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("cut.safetensors" if kind == "safetensors" else "cut.pt")
    if kind == "safetensors":
        save_file(weights, path, {METADATA_KEY: "{}"})
    else:
        torch.save({"ema": weights}, path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    for size in (0, 1, 7, 8, 100, *range(1000, 20_000, 2999), len(content) // 2, len(content) - 100, len(content) - 1):
        path.write_bytes(content[:size])
        refusal(path)


@pytest.mark.parametrize(
    "content",
    [[], {}, 3, {"ema": {}}, {"ema": {"a": 1}}, {"ema": {"pos_embed": torch.zeros(3)}}, torch.zeros(3), "text"],
    ids=str,
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "other.pt")
    refusal(tmp_path / "other.pt")


@pytest.mark.parametrize("name", ["text.pt", "text.safetensors", "absent.pt"])
def test_a_missing_file_and_a_text_file_are_refused(tmp_path: Path, name: str) -> None:
    if "text" in name:
        (tmp_path / name).write_text("these are no weights\n" * 50)
    refusal(tmp_path / name)


@pytest.mark.parametrize(
    "description", ["{", "[]", '{"model": {"depht": 4}, "objective": {}}', '{"model": 3, "objective": {}}']
)
def test_damaged_metadata_is_refused(weights, tmp_path: Path, description: str) -> None:
    save_file(weights, tmp_path / "ours.safetensors", {METADATA_KEY: description})
    refusal(tmp_path / "ours.safetensors")


def described(tensors: dict[str, Tensor], path: Path, **changes: int) -> Path:
    """A file whose description of its network is changed."""
    config = read(path).config
    description = {"model": {**to_dict(config), **changes}, "objective": to_dict(ObjectiveConfig())}
    save_file(tensors, path, {METADATA_KEY: json.dumps(description)})
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"depth": 900},
        {"hidden": 64},
        {"depth": 10**6},
        {"hidden": 2**40},
        {"classes": 10**9},
        {"input_size": 2**20},
        {"mlp_ratio": 10**6},
        {"patch": 4},
    ],
    ids=str,
)
def test_what_a_file_says_of_its_network_is_compared_before_anything_is_built(weights, tmp_path, changes) -> None:
    path = tmp_path / "ours.safetensors"
    save_file(weights, path)
    line, (name,) = refusal(described(weights, path, **changes)), changes
    assert f"describes a network of {name} = " in line or f"model.{name.replace('_', '-')}: " in line


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: {**w, "blocks.999999.mlp.fc1.weight": w["blocks.0.mlp.fc1.weight"]}, "blocks, the last of number"),
        (lambda w: {**w, 5: w["pos_embed"]}, "must be text"),
        (lambda w: {**w, (1, 2): w["pos_embed"]}, "must be text"),
        (lambda w: {**w, b"x": w["pos_embed"]}, "must be text"),
        (lambda w: {**w, "x_embedder.proj.weight": torch.zeros(0, 4, 2, 2)}, "is empty"),
        (lambda w: {**w, "pos_embed": torch.quantize_per_tensor(w["pos_embed"], 0.1, 0, torch.qint8)}, "qint8"),
        (lambda w: {**w, "pos_embed": w["pos_embed"].to_sparse()}, "sparse"),
        (lambda w: {**w, "pos_embed": w["pos_embed"].long()}, "int64"),
        (lambda w: {**w, "pos_embed": w["pos_embed"] * math.nan}, "pos_embed has numbers that are not finite"),
        (lambda w: {**w, "final_layer.linear.bias": w["final_layer.linear.bias"] + math.inf}, "not finite"),
    ],
)
def test_tensors_that_cannot_be_parameters_are_refused(weights, tmp_path: Path, change: Callable, reason: str) -> None:
    torch.save(change(weights), tmp_path / "odd.pt")
    assert reason in refusal(tmp_path / "odd.pt")


def compressed(source: Path, path: Path) -> Path:
    """The same archive with all members compressed."""
    with zipfile.ZipFile(source) as given, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for name in given.namelist():
            made.writestr(name, given.read(name))
    return path


def test_a_small_file_takes_little_time_and_memory(tmp_path: Path) -> None:
    torch.save({"ema": {"pos_embed": torch.zeros(1 << 24)}}, tmp_path / "zeros.pt")
    assert "is compressed" in refusal(compressed(tmp_path / "zeros.pt", tmp_path / "bomb.pt"))
    with zipfile.ZipFile(tmp_path / "marks.pt", "w") as archive:
        archive.writestr("marks/data.pkl", b"\x80\x02" + b"(" * 10_000_000 + b".")
    start = time.monotonic()
    assert "data.pkl has 10,000,003 bytes" in refusal(tmp_path / "marks.pt")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_pipes_and_devices_are_not_read(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"device{suffix}").symlink_to("/dev/zero")
    for name in ("pipe", "device"):
        assert "not a regular file" in refusal(tmp_path / f"{name}{suffix}")


def test_equal_weights_give_equal_bytes(weights, model, tmp_path: Path) -> None:
    """Whatever the order in which a process keeps the entries of a mapping."""
    script = (
        "import sys, torch\nfrom pathlib import Path\nfrom sra_fast.config import ModelConfig, ObjectiveConfig\n"
        "from sra_fast.model.public_weights import write_safetensors\n"
        "for i in range(8):\n"
        "    write_safetensors(Path(f'{i}.safetensors'), {'a': torch.ones(3)}, ModelConfig(), ObjectiveConfig())"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    assert len({path.read_bytes() for path in tmp_path.glob("*.safetensors")}) == 1


def test_a_full_disk_spares_the_file_that_was_there(weights, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_text("before")
    with full_disk(10_000), pytest.raises(Refused, match=r"weights\.pt: could not be written"):
        write_public(path, weights, weights, 1, 0, {})
    assert path.read_text() == "before"
