"""Preprocessing by RobustBench's names against torchvision's transforms; fixed lists of images."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.data.build import build_val_loader
from freeadv_fast.data.preprocessing import PREPROCESSINGS, find_preprocessing
from freeadv_fast.data.view import View, read_image_list
from freeadv_fast.errors import UserError
from freeadv_fast.evaluation.images import open_val, whole_val_loader

# robustbench/data.py, as torchvision says it.
BICUBIC = transforms.InterpolationMode.BICUBIC
TRANSFORMS = {
    "Res256Crop224": [transforms.Resize(256), transforms.CenterCrop(224)],
    "BicubicRes256Crop224": [transforms.Resize(256, BICUBIC), transforms.CenterCrop(224)],
    "Crop288": [transforms.CenterCrop(288)],
    "Res224": [transforms.Resize([224, 224])],
    "none": [],
}
# Height and width: above and below every crop, odd, one side short, exact.
SIZES = [(300, 401), (500, 375), (281, 290), (190, 305), (97, 64), (288, 288), (224, 320)]
SQUARES = [(40, 40)] * 3


@pytest.fixture
def pictures(tmp_path, smooth_image):
    """A folder of losslessly stored pictures of given sizes, one class for even ones."""

    def build(sizes):
        for number, (height, width) in enumerate(sizes):
            place = tmp_path / "data/val" / f"class{number % 2}"
            place.mkdir(parents=True, exist_ok=True)
            smooth_image(number, height, width).save(place / f"{number}.png")
        return tmp_path / "data"

    return build


def config_of(data, side, **changes):
    options = {"augment": "none", "workers": 0, "batch_size": 4, "resize_size": 0} | changes
    return TrainConfig(
        method="natural", m=1, data=str(data), image_size=side, normalization="none", **options
    )


@pytest.mark.parametrize("name", TRANSFORMS)
def test_pixels_are_torchvision_s(name, pictures, world_of):
    way = PREPROCESSINGS[name]
    data = pictures(SQUARES if name == "none" else SIZES)
    loader = open_val(config_of(data, way.image_size or 40), world_of(), None, View(name))
    seen = torch.cat([batch.images for batch in loader.epoch(0)])
    files = [Path(loader.index.path(row)) for row in range(len(seen))]
    transform = transforms.Compose([*TRANSFORMS[name], transforms.PILToTensor()])
    for pixels, file in zip(seen, files, strict=True):
        with Image.open(file) as image:
            assert torch.equal(pixels.permute(2, 0, 1), transform(image.convert("RGB"))), file.name


def test_all_names_are_checked_here():
    assert set(TRANSFORMS) == set(PREPROCESSINGS)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("res256crop224", "did you mean Res256Crop224?"), ("Crop224", "did you mean"),
     ("x", "Res256Crop224, BicubicRes256Crop224, Crop288, Res224, none")],
)  # fmt: skip
def test_other_names_are_refused(name, hint):
    with pytest.raises(UserError, match=f"--preprocessing {name}: no such preprocessing") as caught:
        find_preprocessing(name)
    assert hint in str(caught.value)


def test_images_of_another_size_are_named_where_nothing_resizes_them(pictures, world_of):
    data = pictures([(40, 40), (40, 40), (40, 41)])
    with pytest.raises(UserError, match=r"none: class0/2\.png is 41 x 40 pixels.* 40 x 40; give"):
        open_val(config_of(data, 40), world_of(), None, View("none"))
    listed = data / "list.txt"
    listed.write_text("class0/0.png\nclass1/1.png\n")
    view = View("none", read_image_list(listed))
    assert open_val(config_of(data, 40), world_of(), None, view).num_images == 2


def test_what_is_no_folder_takes_neither(world_of, tmp_path):
    config = config_of("synthetic:3", 8)
    listed = tmp_path / "list.txt"
    listed.write_text("class0/0.png\n")
    with pytest.raises(UserError, match="Crop288: synthetic:3 is not resized; use none"):
        open_val(config, world_of(), 4, View("Crop288"))
    with pytest.raises(UserError, match="synthetic:3 holds no image files"):
        open_val(config, world_of(), 4, View(image_list=read_image_list(listed)))
    assert open_val(config, world_of(), 4, View("none")).num_images == 4


@pytest.fixture
def listed(small_images, tmp_path):
    """Writes a list and reads it; the set's images are class0/0.jpg to class2/5.jpg."""

    def write(text):
        path = tmp_path / "ids.txt"
        path.write_bytes(text.encode())
        return View(image_list=read_image_list(path))

    return write


def files_of(loader):
    return [loader.index.files[row] for batch in loader.epoch(0) for row in batch.indices.tolist()]


def test_exactly_the_listed_images_are_read(small_images, listed, world_of):
    """In the set's order; without a last newline, as RobustBench's list, or with Windows'."""
    view = listed("class2/0.jpg\r\n./class0/3.jpg\n\nclass1/5.jpg")
    config = config_of(small_images, 16)
    loader = open_val(config, world_of(), None, view)
    assert files_of(loader) == ["class0/3.jpg", "class1/5.jpg", "class2/0.jpg"]
    labels = torch.cat([batch.labels for batch in loader.epoch(0)])
    assert labels.tolist() == [0, 1, 2]
    content = Path(view.image_list.path).read_bytes()
    assert view.image_list.digest == hashlib.sha256(content).hexdigest()


def test_some_of_the_list_are_attacked_and_all_of_it_is_read_clean(small_images, listed, world_of):
    names = [f"class{c}/{i}.jpg" for c in range(3) for i in range(0, 6, 2)]
    config = config_of(small_images, 16, eval_images=3)
    view = listed("\n".join(reversed(names)))
    assert files_of(open_val(config, world_of(), 3, view)) == names[::3]
    assert whole_val_loader(config, world_of(), view).num_images == len(names)


def test_ranks_share_the_list(small_images, listed, world_of):
    names = [f"class{c}/{i}.jpg" for c in range(3) for i in range(0, 6, 2)]
    config = config_of(small_images, 16)
    shares = [
        files_of(build_val_loader(config, world_of(rank, 2), None, listed("\n".join(names))))
        for rank in range(2)
    ]
    assert sorted(shares[0] + shares[1]) == names


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("class0/0.jpg\nclass0/9.jpg\nclass7/1.jpg", r"2 of its 3 images are not in .*/val "
         r"\(class0/9\.jpg, class7/1\.jpg\)"),
        ("\n".join(f"x/{i}.jpg" for i in range(9)), r"9 of its 9 .*x/2\.jpg, and 6 more\)"),
        ("class0/0.jpg\nclass0/1.jpg\nclass0/0.jpg", r"lists 1 images twice \(class0/0\.jpg\)"),
        (" \n\n", "lists no images"),
    ],
)  # fmt: skip
def test_a_list_that_does_not_fit_is_refused_in_a_line(
    small_images, listed, world_of, text, complaint
):
    with pytest.raises(UserError, match=complaint) as caught:
        open_val(config_of(small_images, 16), world_of(), None, listed(text))
    assert str(caught.value).startswith("--image-list ")
    assert "\n" not in str(caught.value)


def test_a_list_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--image-list .*none\.txt: No such file"):
        read_image_list(tmp_path / "none.txt")
    (tmp_path / "picture").write_bytes(bytes(np.arange(256, dtype=np.uint8)))
    with pytest.raises(UserError, match="not a text file"):
        read_image_list(tmp_path / "picture")


def test_a_bad_file_is_missing_with_its_reason(pictures, world_of, tmp_path):
    data = pictures([(20, 20)] * 8)
    (data / "val/class0/0.png").write_bytes(b"<html>404</html>")
    path = tmp_path / "ids.txt"
    path.write_text("class0/0.png\nclass0/2.png\n")
    config = config_of(data, 16, max_bad_fraction=0.5)
    with pytest.raises(UserError, match=r"1 of its 2 images .*\(class0/0\.png \(.+\)\)"):
        open_val(config, world_of(), None, View(image_list=read_image_list(path)))
