"""A run that adds minibatches up, stopped within an epoch, goes on as if nothing had happened."""

import json
import os
import signal

import pytest
import torch

from freeadv_fast import training
from freeadv_fast.cli import run_training
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.errors import UserError
from freeadv_fast.runs.checkpoint import load_checkpoint
from freeadv_fast.session.changes import differences, refuse_fixed

# 108 images: two data epochs of four updates' minibatches of 2 x 12 images, and a smaller one.
FLAGS = [
    "--workers", "1", "--augment", "random-resized-crop", "--arch", "test_resnet",
    "--image-size", "16", "--batch-size", "12", "--accumulate", "2", "--epochs", "4", "--m", "2",
    "--eps", "8/255", "--holdout-images", "6", "--eval-images", "8", "--eval-attacks", "pgd-2",
    "--log-every", "2", "--bn-group", "None",
]  # fmt: skip
FINISHED = 0


@pytest.fixture
def run(small_images):
    """Trains in this process and returns the exit status."""

    def run(folder, *flags):
        where = ["--data", str(small_images), "--output-dir", str(folder)]
        return run_training("free", "imagenet", [*FLAGS, *where, *flags])

    return run


@pytest.mark.slow
def test_a_stopped_run_resumes_bit_for_bit(run, tmp_path, monkeypatch, capsys):
    """Stopped at every third minibatch, until it is done."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert run(straight) == FINISHED
    assert "24 = 1 rank x 2 minibatches x 12" in capsys.readouterr().out
    real, calls = training.obey_requests, []

    def interrupt(run, stop):
        calls.append(run.progress.minibatch)
        if len(calls) % 3 == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        real(run, stop)

    monkeypatch.setattr(training, "obey_requests", interrupt)
    status, sessions = run(stopped), 1
    while status != FINISHED:
        assert status == 128 + signal.SIGTERM
        status, sessions = run(stopped, "--resume"), sessions + 1
    assert sessions == 4
    assert max(calls) == 4  # an epoch's fifth ends it
    ours, theirs = (load_checkpoint(f / "checkpoints" / "last.pt") for f in (stopped, straight))
    for name, value in theirs["model"].items():
        assert torch.equal(ours["model"][name], value), name
    for mine, other in zip(
        ours["learner"]["optimizer"]["state"].values(),
        theirs["learner"]["optimizer"]["state"].values(),
        strict=True,
    ):
        assert torch.equal(mine["momentum_buffer"], other["momentum_buffer"])
    delta, expected = (state["ranks"][0]["method"]["delta"] for state in (ours, theirs))
    assert torch.equal(delta, expected)
    assert delta.shape == (24, 16, 16, 3)
    assert delta[12:].any()
    results = [json.loads((f / "result.json").read_text()) for f in (stopped, straight)]
    assert results[0]["passes"] == results[1]["passes"] == 2 * 2 * 108


def test_another_number_of_minibatches_is_refused():
    """The schedule counts updates: other ones would be another run."""
    saved, asked = TrainConfig(accumulate=2), TrainConfig(accumulate=4)
    with pytest.raises(UserError, match="--accumulate 4: the run in X .* --accumulate 2"):
        refuse_fixed(differences(saved, asked), saved, asked, "X")
