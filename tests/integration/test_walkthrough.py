"""README's walk-through, word for word, as somebody types it after `make run`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# What a reader's checkout does not share with this one: what runs leave, and git's own.
NOT_SHARED = {"runs", ".git", ".venv"}


@pytest.fixture
def checkout(repository, tmp_path):
    """A folder like a fresh clone in which make has made .venv: every file, and no run but its."""
    environment = Path(sys.prefix)
    if not (environment / "bin" / "activate").is_file():
        pytest.skip("this Python is not in an environment that can be activated")
    for path in repository.iterdir():
        if path.name not in NOT_SHARED:
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / ".venv").symlink_to(environment)
    (tmp_path / "runs").mkdir()
    return tmp_path


def walk_through(repository):
    """The block as it stands in README, and nothing else."""
    text = (repository / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```bash walk-through\n(.*?)^```", text, re.M | re.S)
    return block


def test_it_is_ten_lines(repository):
    assert len(walk_through(repository).splitlines()) <= 10


@pytest.mark.slow
def test_it_works_word_for_word(repository, checkout):
    variables = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        ["bash", "-c", walk_through(repository)],
        cwd=checkout, env=variables, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "error:" not in done.stderr
    run = checkout / "runs" / "first"
    result = json.loads((run / "result.json").read_text())
    assert (result["method"], result["passes"], result["num_eval_images"]) == ("free", 5348, 50)
    (evaluation,) = run.glob("evaluation-*.json")
    assert json.loads(evaluation.read_text())["robust_accuracy"].keys() == {"cw-20"}
    last = done.stdout.split("tensor(")
    assert len(last) == 3, done.stdout  # the logits here, the class elsewhere
    assert re.match(r"\d\)", last[2])
    # Stopped and resumed, unless this machine was done or had not begun within the pause.
    assert "resuming from" in done.stdout or "is finished" in done.stdout or (
        "starting from the beginning" in done.stdout
    )  # fmt: skip
