"""The help of scripts that do not train has the form of the training scripts' own."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys

import pytest

from freeadv_fast.cli.run import run_tool
from freeadv_fast.data.resize import __main__ as resize
from freeadv_fast.sweep import run_sweep


@pytest.fixture
def shown(repository, capsys, monkeypatch):
    """What a script prints with --help on a terminal of some width, and the names of its flags."""

    def call(script, width=100):
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setattr(sys, "argv", [f"launch/{script}.py", "--help"])
        spec = importlib.util.spec_from_file_location(script, repository / f"launch/{script}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        status = run_sweep(["--help"]) if script == "sweep" else run_tool(tool_of(module))
        assert status == 0
        return capsys.readouterr().out, module

    return call


def tool_of(module):
    """What makes a script's help: its function, or the dataclass of its flags."""
    return getattr(module, "main", None) or module.EvaluateFlags


@pytest.mark.parametrize("script", ["evaluate", "robustness", "export", "pictures"])
def test_every_argument_is_shown_once(shown, script):
    text, module = shown(script)
    (first, *names) = inspect.signature(tool_of(module)).parameters
    about = inspect.getdoc(tool_of(module)).splitlines()[0]
    typed = first.upper()
    head = f"{about}\nusage: launch/{script}.py {typed} [flags]\n\narguments\n  {typed} "
    assert text.startswith(head)
    flags = re.findall(r"^  (--[\w-]+)", text, re.M)
    assert flags == [f"--{name.replace('_', '-')}" for name in names]
    assert re.search(r"^  --checkpoint NAME .*\n +Default: last$", text, re.M)


def test_a_sweep_shows_its_own_flags_and_says_where_the_others_go(shown):
    text, _ = shown("sweep")
    assert text.startswith("Methods x radii x seeds. Every other flag goes to each cell whose")
    assert "usage: launch/sweep.py [flags]\n" in text
    assert re.findall(r"^  (--.*?)(?:  |$)", text, re.M) == [
        "--methods NAME,NAME",
        "--eps K/255",
        "--seeds N,N",
        "--dataset {cifar,imagenet}",
        "--output-dir PATH",
        "--resume [FOLDER]",
    ]
    assert "separated by commas.\n" + " " * 26 + "Default: 4/255,8/255\n" in text


@pytest.mark.parametrize("width", [20, 80, 120])
def test_lines_fit(shown, width):
    for script in ("robustness", "sweep"):
        assert max(map(len, shown(script, width)[0].splitlines())) <= max(80, min(width, 100))


def test_what_must_be_typed_is_in_the_usage(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x.py", "-h"])
    assert run_tool(resize.main) == 0
    assert "usage: x.py SOURCE TARGET --size N [flags]\n" in capsys.readouterr().out


def test_help_is_said_by_one_rank(shown, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert shown("evaluate")[0] == ""
