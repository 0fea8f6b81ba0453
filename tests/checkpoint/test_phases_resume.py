"""A run in three phases: what each one sees, and a resume in any of them, bit for bit."""

import json
import os
import signal

import pytest
import torch

from freeadv_fast import training
from freeadv_fast.cli import run_training
from freeadv_fast.methods.free import Free
from freeadv_fast.runs.checkpoint import load_checkpoint
from freeadv_fast.session import selection

# 108 images, m = 2: two data epochs of 3 minibatches at 16 px, two of 5 at 24 px, one of 6 at
# 32 px. The last minibatch of each phase but the first is smaller.
FLAGS = [
    "--data", "(small_images)", "--workers", "0", "--augment", "random-resized-crop",
    "--arch", "test_resnet", "--epochs", "10", "--phases", "0-4:16:36,4-7:24:24,7-10:32:20",
    "--schedule", "piecewise:0=0,4=1,7=0.1,10=0.01", "--decay", "no-bn", "--m", "2",
    "--eps", "8/255", "--holdout-images", "6", "--eval-images", "8", "--eval-attacks", "pgd-2",
    "--log-every", "2", "--bn-group", "None",
]  # fmt: skip
IMAGES = [*[36, 36, 36] * 2, *[24, 24, 24, 24, 12] * 2, *[20, 20, 20, 20, 20, 8]]
FULL = [36] * 6 + [24] * 10 + [20] * 6
SIDES = [16] * 6 + [24] * 10 + [32] * 6


@pytest.fixture(scope="module", autouse=True)
def _images(small_images):
    """FLAGS train on the small image folder."""
    FLAGS[1] = str(small_images)


def run(folder, *flags):
    """Trains in this process and returns the exit status."""
    return run_training("free", "imagenet", [*FLAGS, "--output-dir", str(folder), *flags])


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The uninterrupted run: its folder, and what each minibatch and each selection saw."""
    seen, sides = [], []
    real_minibatch, real_evaluate = Free.train_minibatch, selection.evaluate

    def watched_minibatch(method, images, labels, global_size):
        delta, lr = method.delta.clone(), method.learner.lr_at(method.learner.updates)
        seen.append((tuple(images.shape), tuple(delta.shape), bool(delta.any()), lr))
        return real_minibatch(method, images, labels, global_size)

    def watched_evaluate(model, loader, *arguments, **options):
        sides.append(loader.config.image_size)
        return real_evaluate(model, loader, *arguments, **options)

    folder = tmp_path_factory.mktemp("straight") / "run"
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Free, "train_minibatch", watched_minibatch)
        patch.setattr(selection, "evaluate", watched_evaluate)
        assert run(folder) == 0
    return folder, seen, sides


def test_each_phase_has_its_images_and_a_new_perturbation(straight):
    """Sides and minibatches as asked; delta is zero at a phase's first minibatch only."""
    _, seen, _ = straight
    assert [shape for shape, *_ in seen] == [
        (count, side, side, 3) for count, side in zip(IMAGES, SIDES, strict=True)
    ]
    assert [delta for _, delta, *_ in seen] == [
        (full, side, side, 3) for full, side in zip(FULL, SIDES, strict=True)
    ]
    assert [index for index, (*_, has_delta, _) in enumerate(seen) if not has_delta] == [0, 6, 16]


def test_the_rate_at_the_boundaries(straight):
    """Of the first update of the run, of a phase's last minibatch and of the next one's first."""
    rates = [rate / 0.1 for *_, rate in straight[1]]  # --lr 0.1
    assert rates[0] == pytest.approx(1 / 12)  # a sixth of a data epoch is a third of the budget's
    assert rates[5] == pytest.approx(11 / 12)
    assert rates[6] == pytest.approx(0.94)
    assert rates[15] == pytest.approx(0.1 - 0.09 * 0.8 / 3)
    assert rates[16] == pytest.approx(0.1 - 0.09 * (7 / 6) / 3)


def test_selection_follows_the_phases_and_the_rest_the_last_one(straight):
    """Held-out images at each phase's size; best.pt from the last phase; 32 px in the end."""
    folder, _, sides = straight
    assert sides == [16, 16, 24, 24, 32]
    assert load_checkpoint(folder / "checkpoints" / "best.pt")["epoch"] == 4
    result = json.loads((folder / "result.json").read_text())
    assert (result["epochs"], result["passes"]) == (5, 5 * 108 * 2)
    assert result["best_epoch"] == 4
    assert json.loads((folder / "export" / "config.json").read_text())["image_size"] == 32


def lines(folder):
    """log.jsonl without what depends on the clock."""
    timed = ("passes_per_second", "guard_seconds")
    text = (folder / "log.jsonl").read_text()
    return [
        {key: value for key, value in json.loads(line).items() if key not in timed}
        for line in text.splitlines()
    ]


def assert_same_run(resumed, straight):
    """Weights, statistics, momentum, delta, generators and log are bit for bit the same."""
    ours, theirs = (load_checkpoint(f / "checkpoints" / "last.pt") for f in (resumed, straight))
    for name, value in theirs["model"].items():
        assert torch.equal(ours["model"][name], value), name
    momenta = [s["learner"]["optimizer"]["state"].values() for s in (ours, theirs)]
    for a, b in zip(*momenta, strict=True):
        assert torch.equal(a["momentum_buffer"], b["momentum_buffer"])
    for part in ("method", "random"):
        a, b = (state["ranks"][0][part] for state in (ours, theirs))
        assert all(torch.equal(a[name], value) for name, value in b.items())
    assert lines(resumed) == lines(straight)


def test_a_run_stopped_in_every_phase_and_at_both_boundaries_resumes_bit_for_bit(
    straight, tmp_path, monkeypatch
):
    """Stop requests are obeyed after each of the 22 minibatches, after 6 and 16 in a new phase."""
    real, calls = training.obey_requests, []

    def interrupt(run, stop):
        calls.append(run.phase)
        if len(calls) in (2, 6, 9, 16, 19):
            os.kill(os.getpid(), signal.SIGTERM)
        real(run, stop)

    monkeypatch.setattr(training, "obey_requests", interrupt)
    folder, statuses = tmp_path / "run", []
    while 0 not in statuses:
        statuses.append(run(folder, *["--resume"] * bool(statuses)))
    assert statuses == [128 + signal.SIGTERM] * 5 + [0]
    assert calls == [0] * 5 + [1] * 10 + [2] * 7
    assert_same_run(folder, straight[0])


@pytest.mark.parametrize(
    ("boundary", "moment"), [(1, "before the new phase"), (2, "before its checkpoint")]
)
def test_a_run_that_dies_at_a_boundary_resumes_bit_for_bit(
    straight, tmp_path, monkeypatch, boundary, moment
):
    """Whether last.pt is of the phase that ended or of the one that began."""
    real, entered = training.enter_phase, []

    class Death(BaseException):
        """No handler of ours catches it."""

    def die(run):
        entered.append(run.phase)
        if moment == "before its checkpoint":
            real(run)
        if run.phase == boundary:
            raise Death
        if moment == "before the new phase":
            real(run)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(training, "enter_phase", die)
        with pytest.raises(Death):
            run(folder, "--checkpoint-every", "0")
    assert entered == list(range(1, boundary + 1))
    assert run(folder, "--resume") == 0
    assert_same_run(folder, straight[0])


@pytest.mark.parametrize(("limit", "passes", "best"), [(100, 144, 0), (432, 432, 1), (900, 904, 4)])
def test_max_passes_ends_a_run_in_any_phase(tmp_path, limit, passes, best):
    """In the first, at the boundary after it, in the last; the last one's side is evaluated."""
    folder = tmp_path / "run"
    assert run(folder, "--max-passes", str(limit)) == 0
    result = json.loads((folder / "result.json").read_text())
    assert result["passes"] == passes
    assert result["best_epoch"] <= best
    assert json.loads((folder / "export" / "config.json").read_text())["image_size"] == 32
