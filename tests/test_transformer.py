"""The network against public names, shapes and counts, and against an independent forward pass in NumPy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sra_fast.config import ModelConfig, preset
from sra_fast.errors import Refused
from sra_fast.model.backends import REFERENCE, Backends
from sra_fast.model.layout import from_public, to_public
from sra_fast.model.transformer import TimestepEmbedder, Transformer


def at_256_px(size: str, family: str = "sit", **changes: object) -> ModelConfig:
    """The published network on 32 x 32 x 4 latents and 1,000 classes."""
    return replace(preset(f"{family}-{size}-2").model, input_size=32, channels=4, classes=1000, **changes)


def on_meta(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


def public_shapes(depth: int, d: int, outputs: int, channels: int = 4, p: int = 2, tokens: int = 256) -> dict:
    """Names and shapes of the public checkpoints."""

    def linear(name: str, rows: int, columns: int) -> dict:
        return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}

    shapes = {"pos_embed": (1, tokens, d), "x_embedder.proj.weight": (d, channels, p, p)}
    shapes |= {"x_embedder.proj.bias": (d,), "y_embedder.embedding_table.weight": (1001, d)}
    shapes |= linear("t_embedder.mlp.0", d, 256) | linear("t_embedder.mlp.2", d, d)
    for i in range(depth):
        shapes |= linear(f"blocks.{i}.attn.qkv", 3 * d, d) | linear(f"blocks.{i}.attn.proj", d, d)
        shapes |= linear(f"blocks.{i}.mlp.fc1", 4 * d, d) | linear(f"blocks.{i}.mlp.fc2", d, 4 * d)
        shapes |= linear(f"blocks.{i}.adaLN_modulation.1", 6 * d, d)
    shapes |= linear("ap_head.linear1", 2 * d, d) | linear("ap_head.linear2", d, 2 * d)
    shapes |= linear("final_layer.linear", p * p * outputs, d) | linear("final_layer.adaLN_modulation.1", 2 * d, d)
    return shapes


def shapes_of(model: nn.Module) -> dict:
    return {name: tuple(value.shape) for name, value in to_public(model.state_dict()).items()}


PUBLISHED = {  # depth, width, parameters of SiT: 33.55, 132.86, 462.28, 680.42 million
    "s": (12, 384, 33_548_176),
    "b": (12, 768, 132_861_712),
    "l": (24, 1024, 462_283_792),
    "xl": (28, 1152, 680_423_056),
}


@pytest.mark.parametrize("size", PUBLISHED)
@pytest.mark.parametrize(("family", "outputs"), [("sit", 4), ("dit", 8)])
def test_names_shapes_and_counts_are_the_published_ones(size: str, family: str, outputs: int) -> None:
    depth, d, count = PUBLISHED[size]
    model = on_meta(at_256_px(size, family))
    assert shapes_of(model) == public_shapes(depth, d, outputs)
    variance_head = 4 * (outputs - 4) * (d + 1)
    assert sum(parameter.numel() for parameter in model.parameters()) == count + variance_head
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["pos_embed"]


def test_sizes_that_the_data_have_not_filled_in_are_refused() -> None:
    with pytest.raises(Refused, match=r"model\.input-size: 0 given"):
        Transformer(ModelConfig())


# The forward pass in NumPy


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
    "sit": {},
    "dit": {"family": "dit"},
    "qk norm": {"qk_norm": True},
    "patch 1": {"patch": 1, "input_size": 4},
    "patch 3, 2 channels, dit": {"family": "dit", "patch": 3, "input_size": 9, "channels": 2},
    "10 classes, 4 heads": {"classes": 10, "heads": 4},
}


def inputs(config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Three images, times of the family, labels with the null class last."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, config.channels, config.input_size, config.input_size)
    t = torch.tensor([0.1, 0.5, 0.9]) if config.family == "sit" else torch.tensor([1.0, 500.0, 999.0])
    return torch.randn(shape, generator=generator), t, torch.tensor([0, 2, config.classes])


@pytest.fixture
def network(tiny, awake) -> Callable[..., Transformer]:
    """A small network that computes something. Named arguments change its configuration."""

    def create(backends: Backends = REFERENCE, **changes: object) -> Transformer:
        config = tiny(**changes).model
        return Transformer.from_tensors(config, from_public(awake(config)), backends)

    return create


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_agrees_with_numpy(tiny, awake, variant: str) -> None:
    config = tiny(**VARIANTS[variant]).model
    weights = {name: value.double() for name, value in awake(config).items()}
    model = Transformer.from_tensors(config, from_public(weights))
    x, t, labels = inputs(config)
    arrays = {name: value.numpy() for name, value in weights.items()}
    prediction, outputs = numpy_forward(
        arrays, x.double().numpy(), t.double().numpy(), labels.numpy(), config.heads, config.patch
    )
    # Ours computes the sinusoids' angles in fp32: up to 999 x 2^-23 off, amplified through blocks of gain about 10.
    tolerance = 1e-5 if config.family == "sit" else 1e-2
    assert np.abs(prediction).mean() > 0.3
    np.testing.assert_allclose(model(x, t, labels)[0].numpy(), prediction, atol=tolerance, rtol=0)
    for tap, output in enumerate(outputs, start=1):
        np.testing.assert_allclose(model.features(x, t, labels, tap).numpy(), output, atol=tolerance, rtol=0)


def test_sinusoids_are_cosines_then_sines_of_fp32_angles() -> None:
    t = torch.tensor([0.0, 0.37, 1.0, 999.0])
    angle = t.double()[:, None] * torch.tensor([10_000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    expected = torch.cat([angle.cos(), angle.sin()], dim=1)
    sinusoids = TimestepEmbedder.sinusoids(t)
    assert bool(((sinusoids - expected).abs() <= 2**-22 * (1 + t[:, None])).all())  # two roundings of an angle up to t
    embedder = TimestepEmbedder(8).bfloat16()  # 999 itself is not a bf16 number
    assert torch.equal(embedder(t), embedder.mlp(sinusoids.bfloat16()))


def test_blocks_compute_with_the_given_backends(network) -> None:
    calls = Counter()

    def counted(op: str) -> Callable:
        def call(*inputs: Tensor):
            calls[op] += 1
            return getattr(REFERENCE, op)(*inputs)

        return call

    ops = ("adaln", "gated_adaln", "gated_residual", "attention")
    model = network(Backends(**{op: counted(op) for op in ops}))
    model(*inputs(model.config))
    assert calls == {"adaln": 1, "gated_adaln": 8, "attention": 4}
    calls.clear()
    model.features(*inputs(model.config), tap=3)  # runs three blocks, and normalises nothing for a fourth
    assert calls == {"adaln": 1, "gated_adaln": 5, "attention": 3, "gated_residual": 1}


def test_features_are_what_enters_the_head_also_after_truncation(network) -> None:
    model, teacher = network(), network().truncate_after(2)
    entered = []
    model.ap_head.register_forward_hook(lambda module, inputs, output: entered.append(inputs[0]))
    assert model(*inputs(model.config))[1] is None
    assert not entered
    projected = model(*inputs(model.config), tap=2)[1]
    features = teacher.features(*inputs(model.config), tap=2)
    assert torch.equal(features, entered[0])
    assert torch.equal(model.ap_head(features), projected)
    assert len(teacher.blocks) == 2


@pytest.mark.parametrize(("every", "calls"), [(1, [2, 2, 2, 2]), (3, [1, 1, 2, 1])])
def test_activation_checkpointing_recomputes_every_kth_block_and_changes_no_bit(network, every: int, calls: list):
    results, counts = [], [0] * 4
    for checkpoint_every in (0, every):
        model = network(checkpoint_every=checkpoint_every).requires_grad_().train()
        counts = [0] * 4
        for i, block in enumerate(model.blocks):
            block.attn.register_forward_hook(lambda *_, i=i, counts=counts: counts.__setitem__(i, counts[i] + 1))
        prediction, features = model(*inputs(model.config), tap=2)
        loss = prediction.square().mean() + features.square().mean()
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert all(torch.equal(*values) for values in zip(*results, strict=True))
    assert counts == calls
