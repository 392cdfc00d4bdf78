"""crop.py: against the ADM crop written in NumPy, and against ADM's own code, which uses Pillow alone."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from test_decoders import picture

from benchmarks.rivals.loaders import pillow_crop
from sra_fast.data.crop import adm_crop


def box_halved(a):
    """(H, W) float halved along both axes, rounded to whole levels after each as 8-bit images are; even sides only."""
    a = np.floor((a[:, 0::2] + a[:, 1::2]) / 2 + 0.5)
    return np.floor((a[0::2] + a[1::2]) / 2 + 0.5)


def bicubic_matrix(size, target):
    """(target, size): the cubic convolution kernel (a = -1/2) stretched by the shrinking factor, each row summing to
    one."""
    stretch = max(size / target, 1.0)
    centre = (np.arange(target) + 0.5) * size / target
    t = np.abs(np.arange(size) + 0.5 - centre[:, None]) / stretch
    weight = np.where(t < 1, 1.5 * t**3 - 2.5 * t**2 + 1, np.where(t < 2, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2, 0))
    return weight / weight.sum(1, keepdims=True)


def numpy_crop(a, resolution):
    a = a.astype(np.float64)
    while min(a.shape) >= 2 * resolution:
        a = box_halved(a)
    height, width = (round(side * resolution / min(a.shape)) for side in a.shape)
    a = bicubic_matrix(a.shape[0], height) @ a @ bicubic_matrix(a.shape[1], width).T
    top, left = (height - resolution) // 2, (width - resolution) // 2
    return a.clip(0, 255)[top : top + resolution, left : left + resolution]


SIZES = [(300, 200, 128), (200, 300, 128), (75, 56, 64), (512, 400, 64), (512, 256, 256), (64, 64, 32)]


@pytest.mark.parametrize(("width", "height", "resolution"), SIZES)
def test_it_matches_its_formula(width, height, resolution):
    array = picture(width, height, 1)
    ours = adm_crop(array[..., None], resolution)
    assert (ours.shape, ours.dtype) == ((1, resolution, resolution), np.uint8)
    # Whole levels between the two passes and at the end, where the formula has none: at most 1/2 each, and the second
    # pass may enlarge the first's by the sum of its weights' magnitudes (below 1.4).
    assert np.abs(ours[0] - numpy_crop(array, resolution)).max() < 0.5 + 0.5 * 1.4


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("width", "height", "resolution"), [*SIZES, (515, 301, 64), (1033, 769, 128), (640, 130, 128)])
def test_it_matches_pillow_within_rounding(width, height, resolution, channels):
    """Odd sides and several halvings too."""
    array = picture(width, height, channels, seed=width).reshape(height, width, channels)
    image = Image.fromarray(array if channels == 3 else array[..., 0])
    right = np.asarray(pillow_crop(image, resolution)).reshape(resolution, resolution, channels).transpose(2, 0, 1)
    off = np.abs(adm_crop(array, resolution).astype(int) - right)
    assert off.max() <= 2
    assert off.mean() < 0.02


@pytest.mark.parametrize("shape", [(2, 1001, 3), (1001, 2, 1)])
def test_a_very_thin_image_is_refused(shape):
    with pytest.raises(ValueError, match="a side is over 500 times the other"):
        adm_crop(np.zeros(shape, np.uint8), 256)
    assert adm_crop(np.zeros((2, 1000, 3), np.uint8), 4).shape == (3, 4, 4)


def test_an_image_of_the_right_size_is_unchanged():
    array = picture(64, 64)
    assert (adm_crop(array, 64) == array.transpose(2, 0, 1)).all()
