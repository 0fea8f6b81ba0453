"""SVHN from hand-made files of the official layout, and crops without a flip."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.io import savemat

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.data.build import build_loaders
from freeadv_fast.data.stream import random_offsets
from freeadv_fast.errors import UserError


@pytest.fixture
def svhn(tmp_path):
    """Sixty training and twenty validation images; their pixels (NHWC) by split."""
    random, pixels = np.random.default_rng(0), {}
    for split, name, count in (("train", "train", 60), ("val", "test", 20)):
        pixels[split] = random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        labels = (np.arange(count) % 10 + 1)[:, None].astype(np.uint8)  # 1..10, 10 is the digit 0
        savemat(
            tmp_path / f"{name}_32x32.mat", {"X": pixels[split].transpose(1, 2, 3, 0), "y": labels}
        )
    return tmp_path, pixels


def config(folder, **changes):
    values = {
        "data": f"svhn:{folder}", "image_size": 32, "augment": "none", "batch_size": 20,
        "holdout_images": 0,
    }  # fmt: skip
    return TrainConfig(**(values | changes))


def test_pixels_and_labels(svhn, world):
    folder, pixels = svhn
    loaders = build_loaders(config(folder), world)
    assert loaders.val.classes == [str(digit) for digit in range(10)]
    (batch,) = loaders.val.epoch(0)
    assert torch.equal(batch.images, torch.from_numpy(pixels["val"]))
    assert batch.labels.tolist() == [(index % 10 + 1) % 10 for index in range(20)]
    assert batch.labels[9] == 0  # stored as 10


def test_pad_crop_cuts_without_mirroring(svhn, world):
    folder, pixels = svhn
    loader = build_loaders(config(folder, augment="pad-crop", seed=5), world).train
    for batch in loader.epoch(3):
        rows = batch.indices.numpy()
        for image, row, (top, left) in zip(
            batch.images, rows, random_offsets(5, 3, rows, 9), strict=True
        ):
            padded = np.pad(pixels["train"][row], ((4, 4), (4, 4), (0, 0)))
            expected = padded[top : top + 32, left : left + 32]
            assert np.array_equal(image.numpy(), expected)


def test_refuses(svhn, world, tmp_path):
    folder, _ = svhn
    for changed, message in (
        (config(tmp_path / "nowhere"), "no test_32x32.mat"),
        (config(folder, image_size=64), "svhn has 32 pixels a side"),
        (
            config(folder, augment="random-resized-crop"),
            "pad-crop-flip, pad-crop or none",
        ),
        (dataclasses.replace(config(folder), data="svhn:"), "name the folder of the files"),
    ):
        with pytest.raises(UserError) as caught:
            build_loaders(changed, world)
        assert message in str(caught.value)
    (folder / "test_32x32.mat").write_bytes(b"not a MATLAB file at all")
    with pytest.raises(UserError, match="test_32x32.mat is damaged"):
        build_loaders(config(folder), world)
