"""The queue of decoded minibatches beyond an epoch's end: where it goes on, where it is let go of.

Runs without held-out images keep one stream of minibatches as long as epochs follow each other. It
changes no bit of a run, and whatever ends the run or turns it back leaves nothing of it.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading

import pytest
import torch

from freeadv_fast import training
from freeadv_fast.config.phases import Phases
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.schedule import Schedule
from freeadv_fast.config.threat import Perturbation
from freeadv_fast.data import build
from freeadv_fast.data.folder import AHEAD, FolderLoader, build_decoder
from freeadv_fast.distributed.world import World
from freeadv_fast.methods.free import Free
from freeadv_fast.runs.checkpoint import load_checkpoint
from freeadv_fast.session import decoding
from freeadv_fast.session.ahead import Ahead
from freeadv_fast.session.prepare import prepare
from freeadv_fast.session.signals import Interrupted, StopRequests

# Three data epochs of eight minibatches of 14 images and one of two, each replayed once.
PER_EPOCH, BATCH, M, IMAGES = 9, 14, 2, 114


# For what a decoder has a part in; elsewhere it is torchvision, which needs nothing.
with_each_decoder = pytest.mark.parametrize("config", ["dali", "torchvision"], indirect=True)


@pytest.fixture
def config(request, small_images, tmp_path, monkeypatch):
    """A small run of free training."""
    backend = getattr(request, "param", "torchvision")
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    monkeypatch.setattr(build, "available_backend", lambda: backend)
    return TrainConfig(
        method="free", m=M, data=str(small_images), workers=1, augment="random-resized-crop",
        arch="test_resnet", image_size=16, batch_size=BATCH, epochs=6, lr=0.01,
        eps=Perturbation.parse("8/255"), holdout_images=0, eval_images=8, eval_attacks=("pgd-2",),
        schedule=Schedule.parse("constant"), output_dir=str(tmp_path / "run"),
    )  # fmt: skip


@pytest.fixture
def streams(monkeypatch):
    """What is asked of training loaders: epoch, start, last; and the epochs that were planned."""
    asked, planned = [], []
    real, real_plan = FolderLoader.epochs, FolderLoader._plan

    def epochs(self, epoch, start, last):
        if self.stream.seed is not None:
            asked.append((epoch, start, last))
        return real(self, epoch, start, last)

    def plan(self, share, epoch):
        if self.stream.seed is not None:
            planned.append(epoch)
        return real_plan(self, share, epoch)

    monkeypatch.setattr(FolderLoader, "epochs", epochs)
    monkeypatch.setattr(FolderLoader, "_plan", plan)
    return asked, planned


def train(config, name="", **changes):
    """Trains in a folder of that name; returns the last checkpoint. Nothing may be left then."""
    changes["output_dir"] = config.output_dir + name
    config = dataclasses.replace(config, **changes)
    run = prepare(config, World(0, 1, torch.device("cpu")))
    try:
        with StopRequests() as stop:
            training.train_epochs(run, stop)
    finally:
        run.log.close()
        run.lock.release()
        assert_nothing_is_left()
    return load_checkpoint(run.folder.checkpoints / "last.pt")


def assert_nothing_is_left():
    """No thread that runs ahead, no worker of it."""
    names = [thread.name for thread in threading.enumerate()]
    assert "freeadv-prefetch" not in names
    assert not multiprocessing.active_children()


def assert_equal(ours, theirs):
    """The runs have the same weights, optimizer, perturbation and generators."""
    for part in ("model", "learner", "ranks"):
        left, right = (torch.utils._pytree.tree_leaves(state[part]) for state in (ours, theirs))
        assert len(left) == len(right)
        for mine, other in zip(left, right, strict=True):
            same = torch.equal(mine, other) if isinstance(mine, torch.Tensor) else mine == other
            assert same
    for key in ("epoch", "minibatch", "passes"):
        assert ours["progress"][key] == theirs["progress"][key]


@pytest.fixture
def anew(monkeypatch):
    """Has every epoch begin with an empty queue, as long as it is set."""

    def set_(is_anew):
        monkeypatch.setattr(Ahead, "_must_pause", property(lambda _: is_anew))

    return set_


@with_each_decoder
def test_a_run_is_the_same_with_and_without_a_pause(config, streams, anew):
    asked, planned = streams
    ours = train(config, "-across")
    assert asked == [(0, 0, 2)]
    assert planned == sorted([0, 1, 2] * PER_EPOCH)  # nothing beyond the last epoch
    asked.clear()
    anew(True)
    assert_equal(ours, train(config, "-anew"))
    assert asked == [(0, 0, 0), (1, 0, 1), (2, 0, 2)]


@with_each_decoder
def test_the_next_epoch_is_decoded_while_the_checkpoint_is_written(config, streams, monkeypatch):
    """Its first plans are drawn by then, no more than the queue holds."""
    _, planned = streams
    real, seen = training.save, []

    def save(run):
        if (run.progress.epoch, run.progress.minibatch) == (1, 0):
            seen.append(planned.count(1))
        real(run)

    monkeypatch.setattr(training, "save", save)
    train(config)
    assert len(seen) == 1
    assert 0 < seen[0] < AHEAD


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_passes": 2 * IMAGES * M}, [(0, 0, 1)]),
        ({"max_passes": 2 * IMAGES * M + 1}, [(0, 0, 2)]),
        ({"max_passes": IMAGES * M - 60}, [(0, 0, 0)]),
        ({"steps": 2 * PER_EPOCH * M}, [(0, 0, 1)]),
        ({"phases": Phases.parse("0-4:16:14,4-6:20:14")}, [(0, 0, 1), (2, 0, 2)]),
    ],
    ids=["epochs of passes", "one pass more", "within an epoch", "steps", "phases"],
)  # fmt: skip
def test_it_ends_with_what_is_known_to_come(config, streams, changes, expected):
    asked, planned = streams
    if "phases" in changes:
        changes = changes | {"image_size": 20, "resize_size": 0}
    train(config, **changes)
    assert asked == expected
    assert max(planned) == expected[-1][-1]


@with_each_decoder
@pytest.mark.parametrize("stop_at", [PER_EPOCH - 1, PER_EPOCH])
def test_a_stopped_run_resumes_bit_for_bit(config, streams, monkeypatch, stop_at):
    """In an epoch's last minibatches and at its end, with plans of the next one drawn."""
    straight = train(config, "-straight")
    asked, planned = streams
    asked.clear()
    planned.clear()
    real = training.obey_requests

    def interrupt(run, stop):
        if run.progress.epoch * PER_EPOCH + run.progress.minibatch == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        real(run, stop)

    with monkeypatch.context() as patch:
        patch.setattr(training, "obey_requests", interrupt)
        with pytest.raises(Interrupted):
            train(config, "-cut")
    assert 1 in planned
    assert_equal(train(config, "-cut", resume=True), straight)
    epoch, minibatch = divmod(stop_at, PER_EPOCH)
    assert asked == [(0, 0, 2), (epoch, minibatch, 2)]


@with_each_decoder
def test_a_failure_leaves_nothing_behind(config, monkeypatch):
    """In the second epoch, with the queue full."""
    real = Free.train_minibatch

    def train_minibatch(self, *batch):
        if self.learner.updates > PER_EPOCH * M:
            raise RuntimeError("a bug")
        return real(self, *batch)

    monkeypatch.setattr(Free, "train_minibatch", train_minibatch)
    with pytest.raises(RuntimeError, match="a bug"):
        train(config)


def test_a_rewound_run_goes_on_from_where_it_is(config, streams):
    """Back in an epoch that the queue has left, and again where it stands."""
    asked, _ = streams
    run = prepare(config, World(0, 1, torch.device("cpu")))
    loader, progress = run.loaders.train, run.progress
    whole = [*loader.epoch(0), *loader.epoch(1)]
    asked.clear()
    places = [*range(PER_EPOCH + 1), PER_EPOCH - 2, PER_EPOCH - 1, PER_EPOCH]
    with contextlib.closing(Ahead(run)) as ahead:
        for place in places:
            progress.epoch, progress.minibatch = divmod(place, PER_EPOCH)
            batch = ahead.next()
            assert torch.equal(batch.images, whole[place].images)
            assert torch.equal(batch.indices, whole[place].indices)
        assert len(multiprocessing.active_children()) == config.workers
    assert asked == [(0, 0, 2), (0, PER_EPOCH - 2, 2)]
    assert_nothing_is_left()
    run.log.close()
    run.lock.release()


class Slow:
    """A minibatch that takes a day: any threads decode enough."""

    seconds = 86400.0

    def end(self):
        """Nothing to do."""


def test_a_decoder_that_held_out_images_need_is_let_go_of(config, streams, monkeypatch):
    """A pipeline more, or as many workers again, would be memory beyond the queue's."""
    asked, _ = streams
    changes = {"holdout_images": 11, "guard_every": 0, "epochs": 4}
    train(config, "-one", **changes)
    assert asked == [(0, 0, 0), (1, 0, 1)]
    asked.clear()
    monkeypatch.setattr(build, "first_decoder", build_decoder)  # the training images have their own
    monkeypatch.setattr(decoding, "DeviceSpan", Slow)
    train(config, "-two", **changes)
    assert asked == [(0, 0, 1)]
