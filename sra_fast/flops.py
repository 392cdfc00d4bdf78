"""How much arithmetic the model takes, and how much a device could do.

    FLOPs = 2 x multiply-adds of all matrix products, attention's two included

Norms, activations, softmax, embeddings of position and class, losses and the optimizer are not counted: they are a
matter of bytes. A backward pass counts as two forwards (one product for the input's gradient, one for the weight's);
what is recomputed in it does not count, so that a number means the same with and without recomputation.
"""

from __future__ import annotations

from sra_fast.config import ModelConfig, refuse_unless

FREQUENCIES = 256  # width of the sinusoidal time embedding, as model.transformer.FREQUENCIES, without bringing in torch

# Dense peaks in FLOP/s by CUDA device name: bf16, TF32 and plain fp32. Data sheets advertise the tensor cores' rate
# with 2:4 sparsity, marked by an asterisk; the dense number is half of that, and is the one here. None: not published.
A100 = {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12}  # "NVIDIA A100 Tensor Core GPU" data sheet, 2021
H100_SXM = {"bf16": 989.4e12, "tf32": 494.7e12, "fp32": 66.9e12}  # "H100 Tensor Core GPU Architecture", v1.04, table 2
H200_SXM = {"bf16": 989.4e12, "tf32": 494.7e12, "fp32": 66.9e12}  # "H200" data sheet: half of 1979* and 989*, and 67
PEAKS: dict[str, dict[str, float | None]] = {
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
        blocks: stop after so many blocks, without the final layer, as the teacher does at its tap; None = all blocks
            and the final layer.

    Raises:
        Refused: if the model has fewer blocks, or its sizes are still to be read from the data.
    """
    refuse_unless(config.tokens > 0, "model.input-size", config.input_size, "must be positive")
    refuse_unless(config.channels > 0, "model.channels", config.channels, "must be positive")
    run = config.depth if blocks is None else blocks
    refuse_unless(0 <= run <= config.depth, "blocks", run, f"must be in [0, model.depth = {config.depth}]")
    tokens, width, patch = config.tokens, config.hidden, config.patch**2
    block = tokens * width * 3 * width  # qkv
    block += 2 * tokens * tokens * width  # q k^T, and its softmax times v, over all heads
    block += tokens * width * width  # proj
    block += 2 * tokens * width * config.mlp_ratio * width  # fc1, fc2
    block += width * 6 * width  # adaLN modulation, once per image
    total = run * block
    total += tokens * patch * config.channels * width  # patch embedding
    total += FREQUENCIES * width + width * width  # time embedder
    if blocks is None:
        total += width * 2 * width + tokens * width * patch * config.output_channels  # final layer
    return 2 * total


def head_flops(config: ModelConfig) -> int:
    """FLOPs of one forward pass of SRA's projection head, D -> 2D -> D, per image."""
    return 2 * config.tokens * 2 * config.hidden * 2 * config.hidden


def training_flops(config: ModelConfig, teacher_tap: int | None) -> int:
    """FLOPs of one training step, per image: three forwards of the student and its head (one forward, and a backward
    of two), one of the teacher.

    Args:
        config: as in `forward_flops`.
        teacher_tap: block (1-based) after which the teacher stops; None = plain training, no head and no teacher.
    """
    if teacher_tap is None:
        return 3 * forward_flops(config)
    return 3 * (forward_flops(config) + head_flops(config)) + forward_flops(config, teacher_tap)


def dense_peak_flops(device_name: str, precision: str) -> float | None:
    """The data sheet's dense peak in FLOP/s, None for a device or precision that the table does not hold: names are
    compared whole, because a laptop part, a MIG slice or a variant has other numbers under a similar name.

    Args:
        device_name: from `torch.cuda.get_device_name`.
        precision: bf16, tf32 or fp32.

    Raises:
        ValueError: for another precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: {precision!r} given; must be one of {', '.join(PRECISIONS)}")
    return PEAKS.get(device_name, {}).get(precision)
