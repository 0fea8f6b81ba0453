"""Every command that README shows exists."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUNNERS = {"python", "python3", ".venv/bin/python", "torchrun", ".venv/bin/torchrun"}


def readme_commands() -> list[list[str]]:
    """The words of each command in README's code blocks; Python blocks are left out."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    lines = "".join(
        body for language, body in blocks if language in ("", "sh", "bash", "console", "shell")
    )
    lines = lines.replace("\\\n", " ")
    commands = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines.splitlines()]
    return [without_assignments(words) for words in commands if words]


def without_assignments(words: list[str]) -> list[str]:
    """Drops `NAME=value` before a command."""
    while len(words) > 1 and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    return words


def make_targets() -> set[str]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z][\w-]*):(?! export)", text, re.M))


def scripts_of(words: list[str]) -> list[str]:
    """The first .py file of a python or torchrun command."""
    if words[0] not in RUNNERS:
        return []
    return [word for word in words[1:] if word.endswith(".py")][:1]


def test_the_first_two_commands_are_make_run_and_make_test():
    assert readme_commands()[:2] == [["make", "run"], ["make", "test"]]


def test_make_commands_name_targets():
    named = {
        word
        for words in readme_commands()
        if words[0] == "make"
        for word in words[1:]
        if not word.startswith("-") and "=" not in word
    }
    assert named <= make_targets()


def test_scripts_exist():
    named = {script for words in readme_commands() for script in scripts_of(words)}
    assert any(name.startswith("launch/") for name in named)
    assert not {name for name in named if not (ROOT / name).is_file()}


@pytest.mark.parametrize("target", ["run", "test", "lint", "clean"])
def test_makefile_has(target):
    assert target in make_targets()


def test_ci_runs_make_test():
    script = ROOT / ".ci" / "run"
    text = script.read_text(encoding="utf-8")
    assert "make test" in text
    assert "set -euo pipefail" in text
