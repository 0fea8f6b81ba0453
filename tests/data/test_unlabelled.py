"""Unlabelled images: the files, their walk, and minibatches that hold both kinds."""

from __future__ import annotations

import os
import pickle
import threading
import zipfile

import numpy as np
import pytest
import torch

from freeadv_fast.data.agreement import describe_difference
from freeadv_fast.data.build import build_loaders, open_data
from freeadv_fast.data.stream import random_flips, random_offsets
from freeadv_fast.data.unlabelled import UnlabelledStream, evenly_mixed, open_unlabelled
from freeadv_fast.errors import UserError

CPU = torch.device("cpu")
CLASSES = [f"class{number}" for number in range(10)]
POOL = 45


def pool(count=POOL, side=32, seed=1):
    """Random images and pseudo labels."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return images, random.integers(0, 10, count)


def write_pickle(path, images, labels, protocol=4):
    path.write_bytes(pickle.dumps({"data": images, "extrapolated_targets": labels}, protocol))


def write_python_2(path, images, labels):
    content = {b"data": images, b"extrapolated_targets": list(map(int, labels))}
    path.write_bytes(pickle.dumps(content, 2))


def write_stored(path, images, labels):
    np.savez(path, image=images, label=labels)


def write_compressed(path, images, labels):
    np.savez_compressed(path, image=images, label=labels)


WRITERS = {
    "pickle": write_pickle,
    "protocol-5": lambda *arguments: write_pickle(*arguments, protocol=5),
    "python-2": write_python_2,
    "stored": write_stored,
    "compressed": write_compressed,
}


def file_name(kind):
    return "pool.npz" if kind in ("stored", "compressed") else "pool.pickle"


@pytest.fixture
def cifar(tmp_path):
    """60 labelled images and 20 for validation in CIFAR-10's layout; --data, and the first ones."""
    random, place = np.random.default_rng(3), tmp_path / "cifar-10-batches-py"
    place.mkdir()
    train = []
    for name in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]:
        count = 20 if name == "test_batch" else 12
        data = random.integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = [row % 10 for row in range(count)]
        (place / name).write_bytes(pickle.dumps({b"data": data, b"labels": labels}, 2))
        train.append(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    names = {b"label_names": [name.encode() for name in CLASSES]}
    (place / "batches.meta").write_bytes(pickle.dumps(names, 2))
    return f"cifar10:{place}", np.concatenate(train[:-1])


@pytest.fixture
def settings(config, cifar, tmp_path):
    """A run on both: eight images a minibatch, five of them unlabelled."""

    def build(kind="stored", images=None, labels=None, **options):
        path = tmp_path / file_name(kind)
        if images is None:
            images, labels = pool()
        WRITERS[kind](path, images, labels)
        defaults = {
            "method": "pgd", "m": 1, "augment": "pad-crop-flip", "batch_size": 8, "seed": 9,
            "unlabelled": str(path), "unlabelled_fraction": 0.6, "data": cifar[0],
        }  # fmt: skip
        return config(**(defaults | options))

    return build


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_file_gives_the_same_images(kind, settings, cache):
    images, labels = pool()
    opened = open_unlabelled(settings(kind), CLASSES, CPU)
    np.testing.assert_array_equal(opened.images.numpy(), images)
    assert opened.labels.dtype == np.int64
    np.testing.assert_array_equal(opened.labels, labels)
    is_mapped = kind in ("stored", "compressed")
    assert opened.place == ("memory-mapped" if is_mapped else "resident on the device")
    unpacked = list((cache / "unlabelled").glob("*"))
    assert len(unpacked) == (kind == "compressed")


def test_a_compressed_file_is_unpacked_once_and_anew_when_it_changed(settings, cache):
    config = settings("compressed")
    open_unlabelled(config, CLASSES, CPU)
    (unpacked,) = (cache / "unlabelled").glob("*.npy")
    before = unpacked.stat().st_mtime_ns
    open_unlabelled(config, CLASSES, CPU)
    assert unpacked.stat().st_mtime_ns == before
    other, labels = pool(seed=2)
    opened = open_unlabelled(settings("compressed", other, labels), CLASSES, CPU)
    np.testing.assert_array_equal(opened.images.numpy(), other)


def test_a_cache_that_cannot_be_written_is_named(settings, cache):
    cache.mkdir(parents=True)
    (cache / "unlabelled").write_text("a file in the folder's place")
    with pytest.raises(UserError, match=r"cannot be unpacked into .*numpy\.savez") as error:
        open_unlabelled(settings("compressed"), CLASSES, CPU)
    assert "\n" not in str(error.value)


def test_a_mapped_file_stays_as_it_is(settings):
    config = settings("stored")
    images = open_unlabelled(config, CLASSES, CPU).images
    images.zero_()
    again = open_unlabelled(config, CLASSES, CPU).images
    np.testing.assert_array_equal(again.numpy(), pool()[0])


def test_members_are_found_behind_longer_local_headers(tmp_path, settings):
    """numpy writes extra fields that the archive's directory does not have, and other orders."""
    config = settings("stored")
    images, labels = pool()
    with zipfile.ZipFile(config.unlabelled, "w") as archive:
        for name, array in (("label", labels), ("other", labels), ("image", images)):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asfortranarray(array))
    opened = open_unlabelled(config, CLASSES, CPU)
    np.testing.assert_array_equal(opened.images.numpy(), images)
    assert opened.images.is_contiguous()


def walk(rank=0, world_size=1, **options):
    """Minibatches of 3 + 2 images a rank, the last of 6 an epoch short."""
    defaults = {
        "num_images": 17, "share_size": 3, "num_labelled": 21, "labelled_share_size": 2,
        "num_batches": 6, "seed": 5,
    }  # fmt: skip
    return UnlabelledStream(rank=rank, world_size=world_size, **(defaults | options))


def test_every_walk_meets_every_image_once():
    stream = walk(num_labelled=12)
    rows = np.concatenate([s.rows for epoch in range(20) for s in stream.shares(epoch)])
    walks = rows[: len(rows) // 17 * 17].reshape(-1, 17)
    assert len(walks) > 15
    assert (np.sort(walks, axis=1) == np.arange(17)).all()
    assert len(np.unique(walks, axis=0)) == len(walks)
    keys = np.concatenate([s.keys for epoch in range(20) for s in stream.shares(epoch)])
    assert len(np.unique(keys)) == len(keys)


def test_the_walk_is_a_function_of_the_position():
    stream = walk(num_labelled=11)
    for epoch in (3, 0):  # in any order, whatever was read before
        whole = list(stream.shares(epoch))
        for start in range(7):
            tail = list(stream.shares(epoch, start))
            assert len(tail) == 6 - start
            for mine, expected in zip(tail, whole[start:], strict=True):
                np.testing.assert_array_equal(mine.rows, expected.rows)
                np.testing.assert_array_equal(mine.keys, expected.keys)
                assert mine.global_size == expected.global_size
    other = next(walk(seed=6).shares(3)).rows
    assert (other != next(stream.shares(3)).rows).any()


def test_ranks_share_the_walk():
    """Two ranks of three are one rank of six."""
    alone = walk(share_size=6, labelled_share_size=4)
    ranks = [walk(rank, 2) for rank in (0, 1)]
    for one, *shares in zip(*(stream.shares(1) for stream in (alone, *ranks)), strict=True):
        for rank, share in enumerate(shares):
            np.testing.assert_array_equal(share.rows, one.rows[rank::2])
            np.testing.assert_array_equal(share.keys, one.keys[rank::2])
            assert share.global_size == one.global_size


def test_a_short_minibatch_has_its_share():
    """11 labelled images are five times 2 and a last one, which brings 3 / 2 of one."""
    stream = walk(num_labelled=11)
    assert [stream.global_size(number) for number in range(6)] == [3, 3, 3, 3, 3, 1]
    assert [len(share.rows) for share in stream.shares(4)] == [3, 3, 3, 3, 3, 1]
    assert stream.per_epoch == 16


def test_a_pool_smaller_than_a_minibatch_is_walked_again():
    share = next(walk(num_images=2, share_size=7).shares(0))
    assert sorted(share.rows[:6].reshape(3, 2).sum(axis=1)) == [1, 1, 1]
    assert len(np.unique(share.keys)) == 7


@pytest.mark.parametrize(("first", "second"), [(3, 5), (1, 9), (7, 7), (10, 2), (4, 0), (6, 1)])
def test_any_stretch_has_its_share(first, second):
    order = evenly_mixed(first, second)
    assert sorted(order) == list(range(first + second))
    is_second = order >= first
    assert (np.diff(order[is_second]) == 1).all()
    assert (np.diff(order[~is_second]) == 1).all()
    for length in range(1, len(order) + 1):
        ideal = length * second / len(order)
        counts = np.convolve(is_second, np.ones(length, int), "valid")
        assert (abs(counts - ideal) < 1).all()


def slow_pad_crop_flip(image, top, left, flip, padding=4):
    padded = np.zeros((32 + 2 * padding, 32 + 2 * padding, 3), np.uint8)
    padded[padding:-padding, padding:-padding] = image
    cut = padded[top : top + 32, left : left + 32]
    return cut[:, ::-1] if flip else cut


@pytest.mark.parametrize("kind", ["pickle", "stored"])
def test_minibatches_hold_both_kinds(kind, settings, cifar, world_of):
    """Pixels, labels, crops and places of each; in a thread of its own where they are mapped."""
    loader = build_loaders(settings(kind), world_of()).train
    (images, labels), (_, labelled) = pool(), cifar
    assert (loader.num_batches, loader.num_images) == (20, 160)
    batches = list(loader.epoch(2))
    for batch, share in zip(batches, loader.stream.shares(2), strict=True):
        rows = batch.indices.numpy()
        assert (batch.global_size, batch.images.is_contiguous()) == (8, True)
        assert (rows < 0).tolist() == [False, True, False, True, True, False, True, True]
        np.testing.assert_array_equal(~rows[rows < 0], share.rows)
        draws = {
            False: (rows[rows >= 0], 2, rows[rows >= 0].astype(np.uint64)),
            True: (share.rows, 0, share.keys),
        }
        for is_unlabelled, (own, epoch, keys) in draws.items():
            corners = random_offsets(9, epoch, keys, 9)
            flips = random_flips(9, epoch, keys)
            source = images if is_unlabelled else labelled
            found = batch.images.numpy()[(rows < 0) == is_unlabelled]
            for row, image, (top, left), flip in zip(own, found, corners, flips, strict=True):
                expected = slow_pad_crop_flip(source[row], top, left, flip)
                np.testing.assert_array_equal(image, expected)
        expected = np.where(rows < 0, labels[~rows % POOL], rows % 12 % 10)
        assert batch.labels.tolist() == expected.tolist()
    for left, right in zip(batches[7:], loader.epoch(2, start=7), strict=True):
        for ours, theirs in zip(left, right, strict=True):
            assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))


def test_an_epoch_left_early_leaves_no_thread(settings, world_of):
    batches = build_loaders(settings("stored"), world_of()).train.epoch(0)
    next(batches)
    assert "freeadv-prefetch" in {thread.name for thread in threading.enumerate()}
    batches.close()
    assert "freeadv-prefetch" not in {thread.name for thread in threading.enumerate()}


def test_an_image_is_cropped_anew_in_each_walk(settings, world_of):
    """100 draws of 162 crops are 75 different ones, give or take five."""
    images, labels = pool(1)
    loader = build_loaders(settings("pickle", images, labels), world_of()).train
    crops = [batch.images[batch.indices < 0] for batch in loader.epoch(0)]
    crops = torch.cat(crops).flatten(1)
    assert len(crops) == 100
    assert len(crops.unique(dim=0)) > 55


def test_without_augmentation_pixels_are_kept(settings, world_of):
    loader = build_loaders(settings(augment="none"), world_of()).train
    for batch in loader.epoch(1):
        is_unlabelled = batch.indices < 0
        expected = pool()[0][~batch.indices[is_unlabelled].numpy()]
        np.testing.assert_array_equal(batch.images[is_unlabelled].numpy(), expected)


@pytest.mark.parametrize("way", ["pseudo-labels", "kl"])
def test_only_kl_marks_unlabelled_images(way, settings, world_of):
    loader = build_loaders(settings(method="dat", dat_unlabelled=way), world_of()).train
    for batch in loader.epoch(0):
        is_unlabelled = batch.indices < 0
        pseudo_labels = torch.from_numpy(pool()[1][~batch.indices[is_unlabelled].numpy()])
        expected = ~pseudo_labels if way == "kl" else pseudo_labels
        assert torch.equal(batch.labels[is_unlabelled], expected)
        assert (batch.labels[~is_unlabelled] >= 0).all()


def test_held_out_images_are_labelled_ones(settings, world_of):
    loaders = build_loaders(settings(holdout_images=10), world_of())
    assert all((batch.indices >= 0).all() for batch in loaders.holdout.epoch(0))
    held = {row for batch in loaders.holdout.epoch(0) for row in batch.indices.tolist()}
    trained = {row for batch in loaders.train.epoch(0) for row in batch.indices.tolist()}
    assert len(held) == 10
    assert not held & trained
    assert {row for row in trained if row < 0} == {~row for row in range(POOL)}


def test_two_ranks_see_what_one_sees(settings, world_of):
    alone = build_loaders(settings(batch_size=16), world_of()).train
    ranks = [build_loaders(settings(), world_of(rank, 2)).train for rank in (0, 1)]
    assert {loader.num_images for loader in (alone, *ranks)} == {160}
    for one, *shares in zip(*(loader.epoch(3) for loader in (alone, *ranks)), strict=True):
        assert {batch.global_size for batch in (one, *shares)} == {len(one.labels)}
        rows = torch.cat([share.indices for share in shares])
        assert sorted(rows.tolist()) == sorted(one.indices.tolist())
        order, expected = rows.argsort(), one.indices.argsort()
        images = torch.cat([share.images for share in shares])
        assert torch.equal(images[order], one.images[expected])


def test_accumulated_parts_have_equal_shares(settings, world_of):
    """Four minibatches of eight an update; three in the last one, for 60 is 3 * 16 + 12."""
    config = settings(accumulate=4, unlabelled_fraction=0.5)
    loader = build_loaders(config, world_of()).train
    counts = [
        [int((part < 0).sum()) for part in batch.indices.split(8)] for batch in loader.epoch(0)
    ]
    assert counts == [[4, 4, 4, 4]] * 3 + [[4, 4, 4]]
    assert loader.num_images == 120


@pytest.mark.parametrize(("accumulate", "fraction", "num_labelled"), [(1, 0.6, 3), (2, 0.25, 12)])
def test_folders_of_images_take_them_too(
    accumulate, fraction, num_labelled, build_tree, settings, config, world_of, use_backend
):
    """Labelled images are those of a run without, in minibatches of their own size."""
    use_backend("torchvision")
    tree, (images, labels) = build_tree(), pool()
    options = {"accumulate": accumulate, "unlabelled_fraction": fraction}
    run = settings("stored", images, labels % 3, data=tree, **options)
    mixed = build_loaders(run, world_of()).train
    plain_run = config(tree, augment="pad-crop-flip", batch_size=num_labelled, seed=9)
    plain = build_loaders(plain_run, world_of()).train
    assert mixed.num_batches == plain.num_batches == 36 / num_labelled
    for both, labelled in zip(mixed.epoch(1), plain.epoch(1), strict=True):
        is_labelled = both.indices >= 0
        assert torch.equal(both.images[is_labelled], labelled.images)
        assert torch.equal(both.labels[is_labelled], labelled.labels)
        assert both.global_size == len(both.labels) == 8 * accumulate


def test_a_line_says_how_many_of_what(settings, world_of):
    config = settings("stored")
    for world, share in ((world_of(), "5 of each minibatch's 8"), (world_of(1, 2), "10 of each")):
        counts, *lines = build_loaders(config, world).describe()
        assert counts.startswith("data: 60 training images, 20 validation images")
        expected = f"45 unlabelled images of {config.unlabelled}, {share}"
        assert any(line.startswith(expected) for line in lines)


def test_a_share_of_nothing_reads_none(settings, world_of):
    loader = build_loaders(settings(unlabelled_fraction=0.0), world_of()).train
    assert loader.num_images == 60
    assert all((batch.indices >= 0).all() for batch in loader.epoch(0))


def test_ranks_compare_them(settings, tmp_path, world_of):
    """One pixel or one label is enough, and so is another number; the path does not matter."""
    config = settings("stored")
    flag = f"--unlabelled {config.unlabelled}"
    roll = open_data(config, world_of()).rolls(config)[flag]
    images, labels = pool()

    def words(images, labels):
        path = tmp_path / "elsewhere" / "other.npz"
        path.parent.mkdir(exist_ok=True)
        write_stored(path, images, labels)
        other = settings(unlabelled=str(path))
        (found,) = [
            roll for name, roll in open_data(other, world_of()).rolls(other).items() if "un" in name
        ]
        return None if found.digest == roll.digest else describe_difference(roll, found, 1)

    assert words(images, labels) is None
    images[44, 31, 31, 2] ^= 1
    assert words(images, labels) == "image 44 of 45 on rank 1 is not that of rank 0"
    images[44, 31, 31, 2] ^= 1
    labels[7] = (labels[7] + 1) % 10
    assert words(images, labels) == "the list of 45 labels on rank 1 is not that of rank 0"
    fewer = words(images[:-1], labels[:-1])
    assert fewer.startswith("rank 1 lacks image 0 of 45, which rank 0 has")


class Attack:
    """A pickle that writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["pickle", "stored", "compressed"])
def test_truncated_files_are_damaged(kind, settings):
    config = settings(kind)
    with open(config.unlabelled, "r+b") as file:
        file.truncate(os.path.getsize(config.unlabelled) - 1000)
    with pytest.raises(UserError, match="--unlabelled .*damaged.* get it anew") as error:
        open_unlabelled(config, CLASSES, CPU)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["pickle", "npz"])
def test_code_is_refused_and_not_run(kind, settings, tmp_path):
    trace = tmp_path / "trace"
    config = settings("stored" if kind == "npz" else "pickle")
    if kind == "npz":
        objects = np.array([Attack(trace)] * 2, dtype=object)
        for labels in (objects, pool()[1]):
            np.savez(config.unlabelled, image=objects, label=labels)
            with pytest.raises(UserError, match=r"damaged, or not arrays alone \(.*bject"):
                open_unlabelled(config, CLASSES, CPU)
    else:
        content = {"data": Attack(trace), "extrapolated_targets": 1}
        with open(config.unlabelled, "wb") as file:
            pickle.dump(content, file)
        with pytest.raises(UserError, match=r"holds posix\.mkdir, not only arrays"):
            open_unlabelled(config, CLASSES, CPU)
    assert not trace.exists()


IMAGES, LABELS = pool(4)
UNFIT = {
    "size": (
        pool(4, side=16)[0],
        LABELS,
        "16 x 16 pixels, those of the run 32 x 32 (--image-size)",
    ),
    "not square": (IMAGES[:, :30], LABELS, "30 x 32 pixels"),
    "float": (IMAGES / 255, LABELS, "float64 of shape (4, 32, 32, 3); store uint8"),
    "flat": (IMAGES.reshape(4, -1), LABELS, "uint8 of shape (4, 3072); store uint8"),
    "channels first": (IMAGES.transpose(0, 3, 1, 2), LABELS, "uint8 of shape (4, 3, 32, 32)"),
    "empty": (IMAGES[:0], LABELS[:0], "holds no image"),
    "count": (IMAGES, LABELS[:3], "labels are int64 of shape (3,); store a whole number for each"),
    "soft": (IMAGES, np.ones((4, 10)), "labels are float64 of shape (4, 10)"),
    "classes": (IMAGES, np.array([3, 10, 0, 2]), "go from 0 to 10, those of --data from 0 to 9"),
    "negative": (IMAGES, np.array([3, -1, 0, 2]), "go from -1 to 3"),
}


@pytest.mark.parametrize("kind", ["pickle", "stored", "compressed"])
@pytest.mark.parametrize("case", UNFIT)
def test_arrays_that_do_not_fit_are_refused(case, kind, settings):
    images, labels, words = UNFIT[case]
    config = settings(kind, images, labels)
    with pytest.raises(UserError) as error:
        open_unlabelled(config, CLASSES, CPU)
    assert str(error.value).startswith(f"--unlabelled {config.unlabelled}: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_other_keys_and_missing_files_are_named(settings, tmp_path):
    config = settings("stored")
    np.savez(config.unlabelled, x=1, label=2)
    with pytest.raises(UserError, match="holds x, label; store its images as image and their"):
        open_unlabelled(config, CLASSES, CPU)
    config = settings("pickle")
    for content, words in (({"data": 1}, "holds data; store"), ([1], "holds a list")):
        with open(config.unlabelled, "wb") as file:
            pickle.dump(content, file)
        with pytest.raises(UserError, match=words):
            open_unlabelled(config, CLASSES, CPU)
    os.unlink(config.unlabelled)
    with pytest.raises(UserError, match="no such file; give the pickle of Carmon"):
        open_unlabelled(config, CLASSES, CPU)
