"""Which images a split holds: compared over ranks, kept in checkpoints, the same in every phase."""

from __future__ import annotations

import dataclasses
import io
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from freeadv_fast.config.phases import Phases
from freeadv_fast.data.agreement import describe_difference
from freeadv_fast.data.build import build_loaders, build_phase_loaders, open_data
from freeadv_fast.data.names import keys_of
from freeadv_fast.data.resize.copies import resize_folder
from freeadv_fast.data.roll import Changes, Roll
from freeadv_fast.errors import UserError


def roll(*names, classes=("n01", "n02"), stamp="bytes", bad=(), **stamps):
    sizes = [stamps.get(name[4], 100) for name in names]
    return Roll(list(classes), list(names), np.array(sizes, np.uint32), stamp, dict(bad))


THREE = ("n01/a", "n01/b", "n02/c")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (roll("n01/a", "n02/c"), "rank 3 lacks n01/b, which rank 0 has"),
        (roll(*THREE, "n02/d"), "rank 0 lacks n02/d, which rank 3 has"),
        (roll(*THREE, b=2345), "n01/b has 2,345 bytes on rank 3 and 100 on rank 0"),
        (
            roll("n01/a", "n02/c", bad={"n01/b": "truncated JPEG"}),
            "rank 3 leaves out n01/b (truncated JPEG), which rank 0 reads",
        ),
        (
            roll("n01/a", "n02/d"),
            "rank 3 lacks n01/b, which rank 0 has (3 images differ in all)",
        ),
        (roll("n02/c", "n01/a", "n01/b"), "rank 3 lists the images in another order than rank 0"),
        (
            roll(*THREE, classes=("n01", "n04")),
            "rank 3 has the class n04, and lacks n02 of rank 0",
        ),
        (roll(*THREE, classes=("n01",)), "rank 3 lacks the class n02, which rank 0 has"),
        (roll(*THREE, classes=("n01", "n02", "n3")), "rank 0 lacks the class n3, which rank 3 has"),
        (
            roll(*THREE, classes=("n02", "n01")),
            "rank 3 has the classes in another order than rank 0",
        ),
    ],
)
def test_every_difference_has_a_digest_and_words(other, words) -> None:
    own = roll(*THREE)
    assert own.digest == roll(*THREE).digest != other.digest
    assert describe_difference(own, other, 3) == words


def test_the_digest_knows_where_names_end() -> None:
    assert roll("n01/ab", "n01/c").digest != roll("n01/a", "n01/bc").digest
    assert roll("n01/a", classes=("n", "01")).digest != roll("n01/a", classes=("n01",)).digest


def test_resident_images_are_compared_by_pixels_and_labels(config, world_of) -> None:
    settings = config("synthetic:5", image_size=8)
    own, again = (open_data(settings, world_of()) for _ in range(2))
    assert own.roll.digest == again.roll.digest
    images = again.trains[0].images
    images.labels[17] = (images.labels[17] + 1) % 5
    words = describe_difference(own.roll, images.roll, 1)
    assert words == "image 17 on rank 1 is not that of rank 0"
    images.labels[17] = own.trains[0].labels[17]
    images.images[3, 0, 0, 0] += 1  # which rows 3, 515, ... show
    assert describe_difference(own.roll, images.roll, 1).startswith("image 3 on rank 1")


def test_a_roll_survives_a_checkpoint() -> None:
    kept = roll("n01/a", "n01/\udcff\n'b", "n02/c", c=2**32 - 1)
    buffer = io.BytesIO()
    torch.save(kept.state_dict(), buffer)
    buffer.seek(0)
    back = Roll.from_state(torch.load(buffer, weights_only=True))
    assert back.digest == kept.digest
    assert not Changes.between(kept, back)


@pytest.mark.slow
def test_a_roll_of_imagenets_size_is_affordable() -> None:
    """1.28 million names: a few MB in the checkpoint, seconds at the start."""
    random = np.random.default_rng(0)
    names = [
        f"n{wnid:08d}/n{wnid:08d}_{number}.JPEG"
        for wnid in np.cumsum(random.integers(1, 30_000, 1000)).tolist()
        for number in np.cumsum(random.integers(1, 46, 1281)).tolist()
    ]
    sizes = random.lognormal(11.5, 0.5, len(names)).astype(np.uint32)
    start = time.process_time()
    kept = Roll([str(k) for k in range(1000)], names, sizes, "bytes", {})
    kept.digest  # noqa: B018
    state = kept.state_dict()
    assert len(np.unique(keys_of(names))) == len(names)
    back = Roll.from_state(state)
    assert Changes.between(kept, back.of(np.arange(1, len(names)))).left == names[:1]
    assert state["names"].numel() + state["stamps"].numel() < 10e6
    assert time.process_time() - start < 60


def held_names(loaders):
    index, rows = loaders.train.index, loaders.holdout.stream.rows
    return [index.names[row] for row in rows]


def trained_names(loaders, epoch):
    index, shares = loaders.train.index, loaders.train.stream.shares(epoch)
    return [index.names[row] for share in shares for row in share.rows]


def test_a_new_run_without_one_file_holds_out_the_same_images(build_tree, config, world_of) -> None:
    data = Path(build_tree())
    settings = config(str(data), holdout_images=9, batch_size=3)
    before = build_loaders(settings, world_of())
    (gone,) = trained_names(before, 0)[:1]
    (data / "train" / gone).unlink()
    after = build_loaders(settings, world_of())
    assert held_names(after) == held_names(before)
    for epoch in range(3):
        rest = [name for name in trained_names(before, epoch) if name != gone]
        now = trained_names(after, epoch)
        assert now == rest[: len(now)]


def test_a_moved_folder_is_the_same_stream(build_tree, config, world_of) -> None:
    data = Path(build_tree())
    pixels = []
    for _ in range(2):
        loaders = build_loaders(config(str(data), augment="random-resized-crop"), world_of())
        pixels.append(torch.cat([batch.images for batch in loaders.train.epoch(1)]))
        data = data.rename(data.parent / "elsewhere")
    assert torch.equal(*pixels)


@pytest.fixture
def phases_of(config, world_of):
    """The loaders of two phases, a copy first and then the original."""

    def build(copy, data, **options):
        settings = config(str(data), holdout_images=9, epochs=4, m=1, **options)
        phases = Phases.parse("0-2:16:4,2-4:32:4")
        folders = (str(copy), str(data))
        return build_phase_loaders(
            dataclasses.replace(settings, phases=phases, phase_data=folders), world_of()
        )

    return build


def test_copies_keep_their_originals_names(build_tree, phases_of, tmp_path) -> None:
    """A copy of a PNG has another name and another row; it is held out with its original."""
    data = Path(build_tree())
    for path in list((data / "train").glob("*/00[0-5].JPEG")):
        with Image.open(path) as image:
            image.save(path.with_suffix(".png"))
        shutil.move(path, path.with_name(f"{path.stem}.png.JPEG"))  # sorts otherwise
    resize_folder(data, tmp_path / "small", size=32, workers=1)
    assert list((tmp_path / "small").rglob("000.png.jpg"))
    small, large = phases_of(tmp_path / "small", data)
    assert sorted(held_names(small)) == sorted(held_names(large))
    assert trained_names(small, 1) == trained_names(large, 1)


def test_an_image_that_one_phase_lacks_is_left_out_of_all(build_tree, phases_of, tmp_path) -> None:
    """As one that could not be copied; no more of them than may be bad."""
    data = Path(build_tree())
    copy = shutil.copytree(data, tmp_path / "copy")
    (copy / "train" / "class0" / "003.JPEG").unlink()
    with pytest.raises(UserError, match=r"1 are in one of them only \(class0/003\.JPEG\)"):
        phases_of(copy, data)
    small, large = phases_of(copy, data, max_bad_fraction=0.03)
    for loaders in (small, large):
        assert loaders.train.num_images == 26
        assert "class0/003.JPEG" not in held_names(loaders) + loaders.roll.names
        assert "1 training images left out, for not every phase's folder has them" in loaders.lines
    assert sorted(held_names(small)) == sorted(held_names(large))
