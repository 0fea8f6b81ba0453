"""Two ranks with a copy of the data each: what differs is named before anything trains."""

import json
import shutil
from pathlib import Path

from forked import run_ranks

WORKER = Path(__file__).with_name("own_copies_worker.py")
DIFFERENT = "give every node the same images"


def cut(case):
    path = case / "data" / "train" / "class1" / "7.jpg"
    path.write_bytes(path.read_bytes()[:-40])


def rename_a_class(case):
    for split in ("train", "val"):
        (case / "data" / split / "class2").rename(case / "data" / split / "class4")


def rename_a_class_of_one_split(case):
    (case / "data" / "train" / "class2").rename(case / "data" / "train" / "class4")


def remove(case):
    (case / "data" / "val" / "class0" / "3.jpg").unlink()


def forget_a_copy(case):
    (case / "small" / "train" / "class0" / "0.jpg").unlink()


def nothing(case):
    pass


# What one rank does to its copy, which rank, and what all are told.
BAD = "class1/7.jpg (truncated JPEG: no end-of-image marker)"
CASES = {
    "cut": (cut, 1, f"train: rank 1 leaves out {BAD}, which rank 0 reads; {DIFFERENT}"),
    "cut_on_main": (cut, 0, f"train: rank 0 leaves out {BAD}, which rank 1 reads; {DIFFERENT}"),
    "equal": (nothing, 1, None),
    "renamed": (
        rename_a_class,
        1,
        f"val: rank 1 has the class class4, and lacks class2 of rank 0; {DIFFERENT}",
    ),
    "removed": (remove, 1, f"val: rank 1 lacks class0/3.jpg, which rank 0 has; {DIFFERENT}"),
}


def test_every_rank_is_told_which_rank_and_file_differ(small_images, tmp_path):
    """Truncated, removed, a class renamed, a copy for a phase; the next opening works again."""
    cases = CASES | {
        "half_renamed": (rename_a_class_of_one_split, 1, None),
        "phase": (forget_a_copy, 1, None),
    }
    for name, (change, changing, _) in cases.items():
        for rank in range(2):
            case = tmp_path / f"rank{rank}" / name
            for copy in ["data", "small"] if name == "phase" else ["data"]:
                shutil.copytree(small_images, case / copy)
            if rank == changing:
                change(case)
    done = run_ranks(2, WORKER, tmp_path, output=tmp_path / "output")
    assert done.returncode == 0, done.stderr
    told = [json.loads((tmp_path / f"told{rank}.json").read_text()) for rank in range(2)]
    assert told[0] == told[1]
    expected = {
        name: words and f"--data {name}/data: {words}" for name, (_, _, words) in CASES.items()
    }
    expected["half_renamed"] = (
        "rank 1: --data half_renamed/data: val/ lacks 1 of the 3 classes: class4; both splits "
        "need the same classes"
    )
    expected["phase"] = (
        f"--phase-data phase/small: train: rank 1 lacks class0/0.jpg, which rank 0 has; {DIFFERENT}"
    )
    assert told[0] == expected


def test_a_run_whose_ranks_differ_ends_with_one_line(small_images, tmp_path):
    """A truncated JPEG on rank 1 made both wait for ever: one had a minibatch less."""
    for rank in range(2):
        shutil.copytree(small_images, tmp_path / f"rank{rank}" / "data")
    cut(tmp_path / "rank1")
    done = run_ranks(
        2, WORKER, tmp_path, "--data", "data", "--arch", "test_resnet", "--image-size", "16",
        "--batch-size", "8", "--epochs", "2", "--m", "2", "--max-bad-fraction", "0.1",
        "--workers", "0", "--bn-group", "None", "--output-dir", tmp_path / "run",
        output=tmp_path / "output",
    )  # fmt: skip
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines == [f"error: --data data: {CASES['cut'][2]}"]
