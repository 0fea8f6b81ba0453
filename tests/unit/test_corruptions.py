"""The corruptions made on the fly: formulas, values, and draws that hang on the image alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from freeadv_fast.data.loader import Batch
from freeadv_fast.evaluation.shifts.corruptions import (
    CORRUPTIONS,
    SMALL_SIDE,
    CorruptedLoader,
    corrupt,
)

RANDOM = {"gaussian_noise", "shot_noise", "elastic_transform"}


def smooth_images(num_images=3, side=32):
    """Coarse random colours, resized: uint8 images in which every corruption shows."""
    random = np.random.default_rng(0)
    pictures = [
        Image.fromarray(random.integers(0, 256, (6, 6, 3)).astype(np.uint8)).resize((side, side))
        for _ in range(num_images)
    ]
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))


def flat_image(grey, side=128):
    return torch.full((1, side, side, 3), grey, dtype=torch.uint8)


def corrupt_one(image, name, severity):
    return corrupt(image, name, severity, indices=torch.tensor([0]), seed=0)


def distance(images, others):
    return (images.float() - others.float()).abs().mean().item()


@pytest.mark.parametrize("side", [8, 32, 65, 224])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_severity_5_differs_more_than_severity_1(name, side):
    images = smooth_images(2, side)
    weak, strong = (corrupt(images, name, s, indices=torch.arange(2), seed=0) for s in (1, 5))
    assert weak.dtype == strong.dtype == torch.uint8
    assert weak.shape == strong.shape == images.shape
    assert distance(images, strong) > distance(images, weak)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_is_corrupted_alike_in_any_batch(name):
    images, indices, state = smooth_images(), torch.tensor([4, 7, 9]), torch.get_rng_state()
    whole = corrupt(images, name, 3, indices=indices, seed=1)
    alone = corrupt(images[1:2], name, 3, indices=indices[1:2], seed=1)
    assert torch.equal(whole[1:2], alone)
    assert torch.equal(torch.get_rng_state(), state)
    changes = {
        "seed": corrupt(images, name, 3, indices=indices, seed=2),
        "index": corrupt(images, name, 3, indices=indices + 1, seed=1),
    }
    for changed in changes.values():
        assert torch.equal(changed, whole) == (name not in RANDOM)


def test_draws_of_severities_and_corruptions_are_their_own():
    """On mid grey, noise of two severities is not one pattern at two strengths."""
    grey = flat_image(128)
    signs = [
        corrupt_one(grey, name, severity) > 128
        for name, severity in (("gaussian_noise", 1), ("gaussian_noise", 5), ("shot_noise", 1))
    ]
    for first, second in ((0, 1), (0, 2)):
        assert abs((signs[first] == signs[second]).float().mean().item() - 0.5) < 0.02


def test_values_are_those_of_imagenet_c():
    """hendrycks/robustness, corruptions.py above 64 pixels and make_cifar_c.py up to there."""
    # 128 is 0.502 of the range; a standard deviation of 0.08 stays clear of clipping.
    noise = corrupt_one(flat_image(128), "gaussian_noise", 1).float()
    assert noise.std().item() / 255 == pytest.approx(0.08, rel=0.01)
    shots = corrupt_one(flat_image(51), "shot_noise", 1).float()  # 12 of 60 photons
    assert shots.std().item() / 255 == pytest.approx(math.sqrt(12) / 60, rel=0.02)
    assert corrupt_one(flat_image(0), "brightness", 5).unique().tolist() == [128]
    assert corrupt_one(flat_image(0, 32), "brightness", 5).unique().tolist() == [76]
    halves = torch.cat([flat_image(0)[:, :64], flat_image(200)[:, :64]], 1)
    assert corrupt_one(halves, "contrast", 5).unique().tolist() == [95, 105]
    assert CORRUPTIONS["jpeg_compression"].levels == (25, 18, 15, 10, 7)
    assert CORRUPTIONS["jpeg_compression"].small_levels == (80, 65, 58, 50, 40)
    assert SMALL_SIDE == 64


def test_brightness_keeps_hue():
    image = torch.tensor([40, 20, 60], dtype=torch.uint8).expand(1, 100, 100, 3)
    raised = corrupt_one(image, "brightness", 2)[0, 0, 0].tolist()  # value 60 + 51
    assert raised == [74, 37, 111]


def test_pixelate_repeats_pixels():
    image = corrupt_one(smooth_images(1, 96), "pixelate", 5)[0]  # 24 pixels a side, 4 wide each
    assert torch.equal(image[::4], image[3::4])
    assert torch.equal(image[:, ::4], image[:, 3::4])


def test_a_blurred_point_is_a_gaussian():
    point = flat_image(0)
    point[0, 64, 64] = 255
    blurred = corrupt_one(point, "gaussian_blur", 1)[0, 64, 64:67, 0].tolist()
    peak = 255 / (2 * math.pi)  # of a Gaussian one pixel wide
    assert blurred == pytest.approx([peak * math.exp(-(x**2) / 2) for x in range(3)], abs=0.6)


def test_only_known_severities():
    with pytest.raises(ValueError, match="severity 6: must be one of"):
        corrupt_one(flat_image(0), "contrast", 6)
    with pytest.raises(KeyError):
        corrupt_one(flat_image(0), "hail", 1)


class OneBatch:
    """A loader of three images, rows 4 to 6 of their set."""

    classes = ("a", "b")
    num_images, num_batches = 3, 1

    def epoch(self, epoch, start=0):
        yield Batch(smooth_images(), torch.tensor([0, 1, 0]), 3, torch.arange(4, 7))


def test_a_loader_is_corrupted_as_it_passes():
    loader = CorruptedLoader(OneBatch(), "shot_noise", 2, seed=5)
    (batch,) = loader.epoch(0)
    assert (loader.classes, loader.num_images, loader.num_batches) == (("a", "b"), 3, 1)
    assert batch.labels.tolist() == [0, 1, 0]
    expected = corrupt(smooth_images(), "shot_noise", 2, indices=torch.arange(4, 7), seed=5)
    assert torch.equal(batch.images, expected)
