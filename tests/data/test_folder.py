"""ImageFolders through both decoders."""

from __future__ import annotations

import gc
import os
import random
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional

from freeadv_fast.data import build, folder_torchvision
from freeadv_fast.data.build import build_loaders, build_val_loader
from freeadv_fast.errors import UserError

AUGMENTS = ("random-resized-crop", "pad-crop-flip", "none")


def assert_same(left, right):
    assert len(left) == len(right)
    for mine, other in zip(left, right, strict=True):
        assert torch.equal(mine.indices, other.indices)
        assert torch.equal(mine.labels, other.labels)
        assert torch.equal(mine.images, other.images)
        assert mine.global_size == other.global_size


def mean_difference(left, right):
    return (left.int() - right.int()).abs().float().mean().item()


@pytest.mark.parametrize("augment", AUGMENTS)
def test_epochs_repeat_and_restart_bit_for_bit(backend, augment, build_tree, config, world_of):
    settings = config(build_tree(), augment=augment)
    train = build_loaders(settings, world_of()).train
    whole = list(train.epoch(1))
    assert [len(batch.images) for batch in whole] == [5] * 7  # 36 images: the last one waits
    assert all(batch.images.shape[1:] == (32, 32, 3) for batch in whole)
    assert all(batch.images.is_contiguous() for batch in whole)
    assert {batch.images.dtype for batch in whole} == {torch.uint8}
    assert {batch.labels.dtype for batch in whole} == {torch.int64}
    for start in (0, 3, 7):
        assert_same(list(train.epoch(1, start)), whole[start:])
    again = build_loaders(config(settings.data, augment=augment, workers=2), world_of()).train
    assert_same(list(again.epoch(1)), whole)
    other = list(train.epoch(2))
    assert not torch.equal(other[0].indices, whole[0].indices)


def test_an_abandoned_epoch_leaves_nothing_behind(backend, build_tree, config, world_of):
    train = build_loaders(config(build_tree()), world_of()).train
    whole = list(train.epoch(0))
    threads = threading.active_count()
    for position in (1, 2):
        entered = train.epoch(0)
        for _ in range(position):
            next(entered)
        entered.close()
    forgotten = train.epoch(1)
    next(forgotten)
    del forgotten
    gc.collect()
    assert threading.active_count() <= threads
    assert_same(list(train.epoch(0)), whole)
    both = zip(train.epoch(0), train.epoch(1), strict=True)
    assert_same([pair[0] for pair in both], whole)


def test_a_smaller_last_minibatch_is_trained(backend, build_tree, config, world_of):
    settings = config(build_tree(), batch_size=8)
    batches = list(build_loaders(settings, world_of()).train.epoch(0))
    assert [len(batch.images) for batch in batches] == [8, 8, 8, 8, 4]
    assert [batch.global_size for batch in batches] == [8, 8, 8, 8, 4]


@pytest.mark.parametrize("augment", ["random-resized-crop", "pad-crop-flip"])
def test_minibatches_that_add_up_are_one_of_their_size(
    backend, augment, build_tree, config, world_of
):
    """Decoders, which have room for one minibatch, are given one at a time."""
    options = {"augment": augment, "holdout_images": 9}
    settings = config(build_tree(), batch_size=4, accumulate=2, **options)
    loaders = build_loaders(settings, world_of())
    alone = build_loaders(config(settings.data, batch_size=8, **options), world_of())
    assert loaders.train.num_batches == alone.train.num_batches == 4
    whole = list(alone.train.epoch(1))
    assert [len(batch.images) for batch in whole] == [8, 8, 8, 3]
    assert_same(list(loaders.train.epoch(1)), whole)
    assert_same(list(loaders.train.epoch(1, 2)), whole[2:])
    assert [len(batch.images) for batch in loaders.holdout.epoch(0)] == [4, 4, 1]


def test_ranks_share_each_minibatch(backend, build_tree, config, world_of):
    settings = config(build_tree(), batch_size=8)
    per_rank = [list(build_loaders(settings, world_of(r, 2)).train.epoch(0)) for r in range(2)]
    alone = list(build_loaders(config(settings.data, batch_size=16), world_of()).train.epoch(0))
    assert [batch.global_size for batch in alone] == [16, 16, 4]
    for whole, *parts in zip(alone, *per_rank, strict=True):
        for rank, part in enumerate(parts):
            assert part.global_size == whole.global_size
            assert torch.equal(part.indices, whole.indices[rank::2])
            assert torch.equal(part.images, whole.images[rank::2])


def test_labels_and_indices_are_those_of_torchvision(backend, build_tree, config, world_of):
    folder = build_tree()
    loaders = build_loaders(config(folder), world_of())
    reference = ImageFolder(f"{folder}/train")
    assert loaders.train.classes == reference.classes
    for batch in loaders.train.epoch(0):
        expected = [reference.targets[index] for index in batch.indices.tolist()]
        assert batch.labels.tolist() == expected


def test_evaluation_is_resize_and_center_crop(backend, real_images, config, world_of):
    """torchvision's own transforms: bit for bit with PIL, to a few levels with DALI."""
    settings = config(str(real_images), image_size=160, batch_size=8)
    reference = ImageFolder(real_images / "val")
    for batch in build_val_loader(settings, world_of(), None).epoch(0):
        for pixels, index in zip(batch.images, batch.indices.tolist(), strict=True):
            image = functional.resize(reference[index][0], settings.evaluation_resize)
            expected = torch.from_numpy(np.array(functional.center_crop(image, [160, 160])))
            assert mean_difference(pixels, expected) < (0.5 if backend == "dali" else 1e-9)
            assert (pixels.int() - expected.int()).abs().max() <= (4 if backend == "dali" else 0)


def test_evaluation_can_cut_images_as_they_are_stored(backend, real_images, config, world_of):
    """--resize-size 0: torchvision's central crop of large images; small ones are enlarged."""
    reference = ImageFolder(real_images / "val")
    shorter = [min(image.size) for image, _ in reference]
    for image_size in (min(shorter), min(shorter) + 8):
        settings = config(str(real_images), image_size=image_size, resize_size=0, batch_size=8)
        for batch in build_val_loader(settings, world_of(), None).epoch(0):
            for pixels, index in zip(batch.images, batch.indices.tolist(), strict=True):
                image = reference[index][0]
                if shorter[index] < image_size:
                    image = functional.resize(image, image_size)
                expected = torch.from_numpy(np.array(functional.center_crop(image, image_size)))
                assert mean_difference(pixels, expected) < (0.5 if backend == "dali" else 1e-9)


def test_decoders_agree_without_resampling(use_backend, smooth_image, tmp_path, config, world_of):
    """RGB and grey JPEGs and PNGs of the network's size: the decoders' rounding is all."""
    for split in ("train", "val"):
        for mode in ("RGB", "L"):
            place = tmp_path / "tree" / split / mode
            place.mkdir(parents=True)
            for number in range(4):
                image = smooth_image(number, 64, 64, mode)
                image.save(place / f"{mode}{number}.jpg", quality=90)
                image.save(place / f"{mode}{number}.png")
    settings = config(
        str(tmp_path / "tree"), image_size=64, resize_size=64, augment="none", batch_size=16
    )
    seen = {}
    for name in ("dali", "torchvision"):
        use_backend(name)
        seen[name] = list(build_loaders(settings, world_of()).train.epoch(0))[0]
    assert seen["dali"].indices.tolist() == seen["torchvision"].indices.tolist()
    difference = (seen["dali"].images.int() - seen["torchvision"].images.int()).abs()
    assert difference.max() <= 2
    files = ImageFolder(tmp_path / "tree" / "train").samples
    for pixels, index in zip(seen["dali"].images, seen["dali"].indices.tolist(), strict=True):
        if files[index][0].endswith(".png"):
            expected = np.array(Image.open(files[index][0]).convert("RGB"))
            np.testing.assert_array_equal(pixels.numpy(), expected)


@pytest.mark.parametrize("augment", AUGMENTS)
def test_decoders_execute_the_same_plan(use_backend, real_images, augment, config, world_of):
    settings = config(str(real_images), image_size=96, batch_size=8, augment=augment)
    seen = {}
    for name in ("dali", "torchvision"):
        use_backend(name)
        train = build_loaders(settings, world_of()).train
        seen[name] = torch.cat([batch.images for batch in train.epoch(0)])
    # A crop that is one pixel off, or mirrored, differs by far more than 1 on a photograph.
    for mine, other in zip(seen["dali"], seen["torchvision"], strict=True):
        assert mean_difference(mine, other) < 1.0
        assert mean_difference(mine, other.flip(1)) > 1.0


def test_training_differs_from_evaluation_by_the_crop(backend, build_tree, config, world_of):
    folder = build_tree()
    plain = config(folder, augment="none", batch_size=36)
    crops = config(folder, augment="random-resized-crop", batch_size=36)
    still = next(iter(build_loaders(plain, world_of()).train.epoch(0)))
    first = next(iter(build_loaders(crops, world_of()).train.epoch(0)))
    assert torch.equal(still.indices, first.indices)
    changed = [mean_difference(a, b) > 3 for a, b in zip(still.images, first.images, strict=True)]
    assert np.mean(changed) > 0.8
    assert_same(
        list(build_loaders(crops, world_of()).val.epoch(0)),
        list(build_loaders(plain, world_of()).val.epoch(5)),
    )


def test_odd_but_whole_files_train(backend, smooth_image, tmp_path, config, world_of):
    """ImageNet holds CMYK JPEGs and a PNG named .JPEG; a palette, alpha and EXIF are common."""
    for split in ("train", "val"):
        place = tmp_path / "tree" / split / "class0"
        other = tmp_path / "tree" / split / "class1"
        place.mkdir(parents=True)
        other.mkdir()
        smooth_image(1, 60, 80, "CMYK").save(place / "a_cmyk.JPEG")
        smooth_image(2, 60, 80).save(place / "b_png.JPEG", format="PNG")
        smooth_image(3, 60, 80).convert("P").save(place / "c_palette.png")
        smooth_image(4, 60, 80).convert("RGBA").save(other / "d_alpha.PNG")
        smooth_image(5, 60, 80).save(other / "e_progressive.jpeg", progressive=True)
        turned = Image.Exif()
        turned[0x0112] = 6  # "rotate me": not obeyed, as in torchvision
        smooth_image(6, 60, 80).save(other / "f_exif.jpg", exif=turned, quality=95)
    settings = config(str(tmp_path / "tree"), image_size=60, resize_size=60, batch_size=6)
    loader = build_val_loader(settings, world_of(), None)
    (batch,) = loader.epoch(0)
    assert loader.num_images == 6
    paths = sorted((tmp_path / "tree" / "val").glob("*/*"))
    for pixels, path in zip(batch.images, paths, strict=True):
        expected = np.array(Image.open(path).convert("RGB"))[:, 10:70]
        tolerance = 40 if "cmyk" in path.name else 2
        assert mean_difference(pixels, torch.from_numpy(expected)) < tolerance / 2
        assert np.abs(pixels.numpy().astype(int) - expected).max() <= tolerance


def test_damage_that_the_scan_cannot_see_names_the_file(backend, build_tree, config, world_of):
    folder = build_tree()
    victim = Path(folder, "train", "class1", "004.JPEG")
    content = bytearray(victim.read_bytes())
    table = content.index(b"\xff\xc4")
    content[table + 4] = 0xFF  # a Huffman table of an impossible number
    victim.write_bytes(content)
    train = build_loaders(config(folder), world_of()).train
    with pytest.raises(UserError, match=r"class1/004\.JPEG cannot be decoded.*--resume") as error:
        list(train.epoch(0))
    assert "\n" not in str(error.value)


def test_a_file_that_vanishes_is_named(backend, build_tree, config, world_of):
    folder = build_tree()
    loader = build_val_loader(config(folder), world_of(), None)
    Path(folder, "val", "class2", "001.JPEG").unlink()
    with pytest.raises(UserError, match=r"class2/001\.JPEG"):
        list(loader.epoch(0))


def test_reading_leaves_the_global_generators_alone(backend, build_tree, config, world_of):
    train = build_loaders(config(build_tree()), world_of()).train
    states = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())  # noqa: NPY002
    list(train.epoch(0))
    assert torch.equal(torch.get_rng_state(), states[0])
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert random.getstate() == states[2]


def test_workers_collect_nothing_of_their_parents(
    use_backend, build_tree, config, world_of, tmp_path, monkeypatch
):
    """A DALI pipeline that a forked worker destroys waits for threads that only its parent has."""

    class Pipeline:
        def __init__(self):
            self.ring = self

        def __del__(self):
            with (tmp_path / "destroyed").open("a") as file:
                print(os.getpid(), file=file)

    fill = folder_torchvision.TorchvisionDecoder._fill

    def collect_and_fill(decoder, *arguments):
        gc.collect()
        return fill(decoder, *arguments)

    monkeypatch.setattr(folder_torchvision.TorchvisionDecoder, "_fill", collect_and_fill)
    use_backend("torchvision")
    train = build_loaders(config(build_tree()), world_of()).train
    gc.disable()  # else the ring may be gone before the fork
    try:
        Pipeline()
        list(train.epoch(0))
    finally:
        gc.enable()
    gc.collect()
    assert (tmp_path / "destroyed").read_text().split() == [str(os.getpid())]


def test_without_dali_one_line_says_so(use_backend, build_tree, config, world_of, capsys):
    build._announce_once.cache_clear()
    settings = config(build_tree())
    use_backend("dali")
    lines = build_loaders(settings, world_of()).describe()
    assert any("NVIDIA DALI on the CPU" in line for line in lines)
    use_backend("torchvision")
    build_loaders(settings, world_of(1, 2))
    assert capsys.readouterr().out == ""
    lines = build_loaders(settings, world_of()).describe()
    build_val_loader(settings, world_of(), 2)
    (told,) = capsys.readouterr().out.splitlines()
    assert "pip install nvidia-dali-cuda130" in told
    assert any("torchvision, 1 processes" in line for line in lines)
