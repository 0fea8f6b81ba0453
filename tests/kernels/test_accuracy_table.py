"""bench/accuracy.py: what a table of networks trained for real says, and what it lacks."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import pickle
import runpy
import sys

import numpy as np
import pytest

from freeadv_fast.cli.flags import parse
from freeadv_fast.cli.resolve import resolve


@pytest.fixture
def accuracy(repository, monkeypatch):
    monkeypatch.syspath_prepend(repository / "bench")
    return importlib.import_module("accuracy")


@pytest.fixture
def call(accuracy, monkeypatch, tmp_path, capsys):
    """Runs the script on two methods; returns its exit status, its rows and what it printed."""
    out = tmp_path / "accuracy.json"
    flags = ["--data", str(cifar(tmp_path)), "--methods", "free", "fgsm", "--tiny"]

    def run(run_limited, *more):
        monkeypatch.setattr(accuracy, "run_limited", run_limited)
        monkeypatch.setattr(sys, "argv", ["accuracy.py", *flags, "--out", str(out), *more])
        status = 0
        try:
            accuracy.main()
        except SystemExit as left:
            status = left.code
        return status, json.loads(out.read_text())["rows"], capsys.readouterr().out

    return run


def cifar(folder):
    """Files of the official layout, 20 images each."""
    random = np.random.default_rng(0)
    for name in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]:
        data = random.integers(0, 256, (20, 3072), dtype=np.uint8)
        content = {b"data": data, b"labels": [n % 10 for n in range(20)]}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    names = {b"label_names": [b"class%d" % n for n in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names, protocol=2))
    return folder


@pytest.fixture
def train_here(repository, monkeypatch):
    """`run_limited` in this process, which has made its imports."""

    def run(command, limit_s):
        _, script, *flags = command
        monkeypatch.setattr(sys, "argv", [script, *flags])
        with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit) as left:
            runpy.run_path(str(repository / script), run_name="__main__")
        return left.value.code, said.getvalue()

    return run


def ended(command, limit_s):
    return f"ended after {limit_s:.0f} s", "a warning\nepoch 0: loss 2.0\n"


def never(command, limit_s):
    raise AssertionError(f"made again: {command}")


def test_what_time_cut_off_is_named_and_made_by_a_second_call(call, train_here):
    status, rows, printed = call(ended, "--budget", "25")
    assert status == 1
    assert rows["free"]["error"] == "ended after 25 s: epoch 0: loss 2.0"
    assert rows["free"]["said"] == ["epoch 0: loss 2.0"]
    assert "free is missing: ended after 25 s" in printed
    assert call(never, "--budget", "1")[1]["fgsm"]["skipped"] == "the time was up"

    status, rows, printed = call(train_here)
    assert status == 0
    assert "missing" not in printed
    lines = {line.split()[0]: line.split() for line in printed.splitlines() if line.strip()}
    for method, passes, papers in (
        ("free", 32, ["85.96", "pgd-100", "46.19", "cifar10-wrn32-free-m8"]),
        ("fgsm", 8, ["83.81", "pgd-50-10", "46.06", "cifar10-preact18-fgsm-rs-30ep"]),
    ):
        result = rows[method]["result"]
        assert (result["passes"], result["num_eval_images"]) == (passes, 4)
        assert result["recipe"] in rows[method]["command"]
        assert result["num_clean_images"] == 20
        assert result["best"] is None  # evaluation_seconds are one network's
        assert 0 < result["evaluation_seconds"] < rows[method]["wall_s"]
        seconds = [f"{result[name]:.1f}" for name in ("train_seconds", "warm_up_seconds")]
        robust = ["pgd-4", f"{100 * result['robust_accuracy']['pgd-4']:.2f}"]
        assert lines[method][2:7] == [
            *seconds, f"{100 * result['clean_accuracy']:.2f}", *robust
        ]  # fmt: skip
        assert lines[method][-4:] == papers

    status, again, _ = call(never)
    assert (status, again) == (0, rows)
    _, of_others, _ = call(ended, "--methods", "pgd")
    assert of_others == rows | {"pgd": of_others["pgd"]}


def test_a_changed_command_is_made_again(call, tmp_path):
    call(ended)
    out = tmp_path / "accuracy.json"
    record = json.loads(out.read_text())
    for row in record["rows"].values():
        row |= {"result": {}}
        del row["error"]
    record["rows"]["free"]["command"] += " --lr 1"
    out.write_text(json.dumps(record))
    with pytest.raises(AssertionError, match="made again.*free-m8"):
        call(never)


def test_rows_are_recipes_at_8_255_that_are_evaluated_once(accuracy, tmp_path):
    epochs = {method: row.epochs for method, row in accuracy.ROWS.items()}
    flags = argparse.Namespace(data=tmp_path, epochs=epochs, tiny=False)
    for method, row in accuracy.ROWS.items():
        _, *arguments = accuracy.command_of(method, flags)
        command, typed = parse(arguments, "free", "cifar")
        config, *_ = resolve(command.run, typed)
        assert config.arch.startswith("preact-resnet18")
        assert (str(config.eps), str(config.eval_step)) == ("8/255", "2/255")
        assert (config.eval_attacks, config.eval_images) == (("pgd-50",), 10_000)
        assert config.holdout_images == 0
        assert config.epochs == row.epochs
        unmade = {"epochs": 1, "paper": accuracy.reported(row.beside)}
        assert len(accuracy.cells(method, unmade)) == len(accuracy.COLUMNS)
