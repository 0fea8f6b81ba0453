"""What happens to a run whose disk, folder, clock or open files fail while it trains."""

import errno
import os
import shutil
import time
from dataclasses import replace

import pytest
import torch

import freeadv_fast as ff
from freeadv_fast import training
from freeadv_fast.cli.run import guard
from freeadv_fast.errors import UserError
from freeadv_fast.runs import checkpoint


@pytest.fixture
def config(small_images, tmp_path):
    return ff.TrainConfig(
        method="free", m=2, data=small_images, workers=1, image_size=16, batch_size=14, epochs=4,
        arch="test_resnet", eps="8/255", holdout_images=30, eval_images=8, eval_attacks="pgd-4",
        log_every=2, schedule="constant", guard_every=0, checkpoint_every=0,
        output_dir=tmp_path / "run",
    )  # fmt: skip


def at_minibatch(monkeypatch, number, work):
    """Does something when a run comes to a minibatch, counted from 1 over all epochs."""
    real, calls = training.arrive, []

    def arrive(place=None):
        calls.append(place)
        if len(calls) == number:
            work()
        return real(place)

    monkeypatch.setattr(training, "arrive", arrive)


def test_a_folder_that_vanishes_is_made_anew_and_the_run_ends_as_it_would_have(
    config, tmp_path, monkeypatch, capsys
):
    undisturbed = ff.train(replace(config, output_dir=tmp_path / "undisturbed"))
    at_minibatch(monkeypatch, 4, lambda: shutil.rmtree(config.output_dir))
    result = ff.train(config)
    printed = capsys.readouterr().out
    assert printed.count("was gone and is made anew") == 1
    assert result.clean_accuracy == undisturbed.clean_accuracy
    assert result.robust_accuracy == undisturbed.robust_accuracy
    files = {path.name for path in result.folder.iterdir()}
    assert {"config.yaml", "env.json", "log.jsonl", "result.json", "export"} <= files
    assert "is finished" in resumed_line(config, capsys)


def resumed_line(config, capsys):
    ff.train(replace(config, resume=True))
    return capsys.readouterr().out


def test_a_folder_that_becomes_read_only_ends_the_run_with_a_line(config, monkeypatch):
    real = checkpoint.os.replace

    def refuse(source, target):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(target))

    at_minibatch(monkeypatch, 4, lambda: monkeypatch.setattr(checkpoint.os, "replace", refuse))
    with pytest.raises(UserError, match="Read-only file system.*make the folder writable"):
        ff.train(config)
    monkeypatch.setattr(checkpoint.os, "replace", real)
    assert ff.train(replace(config, resume=True)).passes > 0


@pytest.mark.parametrize(
    ("number", "help"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EROFS, "make the folder writable"),
        (errno.EMFILE, "raise the limit of open files (ulimit -n)"),
        (errno.EIO, "repair or change the disk"),
    ],
)
def test_what_the_system_refuses_is_one_line(number, help, capsys):
    def work():
        raise OSError(number, os.strerror(number), "runs/x/log.jsonl")

    assert guard(work) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "runs/x/log.jsonl" in error
    assert f"{help} and add --resume" in error


def test_a_bug_is_not_taken_for_the_systems_fault():
    def work():
        raise FileNotFoundError(errno.ENOENT, "no such file", "x")

    with pytest.raises(FileNotFoundError):
        guard(work)


def test_a_clock_that_jumps_changes_nothing(config, tmp_path, monkeypatch):
    undisturbed = ff.train(replace(config, output_dir=tmp_path / "undisturbed"))
    real, jumps = time.time, [0, 10**6, -(10**7), 3600, -(10**6)]

    def jumping():
        jumps.append(jumps.pop(0))
        return real() + jumps[-1]

    monkeypatch.setattr(time, "time", jumping)
    searching = []
    monkeypatch.setattr(
        training, "arrive", lambda place: searching.append(torch.backends.cudnn.benchmark)
    )
    result = ff.train(config)
    assert result.robust_accuracy == undisturbed.robust_accuracy
    assert 0 < result.warm_up_seconds < result.train_seconds < 600
    assert searching == ([True] * 5 + [False]) * 2  # an epoch's last minibatch may be shorter


def test_a_process_without_open_files_left_says_so(config, monkeypatch):
    real = checkpoint.Path.open

    def refuse(path, *arguments, **options):
        if path.name == ".last.pt.partial":
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
        return real(path, *arguments, **options)

    at_minibatch(monkeypatch, 4, lambda: monkeypatch.setattr(checkpoint.Path, "open", refuse))
    with pytest.raises(UserError, match=r"Too many open files.*ulimit -n"):
        ff.train(config)
    monkeypatch.setattr(checkpoint.Path, "open", real)
    assert ff.train(replace(config, resume=True)).passes > 0
