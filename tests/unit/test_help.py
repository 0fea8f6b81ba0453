"""Help teaches: a method's flags by what they are for, with the defaults that will be used."""

import itertools
import re
import signal
import subprocess
import sys

import pytest

from freeadv_fast.cli import run as cli
from freeadv_fast.cli.help import GROUPS, NEGATIVES, TEXT_COLUMN, fields_by_group, stand_in, texts
from freeadv_fast.config.file import NOT_SAVED
from freeadv_fast.config.method_fields import READERS
from freeadv_fast.config.method_names import METHODS
from freeadv_fast.config.read import field_types
from freeadv_fast.config.task_fields import TASK_READERS
from freeadv_fast.recipes.catalogue import RECIPES


@pytest.fixture
def shown(capsys, monkeypatch):
    """What a script prints with some flags on a terminal of some width."""

    def call(line, width=100, dataset="cifar"):
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setattr("sys.argv", ["launch/cifar.py"])
        assert cli.run_training("free", dataset, line.split()) == 0
        return capsys.readouterr().out

    return call


def group(text, title):
    """The lines of a group."""
    (body,) = (part for part in text.split("\n\n") if part.startswith(f"{title}\n"))
    return body


def described(text, flag):
    """A flag's text on one line."""
    start = re.search(rf"^  {flag}( |$)", text, re.M)
    first, *others = text[start.start() :].splitlines()
    entry = [first, *itertools.takewhile(lambda line: line.startswith(" " * 3), others)]
    return " ".join(" ".join(entry).split())


def flags_in(text):
    return re.findall(r"^  (--[\w-]+)", text, re.M)


def test_head(shown):
    lines = shown("--help").splitlines()
    assert lines[0].startswith("Defaults are those of recipe digits-free;")
    assert lines[1] == "usage: launch/cifar.py [flags]"


def test_groups_come_by_what_flags_are_for(shown):
    titles = [part.splitlines()[0] for part in shown("--help").split("\n\n")[1:-1]]
    assert titles == ["method: free", *list(GROUPS.values())[1:]]
    advprop = shown("--help --method advprop")
    assert "method: advprop" in advprop
    assert GROUPS["guard_every"] not in advprop


def test_every_field_is_in_a_group_and_has_a_text_and_a_stand_in():
    names = [name for names in fields_by_group().values() for name in names]
    assert sorted(names) == sorted([*field_types(), "config", "dry_run"])
    for name in names:
        assert texts()[name].strip(), name
        if field_types().get(name) is not bool and name != "dry_run":
            assert stand_in(name), name
    assert fields_by_group()["run"][-2:] == ["config", "dry_run"]


@pytest.mark.parametrize("method", METHODS)
def test_flags_of_other_methods_are_hidden(shown, method):
    names = {name for name, readers in READERS.items() if method not in readers}
    names |= {name for name, task in TASK_READERS.items() if task == "detection"}
    hidden = {f"--{name.replace('_', '-')}" for name in names}
    text, whole = shown(f"--help --method {method}"), shown(f"--help-all --method {method}")
    negatives = {f"--no-{flag[2:]}" for flag in hidden}
    assert not (hidden | negatives) & set(flags_in(text))
    assert text.endswith("\n--help-all shows the flags of other methods too\n")
    assert set(flags_in(group(whole, "other methods"))) <= hidden | negatives
    assert len(flags_in(whole)) == len(field_types()) + 2
    assert len(flags_in(text)) == len(flags_in(whole)) - len(hidden)


def test_other_methods_are_named_beside_their_flags(shown):
    others = group(shown("--help-all"), "other methods")
    assert "[trades, free-trades] Weight of the distance" in described(others, "--trades-beta")
    assert described(others, "--norm").startswith("--norm {linf,l2} [pgd, trades] Ball of")


def test_gradaligns_flags_count_where_a_run_may_go_on_as_gradalign(shown):
    assert "--reg-every" not in flags_in(shown("--help"))
    assert "--reg-every" in flags_in(shown("--help --on-collapse gradalign"))


@pytest.mark.parametrize(
    ("line", "recipe", "flag", "default"),
    [
        ("", "digits-free", "--lr", "0.05"),
        ("--data /x", "cifar10-wrn32-free-m8", "--m", "8"),
        ("--data /x", "cifar10-wrn32-free-m8", "--steps", "80000"),
        ("--data svhn:/x --method pgd", "svhn-preact18-pgd10-eps8", "--attack-start", "zero"),
        ("--recipe imagenet-rn50-fgsm-rs-eps2", "imagenet-rn50-fgsm-rs-eps2", "--eps", "2/255"),
        ("--method fast-advprop", "digits-fast-advprop", "--p-adv", "0.2"),
    ],
)
def test_defaults_are_those_of_the_implied_recipe(shown, line, recipe, flag, default):
    text = shown(f"--help {line}")
    assert text.startswith(f"Defaults are those of recipe {recipe};")
    assert re.search(rf"Default: {re.escape(default)}( --|$)", described(text, flag)), line
    assert f"Default: {recipe}" in described(text, "--recipe")


def test_a_default_replaces_the_rule_and_a_rule_stays_where_there_is_none(shown):
    assert "Default: the whole minibatch" in described(shown("--help"), "--bn-group")
    text = described(shown("--help --recipe imagenet-rn50-free-m4-eps4"), "--bn-group")
    assert text.endswith("Default: 64")


def test_data_has_no_default_where_the_recipe_needs_the_users_own(shown):
    data = group(shown("--help"), "data")
    assert "Default: digits" in data[: data.index("--image-size")]
    data = group(shown("--help --data /x"), "data")
    assert "Default" not in data[: data.index("--image-size")]


def test_a_saved_run_gives_the_defaults(shown, tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("method: trades\nm: 1\ntrades_beta: 2.5\n")
    monkeypatch.chdir(tmp_path)
    text = shown("--help --config config.yaml")
    assert text.startswith("Defaults are those of the run in config.yaml.\n")
    assert described(text, "--trades-beta").endswith("Default: 2.5")


def test_negative_flags_are_described_in_their_own_sense(shown):
    text = shown("--help --method fast-advprop")
    assert described(text, "--no-shuffle").startswith("--no-shuffle Do not shuffle")
    text = shown("--help --recipe imagenet-rn50-fast-advprop-no-sync")
    assert described(text, "--sync-speed").startswith("--sync-speed Divide each parameter's")
    text = shown("--help --recipe imagenet-rn50-advprop-decoupled")
    assert described(text, "--no-decoupled").startswith("--no-decoupled Train on every image")


def test_negatives_are_complete():
    """A config.yaml may make any of them the default, but those that it does not hold."""
    booleans = {name for name, hint in field_types().items() if hint is bool}
    assert NEGATIVES.keys() == booleans - set(NOT_SAVED)


@pytest.mark.parametrize("width", [80, 100, 120, 20])
@pytest.mark.parametrize("method", ["free", "fast-advprop", "gradalign"])
def test_lines_are_filled_and_fit(shown, width, method):
    """No line is too long, and none ends where the next word would have fitted."""
    text = shown(f"--help-all --method {method}", width)
    limit = max(80, min(width, 100))
    lines = text.splitlines()
    assert max(map(len, lines)) <= limit
    margin = " " * TEXT_COLUMN
    for line, following in zip(lines, lines[1:], strict=False):
        is_text = following.startswith(margin) and line[TEXT_COLUMN:].strip()
        if is_text and line[TEXT_COLUMN - 1] == " " and "Default:" not in following:
            assert len(line) + 1 + len(following.split()[0]) > limit, line


def test_help_minds_no_other_flag_and_says_which_recipe_is_unknown(shown, capsys):
    assert "method: free" in shown("--bathc-size 8 --method fgms --help")
    assert cli.run_training("free", "cifar", ["--help", "--recipe", "digits-fre"]) == 2
    assert "did you mean digits-free" in capsys.readouterr().err


def test_help_is_said_once(shown, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert shown("--help") == ""


def test_every_recipe_has_a_help(shown):
    one_of_each = {config.method: name for name, config in RECIPES.items()}
    for method, name in one_of_each.items():
        assert f"method: {method}\n" in shown(f"-h --recipe {name}")


def test_a_reader_may_leave_early(repository):
    script = "import sys; from freeadv_fast.cli import run_training; "
    script += "sys.exit(run_training('free', 'cifar', ['--help-all']))"
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=repository, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 128 + signal.SIGPIPE  # what the shell says of `cat` as well


def test_help_imports_no_training(repository):
    script = "import sys; from freeadv_fast.cli import run_training; "
    script += "run_training('free', 'cifar', ['--help']); "
    script += "assert 'freeadv_fast.training' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], cwd=repository, check=True, capture_output=True)
