"""COCO's files: annotations, canvases, minibatches with boxes, corruptions."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from coco_files import (
    CATEGORIES,
    annotation,
    image_entry,
    sample_folder,
    write_annotations,
    write_coco,
)
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.data.build import build_loaders, build_val_loader
from freeadv_fast.data.coco.annotations import read_annotations
from freeadv_fast.data.coco.canvas import build_canvases, resized_sizes, smallest_canvases
from freeadv_fast.data.coco.corruption import corrupted
from freeadv_fast.data.roll import Changes
from freeadv_fast.data.stream import Stream
from freeadv_fast.errors import UserError
from freeadv_fast.step.objects import NO_OBJECT, Objects
from freeadv_fast.training import dry_run, train

SIDE = 64


@pytest.fixture
def settings():
    """A run of a small detector on a folder of COCO's files."""

    def build(folder, **options):
        defaults = {
            "data": f"coco:{folder}",
            "arch": "retinanet_resnet10_fpn_64",
            "method": "natural",
            "m": 1,
            "image_size": SIDE,
            "batch_size": 4,
            "workers": 0,
            "augment": "none",
        }
        return TrainConfig(**(defaults | options))

    return build


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve training and six validation images of four sizes."""
    return write_coco(tmp_path_factory.mktemp("coco") / "rectangles", num_images=(12, 6))


def assert_same(left, right):
    assert len(left) == len(right)
    for mine, other in zip(left, right, strict=True):
        for one, two in zip(mine, other, strict=True):
            assert torch.equal(torch.as_tensor(one), torch.as_tensor(two))


def by_row(batches):
    """Image without padding, its padding, boxes and classes of each row."""
    found = {}
    for batch in batches:
        objects = Objects.of(batch.labels)
        for slot, row in enumerate(batch.indices.tolist()):
            height, width = objects.sizes[slot].tolist()
            image = batch.images[slot]
            is_object = objects.is_object[slot]
            padding = (image[height:], image[:, width:])
            boxes, classes = objects.boxes[slot][is_object], objects.classes[slot][is_object]
            assert row not in found
            found[row] = (image[:height, :width], padding, boxes, classes)
    return found


# Annotations.


def test_ids_with_gaps_become_labels_and_boxes_stay_where_they_are(folder):
    read = read_annotations(str(folder), "val")
    content = json.loads((folder / "annotations" / "instances_val.json").read_text())
    assert read.classes == list(CATEGORIES.values())
    assert read.category_ids.tolist() == list(CATEGORIES)
    assert read.image_ids.tolist() == [image["id"] for image in content["images"]]
    for row, image in enumerate(content["images"]):
        assert read.sizes[row].tolist() == [image["height"], image["width"]]
        mine = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        for entry, box, label in zip(mine, read.boxes[row], read.labels[row], strict=True):
            x, y, width, height = entry["bbox"]
            assert box.tolist() == [x, y, x + width, y + height]
            assert read.category_ids[label] == entry["category_id"]
    assert read.record["annotations"] == content["annotations"]


def crafted(tmp_path, entries, images=None, *, kinds=CATEGORIES, split="train", ids=(5, 9)):
    """A folder of images of 40 x 50 pixels and these annotations; returns it as a string."""
    (tmp_path / split).mkdir(exist_ok=True)
    for number in ids:
        Image.new("RGB", (50, 40)).save(tmp_path / split / f"{number}.png")
    listed = [image_entry(number, f"{number}.png", (40, 50)) for number in ids]
    write_annotations(tmp_path, split, listed if images is None else images, entries, kinds)
    return str(tmp_path)


def test_boxes_are_cut_and_crowds_and_thin_ones_are_not_trained_on(tmp_path):
    entries = [
        annotation(1, 9, 3, (-4, 30, 10, 20)),
        annotation(2, 9, 1, (0, 0, 20, 20), is_crowd=1),
        annotation(3, 9, 1, (49.5, 3, 8, 8)),  # half a pixel once it is cut
        annotation(4, 9, 1, (3, 3, 5, 0)),
    ]
    entries[0]["segmentation"] = [[1, 2, 3, 4, 5, 6]]
    entries[1]["iscrowd"] = True
    del entries[0]["iscrowd"], entries[0]["area"]
    read = read_annotations(crafted(tmp_path, entries), "train")
    assert [boxes.tolist() for boxes in read.boxes] == [[], [[0, 30, 6, 40]]]
    assert [labels.tolist() for labels in read.labels] == [[], [1]]
    assert read.left_out == (
        "1 crowds and 2 boxes thinner than a pixel of instances_train.json are not trained on; "
        "COCO's evaluation reads them",
    )
    assert [entry["iscrowd"] for entry in read.record["annotations"]] == [0, 1, 0, 0]
    # As the evaluators read it: they take no true and no null.
    assert read.record["annotations"][0] == annotation(1, 9, 3, (-4, 30, 10, 20))
    assert type(read.record["annotations"][1]["iscrowd"]) is int
    trained = read.with_objects()
    assert (trained.files, trained.image_ids.tolist()) == (["9.png"], [9])
    assert trained.left_out[1:] == ("1 training images without objects left out",)


def test_a_roll_knows_other_boxes_labels_and_files_again(tmp_path):
    box = (2, 3, 10, 10)
    before = read_annotations(crafted(tmp_path, [annotation(1, 5, 1, box)]), "train").roll
    assert not Changes.between(before, read_annotations(str(tmp_path), "train").roll)
    for other in (annotation(1, 5, 3, box), annotation(1, 5, 1, (2, 3, 10, 11))):
        now = read_annotations(crafted(tmp_path, [other]), "train").roll
        assert Changes.between(before, now).altered == ["5.png"]
    (tmp_path / "train" / "9.png").write_bytes(b"another")
    write_annotations(tmp_path, "train", *both_lists(tmp_path, [annotation(1, 5, 1, box)]))
    now = read_annotations(str(tmp_path), "train").roll
    assert Changes.between(before, now).altered == ["9.png"]


def both_lists(tmp_path, annotations):
    content = json.loads((tmp_path / "annotations" / "instances_train.json").read_text())
    return content["images"], annotations


GOOD = annotation(1, 5, 1, (2, 3, 10, 10))
BAD = {
    "2 boxes lie outside": [
        annotation(1, 5, 1, (60, 3, 10, 10)),
        annotation(2, 5, 1, (2, 52, 1, 1)),
    ],
    'list "annotations" is empty': [],
    'image ids that "images" lacks (7)': [annotation(1, 7, 1, (2, 3, 10, 10))],
    'category ids that "categories" lacks (2)': [annotation(1, 5, 2, (2, 3, 10, 10))],
    "not four numbers": [GOOD | {"bbox": [1, 2, 3]}],
    "the bbox of annotation 2 is [1, 2, nan, 4]": [GOOD, GOOD | {"bbox": [1, 2, float("nan"), 4]}],
    'entry 1 of "annotations" has no "bbox"': [{k: v for k, v in GOOD.items() if k != "bbox"}],
    "'5', no whole number": [GOOD | {"image_id": "5"}],
    'entry 2 of "annotations" has no "image_id"': [GOOD, "crowd"],
    "the bbox of annotation 1 is ['1', '1', '9', '9'], not": [GOOD | {"bbox": list("1199")}],
    "the bbox of annotation 1 is [True, 1, 9, 9], not": [GOOD | {"bbox": [True, 1, 9, 9]}],
    "the bbox of annotation 1 is None, not": [GOOD | {"bbox": None}],
    '"iscrowd" of annotation 2 is None, not 0 or 1': [GOOD, GOOD | {"iscrowd": None}],
    "\"iscrowd\" of annotation 1 is '0', not 0 or 1": [GOOD | {"iscrowd": "0"}],
    '"area" of annotation 2 is None, not a number': [GOOD, GOOD | {"area": None}],
    "\"area\" of annotation 1 is '100', not a number": [GOOD | {"area": "100"}],
}


def refusal(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("--data")
    return str(caught.value)


@pytest.mark.parametrize("line", BAD)
def test_bad_annotations_are_one_line(tmp_path, line):
    assert line in refusal(read_annotations, crafted(tmp_path, BAD[line]), "train")


def test_bad_lists_of_images_are_one_line(tmp_path):
    gone = [image_entry(5, "5.png", (40, 50)), image_entry(6, "6.png", (40, 50))]
    data = crafted(tmp_path, [GOOD], gone)
    assert "1 of the 2 images" in refusal(read_annotations, data, "train")
    for listed, line in (
        ([gone[0], gone[0]], "lists 5 twice"),
        ([gone[0] | {"height": 0}], "no pixels"),
        ([{"id": 5, "height": 3, "width": 4}], 'no "file_name"'),
    ):
        assert line in refusal(read_annotations, crafted(tmp_path, [GOOD], listed), "train")
    assert 'no "name"' in refusal_of_file(tmp_path, {"categories": [{"id": 1}]})
    twice = [{"id": 1, "name": "red"}, {"id": 2, "name": "red"}]
    assert '"categories" lists red twice' in refusal_of_file(tmp_path, {"categories": twice})
    assert 'no list "categories"' in refusal_of_file(tmp_path, {"categories": {}})


def refusal_of_file(folder, change):
    path = folder / "annotations" / "instances_train.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return refusal(read_annotations, str(folder), "train")


def test_a_set_of_crowds_alone_has_nothing_to_learn(settings, tmp_path, world):
    crowd = [annotation(1, 5, 1, (2, 3, 10, 10), is_crowd=1)]
    data = crafted(tmp_path, crowd)
    crafted(tmp_path, [GOOD], split="val")
    assert "no image of train holds an object" in refusal(build_loaders, settings(data), world)


@pytest.mark.parametrize(
    ("content", "line"),
    [(b"{1: 2}", "is not JSON"), (b"\xff\xfe", "is not JSON"), (b"[1, 2]", "no JSON object")],
)
def test_what_is_no_coco_file_is_one_line(tmp_path, content, line):
    data = crafted(tmp_path, [GOOD])
    (tmp_path / "annotations" / "instances_train.json").write_bytes(content)
    assert line in refusal(read_annotations, data, "train")


def test_other_layouts_are_one_line(tmp_path, build_tree, config, settings, world, folder):
    assert "no such folder" in refusal(read_annotations, str(tmp_path / "gone"), "val")
    assert "no annotations/instances_val2017.json" in refusal(
        read_annotations, crafted(tmp_path, [GOOD]), "val"
    )
    tree = build_tree()
    line = refusal(build_loaders, settings(tree), world)
    assert f"use --data {tree} with a classifier" in line
    line = refusal(build_loaders, config(str(folder)), world)
    assert f"use --data coco:{folder} with a detector" in line
    assert "coco:FOLDER" in refusal(build_loaders, settings(""), world)


def test_splits_with_other_categories_are_one_line(tmp_path, settings, world):
    crafted(tmp_path, [GOOD])
    data = crafted(tmp_path, [GOOD], kinds={1: "red", 3: "green"}, split="val")
    assert "val/ lacks 1 of the 3 classes: blue" in refusal(build_loaders, settings(data), world)
    crafted(tmp_path, [GOOD], kinds={1: "red", 3: "blue", 7: "green"}, split="val")
    assert "in different orders" in refusal(build_loaders, settings(data), world)


# Canvases.


@pytest.mark.parametrize(("shortest", "longest"), [(800, 1333), (320, 533), (64, 107)])
def test_sizes_are_those_of_torchvision_and_lie_in_their_canvas(shortest, longest):
    random = np.random.default_rng(1)
    sizes = np.concatenate([random.integers(20, 700, (60, 2)), [[480, 640], [640, 427], [9, 700]]])
    resize = GeneralizedRCNNTransform(shortest, longest, [0, 0, 0], [1, 1, 1]).eval().resize
    expected = [resize(torch.zeros(1, *size))[0].shape[1:] for size in sizes.tolist()]
    resized = resized_sizes(sizes, shortest, longest)
    assert resized.tolist() == [list(size) for size in expected]
    canvases = build_canvases(shortest, longest)
    chosen = canvases[smallest_canvases(resized, canvases)]
    assert (chosen % 32 == 0).all()
    assert (resized <= chosen).all()
    assert len(canvases) == len({tuple(canvas) for canvas in canvases.tolist()}) <= 9
    is_landscape = sizes[:, 1] >= sizes[:, 0]
    assert (chosen[is_landscape, 0] == canvases[:, 0].min()).all()


def test_padding_on_photographs_is_what_the_rule_says(tmp_path):
    sizes = read_annotations(str(sample_folder(tmp_path)), "val").sizes
    resized, canvases = resized_sizes(sizes, 800, 1333), build_canvases(800, 1333)
    chosen = canvases[smallest_canvases(resized, canvases)]
    assert round(1 - resized.prod(1).sum() / chosen.prod(1).sum(), 3) == 0.039


# The stream of groups.


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_minibatches_are_of_one_group_and_every_image_comes_once(seed, accumulate):
    groups = np.random.default_rng(0).integers(0, 3, 101)
    rows = np.arange(200, 301)

    def stream(rank=0, size=1, batch_size=8):
        return Stream(rows, batch_size, rank, size, seed, accumulate=accumulate, groups=groups)

    shares = list(stream().shares(4))
    assert [share.global_size for share in shares[:-1]] == [8 * accumulate] * (len(shares) - 1)
    assert len(shares) == stream().num_batches
    seen = np.concatenate([share.rows for share in shares])
    assert sorted(seen) == rows.tolist()
    size = 8 * accumulate
    number_of_whole = sum(np.bincount(groups) // size)
    number_of_mixed = len(groups) // size - number_of_whole
    for number, share in enumerate(shares):
        there = {int(group) for group in groups[share.rows - 200]}
        assert set(share.groups) == there
        is_whole = number_of_mixed <= number < number_of_mixed + number_of_whole
        assert len(there) == 1 or not is_whole
    wholes = shares[number_of_mixed : number_of_mixed + number_of_whole]
    assert len({share.groups for share in wholes}) == 3
    left_over = groups[seen - 200]
    left_over = np.delete(left_over, np.s_[size * number_of_mixed : -(len(groups) % size)])
    assert (np.diff(left_over) >= 0).all()
    for mine, other in zip(stream().shares(4, 5), shares[5:], strict=True):
        assert np.array_equal(mine.rows, other.rows)
    # Two ranks with half the batch see the same global minibatches under the same groups.
    for share, *ranks in zip(
        shares, *(stream(rank, 2, 4).shares(4) for rank in (0, 1)), strict=True
    ):
        assert sorted(np.concatenate([part.rows for part in ranks])) == sorted(share.rows)
        assert {part.groups for part in ranks} == {share.groups}


def test_groups_are_walked_in_another_order_each_epoch():
    groups = np.arange(90) % 3
    stream = Stream(np.arange(90), 5, 0, 1, 1, groups=groups)
    first, second = (stream.order(epoch).tolist() for epoch in (0, 1))
    assert first != second
    kinds = [[share.groups for share in stream.shares(epoch)] for epoch in range(4)]
    assert len({tuple(kind) for kind in kinds}) > 1
    assert all(len(kind) == stream.num_batches for kind in kinds)


# Minibatches.


def slow_image(annotations, row, flip):
    """An image and its boxes: flipped as stored, then resized by torchvision's own transform."""
    with Image.open(annotations.path(row)) as file:
        image = file.convert("RGB")
    boxes = torch.tensor(annotations.boxes[row]).clone()
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        boxes[:, [0, 2]] = image.width - boxes[:, [2, 0]]
    transform = GeneralizedRCNNTransform(
        SIDE, round(SIDE * 1333 / 800), [0, 0, 0], [1, 1, 1]
    ).eval()
    pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255
    seen, targets = transform.resize(pixels, {"boxes": boxes})
    return seen.permute(1, 2, 0) * 255, targets["boxes"]


@pytest.mark.parametrize("augment", ["none", "flip"])
def test_boxes_follow_resize_flip_and_padding(folder, settings, world, augment):
    config = settings(folder, augment=augment)
    train = build_loaders(config, world).train
    annotations, flipped = train.annotations, 0
    found = by_row(train.epoch(2))
    assert sorted(found) == list(range(12))
    for row, (image, padding, boxes, classes) in found.items():
        assert not any(edge.any() for edge in padding)
        assert classes.tolist() == annotations.labels[row].tolist()
        versions = [slow_image(annotations, row, flip) for flip in (False, True)]
        # Images are enlarged here, where PIL's filter is torch's, but for rounding.
        errors = [(image - seen).abs().max() for seen, _ in versions]
        is_flipped = int(np.argmin(errors))
        assert errors[is_flipped] < 2
        assert torch.allclose(boxes, versions[is_flipped][1], atol=1e-4)
        flipped += is_flipped
    assert (0 < flipped < 12) if augment == "flip" else flipped == 0


def test_minibatches_have_one_canvas_and_one_capacity(folder, settings, world):
    loaders = build_loaders(settings(folder, batch_size=2), world)
    for loader in (loaders.train, loaders.val):
        batches = list(loader.epoch(0))
        assert len(batches) == loader.num_batches
        assert {batch.labels.shape[1:] for batch in batches} == {(1 + loader.capacity, 5)}
        assert {batch.images.dtype for batch in batches} == {torch.uint8}
        assert all(batch.images.is_contiguous() for batch in batches)
        canvases = {tuple(canvas) for canvas in loader.canvases.tolist()}
        assert all(batch.images.shape[1:3] in canvases for batch in batches[:-2])
        assert {batch.labels.dtype for batch in batches} == {torch.float32}
    assert loaders.holdout is None
    num_objects = sum(map(len, loaders.train.annotations.labels))
    assert f"12 training images with {num_objects} objects, 6 val" in loaders.describe()[0]
    assert (loaders.val.capacity, loaders.train.capacity) == (3, 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_restart_and_repeat_in_processes(folder, settings, world, workers):
    loader = build_loaders(settings(folder, augment="flip", workers=workers), world).train
    whole = list(build_loaders(settings(folder, augment="flip"), world).train.epoch(1))
    assert_same(list(loader.epoch(1)), whole)
    assert_same(list(loader.epoch(1, 2)), whole[2:])
    assert not torch.equal(next(iter(loader.epoch(2))).indices, whole[0].indices)


def test_ranks_share_a_canvas_and_updates_in_parts_their_images(folder, settings, world_of):
    whole = list(build_loaders(settings(folder), world_of()).train.epoch(0))
    parts = build_loaders(settings(folder, batch_size=2, accumulate=2), world_of()).train
    assert_same(list(parts.epoch(0)), whole)
    ranks = [
        list(build_loaders(settings(folder, batch_size=2), world_of(rank, 2)).train.epoch(0))
        for rank in (0, 1)
    ]
    for batch, first, second in zip(whole, *ranks, strict=True):
        assert torch.equal(
            torch.stack([first.images, second.images], 1).flatten(0, 1), batch.images
        )
        assert torch.equal(
            torch.stack([first.labels, second.labels], 1).flatten(0, 1), batch.labels
        )
        assert first.global_size == batch.global_size == 4


def test_images_without_objects_are_validated_on_and_not_trained_on(tmp_path, settings, world):
    entries = [GOOD, annotation(2, 9, 3, (4, 4, 20, 20))]
    for split in ("train", "val"):
        data = crafted(tmp_path, entries, split=split, ids=(5, 7, 9))
    loaders = build_loaders(settings(data, batch_size=2), world)
    assert (loaders.train.num_images, loaders.val.num_images) == (2, 3)
    assert "1 training images without objects left out" in loaders.lines
    classes = torch.cat([Objects.of(batch.labels).classes for batch in loaders.val.epoch(0)])
    assert classes.flatten().tolist() == [0, NO_OBJECT, 1]


@pytest.mark.parametrize("workers", [0, 1])
def test_files_that_are_no_images_or_other_ones_are_named(tmp_path, settings, world, workers):
    for split in ("train", "val"):
        data = crafted(tmp_path, [GOOD], split=split)
    loader = build_val_loader(settings(data, workers=workers), world, None)
    (tmp_path / "val" / "9.png").write_bytes(b"no image")
    assert "9.png cannot be decoded" in refusal(lambda: list(loader.epoch(0)))
    Image.new("RGB", (40, 50)).save(tmp_path / "val" / "9.png")
    assert "9.png has 40 x 50 pixels, its annotations are for 50 x 40" in refusal(
        lambda: list(loader.epoch(0))
    )


def cut_short(path):
    """Lets a file's last tenth go: header and size are as they were."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 9 // 10])


def transposed(path):
    """Puts an image of the other format in its place."""
    with Image.open(path) as image:
        turned = image.transpose(Image.Transpose.ROTATE_90)
    turned.save(path)


DAMAGES = {
    "000004.jpg (empty file)": lambda path: path.write_bytes(b""),
    "000004.jpg (neither a JPEG nor": lambda path: path.write_bytes(b"no image"),
    "000004.jpg (truncated JPEG: no end-of-image marker)": cut_short,
    "000004.jpg (48 x 64 pixels, its annotations are for 64 x 48)": transposed,
}


@pytest.fixture
def damaged(tmp_path, folder):
    """A copy of `folder` with an image of a split damaged; returns it."""

    def build(damage, split="val"):
        copy = shutil.copytree(folder, tmp_path / "copy")
        damage(copy / split / "000004.jpg")
        return copy

    return build


@pytest.mark.parametrize("line", DAMAGES)
def test_images_that_cannot_be_evaluated_on_are_told_at_the_start(damaged, settings, world, line):
    data = damaged(DAMAGES[line])
    told = refusal(build_loaders, settings(data), world)
    assert told.startswith(f"--data: 1 of the images in {data / 'val'} that the evaluation reads")
    assert line in told
    assert told.endswith("; get them again, or take them out of the annotations")
    assert refusal(build_val_loader, settings(data), world, None) == told
    # Rows 0, 2 and 4 of the six are an evaluation's three, rows 0 and 3 its two.
    assert refusal(build_val_loader, settings(data), world, 3) == told
    assert build_val_loader(settings(data), world, 2).num_images == 2


def test_neither_a_run_nor_a_dry_one_begins_with_a_damaged_image(damaged, settings, tmp_path):
    config = settings(damaged(cut_short), output_dir=str(tmp_path / "run"))
    assert "000004.jpg (truncated JPEG" in refusal(train, config)
    assert not (tmp_path / "run").exists()
    assert "000004.jpg (truncated JPEG" in refusal(dry_run, config)


def test_each_rank_looks_at_the_images_that_it_evaluates_on(folder, settings, world_of, tmp_path):
    config, worlds = settings(folder, batch_size=2), [world_of(rank, 2) for rank in (0, 1)]
    shares = []
    for world in worlds:
        batches = build_val_loader(config, world, None).epoch(0)
        shares.append([row for batch in batches for row in batch.indices.tolist()])
    assert sorted(shares[0] + shares[1]) == list(range(6))
    data = shutil.copytree(folder, tmp_path / "copy")
    for row in shares[0]:
        cut_short(data / "val" / f"{row:06d}.jpg")
    config = settings(data, batch_size=2)
    assert "3 of the images" in refusal(build_val_loader, config, worlds[0], None)
    assert build_val_loader(config, worlds[1], None).num_images == 6


def test_training_images_are_met_in_training(damaged, settings, world):
    data = damaged(cut_short, "train")
    loaders = build_loaders(settings(data), world)
    assert "000004.jpg cannot be decoded" in refusal(lambda: list(loaders.train.epoch(0)))


def test_what_pil_alone_reads_can_be_evaluated_on(tmp_path, settings, world):
    """DALI and PIL do not agree on a GIF, for which a classifier's folder refuses it."""
    data = crafted(tmp_path, [GOOD], split="val")
    Image.new("RGB", (50, 40)).save(tmp_path / "val" / "9.png", format="GIF")
    loader = build_val_loader(settings(data), world, None)
    assert sum(len(batch.indices) for batch in loader.epoch(0)) == 2
    Image.new("RGB", (40, 50)).save(tmp_path / "val" / "9.png", format="GIF")
    told = refusal(build_val_loader, settings(data), world, None)
    assert "9.png (40 x 50 pixels, its annotations are for 50 x 40)" in told


def test_photographs_load(tmp_path, settings, world):
    loaders = build_loaders(settings(sample_folder(tmp_path), batch_size=8), world)
    assert loaders.train.num_images == 27
    assert loaders.train.annotations.num_objects == 173
    assert len(loaders.train.classes) == 80
    found = by_row(loaders.val.epoch(0))
    assert sorted(found) == list(range(27))
    for image, _, boxes, _ in found.values():
        assert image.float().std() > 10
        assert (boxes[:, 2:] <= torch.tensor(image.shape[1::-1])).all()


# Corruptions.


def test_corrupted_images_are_a_pure_function(folder, settings, world):
    pytest.importorskip("imagecorruptions")
    loader = build_val_loader(settings(folder), world, None)
    clean = list(loader.epoch(0))
    np.random.seed(7)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    for name in ("gaussian_noise", "snow"):
        corrupt = loader.corrupted(name, 3)
        first = list(corrupt.epoch(0))
        assert_same(list(corrupt.epoch(0, 1)), first[1:])
        for batch, other in zip(first, clean, strict=True):
            assert torch.equal(batch.labels, other.labels)
            assert torch.equal(batch.indices, other.indices)
            difference = (batch.images.float() - other.images.float()).abs()
            assert difference.mean() > 1
            padding = ~Objects.of(batch.labels).is_image(*batch.images.shape[1:3])
            assert not batch.images.permute(0, 3, 1, 2)[padding.expand(-1, 3, -1, -1)].any()
        assert not torch.equal(
            next(iter(loader.corrupted(name, 4).epoch(0))).images, first[0].images
        )
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002
    processes = build_val_loader(settings(folder, workers=1), world, None)
    assert_same(list(processes.corrupted("snow", 3).epoch(0)), first)


@pytest.mark.parametrize("name", ["gaussian_noise", "impulse_noise", "glass_blur"])
def test_each_image_has_noise_of_its_own(name, monkeypatch):
    """Whichever generator a corruption draws from."""
    package = pytest.importorskip("imagecorruptions.corruptions")
    shuffled = package._shuffle_pixels_njit_glass_blur.py_func  # compiling it takes 20 s
    monkeypatch.setattr(package, "_shuffle_pixels_njit_glass_blur", shuffled)
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    one, again, other = (corrupted(image, key, name, 2) for key in (2**63, 2**63, 5))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_images_too_small_are_told_before_one_is_decoded(tmp_path, settings, world):
    """Those that are evaluated; with training's they need not be of one size."""
    pytest.importorskip("imagecorruptions")
    data = crafted(tmp_path, [GOOD], ids=(5, 7, 9), split="val")
    listed = json.loads((tmp_path / "annotations" / "instances_val.json").read_text())["images"]
    listed[1] |= {"height": 50, "width": 31}
    write_annotations(tmp_path, "val", listed, [GOOD])
    Image.new("RGB", (31, 50)).save(tmp_path / "val" / "7.png")
    config = settings(data)
    line = "--eval-corruptions fog: .*7.png has 31 x 50 pixels, and the corruptions need 32 a side"
    with pytest.raises(UserError, match=line):
        build_val_loader(config, world, None).corrupted("fog", 1)
    assert build_val_loader(config, world, 1).corrupted("fog", 1).num_images == 1


def test_what_cannot_be_corrupted_is_one_line(folder, settings, world, monkeypatch):
    pytest.importorskip("imagecorruptions")
    loader = build_val_loader(settings(folder), world, None)
    with pytest.raises(UserError, match="--eval-corruptions rain: unknown; use all, or some of g"):
        loader.corrupted("rain", 1)
    from freeadv_fast.data.coco import corruption

    corruption._package.cache_clear()
    corruption.load_corruption.cache_clear()
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(UserError, match="pip install imagecorruptions-imaug; not imagecorruptions"):
        loader.corrupted("fog", 1)
