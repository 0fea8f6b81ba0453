"""Fixtures shared by the tests: one thread, a private cache, a small network."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from freeadv_fast.distributed.world import World
from freeadv_fast.session import outputs

# A shell that runs the tests in the background has them ignore Ctrl-C, and all that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parents[1]
DRAW, WRITE_REPORT = outputs.draw, outputs.write_report


@pytest.fixture(autouse=True)
def _one_thread():
    """Two OpenMP threads on a busy machine can stall a step by seconds."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_pictures():
    """Runs end without pictures and page, which take longer than most runs here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outputs, "draw", lambda *_: None)
        patch.setattr(outputs, "write_report", lambda run: None)
        yield


@pytest.fixture
def pictures(monkeypatch):
    """Lets runs draw."""
    monkeypatch.setattr(outputs, "draw", DRAW)


@pytest.fixture
def report_page(monkeypatch):
    """Lets runs write their page."""
    monkeypatch.setattr(outputs, "write_report", WRITE_REPORT)


@pytest.fixture(scope="session")
def cache_home(tmp_path_factory):
    """One private cache for all tests of a worker, so that digits are written once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _private_cache(cache_home, monkeypatch):
    """Nothing is read from or written to the user's own cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home))


@pytest.fixture
def world():
    """This process alone, on the CPU."""
    return World(0, 1, torch.device("cpu"))


@pytest.fixture
def repository():
    """The checkout's root."""
    return REPOSITORY


@pytest.fixture(scope="session")
def test_data():
    """The folder of real images, or a skip."""
    folder = Path(os.environ.get("FREEADV_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("real images are not here; set FREEADV_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def small_images(tmp_path_factory):
    """An ImageFolder of three classes of 24x20 JPEG files: 114 for training, 18 for validation."""
    root, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 38), ("val", 6)):
        for label in range(3):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 256, (5, 5, 3)) // 2 + 60 * label
                picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                picture.resize((24, 20)).save(folder / f"{index}.jpg")
    return root


@pytest.fixture
def small_network():
    """Builds a seeded convolutional network with batch norm: (n, 3, 8, 8) to (n, 5)."""

    def build(dtype=torch.float32):
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * 16, 5),
        ).to(dtype)

    return build
