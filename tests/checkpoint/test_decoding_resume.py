"""A run that decides where to decode, is stopped before it gets there, and goes on."""

import json
import os
import signal

import pytest
import torch

from freeadv_fast import training
from freeadv_fast.cli import run_training
from freeadv_fast.data import build
from freeadv_fast.data.folder import AHEAD, build_decoder
from freeadv_fast.runs.checkpoint import load_checkpoint
from freeadv_fast.session import decoding

# 114 images: 28 minibatches and two images, which make a last one.
FLAGS = [
    "--workers", "1", "--augment", "random-resized-crop", "--arch", "test_resnet",
    "--image-size", "16", "--batch-size", "4", "--epochs", "1", "--eps", "8/255", "--m", "1",
    "--holdout-images", "0", "--eval-images", "8", "--eval-attacks", "pgd-2", "--bn-group", "None",
    "--schedule", "constant",
]  # fmt: skip


class Instant:
    """A minibatch that takes a microsecond: training asks for more than any threads decode."""

    seconds = 1e-6

    def end(self):
        """Nothing to do."""


def test_a_choice_outlives_a_stop(small_images, tmp_path, monkeypatch, capsys):
    """Two pipelines on the CPU stand for two places: the weights are those of a run without."""
    pytest.importorskip("nvidia.dali")

    def run(name, *flags):
        folder = str(tmp_path / name)
        return run_training(
            "free",
            "imagenet",
            [*FLAGS, "--data", str(small_images), "--output-dir", folder, *flags],
        )

    def last(name):
        return load_checkpoint(tmp_path / name / "checkpoints" / "last.pt")

    assert run("plain") == 0
    assert json.loads((tmp_path / "plain" / "result.json").read_text())["decoding"] is None
    assert "decoding " not in capsys.readouterr().out
    real, stops = training.obey_requests, [decoding.WATCHED + 2]

    def interrupt(run, stop):
        if run.progress.minibatch in stops:
            stops.remove(run.progress.minibatch)
            os.kill(os.getpid(), signal.SIGTERM)
        real(run, stop)

    monkeypatch.setattr(training, "obey_requests", interrupt)
    monkeypatch.setattr(build, "first_decoder", build_decoder)
    monkeypatch.setattr(decoding, "DeviceSpan", Instant)
    assert run("chosen") == 128 + signal.SIGTERM
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("decoding ")]
    (choice,) = last("chosen")["decoding"].values()
    assert (choice["epoch"], choice["minibatch"]) == (0, decoding.WATCHED + AHEAD)
    monkeypatch.setattr(decoding, "DeviceSpan", pytest.fail)  # nothing is measured again
    assert run("chosen", "--resume") == 0
    assert capsys.readouterr().out.splitlines().count(line) == 1
    ours, theirs = last("chosen"), last("plain")
    assert list(ours["decoding"].values()) == [choice]
    for name, value in theirs["model"].items():
        assert torch.equal(ours["model"][name], value), name
    result = json.loads((tmp_path / "chosen" / "result.json").read_text())
    assert result["decoding"] == {
        "place": "GPU",
        "threads": 1,
        "cpu_images_per_second": choice["decoded"],
        "asked_images_per_second": 4_000_000,
    }
