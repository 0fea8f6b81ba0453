"""A recording on trial: what does the eager update's work is used, anything else is not."""

from __future__ import annotations

import contextlib

import pytest
import torch
from recorded_training import Recorder, build_learner, build_method, minibatches

from freeadv_fast.config.method_names import DUAL
from freeadv_fast.distributed.world import World
from freeadv_fast.models.batch_norm import DualNetwork, add_auxiliary_bn
from freeadv_fast.step import trial
from freeadv_fast.step.graphs import GraphRunner
from freeadv_fast.step.trial import Trial, difference, distance


class BrokenRecorder(Recorder):
    """Its recordings do something else than the step that was recorded.

    Args:
        bug: A context of a learner and its method in which launches run.
    """

    def __init__(self, bug):
        super().__init__()
        self.bug = bug

    def record(self, step):
        launch = super().record(step)

        def broken_launch():
            with self.bug(self.learner, self.method):
                launch()

        return broken_launch


class Ranks(World):
    """Two ranks, of which the other one says what it is told to say."""

    def __init__(self, other=""):
        super().__init__(0, 2, torch.device("cpu"))
        vars(self)["other"] = other

    def first_objection(self, objection):
        return objection or self.other


def train(name, network, recorder=None, world=None):
    """Eight updates, or six in replays, recorded once they are warm where there is a recorder.

    Returns:
        All tensors that training changes, and the lines that were said.
    """
    torch.manual_seed(0)
    if name in DUAL:
        network = DualNetwork(add_auxiliary_bn(network, 3))
    learner, lines = build_learner(network), []
    if recorder is not None:
        tried = Trial(learner.changing_tensors, world or Ranks(), recorder)
        learner.record_with(GraphRunner(lines.append, recorder, trial=tried))
    method = build_method(name, learner)
    if recorder is not None:
        recorder.learner, recorder.method = learner, method
    for images, labels in minibatches([6] * (8 // getattr(method, "m", 1))):
        method.train_minibatch(images, labels, 6)
    return learner.changing_tensors(), lines


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(a, b) for kind in one for a, b in zip(one[kind], other[kind], strict=True)
    )


@pytest.mark.parametrize("name", ["free", "elle", "fast-advprop"])
def test_a_trial_changes_nothing(small_network, name):
    """Three updates more were made, with attacks, noise and metrics; the last bit is the same."""
    recorder = Recorder()
    plain, _ = train(name, small_network())
    tried, lines = train(name, small_network(), recorder)
    assert recorder.num_recordings == 1
    assert recorder.num_launches > 2  # its trial's was one
    assert not lines
    assert same(tried, plain)
    assert {"weights", "running statistics", "optimizer's sums", "metrics"} <= plain.keys()
    assert ("attacks" in plain) == (name != "fast-advprop")


@contextlib.contextmanager
def momentum_is_dropped(learner, method):
    group = learner.optimizer.param_groups[0]
    group["momentum"] = 0.0
    yield
    group["momentum"] = 0.9


@contextlib.contextmanager
def a_gradient_is_not_averaged(learner, method):
    """One of ten tensors, as a bucket that data parallelism forgets: half of a sum of two."""
    weight = next(learner.network.parameters())
    handle = weight.register_hook(lambda gradient: gradient / 2)
    yield
    handle.remove()


@contextlib.contextmanager
def images_are_others(learner, method):
    own, learner.network_input = learner.network_input, None
    learner.network_input = lambda images, *rest: own(images.flip(0), *rest)
    yield
    learner.network_input = own


@contextlib.contextmanager
def statistics_stand_still(learner, method):
    buffers = [buffer.clone() for buffer in learner.network.buffers()]
    yield
    for buffer, before in zip(learner.network.buffers(), buffers, strict=True):
        buffer.copy_(before)


@contextlib.contextmanager
def delta_is_not_kept(learner, method):
    before = method.delta.clone()
    yield
    method.delta.copy_(before)


@contextlib.contextmanager
def noise_is_other_noise(learner, method):
    torch.manual_seed(9)
    yield


@contextlib.contextmanager
def weights_are_lost(learner, method):
    yield
    next(learner.network.parameters()).data.fill_(torch.nan)


@pytest.mark.parametrize(
    ("name", "bug", "kind"),
    [
        ("natural", momentum_is_dropped, "weights"),
        ("natural", a_gradient_is_not_averaged, "weights"),
        ("pgd", images_are_others, "weights"),
        ("free", statistics_stand_still, "running statistics"),
        ("free", delta_is_not_kept, "attacks"),
        ("fgsm-rs", noise_is_other_noise, "weights"),
        ("natural", weights_are_lost, "weights"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_what_does_something_else_is_not_used(small_network, name, bug, kind):
    """Training goes on eagerly, as if nothing had been tried, and says what would have differed."""
    plain, _ = train(name, small_network())
    tried, lines = train(name, small_network(), BrokenRecorder(bug))
    (line,) = lines
    assert line.startswith(f"graphs: off, this step cannot be recorded (its {kind} end ")
    assert same(tried, plain)


def test_no_rank_uses_what_another_one_does_not(small_network):
    recorder = Recorder()
    plain, _ = train("free", small_network())
    tried, lines = train("free", small_network(), recorder, Ranks("out of memory"))
    assert lines == ["graphs: off, this step cannot be recorded (out of memory)"]
    assert (recorder.num_recordings, recorder.num_launches) == (1, 0)
    assert same(tried, plain)


def test_a_recording_that_hangs_ends_the_process(small_network, monkeypatch, capsys):
    """All ranks live and wait for each other: nothing else would."""
    recorder, ends = Recorder(), []
    recorder.has_ended = lambda seconds: False
    monkeypatch.setattr(trial, "end_process", ends.append)
    train("natural", small_network(), recorder)
    assert ends == [
        "--graphs: an update that was recorded over 2 ranks did not end within 120 s; use "
        "--graphs off"
    ]


def test_rounding_is_told_from_bugs_by_the_spread_of_eager_updates():
    before, eager = {"weights": [torch.zeros(4)]}, {"weights": [torch.ones(4)]}
    near, far = ({"weights": [torch.full((4,), value)]} for value in (1.019, 1.05))
    assert not difference(before, eager, eager, near)
    assert difference(before, eager, eager, far) == (
        "its weights end 0.1 from those of an eager update, which moves them by 2; two eager ones "
        "end 0 apart"
    )
    assert not difference(before, eager, near, far)
    nan = {"weights": [torch.tensor([torch.nan, 1, 1, 1])]}
    assert "its weights end nan" in difference(before, eager, eager, nan)
    flipped = torch.zeros(1000, dtype=torch.int8)
    flipped[:3] = 2
    assert distance([torch.zeros(1000, dtype=torch.int8)], [flipped]) == 3
    infinite = [torch.tensor([torch.inf, 1])]
    assert distance(infinite, infinite) == 0
