"""FLOPs: the published numbers to their printed digits, and what PyTorch itself counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sra_fast.config import preset
from sra_fast.errors import Refused
from sra_fast.flops import (
    FREQUENCIES,
    PEAKS,
    PRECISIONS,
    dense_peak_flops,
    forward_flops,
    head_flops,
    training_flops,
)
from sra_fast.model import transformer
from sra_fast.model.attention import attention_operator
from sra_fast.model.backends import REFERENCE
from sra_fast.model.transformer import Transformer

XL = replace(preset("sit-xl-2").model, input_size=32, channels=4, classes=1000)


@pytest.mark.parametrize(
    ("flops", "printed"),
    [
        (forward_flops(XL), 237.2),
        (head_flops(XL), 2.72),
        (forward_flops(XL, 20), 169.45),  # 169.46 with the final layer, which a teacher stopped at its tap does not run
        (training_flops(XL, 20), 889.3),
        (training_flops(XL, None), 711.7),
    ],
)
def test_published_gflop_of_sit_xl_2_at_256_tokens(flops, printed):
    digits = len(str(printed).split(".")[1])
    assert round(flops / 1e9, digits) == printed


@pytest.mark.parametrize("family", ["sit", "dit"])
@pytest.mark.parametrize("tap", [0, 1, 3])
def test_pytorch_counts_the_same(tiny, family, tap):
    """Its counter sees every matrix product and convolution of a real forward."""
    config = replace(tiny().model, family=family, input_size=12, channels=3)
    # The counter knows attention only by its products.
    model, batch = Transformer(config, replace(REFERENCE, attention=attention_operator("math"))), 2
    images, t, labels = torch.randn(batch, 3, 12, 12), torch.rand(batch), torch.zeros(batch, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if tap:
            model.features(images, t, labels, tap)
        else:
            model(images, t, labels, tap=1)
    expected = forward_flops(config, tap) if tap else forward_flops(config) + head_flops(config)
    assert counter.get_total_flops() == batch * expected


def test_the_time_embedding_is_as_wide_as_the_models():
    assert FREQUENCIES == transformer.FREQUENCIES


def test_unknown_sizes_and_too_many_blocks_are_refused():
    with pytest.raises(Refused, match=r"model\.input-size: 0 given"):
        forward_flops(preset("sit-xl-2").model)
    with pytest.raises(Refused, match="blocks: 29 given"):
        forward_flops(XL, 29)


def test_peaks_are_dense_and_only_of_exact_names():
    assert dense_peak_flops("NVIDIA H200", "bf16") == 989.4e12
    assert dense_peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert dense_peak_flops("NVIDIA A100-SXM4-80GB", "tf32") == 156e12
    for unknown in ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "AMD EPYC", ""):
        assert dense_peak_flops(unknown, "bf16") is None
    with pytest.raises(Refused, match="must be one of bf16, tf32, fp32"):
        dense_peak_flops("NVIDIA H200", "fp8")


def test_the_peaks_of_a_device_have_plausible_ratios():
    """TF32 runs at half the bf16 rate on all of these chips; a figure from a sparse column would break this."""
    for name, peaks in PEAKS.items():
        assert set(peaks) == set(PRECISIONS), name
        if peaks["tf32"] is not None:
            assert peaks["tf32"] / peaks["bf16"] == pytest.approx(0.5, rel=0.02), name
            assert peaks["fp32"] <= peaks["tf32"], name
