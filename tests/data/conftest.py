"""Small ImageFolders made by PIL, and one process as a world."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.distributed.world import World


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "freeadv_fast"


@pytest.fixture
def world_of() -> Callable[..., World]:
    """Rank `rank` of `size` on the CPU, without a process group."""

    def build(rank: int = 0, size: int = 1) -> World:
        return World(rank, size, torch.device("cpu"))

    return build


@pytest.fixture
def smooth_image() -> Callable[..., Image.Image]:
    """A smooth random picture: decoders and filters agree on it to a level or two."""

    def build(seed: int, height: int, width: int, mode: str = "RGB") -> Image.Image:
        random = np.random.default_rng(seed)
        channels = {"RGB": 3, "L": 1, "CMYK": 4}[mode]
        coarse = random.integers(0, 256, (6, 6, channels), dtype=np.uint8)
        bands = [Image.fromarray(coarse[:, :, c], "L") for c in range(channels)]
        image = Image.merge(mode, bands) if channels > 1 else bands[0]
        return image.resize((width, height), Image.Resampling.BICUBIC)

    return build


@pytest.fixture
def build_tree(tmp_path: Path, smooth_image: Callable[..., Image.Image]) -> Callable[..., str]:
    """Writes an ImageFolder of JPEGs of varied sizes; returns its path."""

    def build(
        train: int = 12, val: int = 4, classes: int = 3, side: int = 48, name: str = "tree"
    ) -> str:
        random = np.random.default_rng(7)
        for split, count in (("train", train), ("val", val)):
            for label in range(classes):
                place = tmp_path / name / split / f"class{label}"
                place.mkdir(parents=True)
                for number in range(count):
                    height, width = random.integers(side, 2 * side, 2).tolist()
                    image = smooth_image(1000 * label + number, height, width)
                    image.save(place / f"{number:03d}.JPEG", quality=95)
        return str(tmp_path / name)

    return build


@pytest.fixture
def config() -> Callable[..., TrainConfig]:
    def build(data: str, **options: object) -> TrainConfig:
        defaults: dict[str, object] = {
            "image_size": 32,
            "batch_size": 5,
            "workers": 1,
            "holdout_images": 0,
        }
        return TrainConfig(data=data, **(defaults | options))  # type: ignore[arg-type]

    return build


@pytest.fixture(params=["dali", "torchvision"])
def backend(request: pytest.FixtureRequest, use_backend: Callable[[str], None]) -> str:
    """Runs the test once with each decoder."""
    use_backend(request.param)
    return str(request.param)


@pytest.fixture
def use_backend(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def use(name: str) -> None:
        if name == "dali":
            pytest.importorskip("nvidia.dali")
        monkeypatch.setattr("freeadv_fast.data.build.available_backend", lambda: name)

    return use


@pytest.fixture
def real_images(tmp_path: Path, test_data: Path) -> Path:
    """24 full-size ImageNet photographs, train/ and val/ alike, two a class; skips without them."""
    archive = test_data / "imagenet_sample200" / "imagenet_sample200.zip"
    if not archive.is_file():
        pytest.skip("FREEADV_TEST_DATA holds no imagenet_sample200")
    with zipfile.ZipFile(archive) as files:
        names = sorted(name for name in files.namelist() if name.endswith(".JPEG"))[:24]
        for number, name in enumerate(names):
            for split in ("train", "val"):
                path = tmp_path / "real" / split / f"class{number // 2:02d}" / Path(name).name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(files.read(name))
    return tmp_path / "real"
