"""A run whose robustness collapses is stopped or rewound, and goes on bit for bit when killed."""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from freeadv_fast import training
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.schedule import Schedule
from freeadv_fast.config.threat import Perturbation
from freeadv_fast.methods.free import Free
from freeadv_fast.methods.gradalign import GradAlign
from freeadv_fast.runs.checkpoint import load_checkpoint
from freeadv_fast.session import outputs, rewind
from freeadv_fast.session.signals import Interrupted

# Four data epochs of six minibatches of two updates each. The guard looks after every second
# minibatch; the weights are ruined at the end of the 16th, at the full learning rate only.
GUARD_EVERY, PER_EPOCH, M, BATCH = 2, 6, 2, 14
RUINED_MINIBATCH = 16
LR = 0.05


@pytest.fixture(autouse=True)
def _no_export(monkeypatch):
    """It takes longer than the training here."""
    monkeypatch.setattr(outputs, "write_export", lambda *_: None)


@pytest.fixture
def config(small_images, tmp_path):
    """A small run of free training; robust accuracy is above 60 % when it is ruined."""
    return TrainConfig(
        method="free", m=M, data=str(small_images), workers=1, augment="random-resized-crop",
        arch="test_resnet", image_size=16, batch_size=BATCH, epochs=8, eps=Perturbation.parse(
        "8/255"), holdout_images=30, eval_images=8, eval_attacks=("pgd-2",), log_every=5, lr=LR,
        schedule=Schedule.parse("constant"), guard_every=GUARD_EVERY,
        output_dir=str(tmp_path / "run"),
    )  # fmt: skip


def ruin(learner):
    """Turns the classifier round: what was right is wrong."""
    *_, weight, bias = learner.module.parameters()
    with torch.no_grad():
        weight.neg_()
        bias.neg_()


@pytest.fixture
def collapsing(monkeypatch):
    """Free training that ruins the weights once, at the full learning rate."""
    real = Free.train_minibatch

    def train_minibatch(self, *batch):
        passes = real(self, *batch)
        learner = self.learner
        if learner.updates == M * RUINED_MINIBATCH and learner.lr_at(learner.updates) == LR:
            ruin(learner)
        return passes

    monkeypatch.setattr(Free, "train_minibatch", train_minibatch)


@pytest.fixture
def snapshots(monkeypatch):
    """Every good state of the test's runs, in order."""
    taken, real = [], rewind.snapshot

    def snapshot(run):
        taken.append(real(run))
        return taken[-1]

    monkeypatch.setattr(rewind, "snapshot", snapshot)
    return taken


def train(config, name=None, **changes):
    """Trains in a folder of that name; returns the result and the last checkpoint."""
    if name is not None:
        changes["output_dir"] = config.output_dir + name
    config = dataclasses.replace(config, **changes)
    result = training.train(config)
    return result, load_checkpoint(Path(config.run_folder) / "checkpoints" / "last.pt")


def log(config, name=""):
    """The lines of log.jsonl without what the clock gives."""
    with open(config.output_dir + name + "/log.jsonl") as file:
        lines = [json.loads(line) for line in file]
    timed = ("passes_per_second", "guard_seconds")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


def assert_equal(ours, theirs):
    """Nested states are equal to the last bit."""
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        clocks = {"train_seconds", "warm_up_seconds", "passes_per_second"}
        for key in theirs.keys() - clocks - {"config", "log_bytes"}:
            assert_equal(ours[key], theirs[key])
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_equal(a, b)
    else:
        assert ours == theirs


def test_a_healthy_run_is_left_alone(config):
    """Guarded or not, the weights are the same; checks are logged and drawn."""
    result, guarded = train(config)
    assert result.collapse is None
    _, free = train(config, "-off", guard_every=0)
    for part in ("model", "learner"):
        assert_equal(guarded[part], free[part])
    assert_equal(guarded["ranks"][0]["random"], free["ranks"][0]["random"])
    assert_equal(guarded["ranks"][0]["method"], free["ranks"][0]["method"])
    assert free["good"] is None
    checks = [line for line in log(config) if "guard_robust_accuracy" in line]
    # A check after minibatches 2 and 4; the epoch's end is one too.
    assert len(checks) == 4 * 2
    assert all({"loss", "passes", "epoch", "guard_alignment"} <= line.keys() for line in checks)
    assert checks[-1]["guard_robust_accuracy"] > 0.6


def test_a_collapse_stops_the_run(config, collapsing, snapshots, capsys):
    """Named at the next check; the weights are the last good ones; result.json tells."""
    result, last = train(config)
    good = snapshots[-2]  # the last one is what was put back
    for part in ("model", "learner"):
        assert_equal(last[part], good[part])
    assert_equal(last["ranks"][0], good["ranks"][0])
    passes = RUINED_MINIBATCH * BATCH * M
    collapse = result.collapse
    assert collapse["detected_at_passes"] == passes
    assert collapse["epoch"] == pytest.approx(RUINED_MINIBATCH / PER_EPOCH, abs=1e-4)
    assert collapse["robust_accuracy_before"] > 0.6
    assert collapse["robust_accuracy_after"] < 0.2
    assert (collapse["action"], collapse["restores"]) == ("stop", 1)
    assert result.passes == passes  # the lost work counts
    assert result.epochs == pytest.approx(14 / PER_EPOCH, abs=1e-4)
    assert result.best_epoch == 1
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    (warning,) = warnings
    assert "catastrophic overfitting, seen in epoch 2.67 after 448 passes" in warning
    assert "training stops (--on-collapse stop" in warning


def test_a_restored_run_goes_on_at_half_the_rate(config, collapsing, snapshots):
    """Position, generators and weights are those of the good state."""
    result, _ = train(config, on_collapse="restore")
    at = next(i for i, state in enumerate(snapshots) if state["guard"]["collapses"])
    good, restored = snapshots[at - 1], snapshots[at]
    for part in ("model", "learner", "ranks"):
        assert_equal(restored[part], good[part])
    for key in ("epoch", "minibatch"):
        assert restored["progress"][key] == good["progress"][key]
    assert restored["progress"]["passes"] == good["progress"]["passes"] + 2 * M * BATCH
    assert (result.collapse["action"], result.epochs) == ("restore", 4)
    assert result.passes == (4 * PER_EPOCH + 2) * M * BATCH
    rates = [line["lr"] for line in log(config)]
    assert rates == sorted(rates, reverse=True)
    assert set(rates) == {LR, LR / 2}


@pytest.mark.parametrize("on_collapse", ["restore", "gradalign"])
def test_a_run_stopped_around_a_collapse_resumes_bit_for_bit(
    config, collapsing, monkeypatch, on_collapse
):
    """Interrupted at every fifth minibatch: before the collapse, right after it, and later on."""
    _, straight = train(config, on_collapse=on_collapse)
    real, calls = training.obey_requests, []

    def interrupt(run, stop):
        calls.append(None)
        if len(calls) % 5 == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        real(run, stop)

    monkeypatch.setattr(training, "obey_requests", interrupt)
    sessions, result = 0, None
    while result is None:
        sessions += 1
        try:
            result, last = train(config, "-cut", on_collapse=on_collapse, resume=sessions > 1)
        except Interrupted:
            continue
    assert sessions >= 5
    assert_equal(last, straight)
    assert log(config, "-cut") == log(config)


def test_gradalign_takes_over(config, collapsing, monkeypatch):
    """It makes one update a minibatch, and every one after the collapse."""
    updates, real = [], GradAlign.train_minibatch

    def train_minibatch(self, *batch):
        updates.append(self.learner.updates)
        assert self.threat.eps == config.eps
        return real(self, *batch)

    monkeypatch.setattr(GradAlign, "train_minibatch", train_minibatch)
    result, _ = train(config, on_collapse="gradalign")
    assert updates == list(range(28, 28 + 10))  # from minibatch 14 on
    assert result.collapse["action"] == "gradalign"
    assert result.epochs == 4
    assert {line["lr"] for line in log(config)} == {LR}


def test_a_third_collapse_stops_the_run(config, monkeypatch, capsys):
    """Ruined at any learning rate: two restores, then the end."""
    real = Free.train_minibatch

    def train_minibatch(self, *batch):
        passes = real(self, *batch)
        if self.learner.updates == M * RUINED_MINIBATCH:
            ruin(self.learner)
        return passes

    monkeypatch.setattr(Free, "train_minibatch", train_minibatch)
    result, last = train(config, on_collapse="restore")
    actions = [collapse["action"] for collapse in last["guard"]["collapses"]]
    assert actions == ["restore", "restore", "stop"]
    assert result.collapse["restores"] == 3
    assert capsys.readouterr().out.count("warning: catastrophic overfitting") == 3


def test_a_collapse_at_an_epochs_end_is_seen_by_the_selection(config, collapsing, monkeypatch):
    """Without a check of its own in between; best.pt is from before."""
    monkeypatch.setattr(sys.modules[__name__], "RUINED_MINIBATCH", 3 * PER_EPOCH)
    result, _ = train(config, guard_every=1000)
    assert result.collapse["epoch"] == 3
    assert result.epochs == 2
    assert result.best_epoch in (0, 1)


def test_without_held_out_images_the_guard_is_off(config, capsys):
    """One line says so."""
    result, last = train(config, holdout_images=0, max_passes=2 * M * BATCH)
    out = capsys.readouterr().out
    assert "guard: off, for no training images are held out (--holdout-images 0)" in out
    assert (result.collapse, last["good"]) == (None, None)
