"""The embedded digits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from freeadv_fast.data.build import build_loaders
from freeadv_fast.data.digits import FOLDER_NAME, digits_folder
from freeadv_fast.errors import UserError

CODE = "from freeadv_fast.data.digits import digits_folder; print(digits_folder())"


def count(folder, split):
    return [len(list(Path(folder, split, str(digit)).iterdir())) for digit in range(10)]


def start(cache):
    environment = os.environ | {"XDG_CACHE_HOME": str(cache.parent)}
    return subprocess.Popen(
        [sys.executable, "-c", CODE], stdout=subprocess.PIPE, text=True, env=environment
    )


def test_the_split_is_stratified_and_whole(cache):
    datasets = pytest.importorskip("sklearn.datasets")
    folder = digits_folder()
    train, val = count(folder, "train"), count(folder, "val")
    assert (sum(train), sum(val)) == (1437, 360)
    target = datasets.load_digits().target
    for digit in range(10):
        size = int((target == digit).sum())
        assert train[digit] + val[digit] == size
        assert abs(val[digit] - size * 360 / 1797) < 1
    rows = sorted(int(path.stem) for path in Path(folder).rglob("*.jpg"))
    assert rows == list(range(1797))
    assert [path.name for path in cache.iterdir()] == [FOLDER_NAME]


def test_files_are_the_digits_enlarged():
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    folder = Path(digits_folder())
    for path in sorted(folder.rglob("*.jpg"))[::97]:
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (32, 32))
            assert image.layer[0][1:3] == image.layer[1][1:3] == (1, 1)  # 4:4:4
            assert max(image.quantization[0]) <= 12  # quality 95
            pixels = np.asarray(image).astype(float)
        assert int(path.parent.name) == digits.target[int(path.stem)]
        assert np.abs(pixels - pixels.mean(axis=2, keepdims=True)).max() <= 2
        cells = pixels.mean(axis=2).reshape(8, 4, 8, 4).mean(axis=(1, 3))
        original = digits.images[int(path.stem)] * 255 / 16
        assert np.corrcoef(cells.ravel(), original.ravel())[0, 1] > 0.97


def test_digits_are_written_once(cache):
    first = digits_folder()
    stamp = Path(first, "val", "7").stat().st_mtime_ns
    assert digits_folder() == first
    assert Path(first, "val", "7").stat().st_mtime_ns == stamp


def test_two_processes_at_once(cache):
    both = [start(cache) for _ in range(2)]
    folders = {process.communicate(timeout=60)[0].strip() for process in both}
    assert folders == {str(cache / FOLDER_NAME)}
    assert [process.returncode for process in both] == [0, 0]
    assert sum(count(cache / FOLDER_NAME, "train")) == 1437
    assert [path.name for path in cache.iterdir()] == [FOLDER_NAME]


def test_a_kill_while_writing_does_no_harm(cache):
    process = start(cache)
    deadline = time.monotonic() + 60
    while not any(cache.glob(".digits*/train/3/*.jpg")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    folder = digits_folder()
    assert sum(count(folder, "train")) == 1437
    assert sum(count(folder, "val")) == 360


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        digits_folder()


def test_digits_load_through_the_folder_path(backend, config, world_of):
    settings = config("digits", resize_size=32, batch_size=100, holdout_images=100)
    loaders = build_loaders(settings, world_of())
    assert loaders.train.classes == [str(digit) for digit in range(10)]
    assert loaders.train.num_images == 1337
    assert loaders.val.num_images == 360
    labels = torch.cat([batch.labels for batch in loaders.holdout.epoch(0)])
    assert torch.bincount(labels).tolist() == [10] * 10
    batches = list(loaders.train.epoch(0))
    assert sum(len(batch.images) for batch in batches) == 1337
