"""The scan: what it finds bad, what it remembers, and its one-line errors."""

from __future__ import annotations

import io
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from freeadv_fast.data import index
from freeadv_fast.data.build import build_loaders, build_val_loader
from freeadv_fast.data.formats.picture_file import BadImage
from freeadv_fast.data.headers import inspect_image
from freeadv_fast.data.index import TooManyBad, index_images
from freeadv_fast.errors import UserError
from freeadv_fast.evaluation.images import open_folder, open_val


def jpeg(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def scan(folder, max_bad_fraction=1.0):
    return index_images(str(folder), max_bad_fraction, pytest.fail)


def one_line(error, *words):
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text


@pytest.fixture
def inspect(tmp_path):
    def look(content):
        path = tmp_path / "file.jpg"
        path.write_bytes(content)
        return inspect_image(str(path))

    return look


def test_sizes_come_from_the_header(inspect, smooth_image):
    image = smooth_image(0, 33, 57)
    assert inspect(jpeg(image)) == (33, 57)
    assert inspect(jpeg(image, progressive=True)) == (33, 57)
    assert inspect(jpeg(smooth_image(0, 20, 10, "CMYK"))) == (20, 10)
    assert inspect(jpeg(smooth_image(0, 20, 10, "L"))) == (20, 10)
    assert inspect(png(image)) == (33, 57)
    turned = Image.Exif()
    turned[0x0112] = 6
    assert inspect(jpeg(image, exif=turned)) == (33, 57)
    # A profile of many segments, so that the frame header lies far behind the first read.
    assert inspect(jpeg(image, icc_profile=bytes(300_000))) == (33, 57)
    assert inspect(jpeg(image, comment=b"\xff\xd9" * 50)) == (33, 57)
    assert inspect(jpeg(image) + bytes(5000)) == (33, 57)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: b"", "empty file"),
        (lambda data: b"hello, world", "neither a JPEG nor a PNG"),
        (lambda data: b"GIF89a" + data, "neither a JPEG nor a PNG"),
        (lambda data: data[:-2], "no end-of-image"),
        (lambda data: data[: len(data) // 2], "no end-of-image"),
        (lambda data: data[:-2] + bytes(3000), "no end-of-image"),
        (lambda data: data[:100], "inside its header"),
        (lambda data: data[:2] + bytes(50) + data[2:], "neither a JPEG"),
        (lambda data: data[:20] + bytes(50) + data[20:], "damaged JPEG header"),
        (lambda data: data.replace(b"\xff\xc0", b"\xff\xc3", 1), "do not read"),
        (
            lambda data: data.replace(b"\xff\xc0\x00\x11\x08\x00", b"\xff\xc0\x00\x11\x08\x00", 1)[
                :3
            ],
            "inside its header",
        ),
    ],
)
def test_bad_jpegs(damage, reason, inspect, smooth_image):
    with pytest.raises(BadImage, match=reason):
        inspect(damage(jpeg(smooth_image(0, 64, 64))))


def test_a_thumbnails_end_mark_does_not_make_an_image_whole(inspect, smooth_image):
    thumbnail = jpeg(smooth_image(0, 16, 16))
    whole = jpeg(smooth_image(1, 64, 64), exif=b"Exif\0\0" + thumbnail)
    assert inspect(whole) == (64, 64)
    frame = whole.rindex(b"\xff\xc0")
    with pytest.raises(BadImage, match="no end-of-image"):
        inspect(whole[: frame + 40])


def test_bad_pngs(inspect, smooth_image):
    data = png(smooth_image(0, 64, 64))
    with pytest.raises(BadImage, match="no IEND"):
        inspect(data[:-12])
    with pytest.raises(BadImage, match="damaged PNG header"):
        inspect(data[:20])
    header = b"IHDR" + struct.pack(">II", 0, 5) + data[24:29]
    with pytest.raises(BadImage, match="zero height or width"):
        inspect(data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:])


def test_an_unreadable_path_is_bad(tmp_path):
    with pytest.raises(BadImage, match="cannot be opened"):
        inspect_image(str(tmp_path / "absent.jpg"))


def test_order_is_torchvisions(build_tree):
    data = Path(build_tree(), "train")
    first = sorted((data / "class0").iterdir())[0]
    for name in ("B.JPG", "a.jpeg", "sub/z.png", "0.PNG", "notes.txt"):
        target = data / "class0" / name
        target.parent.mkdir(exist_ok=True)
        shutil.copy(first, target)
    (data / "class1" / "link.jpg").symlink_to(first)
    found = scan(data)
    reference = ImageFolder(data)
    paths = [found.path(row) for row in range(len(found.files))]
    assert list(zip(paths, found.labels.tolist(), strict=True)) == reference.samples
    assert found.classes == reference.classes
    sizes = [reference[row][0].size[::-1] for row in range(len(paths))]
    np.testing.assert_array_equal(found.sizes, sizes)


def test_bad_files_are_left_out_listed_and_counted(backend, build_tree, config, world_of):
    data = Path(build_tree(train=20))
    (data / "train/class0/empty.jpg").write_bytes(b"")
    cut = data / "train/class2/003.JPEG"
    cut.write_bytes(cut.read_bytes()[:-40])
    loaders = build_loaders(config(str(data), max_bad_fraction=0.05), world_of())
    assert loaders.train.num_images == 59
    (line,) = [line for line in loaders.describe() if "left out" in line]
    assert line.startswith("2 bad files")
    listed = Path(re.search(r"listed in (.*)$", line)[1]).read_text().splitlines()
    assert [text.split("\t")[1] for text in listed] == [
        "empty file",
        "truncated JPEG: no end-of-image marker",
    ]
    assert listed[0].startswith(str(data / "train/class0/empty.jpg"))
    assert len(list(loaders.train.epoch(0))) == 12
    (data / "train/class0/empty.jpg").unlink()
    cut.unlink()
    loaders = build_loaders(config(str(data)), world_of())
    assert not [line for line in loaders.describe() if "left out" in line]


def test_too_many_bad_files_refuse_the_run(build_tree, config, world_of):
    data = Path(build_tree(train=20))
    for name in ("000", "001", "002", "003", "004"):
        (data / f"train/class1/{name}.JPEG").write_bytes(b"<html>404</html>")
    with pytest.raises(UserError) as error:
        build_loaders(config(str(data)), world_of())
    one_line(
        error,
        "--max-bad-fraction 0.001",
        "5 of 60 files",
        "class1/000.JPEG",
        "and 2 more",
        "neither a JPEG",
    )
    build_loaders(config(str(data), max_bad_fraction=5 / 60), world_of())
    with pytest.raises(UserError, match="--max-bad-fraction"):
        build_loaders(config(str(data), max_bad_fraction=4.9 / 60), world_of())


@pytest.fixture
def counted_reads(monkeypatch):
    """The names of the files that a scan looks into."""
    reads = []

    def counting(path):
        reads.append(Path(path).name)
        return inspect_image(path)

    monkeypatch.setattr(index, "inspect_image", counting)
    return reads


def test_only_new_and_changed_files_are_read_again(build_tree, counted_reads, smooth_image):
    data = Path(build_tree(), "train")
    before = scan(data)
    assert len(counted_reads) == 36
    counted_reads.clear()
    after = scan(data)
    assert counted_reads == []
    assert after.files == before.files
    np.testing.assert_array_equal(after.sizes, before.sizes)

    (data / "class0" / "000.JPEG").unlink()
    (data / "class1" / "new.png").write_bytes(png(smooth_image(9, 50, 60)))
    (data / "class1" / "002.JPEG").write_bytes(jpeg(smooth_image(9, 70, 71)))
    same_size = data / "class2" / "003.JPEG"
    content = same_size.read_bytes()
    same_size.write_bytes(content[:-2] + b"ab")
    os.utime(same_size, ns=(1, 1))
    changed = scan(data)
    assert sorted(counted_reads) == ["002.JPEG", "003.JPEG", "new.png"]
    assert list(changed.bad) == ["class2/003.JPEG"]
    assert "class0/000.JPEG" not in changed.files
    assert changed.sizes[changed.files.index("class1/002.JPEG")].tolist() == [70, 71]
    counted_reads.clear()
    assert scan(data).files == changed.files
    assert counted_reads == []


@pytest.mark.parametrize("damage", [b"", b"not an archive", None])
def test_a_damaged_cache_is_rebuilt(damage, build_tree, counted_reads, cache):
    data = Path(build_tree(), "train")
    before = scan(data)
    (file,) = cache.glob("index-*.npz")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    counted_reads.clear()
    after = scan(data)
    assert len(counted_reads) == 36
    assert after.files == before.files
    np.testing.assert_array_equal(after.sizes, before.sizes)
    counted_reads.clear()
    scan(data)
    assert counted_reads == []
    assert [path.name for path in cache.iterdir()] == [file.name]  # no temporary files


def test_a_cache_that_cannot_be_written_is_done_without(build_tree, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(scan(Path(build_tree(), "train")).files) == 36


def test_a_file_forbidden_today_is_looked_at_tomorrow(build_tree, monkeypatch):
    data = Path(build_tree(), "train")

    def forbidden(path):
        raise BadImage("cannot be opened: Permission denied")

    monkeypatch.setattr(index, "inspect_image", forbidden)
    with pytest.raises(UserError):
        scan(data, 0.0)
    monkeypatch.undo()
    assert len(scan(data).files) == 36


def test_two_processes_scan_at_once(build_tree, cache):
    data = build_tree()
    code = (
        "import sys; from freeadv_fast.data.index import index_images;"
        "print(len(index_images(sys.argv[1], 0.0, print).files))"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(cache.parent)}
    command = [sys.executable, "-c", code, f"{data}/train"]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    assert [process.communicate()[0].strip() for process in both] == ["36", "36"]
    assert len(list(cache.iterdir())) == 1


def test_a_long_scan_is_announced(build_tree, monkeypatch):
    monkeypatch.setattr(index, "ANNOUNCED_FILES", 36)
    lines = []
    data = str(Path(build_tree(), "train"))
    index_images(data, 0.0, lines.append)
    index_images(data, 0.0, lines.append)
    assert len(lines) == 1
    assert "36 image files" in lines[0]


def test_missing_and_empty_folders(tmp_path, config, world_of):
    with pytest.raises(UserError) as error:
        build_loaders(config(str(tmp_path / "absent")), world_of())
    one_line(error, "--data", "absent", "no such folder")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="no such folder"):
        build_loaders(config(str(tmp_path / "file")), world_of())
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError) as error:
        build_loaders(config(str(tmp_path / "bare")), world_of())
    one_line(error, "--data", "the folder is empty", "train/ and val/")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_is_missing_or_empty(split, build_tree, config, world_of):
    data = build_tree()
    shutil.rmtree(f"{data}/{split}")
    with pytest.raises(UserError) as error:
        build_loaders(config(data), world_of())
    one_line(error, f"no {split}/ folder")
    os.mkdir(f"{data}/{split}")
    with pytest.raises(UserError) as error:
        build_loaders(config(data), world_of())
    one_line(error, f"{split}/ is empty")


def test_an_evaluation_does_not_need_train(build_tree, config, world_of):
    data = build_tree()
    shutil.rmtree(f"{data}/train")
    assert build_val_loader(config(data), world_of(), None).num_images == 12


def test_a_flat_val_says_how_to_sort_it(build_tree, config, world_of):
    data = Path(build_tree())
    for path in list((data / "val").rglob("*.JPEG")):
        path.rename(data / "val" / f"{path.parent.name}-{path.name}")
    for place in list((data / "val").glob("class?")):
        place.rmdir()
    with pytest.raises(UserError) as error:
        build_loaders(config(str(data)), world_of())
    one_line(error, "no class folders", "move each image to val/CLASS/", "valprep.sh")


def test_class_folders_without_images(build_tree, config, world_of):
    data = Path(build_tree())
    for name in ("p", "q", "r", "s", "t"):
        (data / "train" / name).mkdir()
        (data / "train" / name / "notes.txt").write_text("")
    with pytest.raises(UserError) as error:
        build_loaders(config(str(data)), world_of())
    one_line(error, "5 class folders without images", "p, q, r, and 2 more")


@pytest.mark.parametrize(
    ("changed", "lacking"), [("val", "val/ lacks 1 of the 3"), ("train", "train/ lacks 1 of the 3")]
)
def test_other_classes_in_val(changed, lacking, build_tree, config, world_of):
    data = Path(build_tree())
    shutil.rmtree(data / changed / "class1")
    with pytest.raises(UserError) as error:
        build_loaders(config(str(data)), world_of())
    one_line(error, lacking, "class1")


def test_renamed_classes_in_val(build_tree, config, world_of):
    data = Path(build_tree())
    (data / "val" / "class1").rename(data / "val" / "Class1")
    with pytest.raises(UserError) as error:
        build_loaders(config(str(data)), world_of())
    one_line(error, "lacks 1", "class1")


@pytest.mark.parametrize("data", ["synthetic:", "synthetic:1", "synthetic:many", "synthetic:-3"])
def test_synthetic_needs_a_number_of_classes(data, config, world_of):
    if data == "synthetic:":
        build_loaders(config(data, image_size=8), world_of())
        return
    with pytest.raises(UserError, match=r"synthetic:CLASSES"):
        build_loaders(config(data, image_size=8), world_of())


def test_an_evaluation_names_no_flag_that_it_lacks(build_tree, config, world_of):
    """launch/evaluate.py has no --max-bad-fraction; a folder of images has its own flag."""
    data = Path(build_tree())
    for name in sorted(os.listdir(data / "val/class1"))[:2]:
        (data / "val/class1" / name).write_bytes(b"<html>404</html>")
    found = rf"2 of \d+ files in {data}/val cannot be used: class1/.*; repair or remove them, for "
    found += r"an evaluation leaves out no more than 0\.10%$"
    with pytest.raises(UserError, match=f"^--data: {found}"):
        open_val(config(str(data)), world_of(), None)
    with pytest.raises(UserError, match=f"^--imagenet-r: {found}"):
        open_folder("--imagenet-r", data / "val", config(""), world_of(), None)
    (data / "val/class9").mkdir()
    with pytest.raises(UserError, match=r"^--stylized: 1 class folders without images in .*class9"):
        open_folder("--stylized", data / "val", config(""), world_of(), None)


def test_a_refusal_of_bad_files_travels_between_ranks_and_names_their_list(build_tree):
    data = Path(build_tree())
    for name in os.listdir(data / "train/class1")[:4]:
        (data / "train/class1" / name).write_bytes(b"")
    with pytest.raises(TooManyBad) as caught:
        scan(data / "train", 0.0)
    received = pickle.loads(pickle.dumps(caught.value))
    assert str(received) == str(caught.value)
    listed = re.search(r", and 1 more, all in (\S+); repair or remove", str(received))[1]
    assert len(Path(listed).read_text().splitlines()) == 4
