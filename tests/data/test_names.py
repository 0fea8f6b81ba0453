"""What counts as an image, what it is called, and what is left out of a class."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from freeadv_fast.data.build import build_loaders
from freeadv_fast.data.index import image_name, index_images, is_image_name
from freeadv_fast.data.names import is_litter, keys_of
from freeadv_fast.errors import UserError


def scan(folder):
    return index_images(str(folder), 0.0, pytest.fail)


def copied(source, *places):
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, place)


def test_keys_are_the_same_on_every_machine() -> None:
    """BLAKE2b of the name's bytes on disk, little endian, whatever characters they are."""
    names = ["class0/000.JPEG", os.fsdecode(b"\xff/\xe4.jpg")]
    assert keys_of(names).tolist() == [
        int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8).digest(), "little")
        for name in names
    ]


def test_a_copy_is_called_as_its_original() -> None:
    assert image_name("n01/a.png.jpg") == "n01/a.png"
    assert image_name("n01/a.WEBP.jpg") == "n01/a.WEBP"
    for name in ("n01/a.jpg", "n01/a.JPEG.jpg", "n01/a.jfif.jpg", "n01/a.b.jpg", "n01/a.png"):
        assert image_name(name) == name


@pytest.mark.parametrize("name", ["a.jfif", "a.JFIF", "a.jpg", "a.webp"])
def test_names_of_images(name) -> None:
    assert is_image_name(name)


@pytest.mark.parametrize(
    "name",
    [".ipynb_checkpoints", ".Trash-0", "._a.jpg", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "#recycle"],
)
def test_litter(name) -> None:
    assert is_litter(name)
    assert not is_litter(name.strip(".@#$_"))


def test_a_jfif_is_a_jpeg(build_tree) -> None:
    data = Path(build_tree(), "train")
    (data / "class0" / "000.JPEG").rename(data / "class0" / "000.jfif")
    assert "class0/000.jfif" in scan(data).files


def test_foreign_folders_and_files_are_left_out_and_named(build_tree, config, world_of) -> None:
    data = Path(build_tree())
    train, before = data / "train", scan(data / "train").files
    copied(
        train / "class0" / "000.JPEG",
        train / ".ipynb_checkpoints" / "000-checkpoint.JPEG",
        train / "@eaDir" / "000.JPEG",
        train / "class0" / ".Trash-0" / "files" / "999.JPEG",
        train / "class1" / "._001.JPEG",
        train / "class1" / ".DS_Store",
    )
    found = scan(train)
    assert found.files == before
    assert found.classes == ["class0", "class1", "class2"]
    assert found.foreign == [
        ".ipynb_checkpoints", "@eaDir", "class0/.Trash-0", "class1/._001.JPEG"
    ]  # fmt: skip
    (line,) = [x for x in build_loaders(config(str(data)), world_of()).lines if "no part" in x]
    assert line == (
        f"left out of {train}, by name no part of the data: .ipynb_checkpoints, @eaDir, "
        "class0/.Trash-0, and 1 more"
    )


def test_links_to_parents_bring_no_image_twice(build_tree) -> None:
    data = Path(build_tree())
    train, before = data / "train", scan(data / "train").files
    (train / "class0" / "itself").symlink_to(".")
    (train / "class1" / "all").symlink_to("..")
    (train / "class2" / "everything").symlink_to(data)
    (train / "whole").symlink_to(data)
    found = scan(train)
    assert found.files == before
    assert found.foreign == ["whole", "class0/itself", "class1/all", "class2/everything"]


def test_other_links_are_followed_once(build_tree, tmp_path) -> None:
    data = Path(build_tree(), "train")
    copied(data / "class0" / "000.JPEG", tmp_path / "more" / "a.JPEG")
    (data / "class0" / "x").symlink_to(tmp_path / "more")
    (data / "class0" / "y").symlink_to(tmp_path / "more")
    found = scan(data)
    assert [file for file in found.files if file.endswith("a.JPEG")] == ["class0/x/a.JPEG"]


def test_a_folder_that_cannot_be_read_is_named(build_tree, config, world_of, monkeypatch) -> None:
    """Not taken for one without images."""
    data = build_tree()
    inner = Path(data, "train", "class1", "inner")
    inner.mkdir()
    real = os.scandir

    def scandir(path):
        if str(path) == str(inner):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=rf"--data {data}: {inner} cannot be read \(Permission"):
        build_loaders(config(data), world_of())
