"""CIFAR from hand-made files of the official layout."""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from freeadv_fast.data import cifar
from freeadv_fast.data.build import build_loaders
from freeadv_fast.data.stream import random_flips, random_offsets
from freeadv_fast.errors import UserError

NAMES = {
    "cifar10": ("cifar-10-batches-py", [f"data_batch_{n}" for n in range(1, 6)], "test_batch"),
    "cifar100": ("cifar-100-python", ["train"], "test"),
}


@pytest.fixture
def write_files(tmp_path):
    """Writes small files of the official layout; returns their folder and all pixels (NHWC)."""

    def write(kind):
        random = np.random.default_rng(3)
        folder, train, test = NAMES[kind]
        place = tmp_path / folder
        place.mkdir()
        key = b"labels" if kind == "cifar10" else b"fine_labels"
        classes = 10 if kind == "cifar10" else 100
        pixels = {}
        for name in [*train, test]:
            data = random.integers(0, 256, (100, 3072), dtype=np.uint8)
            content = {b"data": data, key: [n % classes for n in range(100)], b"batch_label": b"x"}
            (place / name).write_bytes(pickle.dumps(content, protocol=2))
            pixels[name] = data.reshape(100, 3, 32, 32).transpose(0, 2, 3, 1)
        names = [b"class%d" % n for n in range(classes)]
        meta, meta_key = (
            ("batches.meta", b"label_names") if kind == "cifar10" else ("meta", b"fine_label_names")
        )
        (place / meta).write_bytes(pickle.dumps({meta_key: names}, protocol=2))
        return place, np.concatenate([pixels[name] for name in train]), pixels[test]

    return write


def slow_pad_crop_flip(image, top, left, flip, padding):
    """Pads, cuts and mirrors one image the plain way."""
    padded = np.zeros((32 + 2 * padding, 32 + 2 * padding, 3), np.uint8)
    padded[padding:-padding, padding:-padding] = image
    cut = padded[top : top + 32, left : left + 32]
    return cut[:, ::-1] if flip else cut


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
@pytest.mark.parametrize("padding", [4, 2])
def test_training_is_pad_crop_flip(kind, padding, write_files, config, world_of, capsys):
    place, train, _ = write_files(kind)
    settings = config(
        f"{kind}:{place}", augment="pad-crop-flip", batch_size=32, crop_padding=padding, seed=9
    )
    loader = build_loaders(settings, world_of()).train
    assert len(loader.classes) == (10 if kind == "cifar10" else 100)
    assert loader.classes[3] == "class3"
    seen, corners = [], []
    for batch in loader.epoch(2, start=1):
        rows = batch.indices.numpy()
        offsets = random_offsets(9, 2, rows, 2 * padding + 1)
        flips = random_flips(9, 2, rows)
        assert batch.images.is_contiguous()
        assert batch.labels.tolist() == (rows % 100 % len(loader.classes)).tolist()
        for image, row, (top, left), flip in zip(batch.images, rows, offsets, flips, strict=True):
            expected = slow_pad_crop_flip(train[row], top, left, flip, padding)
            np.testing.assert_array_equal(image.numpy(), expected)
        seen += rows.tolist()
        corners += offsets.ravel().tolist()
    assert len(set(seen)) == len(seen)
    assert set(corners) == set(range(2 * padding + 1))
    whole = list(loader.epoch(2))
    for left, right in zip(whole[1:], loader.epoch(2, start=1), strict=True):
        assert torch.equal(left.images, right.images)


def test_evaluation_and_no_augmentation_keep_the_pixels(write_files, config, world_of):
    place, train, test = write_files("cifar10")
    settings = config(f"cifar10:{place}", augment="none", batch_size=60, holdout_images=50)
    loaders = build_loaders(settings, world_of())
    for loader, pixels in ((loaders.train, train), (loaders.holdout, train), (loaders.val, test)):
        for batch in loader.epoch(0):
            np.testing.assert_array_equal(batch.images.numpy(), pixels[batch.indices.numpy()])
    cropped = config(f"cifar10:{place}", augment="pad-crop-flip", batch_size=60, holdout_images=50)
    for batch in build_loaders(cropped, world_of()).holdout.epoch(0):
        np.testing.assert_array_equal(batch.images.numpy(), train[batch.indices.numpy()])


def test_the_folder_above_is_accepted_too(write_files, config, world_of):
    place, _, _ = write_files("cifar10")
    settings = config(f"cifar10:{place.parent}", augment="none")
    assert build_loaders(settings, world_of()).train.num_images == 500


def test_unofficial_files_are_announced_once_on_rank_0(
    write_files, config, world_of, capsys, monkeypatch
):
    place, _, _ = write_files("cifar100")
    settings = config(f"cifar100:{place}", augment="none")
    build_loaders(settings, world_of(1, 2))
    assert capsys.readouterr().out == ""
    build_loaders(settings, world_of())
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 1
    assert "not the official ones" in told[0]
    official = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in place.iterdir()}
    layout = cifar.CifarFiles(
        folder=place.name,
        train={"train": official["train"]},
        val={"test": official["test"]},
        meta=("meta", official["meta"]),
        label_key=b"fine_labels",
        class_key=b"fine_label_names",
    )
    monkeypatch.setitem(cifar.CIFAR, "cifar100", layout)
    build_loaders(settings, world_of())
    assert capsys.readouterr().out == ""


def test_the_official_checksums_are_known():
    assert cifar.CIFAR["cifar10"].train["data_batch_1"] == "c99cafc152244af753f735de768cd75f"
    assert cifar.CIFAR["cifar10"].val == {"test_batch": "40351d587109b95175f43aff81a1287e"}
    assert cifar.CIFAR["cifar100"].train == {"train": "16019d7e3df5f24257cddd939b257f8d"}
    assert cifar.CIFAR["cifar100"].meta == ("meta", "7973b15100ade9c7d40fb424638fde48")


class Attack:
    """A pickle that runs a command."""

    def __reduce__(self):
        return os.system, ("false",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is damaged"),
        (b"not a pickle", "is damaged"),
        (pickle.dumps([1, 2]), "is damaged"),
        (pickle.dumps({b"data": Attack()}), "not only arrays"),
        (pickle.dumps({b"other": 1}), "not cifar10's python files"),
        (pickle.dumps({b"data": np.zeros((3, 5)), b"labels": [1, 2, 3]}), "not cifar10's"),
    ],
)
def test_damaged_files(content, words, write_files, config, world_of):
    place, _, _ = write_files("cifar10")
    (place / "data_batch_2").write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        build_loaders(config(f"cifar10:{place}", augment="none"), world_of())
    assert "\n" not in str(error.value)


def test_missing_files_and_options_that_do_not_fit(write_files, config, world_of, tmp_path):
    place, _, _ = write_files("cifar10")
    for settings, words in (
        (config(f"cifar10:{tmp_path}/absent", augment="none"), "cifar-10-batches-py/"),
        (config(f"cifar100:{place}", augment="none"), "cifar-100-python/"),
        (config("cifar10", augment="none"), "cifar10:FOLDER"),
        (config(f"cifar10:{place}", augment="none", image_size=64), "--image-size 32"),
        (config(f"cifar10:{place}"), "--augment pad-crop-flip"),
    ):
        with pytest.raises(UserError) as error:
            build_loaders(settings, world_of())
        assert words in str(error.value)
    Path(place, "data_batch_4").unlink()
    with pytest.raises(UserError, match="data_batch_4 cannot be read"):
        build_loaders(config(f"cifar10:{place}", augment="none"), world_of())
