"""Ranks compare their data before an evaluation and a dry run as well as before a run."""

import json
import shutil
from pathlib import Path

from forked import run_ranks

WORKER = Path(__file__).with_name("evaluation_worker.py")


def test_ranks_with_other_data_are_told_before_anything_is_measured(small_images, tmp_path):
    for rank in range(2):
        for data in ("same", "other"):
            shutil.copytree(small_images, tmp_path / f"rank{rank}" / data)
    (tmp_path / "rank1/other/val/class0/3.jpg").unlink()
    done = run_ranks(2, WORKER, tmp_path, output=tmp_path / "output")
    assert done.returncode == 0, done.stderr
    told = [json.loads((tmp_path / f"told{rank}.json").read_text()) for rank in range(2)]
    difference = "rank 1 lacks class0/3.jpg, which rank 0 has; give every node the same images"
    assert (
        told[0]
        == told[1]
        == {
            "evaluated other": f"--data other: val: {difference}",
            "dry other": f"--data other: val: {difference}",
            "opened other": f"--imagenet-r other/val: {difference}",
            "evaluated same": 18,
            "dry same": "minibatch   images (8, 16, 16, 3) torch.uint8, labels (8,) torch.int64",
            "opened same": 18,
            "loaded other": "SUBJECT weights.pt (timm/test_resnet): rank 1 has other weights than "
            "rank 0; give every rank the same",
            "loaded same": 3,
        }
    )
