"""build_loaders and build_val_loader: splits, subsets, epochs in a row, words for the user."""

from __future__ import annotations

import multiprocessing
import threading

import numpy as np
import pytest
import torch

from freeadv_fast.data import synthetic
from freeadv_fast.data.build import build_loaders, build_val_loader
from freeadv_fast.data.coco import shapes
from freeadv_fast.errors import UserError


def indices(loader, epoch=0):
    return [index for batch in loader.epoch(epoch) for index in batch.indices.tolist()]


@pytest.fixture
def loader_of(build_tree, config, world_of, tmp_path, monkeypatch):
    """Training loaders of every kind."""

    def build(kind):
        options = {"batch_size": 5, "workers": 2, "m": 1}
        if kind.startswith("files"):
            data = build_tree(classes=2, train=16)
            options |= {"accumulate": 2} if kind.endswith("accumulated") else {}
        elif kind == "boxes":
            monkeypatch.setattr(shapes, "NUM_IMAGES", {"train": 12, "val": 3})
            data = "shapes"
            options |= {"arch": "retinanet_resnet10_fpn_64", "image_size": 64, "augment": "flip"}
            options |= {"method": "natural"}
        else:
            monkeypatch.setattr(synthetic, "NUM_IMAGES", {"train": 33, "val": 3})
            data = "synthetic:3"
            options |= {"image_size": 8, "augment": "pad-crop-flip"}
        if kind == "unlabelled":
            pixels = np.random.default_rng(1).integers(0, 256, (500, 8, 8, 3), np.uint8)
            file = tmp_path / "more.npz"
            np.savez(file, image=pixels, label=np.arange(500) % 3)
            options |= {"unlabelled": str(file), "method": "dat"}
        return build_loaders(config(data, **options), world_of()).train

    return build


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("files", "dali"), ("files", "torchvision"), ("files, accumulated", "dali"),
        ("files, accumulated", "torchvision"), ("resident", None), ("unlabelled", None),
        ("boxes", None),
    ],
)  # fmt: skip
def test_epochs_in_a_row_are_those_apart(kind, backend, loader_of, use_backend):
    """From within one on, in one stream; closed in another epoch, it leaves nothing behind."""
    if backend:
        use_backend(backend)
    loader = loader_of(kind)
    apart = [*loader.epoch(3, 1), *loader.epoch(4), *loader.epoch(5)]
    assert len(apart) == 3 * loader.num_batches - 1
    for mine, other in zip(loader.epochs(3, 1, 5), apart, strict=True):
        assert torch.equal(mine.images, other.images)
        assert torch.equal(mine.labels, other.labels)
        assert torch.equal(mine.indices, other.indices)
        assert mine.global_size == other.global_size
    threads = threading.active_count()
    begun = loader.epochs(3, 0, 5)
    for _ in range(loader.num_batches + 1):
        next(begun)
    begun.close()
    assert threading.active_count() <= threads
    assert not multiprocessing.active_children()


def test_held_out_images_never_train_and_never_change(build_tree, config, world_of):
    data = build_tree()
    loaders = build_loaders(config(data, holdout_images=9), world_of())
    held = indices(loaders.holdout)
    assert len(set(held)) == loaders.holdout.num_images == 9
    assert loaders.train.num_images == 27
    for epoch in range(3):
        assert not set(indices(loaders.train, epoch)) & set(held)
    labels = torch.cat([batch.labels for batch in loaders.holdout.epoch(0)])
    assert torch.bincount(labels).tolist() == [3, 3, 3]
    other = config(data, holdout_images=9, seed=5, batch_size=4)
    ranks = [build_loaders(other, world_of(rank, 2)).holdout for rank in range(2)]
    assert sorted(indices(ranks[0]) + indices(ranks[1])) == sorted(held)


def test_held_out_images_are_read_as_in_evaluation(build_tree, config, world_of):
    data = build_tree()
    held = build_loaders(config(data, holdout_images=6), world_of()).holdout
    plain = build_loaders(config(data, augment="none", holdout_images=0), world_of()).train
    pixels = {
        index: image
        for batch in plain.epoch(0)
        for index, image in zip(batch.indices.tolist(), batch.images, strict=True)
    }
    compared = 0
    for batch in held.epoch(0):
        for index, image in zip(batch.indices.tolist(), batch.images, strict=True):
            if index in pixels:  # the last image of the epoch is left out of training
                assert torch.equal(image, pixels[index])
                compared += 1
    assert compared >= 5


def test_no_holdout(build_tree, config, world_of):
    assert build_loaders(config(build_tree()), world_of()).holdout is None


def test_a_holdout_of_half_the_training_set_is_refused(build_tree, config, world_of):
    data = build_tree()
    build_loaders(config(data, holdout_images=17), world_of())
    with pytest.raises(UserError, match="--holdout-images 18: half of the 36 training"):
        build_loaders(config(data, holdout_images=18), world_of())


def test_a_batch_beyond_a_ranks_share_is_refused(build_tree, config, world_of):
    data = build_tree()
    with pytest.raises(UserError, match="--batch-size 19: .* 18"):
        build_loaders(config(data, batch_size=19), world_of(0, 2))


def test_an_update_beyond_a_ranks_share_is_refused(build_tree, config, world_of):
    settings = config(build_tree(), batch_size=9, accumulate=3)
    build_loaders(settings, world_of())
    with pytest.raises(UserError, match="--batch-size 9 --accumulate 3: .* 18 .36 images over 2"):
        build_loaders(settings, world_of(0, 2))


def test_resident_minibatches_add_up_too(config, world_of):
    options = {"image_size": 8, "holdout_images": 10}
    parts = build_loaders(config("synthetic:7", batch_size=16, accumulate=4, **options), world_of())
    whole = build_loaders(config("synthetic:7", batch_size=64, **options), world_of())
    assert parts.train.num_batches == whole.train.num_batches
    for ours, theirs in zip(parts.train.epoch(2, 1), whole.train.epoch(2, 1), strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)
        assert ours.global_size == theirs.global_size


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_evaluation_subsets_are_shared_exactly(ranks, build_tree, config, world_of):
    settings = config(build_tree(val=7), batch_size=3)
    seen = [indices(build_val_loader(settings, world_of(rank, ranks), 11)) for rank in range(ranks)]
    expected = [row * 21 // 11 for row in range(11)]
    assert seen == [expected[rank::ranks] for rank in range(ranks)]
    loader = build_val_loader(settings, world_of(0, ranks), 11)
    assert loader.num_images == 11
    assert loader.num_batches == -(-11 // (3 * ranks))


def test_validation_follows_eval_images(build_tree, config, world_of):
    data = build_tree(val=7)
    assert build_loaders(config(data), world_of()).val.num_images == 21
    few = build_loaders(config(data, eval_images=5), world_of()).val
    assert indices(few) == [0, 4, 8, 12, 16]
    assert build_loaders(config(data, eval_images=500), world_of()).val.num_images == 21


def test_the_user_is_told_what_is_read(build_tree, config, world_of):
    line, *_ = build_loaders(config(build_tree(), holdout_images=6), world_of()).describe()
    assert "30 training images, 6 held out, 12 validation images, 3 classes" in line


def test_synthetic_images_are_resident_and_repeatable(config, world_of):
    settings = config("synthetic:7", image_size=8, batch_size=64, holdout_images=10)
    loaders = build_loaders(settings, world_of())
    assert len(loaders.train.classes) == 7
    assert loaders.holdout.num_images == 10
    first, second = (next(iter(loaders.train.epoch(0))) for _ in range(2))
    assert torch.equal(first.images, second.images)
    assert first.images.shape == (64, 8, 8, 3)
    assert first.images.dtype == torch.uint8
    assert 0 <= first.labels.min() <= first.labels.max() <= 6
    assert first.images.float().std() > 60
    again = build_loaders(settings, world_of())
    assert torch.equal(next(iter(again.train.epoch(0))).images, first.images)
    assert len(build_val_loader(config("synthetic"), world_of(), 4).classes) == 1000


def test_by_default_a_tenth_is_held_out(build_tree, config, world_of):
    """1,000 images at most, and never more than a tenth of a small set."""
    data = build_tree()
    loaders = build_loaders(config(data, holdout_images=None), world_of())
    everything = build_loaders(config(data, holdout_images=0), world_of()).train.num_images
    assert loaders.holdout.num_images == everything // 10
    assert loaders.train.num_images == everything - everything // 10
