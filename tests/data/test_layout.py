"""Folders that lie otherwise than one folder a class: refused, with the way out in the line."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from freeadv_fast.data.build import build_loaders, build_val_loader
from freeadv_fast.errors import UserError


def error_of(build, *arguments):
    with pytest.raises(UserError) as caught:
        build(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def follow(line, mark):
    """Does what a line says."""
    subprocess.run(["bash", "-ec", line.partition(mark)[2]], check=True)


@pytest.mark.parametrize("split", ["train", "val"])
def test_one_level_too_deep(split, build_tree, config, world_of):
    data = build_tree(name="my tree")
    place = Path(data, split)
    deeper = place / "images"
    classes = sorted(place.iterdir())
    deeper.mkdir()
    for each in classes:
        each.rename(deeper / each.name)
    error = error_of(build_loaders, config(data), world_of())
    assert error.startswith(
        f"--data {data}: {split}/ holds one folder only, images/, and there would be one class; "
        "the 3 folders in images/ seem to be the classes (class0, class1, class2), move them up: "
    )
    follow(error, "move them up: ")
    assert build_loaders(config(data), world_of()).train.classes == ["class0", "class1", "class2"]


def test_tiny_imagenets_val_is_sorted_as_the_line_says(build_tree, config, world_of):
    data = build_tree(name="tiny imagenet")
    val, labels = Path(data, "val"), []
    (val / "images").mkdir()
    for path in sorted(val.glob("class*/*")):
        name = f"val_{len(labels)}.JPEG"
        labels.append(f"{name}\t{path.parent.name}\t0\t32\t44\t62\n")
        path.rename(val / "images" / name)
    for place in val.glob("class*"):
        place.rmdir()
    (val / "val_annotations.txt").write_text("".join(labels))
    error = error_of(build_loaders, config(data), world_of())
    assert "val/ holds one folder only, images/" in error
    follow(error, "sort them by it: ")
    assert build_loaders(config(data), world_of()).val.num_images == 12
    assert sorted(path.name for path in val.iterdir()) == [
        "class0", "class1", "class2", "val_annotations.txt"
    ]  # fmt: skip


def test_one_class_is_none(build_tree, config, world_of):
    data = build_tree(classes=1)
    for build in (build_loaders, lambda *arguments: build_val_loader(*arguments, None)):
        error = error_of(build, config(data), world_of())
        assert "one folder only, class0/" in error
        assert error.endswith("an ImageFolder holds one folder a class, two or more")


def test_litter_does_not_make_two_classes(build_tree, config, world_of):
    data = build_tree(classes=1)
    Path(data, "val", ".ipynb_checkpoints").mkdir()
    assert "one folder only, class0/" in error_of(build_loaders, config(data), world_of())


def test_one_level_too_high(build_tree, config, world_of):
    data = build_tree()
    above = str(Path(data).parent)
    assert error_of(build_loaders, config(above), world_of()).endswith(
        f"(did you mean --data {data}?)"
    )


@pytest.mark.parametrize("data", ["~/tree", "cifar10:~/cifar", "svhn:~/svhn"])
def test_a_tilde_is_the_home_folder(data, build_tree, config, world_of, tmp_path, monkeypatch):
    """Which no shell expands behind a colon or in --data=~/tree."""
    monkeypatch.setenv("HOME", str(tmp_path))
    if data == "~/tree":
        build_tree()
        assert build_loaders(config(data), world_of()).train.num_images == 36
        return
    options = {"augment": "none"}
    folder = tmp_path / data.partition("~/")[2]
    assert f"{folder}" in error_of(build_loaders, config(data, **options), world_of())
