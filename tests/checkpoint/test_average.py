"""Averaged weights of a run: saved, gone on from, rewound, chosen, evaluated and exported."""

import copy
import dataclasses
import json
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import freeadv_fast as ff
from freeadv_fast import training
from freeadv_fast.errors import UserError
from freeadv_fast.runs import checkpoint
from freeadv_fast.runs.checkpoint import load_checkpoint, save_checkpoint
from freeadv_fast.runs.export.trained import withdraw
from freeadv_fast.session.averages import weights_of
from freeadv_fast.session.guard import Count
from freeadv_fast.session.signals import Interrupted

DECAY = 0.8


@pytest.fixture(scope="module")
def config(small_images):
    """Two data epochs of three updates; checks after the second one of each and at its end."""
    return ff.TrainConfig(
        method="free", m=1, data=str(small_images), workers=0, image_size=16, batch_size=40,
        epochs=2, eps="8/255", holdout_images=6, eval_images=8, eval_attacks="pgd-2", log_every=2,
        guard_every=2, guard_images=4, ema=DECAY,
    )  # fmt: skip


def network():
    """A module of the user's own, seeded: ten times as fast as the smallest of timm's."""
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 7 * 7, 3),
    )


def train(config, folder, **changes):
    """The result of a run in a folder, and the module that was handed over for it."""
    own = network()
    changes |= {"output_dir": str(folder)}
    return ff.train(dataclasses.replace(config, **changes), model=own), own


def last(folder):
    return load_checkpoint(folder / "checkpoints" / "last.pt")


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def assert_same(ours, theirs):
    """State dicts, to the last bit."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@pytest.fixture(scope="module")
def _straight(tmp_path_factory, config):
    """An uninterrupted run."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("straight") / "run"
    _, own = train(config, folder)
    assert_same(own.state_dict(), last(folder)["model"])  # the plain ones are handed back
    return folder


@pytest.fixture
def straight(_straight, tmp_path):
    """A copy of it."""
    return shutil.copytree(_straight, tmp_path / "straight")


def test_both_kinds_of_weights_are_evaluated_and_exported(straight, capsys):
    """The result's own fields are the plain weights'."""
    result, state, own = result_of(straight), last(straight), network()
    average = state["average"]
    assert (average["decay"], average["updates"]) == (DECAY, 6)
    assert not torch.equal(average["model"]["4.weight"], state["model"]["4.weight"])
    assert_same(ff.load_run(straight, model=own).model.state_dict(), state["model"])
    run = ff.load_run(straight, "average", model=own)
    assert_same(run.model.state_dict(), average["model"])
    for name, weights in (("export", state["model"]), ("export-average", average["model"])):
        assert_same(ff.load_export(straight / name, model=own).model.state_dict(), weights)
    measured = ff.evaluate(straight, checkpoint="average", model=own)
    assert result["average"] == {
        "decay": DECAY,
        "clean_accuracy": measured.clean_accuracy,
        "clean_top5_accuracy": measured.clean_top5,
        "robust_accuracy": measured.robust_accuracy,
        "attack_parts": {},
        "attack_log": None,
    }
    assert "straight, average at eps 8/255" in capsys.readouterr().out
    assert len(list(straight.glob("evaluation-average-*.json"))) == 1
    measured = ff.evaluate(straight, model=own)
    assert measured.clean_accuracy == result["clean_accuracy"]


def test_held_out_images_choose_among_averages(straight):
    """best.pt holds one, the last where no earlier one was better; the guard looks at the rest."""
    best, result = load_checkpoint(straight / "checkpoints" / "best.pt"), result_of(straight)
    assert best["is_averaged"] is result["best"]["is_averaged"] is True
    average = last(straight)["average"]["model"]
    is_last = all(torch.equal(average[name], value) for name, value in best["model"].items())
    assert result["best"]["is_last"] == is_last == (result["best"]["epoch"] == 1)
    lines = [json.loads(line) for line in (straight / "log.jsonl").read_text().splitlines()]
    first, second = (line for line in lines if "holdout_clean_accuracy" in line)
    assert {"guard_robust_accuracy", "guard_alignment"} <= first.keys() & second.keys()


def test_it_goes_on_bit_for_bit(config, straight, tmp_path, monkeypatch):
    """Stopped within an epoch, and continued in another session."""
    folder, real, calls = tmp_path / "run", training.obey_requests, []

    def interrupt(run, stop):
        calls.append(None)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        real(run, stop)

    monkeypatch.setattr(training, "obey_requests", interrupt)
    with pytest.raises(Interrupted):
        train(config, folder)
    assert last(folder)["average"]["updates"] == 4
    result, _ = train(config, folder, resume=True)
    ours, theirs = last(folder), last(straight)
    assert ours["average"]["updates"] == theirs["average"]["updates"] == 6
    assert_same(ours["model"], theirs["model"])
    assert_same(ours["average"]["model"], theirs["average"]["model"])
    assert result.average == result_of(straight)["average"]


def test_a_resumed_run_may_begin_and_drop_an_average(config, straight, capsys):
    """It begins with the next update; best.pt is chosen anew, and no outdated export stays."""
    result, _ = train(config, straight, resume=True, ema=None, epochs=3)
    assert (result.best["epoch"], result.best["is_averaged"]) == (2, False)
    assert (straight / "export").exists()
    assert not (straight / "export-average").exists()
    said = capsys.readouterr().out
    assert f"changed: --epochs 3 (was 2), --ema None (was {DECAY}); the learning rate" in said
    assert "; the average so far is dropped\n" in said
    assert last(straight)["average"] is result.average is None
    result, _ = train(config, straight, resume=True, ema=0.5, epochs=4)
    said = capsys.readouterr().out
    assert "--ema 0.5 (was None); the learning" in said
    assert "; the average begins here\n" in said
    assert (last(straight)["average"]["updates"], result.average["decay"]) == (3, 0.5)
    assert (result.best["epoch"], result.best["is_averaged"]) == (3, True)
    assert (straight / "export-average" / "model.safetensors").exists()
    train(config, straight, resume=True, ema=0.9, epochs=4)
    assert "; --ema 0.9 (was 0.5) would change nothing\n" in capsys.readouterr().out


def test_without_training_nothing_is_chosen_among_another_kind(config, straight):
    """best.pt holds an average; the run that has dropped it compares it with nothing."""
    result, _ = train(config, straight, resume=True, ema=None, eval_attacks="pgd-1")
    assert (result.best, result.average, result.exported) == (None, None, "last")


@pytest.mark.parametrize("is_late", [False, True])
def test_the_networks_own_weights_come_back_after_a_failure(monkeypatch, is_late):
    """Within the block, and while others are loaded; the line names which these were."""
    own = network()
    run = SimpleNamespace(model=own, config=SimpleNamespace(arch="own"))
    before = copy.deepcopy(own.state_dict())
    others = {name: value + 1 for name, value in before.items()}
    real = checkpoint.load_weights

    def load(model, state, arch, origin):
        real(model, state, arch, origin)
        if not is_late:
            raise UserError(f"{origin}: broken")

    monkeypatch.setattr(checkpoint, "load_weights", load)

    def work():
        with weights_of(run, {"decay": 0.5, "model": others}):
            assert_same(own.state_dict(), others)
            raise UserError("inside")

    with pytest.raises(UserError, match="inside" if is_late else "the average: broken"):
        work()
    assert_same(own.state_dict(), before)


def test_an_outdated_export_leaves_what_is_the_users(tmp_path):
    """And a folder that is none of ours stays as it is."""
    written = {"model.safetensors", "model_with_normalizer.safetensors", "config.json"}
    for folder, names in (("ours", written), ("mixed", written), ("none", {"config.json"})):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).touch()
    for name in ("README.md", "notes.txt"):
        (tmp_path / "mixed" / name).write_text("mine")
    for folder in ("ours", "mixed", "none", "missing"):
        withdraw(tmp_path / folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mixed", "none"]
    assert {path.name for path in (tmp_path / "mixed").iterdir()} == {"README.md", "notes.txt"}
    assert (tmp_path / "none" / "config.json").exists()


def test_a_run_without_an_average_has_none_to_evaluate(straight):
    save_checkpoint(last(straight) | {"average": None}, straight / "checkpoints")
    with pytest.raises(UserError, match="--checkpoint average: .* holds none, it was trained"):
        ff.load_run(straight, "average", model=network())


def test_a_rewind_puts_the_average_back(config, tmp_path, monkeypatch):
    """The guard judges plain weights; the state that it goes back to holds their average."""
    states, real = [], training.rewind.judge

    def judge(run, count):
        before = copy.deepcopy(run.learner.average.state_dict())
        if len(states) == 2:  # the second epoch's first check
            count = Count(0, 10**4)
            run.guard.history.best = Count(10**4, 10**4)
        else:  # good
            count = Count(1, 1)
        is_rewound = real(run, count)
        states.append((is_rewound, before, copy.deepcopy(run.learner.average.state_dict())))
        return is_rewound

    monkeypatch.setattr(training.rewind, "judge", judge)
    result, _ = train(config, tmp_path / "run")
    _, (_, good, _), (is_rewound, before, after) = states
    assert is_rewound
    assert result.collapse["action"] == "stop"
    assert (good["updates"], before["updates"], after["updates"]) == (3, 5, 3)
    assert_same(after["model"], good["model"])
    assert_same(last(tmp_path / "run")["average"]["model"], good["model"])
