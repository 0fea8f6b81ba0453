"""The quickest look prints both networks beside each other, with what makes the attack strong."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from freeadv_fast.runs.json_file import write_json

CLEAN, ROBUST = {"natural": 0.958, "free": 0.947}, {"natural": 0.086, "free": 0.497}


@pytest.fixture
def quickstart(repository, tmp_path, monkeypatch):
    """launch/quickstart.py, in whose place training writes a result or nothing."""
    spec = importlib.util.spec_from_file_location("quickstart", repository / "launch/quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run_training(method, dataset, flags):
        if "--dry-run" not in flags:
            folder = Path(flags[flags.index("--output-dir") + 1])
            folder.mkdir(parents=True)
            result = {"clean_accuracy": CLEAN[method], "eps": "32/255", "attack_step": "4/255"}
            result["robust_accuracy"] = {"pgd-20": ROBUST[method]}
            write_json(folder / "result.json", result)
        return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "run_training", run_training)
    return module


def test_both_networks_stand_side_by_side(quickstart, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["launch/quickstart.py"])
    assert quickstart.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:6] == [
        "natural and free at eps 32/255",
        "attack  steps  step   restarts  natural   free",
        "------  -----  -----  --------  -------  -----",
        "none        -  -             -    95.8%  94.7%",
        "pgd-20     20  4/255         1     8.6%  49.7%",
    ]
    assert lines[-1].startswith("reports: runs/quickstart-")
    assert Path(lines[-1].split()[-1]).read_text().count("49.7%") >= 2


def test_a_dry_run_has_no_table(quickstart, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["launch/quickstart.py", "--dry-run"])
    assert quickstart.main() == 0
    assert capsys.readouterr().out == ""
