"""Checkpoints that are written while training goes on: what waits, what fails, what is there."""

import threading

import pytest
import torch

from freeadv_fast import training
from freeadv_fast.cli import run_training
from freeadv_fast.errors import UserError
from freeadv_fast.runs import checkpoint
from freeadv_fast.runs.checkpoint import BEST, LAST, Saver, load_checkpoint


@pytest.fixture
def gate(monkeypatch):
    """Writing waits until it is set."""
    opened, real = threading.Event(), checkpoint.write_checkpoint

    def write(content, folder, name):
        assert opened.wait(60)
        real(content, folder, name)

    monkeypatch.setattr(checkpoint, "write_checkpoint", write)
    yield opened
    opened.set()


def test_a_checkpoint_holds_what_was_there_when_it_was_asked_for(gate, tmp_path):
    saver, weights = Saver(), torch.ones(3)
    saver.save({"model": weights}, tmp_path)
    weights += 1  # the next update
    assert not (tmp_path / LAST).exists()
    gate.set()
    saver.finish()
    assert torch.equal(load_checkpoint(tmp_path / LAST)["model"], torch.ones(3))


def test_another_name_waits_for_nothing_and_the_same_for_the_disk(gate, tmp_path):
    saver = Saver()
    saver.save({"model": torch.ones(1)}, tmp_path, BEST)
    saver.save({"model": torch.ones(2)}, tmp_path, LAST)
    threading.Timer(0.2, gate.set).start()
    saver.save({"model": torch.ones(3)}, tmp_path, LAST)
    assert gate.is_set()
    saver.finish()
    sizes = [len(load_checkpoint(tmp_path / name)["model"]) for name in (BEST, "previous.pt", LAST)]
    assert sizes == [1, 2, 3]


@pytest.fixture
def full_disk(monkeypatch):
    """Nothing can be flushed to it; files that are there stay."""

    def fsync(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", fsync)


@pytest.mark.parametrize("asked", ["finish", "save"])
def test_what_could_not_be_written_is_told_by_the_next_call(asked, full_disk, tmp_path):
    saver = Saver()
    saver.save({"model": torch.ones(1)}, tmp_path)
    with pytest.raises(UserError, match=r"cannot save .*last.pt: No space left"):
        saver.finish() if asked == "finish" else saver.save({}, tmp_path)
    saver.finish()  # told once
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_behind_what_could_not_be(tmp_path, monkeypatch):
    """A last.pt that names a best.pt which is not there would be worse than none."""
    real = checkpoint.write_checkpoint

    def write(content, folder, name):
        if name == BEST:
            raise UserError("no room")
        real(content, folder, name)

    monkeypatch.setattr(checkpoint, "write_checkpoint", write)
    saver = Saver()

    def save(*names):
        for name in names:
            saver.save({"model": torch.ones(1)}, tmp_path, name)

    with pytest.raises(UserError, match="no room"):
        save(BEST, LAST, LAST)  # the second may not know yet
    saver.finish()
    assert not list(tmp_path.iterdir())


@pytest.fixture
def run(small_images, tmp_path):
    """Two data epochs of free training without held-out images; gives exit status and folder."""
    flags = [
        "--data", str(small_images), "--workers", "0", "--arch", "test_resnet",
        "--image-size", "16", "--batch-size", "24", "--epochs", "4", "--m", "2", "--eps", "8/255",
        "--holdout-images", "0", "--eval-images", "8", "--eval-attacks", "pgd-2",
        "--output-dir", str(tmp_path / "run"),
    ]  # fmt: skip
    return lambda: (run_training("free", "imagenet", flags), tmp_path / "run")


def test_a_run_trains_while_its_checkpoints_are_written(run, gate, monkeypatch):
    """The first epoch's is on its way until the second epoch's is asked for."""
    seen, real = [], training.train_epoch

    def train_epoch(run, *rest):
        ended = real(run, *rest)
        seen.append((run.folder.checkpoints / LAST).exists())
        if len(seen) == 2:
            gate.set()
        return ended

    monkeypatch.setattr(training, "train_epoch", train_epoch)
    status, folder = run()
    assert status == 0
    assert seen == [False, False]
    assert load_checkpoint(folder / "checkpoints" / LAST)["progress"]["epoch"] == 2


@pytest.mark.parametrize("failing", [1, 2])
def test_a_checkpoint_that_finds_no_room_ends_the_run_in_one_line(
    failing, run, monkeypatch, capsys
):
    """The first, told by the second, and the last, told before anything is evaluated."""
    calls, real = [], checkpoint.os.fsync

    def fsync(file):
        calls.append(file)
        if len(calls) == failing:
            raise OSError(28, "No space left on device")
        real(file)

    monkeypatch.setattr(checkpoint.os, "fsync", fsync)
    status, folder = run()
    said = capsys.readouterr()
    assert status == 2
    assert "cannot save" in said.err
    assert "Traceback" not in said.err
    assert len(said.err.splitlines()) == 1
    assert not (folder / "result.json").exists()
    assert (folder / "checkpoints" / LAST).exists() is (failing == 2)


def test_a_run_that_fails_otherwise_says_both(run, monkeypatch, capsys):
    real, calls = training.train_epoch, []

    def train_epoch(run, *rest):
        calls.append(1)
        if len(calls) == 2:
            raise UserError("something else")
        return real(run, *rest)

    def no_room(content, folder, name):
        raise UserError("no room")

    monkeypatch.setattr(training, "train_epoch", train_epoch)
    monkeypatch.setattr(checkpoint, "write_checkpoint", no_room)
    assert run()[0] == 2
    said = capsys.readouterr()
    assert "something else" in said.err
    assert "no room" in said.out
