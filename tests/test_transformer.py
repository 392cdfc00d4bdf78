"""The network against the public names, shapes and counts and against an independent forward pass in numpy."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sra_fast.config import ModelConfig, preset
from sra_fast.errors import Refused
from sra_fast.model.initial import initial_weights
from sra_fast.model.layout import apart, joined
from sra_fast.model.transformer import TimestepEmbedder, Transformer, around


def at_256_px(size: str, family: str = "sit", **changes: object) -> ModelConfig:
    """The published network on 32 x 32 x 4 latents and 1,000 classes."""
    return replace(preset(f"{family}-{size}-2").model, input_size=32, channels=4, classes=1000, **changes)


def on_meta(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


def public_shapes(depth: int, d: int, side: int, p: int, channels: int, outputs: int, classes: int) -> dict:
    """The public checkpoints, line by line, by hand."""

    def linear(name: str, rows: int, columns: int) -> dict:
        return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}

    shapes = {"pos_embed": (1, side * side, d), "x_embedder.proj.weight": (d, channels, p, p)}
    shapes |= {"x_embedder.proj.bias": (d,), "y_embedder.embedding_table.weight": (classes + 1, d)}
    shapes |= linear("t_embedder.mlp.0", d, 256) | linear("t_embedder.mlp.2", d, d)
    for i in range(depth):
        shapes |= linear(f"blocks.{i}.attn.qkv", 3 * d, d) | linear(f"blocks.{i}.attn.proj", d, d)
        shapes |= linear(f"blocks.{i}.mlp.fc1", 4 * d, d) | linear(f"blocks.{i}.mlp.fc2", d, 4 * d)
        shapes |= linear(f"blocks.{i}.adaLN_modulation.1", 6 * d, d)
    shapes |= linear("ap_head.linear1", 2 * d, d) | linear("ap_head.linear2", d, 2 * d)
    return (
        shapes | linear("final_layer.linear", p * p * outputs, d) | linear("final_layer.adaLN_modulation.1", 2 * d, d)
    )


def shapes_of(model: nn.Module) -> dict:
    return {name: tuple(value.shape) for name, value in apart(model.state_dict()).items()}


# depth, width; the exact count; the same in millions.
PUBLISHED_COUNTS = {
    "s": (12, 384, 33_548_176, 33.55),
    "b": (12, 768, 132_861_712, 132.86),
    "l": (24, 1024, 462_283_792, 462.28),
    "xl": (28, 1152, 680_423_056, 680.42),
}


@pytest.mark.parametrize("size", PUBLISHED_COUNTS)
def test_parameter_count_is_the_published_one(size: str) -> None:
    depth, d, exact, millions = PUBLISHED_COUNTS[size]
    block = 18 * d * d + 15 * d  # qkv 3, proj 1, fc1 4, fc2 4, modulation 6; biases 3, 1, 4, 1, 6
    time, labels, positions, patches = 256 * d + d + d * d + d, 1001 * d, 256 * d, 16 * d + d
    head, final = 4 * d * d + 3 * d, 2 * d * d + 2 * d + 16 * d + 16
    formula = depth * block + time + labels + positions + patches + head + final
    count = sum(parameter.numel() for parameter in on_meta(at_256_px(size)).parameters())
    assert count == formula == exact
    assert round(exact / 1e6, 2) == millions


@pytest.mark.parametrize("family", ["sit", "dit"])
@pytest.mark.parametrize("size", PUBLISHED_COUNTS)
def test_state_dict_has_the_public_names_and_shapes_and_no_others(size: str, family: str) -> None:
    depth, d, _, _ = PUBLISHED_COUNTS[size]
    outputs = {"sit": 4, "dit": 8}[family]
    assert shapes_of(on_meta(at_256_px(size, family))) == public_shapes(depth, d, 16, 2, 4, outputs, 1000)


def test_families_differ_in_the_final_rows_alone() -> None:
    sit, dit = shapes_of(on_meta(at_256_px("b"))), shapes_of(on_meta(at_256_px("b", "dit")))
    different = {name for name in sit if sit[name] != dit[name]}
    assert different == {"final_layer.linear.weight", "final_layer.linear.bias"}
    assert dit["final_layer.linear.bias"][0] == 2 * sit["final_layer.linear.bias"][0]


def test_qk_norm_adds_its_public_names_and_no_others() -> None:
    with_norm = shapes_of(on_meta(at_256_px("b", qk_norm=True)))
    added = {name: (64,) for i in range(12) for qk in "qk" for name in (f"blocks.{i}.attn.{qk}_norm.weight",)}
    added |= {name.replace("weight", "bias"): shape for name, shape in added.items()}
    assert with_norm == shapes_of(on_meta(at_256_px("b"))) | added


def test_the_position_table_alone_is_not_trained() -> None:
    frozen = [name for name, p in on_meta(at_256_px("b")).named_parameters() if not p.requires_grad]
    assert frozen == ["pos_embed"]


def test_sizes_the_data_has_not_filled_in_are_refused() -> None:
    with pytest.raises(Refused, match=r"model\.input-size: 0 given"):
        Transformer(ModelConfig())


# The forward pass, written anew in numpy float64


def numpy_forward(w: dict[str, np.ndarray], x: np.ndarray, t: np.ndarray, y: np.ndarray, heads: int, p: int):
    """(prediction, outputs of all blocks) of DiT: Peebles and Xie, section 3.2 and their table of details."""

    def linear(name: str, h: np.ndarray) -> np.ndarray:
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def silu(h: np.ndarray) -> np.ndarray:
        return h / (1 + np.exp(-h))

    def gelu(h: np.ndarray) -> np.ndarray:
        return 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))

    def norm(h: np.ndarray, name: str = "") -> np.ndarray:
        h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + (1e-5 if name else 1e-6))
        return h * w[f"{name}.weight"] + w[f"{name}.bias"] if f"{name}.weight" in w else h

    def attend(h: np.ndarray, block: str) -> np.ndarray:
        out, width = [], h.shape[2] // heads
        q, k, v = np.split(linear(f"{block}.attn.qkv", h), 3, axis=2)
        for i in range(heads):
            own = slice(i * width, (i + 1) * width)
            has_norm = f"{block}.attn.q_norm.weight" in w
            qi, ki = q[..., own], k[..., own]
            if has_norm:
                qi, ki = norm(qi, f"{block}.attn.q_norm"), norm(ki, f"{block}.attn.k_norm")
            scores = np.exp(qi @ ki.transpose(0, 2, 1) / math.sqrt(width))
            out.append(scores / scores.sum(2, keepdims=True) @ v[..., own])
        return linear(f"{block}.attn.proj", np.concatenate(out, axis=2))

    b, size, side, d = *x.shape[::2], x.shape[2] // p, w["pos_embed"].shape[2]
    h = np.zeros((b, side * side, d))
    for token in range(side * side):
        i, j = divmod(token, side)
        pixels = x[:, :, i * p : (i + 1) * p, j * p : (j + 1) * p].reshape(b, -1)
        h[:, token] = pixels @ w["x_embedder.proj.weight"].reshape(d, -1).T + w["x_embedder.proj.bias"]
    h = h + w["pos_embed"]
    angle = t[:, None] * np.exp(-math.log(10_000) * np.arange(128) / 128)
    c = linear("t_embedder.mlp.0", np.concatenate([np.cos(angle), np.sin(angle)], axis=1))
    c = linear("t_embedder.mlp.2", silu(c)) + w["y_embedder.embedding_table.weight"][y]
    outputs = []
    for i in range(sum(name.endswith("qkv.weight") for name in w)):
        block = f"blocks.{i}"
        m = np.split(linear(f"{block}.adaLN_modulation.1", silu(c))[:, None], 6, axis=2)
        h = h + m[2] * attend(norm(h) * (1 + m[1]) + m[0], block)
        inner = gelu(linear(f"{block}.mlp.fc1", norm(h) * (1 + m[4]) + m[3]))
        h = h + m[5] * linear(f"{block}.mlp.fc2", inner)
        outputs.append(h)
    shift, scale = np.split(linear("final_layer.adaLN_modulation.1", silu(c))[:, None], 2, axis=2)
    patches = linear("final_layer.linear", norm(h) * (1 + scale) + shift)
    image = np.zeros((b, patches.shape[2] // p**2, size, size))
    for token in range(side * side):
        i, j = divmod(token, side)
        image[:, :, i * p : (i + 1) * p, j * p : (j + 1) * p] = (
            patches[:, token].reshape(b, p, p, -1).transpose(0, 3, 1, 2)
        )
    return image, outputs


VARIANTS = {
    "digits": {},
    "dit": {"family": "dit"},
    "qk norm": {"qk_norm": True},
    "patch 1": {"patch": 1, "input_size": 4},
    "patch 4, 3 channels": {"patch": 4, "input_size": 12, "channels": 3},
    "10 classes, 4 heads": {"classes": 10, "heads": 4},
}


def inputs(config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Three images, times of the family, labels with the null class last."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, config.channels, config.input_size, config.input_size)
    t = torch.tensor([0.1, 0.5, 0.9]) if config.family == "sit" else torch.tensor([1.0, 500.0, 999.0])
    return torch.randn(shape, generator=generator), t, torch.tensor([0, 2, config.classes])


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_agrees_with_an_independent_one(tiny, awake, variant: str) -> None:
    config = tiny(**VARIANTS[variant]).model
    weights = awake(config)
    model = around(config, {name: value.double() for name, value in joined(weights).items()})
    x, t, labels = inputs(config)
    arrays = {name: value.double().numpy() for name, value in weights.items()}
    prediction, outputs = numpy_forward(
        arrays, x.double().numpy(), t.double().numpy(), labels.numpy(), config.heads, config.patch
    )
    # Ours computes the sinusoids' angles in fp32: up to 999 x 2^-23 off, amplified through blocks of gain about 10.
    tolerance = 1e-5 if config.family == "sit" else 1e-2
    assert np.abs(prediction).mean() > 0.3
    np.testing.assert_allclose(model(x, t, labels)[0].numpy(), prediction, atol=tolerance, rtol=0)
    for tap, output in enumerate(outputs, start=1):
        np.testing.assert_allclose(model.features(x, t, labels, tap).numpy(), output, atol=tolerance, rtol=0)


def test_sinusoids_are_cosines_then_sines_of_128_frequencies() -> None:
    t = torch.tensor([0.0, 0.37, 1.0, 999.0])
    angle = t.double()[:, None] * torch.tensor([10_000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    wanted = torch.cat([angle.cos(), angle.sin()], dim=1)
    got = TimestepEmbedder.sinusoids(t)
    assert got.dtype == torch.float32
    assert bool(((got - wanted).abs() <= 2**-22 * (1 + t[:, None])).all())  # two roundings of an angle of up to t


def test_a_fresh_block_is_the_identity_and_a_fresh_network_predicts_zero(tiny) -> None:
    config = tiny().model
    model = around(config, joined(initial_weights(config, 0, torch.device("cpu"))))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 16, 32, generator=generator)
    plain = torch.nn.functional.layer_norm(x, (32,), eps=1e-6)
    for block in model.blocks:
        assert torch.equal(block(x, plain, torch.zeros(3, 4, 32), None)[0], x)
        after, h = block(x, plain, torch.zeros(3, 4, 32), torch.zeros(3, 2, 32))
        assert torch.equal(after, x)
        torch.testing.assert_close(h, plain)
    assert not model(*inputs(config))[0].any()


@pytest.mark.parametrize(("patch", "size", "channels"), [(1, 4, 1), (2, 8, 4), (4, 8, 3), (3, 9, 2)])
@pytest.mark.parametrize("family", ["sit", "dit"])
def test_unpatchify_puts_every_value_back(tiny, awake, patch: int, size: int, channels: int, family: str) -> None:
    config = tiny(family=family, patch=patch, input_size=size, channels=channels).model
    model, c_out = around(config, joined(awake(config))), config.output_channels
    image = torch.arange(c_out * size * size, dtype=torch.float32).view(1, c_out, size, size)
    side = size // patch
    patches = torch.stack(  # token by token in rows; within one, row, column, channel
        [
            image[0, :, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch].permute(1, 2, 0).flatten()
            for i in range(side)
            for j in range(side)
        ]
    )[None]
    model.final_layer.register_forward_hook(lambda module, inputs, output: patches.expand_as(output))
    prediction, _ = model(*inputs(config))
    assert torch.equal(prediction, image.expand(3, -1, -1, -1))


def test_the_null_label_is_the_tables_last_row(tiny, awake) -> None:
    config = tiny().model
    model = around(config, joined(awake(config)))
    assert model.y_embedder.embedding_table.num_embeddings == 5
    x, t, _ = inputs(config)
    before, _ = model(x, t, torch.tensor([0, 1, config.classes]))
    model.y_embedder.embedding_table.weight[-1] += 1
    after, _ = model(x, t, torch.tensor([0, 1, config.classes]))
    assert torch.equal(after[:2], before[:2])
    assert not torch.equal(after[2], before[2])


def test_features_are_those_that_enter_the_head(tiny, awake) -> None:
    config = tiny().model
    model = around(config, joined(awake(config)))
    entered = []
    model.ap_head.register_forward_hook(lambda module, inputs, output: entered.append(inputs[0]))
    for tap in range(1, 5):
        projected = model(*inputs(config), tap=tap)[1]
        features = model.features(*inputs(config), tap)
        assert torch.equal(features, entered.pop())
        assert torch.equal(model.ap_head(features), projected)
        entered.clear()


def test_without_a_tap_the_head_is_not_run(tiny, awake) -> None:
    config = tiny().model
    model = around(config, joined(awake(config)))
    model.ap_head.register_forward_hook(lambda *_: pytest.fail("the head was run"))
    assert model(*inputs(config))[1] is None


@pytest.mark.parametrize("every", [1, 3])
def test_activation_checkpointing_changes_no_bit_of_loss_or_gradient(tiny, awake, every: int) -> None:
    results = []
    for checkpoint_every in (0, every):
        config = tiny(checkpoint_every=checkpoint_every).model
        model = around(config, joined(awake(config))).requires_grad_().train()
        prediction, features = model(*inputs(config), tap=2)
        loss = prediction.square().mean() + features.square().mean()
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for kept, recomputed in zip(*results, strict=True):
        assert torch.equal(kept, recomputed)


def test_checkpointing_recomputes_every_kth_block_alone(tiny, awake) -> None:
    config = tiny(checkpoint_every=2).model
    model = around(config, joined(awake(config))).requires_grad_()
    calls = [0] * 4
    for i, block in enumerate(model.blocks):
        block.attn.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    model(*inputs(config))[0].sum().backward()
    assert calls == [1, 2, 1, 2]


def test_the_given_tensors_are_the_networks_own(tiny, awake) -> None:
    weights = joined(awake(tiny().model))
    model = around(tiny().model, weights)
    assert all(parameter.data_ptr() == weights[name].data_ptr() for name, parameter in model.named_parameters())
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
