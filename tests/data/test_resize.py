"""The smaller copy: right sizes and pixels, resumable, never half a file, bad files listed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torchvision.transforms as transforms
from PIL import Image

from freeadv_fast.config.phases import Phases
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.data.build import build_phase_loaders
from freeadv_fast.data.index import index_images
from freeadv_fast.data.resize import copies as resize
from freeadv_fast.data.resize.copies import BAD_LIST, Resizing, resize_file, resize_folder
from freeadv_fast.errors import UserError


@pytest.fixture
def resized(tmp_path):
    """Resizes a tree into tmp_path/small with one worker."""

    def run(source, size=32, **options):
        return resize_folder(source, tmp_path / "small", size=size, **({"workers": 1} | options))

    return run


def files_below(folder):
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())


def refused(*words):
    return pytest.raises(UserError, match=".*".join(words))


def test_a_tree(tmp_path, build_tree, resized):
    source = Path(build_tree(train=5, val=2))
    (source / "train" / "class1" / "note.txt").write_text("no image")
    small = tmp_path / "small"
    report = resized(source, workers=2)
    assert report.counts == {"resized": 21}
    assert not report.bad
    assert set(files_below(source)) - set(files_below(small)) == {"train/class1/note.txt"}
    for split in ("train", "val"):
        before, after = (index_images(str(f / split), 0, pytest.fail) for f in (source, small))
        assert after.classes == before.classes
        assert after.files == before.files
        assert (after.sizes.min(1) == 32).all()
        longer = before.sizes.max(1) * 32 // before.sizes.min(1)
        assert (after.sizes.max(1) == longer).all()


def test_pixels_are_those_of_torchvisions_resize(tmp_path, build_tree, resized):
    source = Path(build_tree(train=2, val=1, classes=1))
    resized(source, quality=100)
    for path in (source / "train" / "class0").iterdir():
        wanted = transforms.Resize(32)(Image.open(path).convert("RGB"))
        found = Image.open(tmp_path / "small" / path.relative_to(source))
        assert found.size == wanted.size
        # Brightness alone: JPEGs store colour at half the resolution.
        difference = np.asarray(found.convert("L"), int) - np.asarray(wanted.convert("L"), int)
        assert np.abs(difference).max() <= 4


def test_every_mode_becomes_rgb(tmp_path, smooth_image, build_tree, resized):
    source = Path(build_tree(train=1, val=1, classes=1))
    place = source / "train" / "class0"
    for mode, name in (("CMYK", "c.jpg"), ("L", "g.JPG"), ("RGBA", "a.png"), ("P", "p.png")):
        smooth_image(1, 80, 50).convert(mode).save(place / name)
    resized(source)
    copies = sorted((tmp_path / "small" / "train" / "class0").iterdir())
    assert [p.name for p in copies] == ["000.JPEG", "a.png.jpg", "c.jpg", "g.JPG", "p.png.jpg"]
    for copy in copies:
        with Image.open(copy) as image:
            assert (image.format, image.mode, min(image.size)) == ("JPEG", "RGB", 32)


def test_small_images_are_copied_byte_for_byte(tmp_path, smooth_image, build_tree, resized):
    source = Path(build_tree(train=1, val=1, classes=1, side=16))
    png = source / "val" / "class0" / "tiny.png"
    smooth_image(1, 20, 32).save(png)
    assert resized(source).counts == {"copied": 3}
    for file in files_below(source):
        assert (tmp_path / "small" / file).read_bytes() == (source / file).read_bytes()


def test_bad_files_are_listed_and_left_out(tmp_path, build_tree, resized):
    source = Path(build_tree(train=4, val=1, classes=1))
    place = source / "train" / "class0"
    (place / "000.JPEG").write_bytes(b"")
    whole = (place / "001.JPEG").read_bytes()
    (place / "001.JPEG").write_bytes(whole[: len(whole) // 2])
    (place / "002.JPEG").write_text("<html>")
    report = resized(source)
    assert report.counts == {"resized": 2, "bad": 3}
    lines = (tmp_path / "small" / BAD_LIST).read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == [str(place / f"00{i}.JPEG") for i in range(3)]
    assert files_below(tmp_path / "small" / "train") == ["class0/003.JPEG"]
    for name in ("000", "001", "002"):
        (place / f"{name}.JPEG").write_bytes(whole)
    assert resized(source).counts == {"resized": 3, "there already": 2}
    assert not (tmp_path / "small" / BAD_LIST).exists()


@pytest.mark.parametrize("error", [RuntimeError("two\nlines"), MemoryError(), OSError(5, "EIO")])
def test_whatever_a_file_fails_of_is_that_files(error, tmp_path, build_tree, monkeypatch):
    source = Path(build_tree(train=3, val=1, classes=1))
    read = resize.read_rgb

    def read_or_fail(path):
        if path.endswith("001.JPEG"):
            raise error
        return read(path)

    monkeypatch.setattr(resize, "read_rgb", read_or_fail)
    (tmp_path / "small" / "train" / "class0").mkdir(parents=True)
    files = [f"train/class0/00{number}.JPEG" for number in range(3)]
    report = resize.resize_part(Resizing(source, tmp_path / "small", 32, 95), files)
    assert report.counts == {"resized": 2, "bad": 1}
    assert report.bad.keys() == {files[1]}
    assert report.bad[files[1]].startswith("cannot be resized: ")
    assert "\n" not in report.bad[files[1]]


def test_odd_files_do_not_stop_the_others(tmp_path, build_tree, resized):
    source = Path(build_tree(train=3, val=1, classes=1))
    place = source / "train" / "class0"
    Image.new("L", (100_000, 40)).save(place / "flat.png")
    longest = f"{'x' * 246}.JPEG"  # the copy is written under a name that is 9 letters longer
    (place / "000.JPEG").rename(place / longest)
    assert resized(source).counts == {"resized": 3, "bad": 2}
    listed = (tmp_path / "small" / BAD_LIST).read_text().splitlines()
    reasons = {Path(line.split("\t")[0]).name: line.split("\t")[1] for line in listed}
    assert reasons["flat.png"] == "100000 x 40 pixels: a side of more than 65,500"
    assert "File name too long" in reasons[longest]


DEADLY = """
import os, signal, sys
from freeadv_fast.data.resize import copies

smaller_jpeg = copies.smaller_jpeg

def kill_at_some(resizing, file):
    if "deadly" in file:
        os.kill(os.getpid(), signal.SIGKILL)
    return smaller_jpeg(resizing, file)

copies.smaller_jpeg = kill_at_some  # in the workers as well: they import this script
if __name__ == "__main__":
    report = copies.resize_folder(sys.argv[1], sys.argv[2], size=32, workers=2)
    print(sorted(report.counts.items()), sorted(report.bad.items()))
"""


def test_a_file_that_kills_its_worker_is_bad_and_the_others_are_copied(tmp_path, build_tree):
    source = Path(build_tree(train=4, val=1, classes=1))
    (source / "train/class0/002.JPEG").rename(source / "train/class0/deadly.JPEG")
    script = tmp_path / "script.py"
    script.write_text(DEADLY)
    command = [sys.executable, script, source, tmp_path / "small"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("[('bad', 1), ('resized', "), done.stderr
    assert "('train/class0/deadly.JPEG', 'cannot be resized: the process was killed" in done.stdout
    assert len(list((tmp_path / "small").rglob("*.JPEG"))) == 4
    for number in (0, 1, 3):
        path = source / f"train/class0/00{number}.JPEG"
        path.rename(path.with_name(f"deadly{number}.JPEG"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "UserError: --workers: one alone was killed at 3 images in a row" in done.stderr


def test_what_is_no_part_of_the_data_is_not_copied(tmp_path, build_tree, resized):
    """As the scan sees it: litter, and links to a parent."""
    source = Path(build_tree(train=1, val=1, classes=1))
    place = source / "train" / "class0"
    for inside in (".Trash-0", "more"):
        (place / inside).mkdir()
        shutil.copy(place / "000.JPEG", place / inside)
    (place / "up").symlink_to("..")
    shutil.copytree(place / "more", source / "train" / ".ipynb_checkpoints")
    assert resized(source).counts == {"resized": 3}
    assert set(files_below(tmp_path / "small")) == {
        "resize.json",
        "train/class0/000.JPEG",
        "train/class0/more/000.JPEG",
        "val/class0/000.JPEG",
    }


def test_phases_leave_out_what_could_not_be_copied(tmp_path, build_tree, resized, world_of):
    source = Path(build_tree(train=10, val=2, classes=2))
    victim = source / "train" / "class1" / "004.JPEG"
    content = bytearray(victim.read_bytes())
    content[content.index(b"\xff\xc4") + 4] = 0xFF  # a Huffman table of an impossible number
    victim.write_bytes(content)
    assert resized(source).bad.keys() == {"train/class1/004.JPEG"}
    small = str(tmp_path / "small")
    config = TrainConfig(
        data=str(source),
        phase_data=(small, str(source)),
        phases=Phases.parse("0-2:16:4,2-4:32:4"),
        epochs=4,
        m=1,
        holdout_images=4,
        max_bad_fraction=0.05,
    )
    for loaders in build_phase_loaders(config, world_of()):
        assert loaders.train.num_images + loaders.holdout.num_images == 19
        assert "class1/004.JPEG" not in loaders.roll.names


def test_finished_files_are_not_touched_again(tmp_path, build_tree, resized):
    source = build_tree(train=3, val=1, classes=1)
    resized(source)
    copies = list((tmp_path / "small").rglob("*.JPEG"))
    before = {copy: copy.stat().st_mtime_ns for copy in copies}
    gone = copies[0]
    gone.unlink()
    assert resized(source).counts == {"resized": 1, "there already": 3}
    assert all(copy.stat().st_mtime_ns == before[copy] for copy in copies if copy != gone)


def test_half_a_file_never_gets_the_name(tmp_path, build_tree, monkeypatch):
    source = Path(build_tree(train=1, val=1, classes=1))
    (tmp_path / "small" / "train" / "class0").mkdir(parents=True)

    write = Path.write_bytes

    def break_off(path, content):
        write(path, content[: len(content) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", break_off)
    resizing = Resizing(source, tmp_path / "small", 32, 95)
    with pytest.raises(KeyboardInterrupt):
        resize_file(resizing, os.path.join("train", "class0", "000.JPEG"))
    assert files_below(tmp_path / "small") == []


def test_errors_of_workers_are_raised(tmp_path, build_tree, resized):
    source = build_tree(train=1, val=1, classes=1)
    resized(source, size=8)
    for copy in (tmp_path / "small").rglob("*.JPEG"):
        copy.unlink()
        copy.with_name(f".{copy.name}.partial").mkdir()  # nothing can be written there
    with refused("TARGET", "000.JPEG.partial", "goes on from here"):
        resized(source, size=8)


def test_what_is_refused(tmp_path, build_tree, resized):
    source = build_tree(train=1, val=1, classes=1)
    with refused("--size 4", "at least 8"):
        resized(source, size=4)
    with refused("--quality 0", "between 1 and 100"):
        resized(source, quality=0)
    with refused("--workers 0", "at least 1"):
        resized(source, workers=0)
    with refused("SOURCE", "no train/ folder"):
        resized(tmp_path)
    with refused("TARGET", "inside SOURCE"):
        resize_folder(source, Path(source) / "small", size=32)
    resized(source)
    with refused("--size 48", "was begun with --size 32"):
        resized(source, size=48)
    other = build_tree(train=1, val=1, classes=1, name="other")
    with refused("SOURCE", "other", "was begun with SOURCE"):
        resized(other)
    with refused("TARGET", "holds other files"):
        resize_folder(source, other, size=32)


def test_the_command(tmp_path, build_tree):
    source = build_tree(train=2, val=1, classes=1)
    command = [sys.executable, "-m", "freeadv_fast.data.resize", source, str(tmp_path / "small")]
    done = subprocess.run(
        [*command, "--size", "32", "--workers", "1"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'small'}: 3 resized\n"), done.stderr
    wrong = subprocess.run([*command, "--sise", "32"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr == "error: --sise: no such flag; did you mean --size?\n"


def test_workers_are_deaf_to_ctrl_c_from_their_birth(tmp_path, build_tree):
    """One that dies while it starts would make the pool kill the others in the middle of a file."""
    code = """
import multiprocessing, signal, sys
from freeadv_fast.data.resize import resize_folder
if __name__ == "__main__":
    resize_folder(sys.argv[1], sys.argv[2], size=16, workers=1)
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        print(signal.SIGINT in pool.apply(signal.pthread_sigmask, (signal.SIG_BLOCK, ())))
    print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    command = [sys.executable, script, build_tree(train=2, val=1), tmp_path / "small"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True", "False"], done.stderr


def test_an_interruption_leaves_whole_files_and_a_quiet_end(tmp_path, build_tree):
    source, small = build_tree(train=400, val=1, classes=2, side=200), tmp_path / "small"
    command = [sys.executable, "-m", "freeadv_fast.data.resize", source, str(small)]
    command += ["--size", "160", "--workers", "1"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not list(small.rglob("*.JPEG")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert output + errors == ""
    copies = list(small.rglob("*.JPEG"))
    assert 0 < len(copies) < 802
    for copy in copies:
        Image.open(copy).load()
    assert not list(small.rglob("*.partial"))
    report = resize_folder(source, small, size=160, workers=2)
    assert report.counts == {"resized": 802 - len(copies), "there already": len(copies)}
    assert resize.SETTINGS in os.listdir(small)
