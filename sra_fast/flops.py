"""FLOPs of the model, and peak FLOP/s of devices.

    FLOPs = 2 x multiply-adds of all matrix products, attention's two included

Norms, activations, softmax, position and class embeddings, losses and the optimizer are limited by memory bandwidth and
not counted. A backward pass counts as two forward passes (one product for the input's gradient, one for the weight's).
Recomputation in the backward pass is not counted, so that figures with and without it are comparable.
"""

from __future__ import annotations

from collections.abc import Mapping

from sra_fast.config import ModelConfig
from sra_fast.errors import Refused

FREQUENCIES = 256  # width of the sinusoidal time embedding, as model.transformer.FREQUENCIES, without importing torch

# Dense peaks in FLOP/s by CUDA device name: bf16, TF32 and plain fp32. Data sheets advertise the tensor cores' rate
# with 2:4 sparsity, marked by an asterisk; the dense rate, used here, is half of it. None: not published.
A100 = {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12}  # "NVIDIA A100 Tensor Core GPU" data sheet, 2021
H100_SXM = {"bf16": 989.4e12, "tf32": 494.7e12, "fp32": 66.9e12}  # "H100 Tensor Core GPU Architecture", v1.04, table 2
H200_SXM = {"bf16": 989.4e12, "tf32": 494.7e12, "fp32": 66.9e12}  # "H200" data sheet: half of 1979* and 989*, and 67
PEAKS: dict[str, Mapping[str, float | None]] = {
    "NVIDIA A100-SXM4-40GB": A100,
    "NVIDIA A100-SXM4-80GB": A100,
    "NVIDIA A100-PCIE-40GB": A100,
    "NVIDIA A100 80GB PCIe": A100,
    "NVIDIA H100 80GB HBM3": H100_SXM,
    "NVIDIA H100 PCIe": {"bf16": 756e12, "tf32": 378e12, "fp32": 51.2e12},  # the same table, column PCIe
    "NVIDIA H100 NVL": {"bf16": 835.5e12, "tf32": 417.5e12, "fp32": 60e12},  # H100 data sheet: half of 1671* and 835*
    "NVIDIA H200": H200_SXM,
    "NVIDIA B200": {"bf16": 2250e12, "tf32": None, "fp32": None},  # "HGX B200" data sheet: 36* PFLOP/s of 8 GPUs
    "NVIDIA GB200": {"bf16": 2500e12, "tf32": None, "fp32": None},  # "GB200 NVL72" data sheet: 360* PFLOP/s of 72 GPUs
    "NVIDIA L40": {"bf16": 181.05e12, "tf32": 90.5e12, "fp32": 90.5e12},  # "NVIDIA L40" data sheet, dense | sparse*
    "NVIDIA L40S": {"bf16": 362.05e12, "tf32": 183e12, "fp32": 91.6e12},  # "NVIDIA L40S" data sheet, dense | sparse*
    # "Ada GPU Architecture" v2, appendix A; with fp32 accumulation
    "NVIDIA GeForce RTX 4090": {"bf16": 165.2e12, "tf32": 82.6e12, "fp32": 82.6e12},
}
PRECISIONS = ("bf16", "tf32", "fp32")


def forward_flops(config: ModelConfig, blocks: int | None = None) -> int:
    """FLOPs of one forward pass, per image.

    Args:
        config: with input size and channels filled in.
        blocks: stop after this many blocks, without the final layer, as the teacher does at its tap; None = all
            blocks and the final layer.

    Raises:
        Refused: if the model has fewer blocks, or its input size or channels are not filled in.
    """
    if config.tokens <= 0:
        raise Refused("model.input-size", config.input_size, "must be positive")
    if config.channels <= 0:
        raise Refused("model.channels", config.channels, "must be positive")
    depth = config.depth if blocks is None else blocks
    if not 0 <= depth <= config.depth:
        raise Refused("blocks", depth, f"must be in [0, model.depth = {config.depth}]")
    tokens, width, patch = config.tokens, config.hidden, config.patch**2
    block = tokens * width * 3 * width  # qkv
    block += 2 * tokens * tokens * width  # q k^T, and its softmax times v, over all heads
    block += tokens * width * width  # proj
    block += 2 * tokens * width * config.mlp_ratio * width  # fc1, fc2
    block += width * 6 * width  # adaLN modulation, once per image
    total = depth * block
    total += tokens * patch * config.channels * width  # patch embedding
    total += FREQUENCIES * width + width * width  # time embedder
    if blocks is None:
        total += width * 2 * width + tokens * width * patch * config.output_channels  # final layer
    return 2 * total


def head_flops(config: ModelConfig) -> int:
    """FLOPs of one forward pass of SRA's projection head, D -> 2D -> D, per image."""
    return 2 * config.tokens * 2 * config.hidden * 2 * config.hidden


def training_flops(config: ModelConfig, teacher_tap: int | None) -> int:
    """FLOPs of one training step, per image: forward and backward pass of the student and its head (three forwards),
    and one forward pass of the teacher.

    Args:
        config: as in `forward_flops`.
        teacher_tap: block (1-based) after which the teacher stops; None = plain training, no head and no teacher.
    """
    if teacher_tap is None:
        return 3 * forward_flops(config)
    return 3 * (forward_flops(config) + head_flops(config)) + forward_flops(config, teacher_tap)


def dense_peak_flops(device_name: str, precision: str) -> float | None:
    """The data sheet's dense peak in FLOP/s; None for a device or precision that the table does not have. Names must
    match exactly, because laptop GPUs, MIG slices and variants have other peaks under similar names.

    Args:
        device_name: from `torch.cuda.get_device_name`.
        precision: bf16, tf32 or fp32.

    Raises:
        Refused: for another precision.
    """
    if precision not in PRECISIONS:
        raise Refused("precision", precision, f"must be one of {', '.join(PRECISIONS)}")
    return PEAKS.get(device_name, {}).get(precision)
