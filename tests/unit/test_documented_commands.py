"""README and docs/ are true: every command is parsed or run, every link leads somewhere."""

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import itertools
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from torch.distributed.run import get_args_parser

import freeadv_fast
from freeadv_fast import toolchain
from freeadv_fast.cli.evaluate import EvaluateFlags
from freeadv_fast.cli.flags import (
    CommandLine,
    parse,
    parse_with_tyro,
    refuse_unknown_flags,
    share_of,
)
from freeadv_fast.cli.help import HELP_FLAGS, asks_for_help, help_page
from freeadv_fast.cli.resolve import resolve
from freeadv_fast.config.method_names import METHODS
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.recipes.catalogue import RECIPES
from freeadv_fast.sweep import Sweep, configure, plan, refuse_bad_flags, split_arguments

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
MAX_README_LINES = 150

SHELL = ("", "sh", "bash", "console", "shell")
# What a shell, or any system, has: nothing of ours to be wrong.
SYSTEM = {"cat", "cd", "kill", "sleep", "tail", "wait"}
# Flags in running text that are neither a training's nor a tool's.
OTHERS_FLAGS = {"--nproc-per-node", *HELP_FLAGS}


class Command(NamedTuple):
    """A command of a page: its words, without redirections and what follows `&&`, `;` or `&`."""

    page: str
    words: tuple[str, ...]


def page_text(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page):
    """Language and body of each fenced block."""
    fenced = re.findall(r"^```([^\n]*)\n(.*?)^```", page_text(page), re.M | re.S)
    return [((info.split() or [""])[0], body) for info, body in fenced]


def prose(page):
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```\n", "", page_text(page), flags=re.M | re.S)


def commands_of(page):
    body = "".join(body for language, body in blocks(page) if language in SHELL)
    found = []
    for line in body.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
        lexer.whitespace_split = True
        for is_separator, words in itertools.groupby(lexer, lambda w: not w.strip(";&|<>")):
            words = without_assignments(list(words))
            if not is_separator and words:
                found.append(Command(page, tuple(words)))
    return found


def without_assignments(words):
    """Drops `NAME=value` before a command, and where there is none behind it."""
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return words


COMMANDS = [command for page in PAGES for command in commands_of(page)]


def make_targets():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z][\w-]*):(?! export)", text, re.M))


@functools.cache
def stated_packages():
    """Names that pyproject.toml installs, and its extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    listed = [*project["dependencies"], *itertools.chain(*extras.values())]
    return {re.match(r"[\w-]+", name)[0] for name in listed} | {f".[{extra}]" for extra in extras}


def check(words, monkeypatch):
    """Runs a command dry: whatever can be wrong about it is raised."""
    program, *rest = words
    if program == "make":
        assert set(rest) <= make_targets()
    elif program == "source":
        assert rest == [".venv/bin/activate"]
    elif program == "pip":
        assert rest[0] == "install"
        named = {word for word in rest[1:] if not word.startswith("-")}
        assert named <= stated_packages(), named
    elif program == "apt-get":
        monkeypatch.setattr(toolchain, "find_cxx", lambda: None)
        monkeypatch.setattr(toolchain, "has_python_headers", lambda: False)
        assert rest == ["install", *toolchain.missing_packages()]
    elif program == "sbatch":
        job = next(index for index, word in enumerate(rest) if word.endswith(".sbatch"))
        assert (ROOT / rest[job]).is_file()
        folder, *training = rest[job + 1 :]
        check_script([*training, "--output-dir", folder])
    elif program == "torchrun":
        script = next(index for index, word in enumerate(rest) if word.endswith(".py"))
        monkeypatch.setenv("WORLD_SIZE", str(ranks_of([w for w in rest[:script] if w != "--"])))
        check_script(rest[script:])
    elif program == "python":
        check_python(rest)
    else:
        assert program in SYSTEM, f"{program}: nobody knows how to check it"


def ranks_of(flags):
    """Ranks that torchrun would start; it refuses flags that it does not know."""
    parsed = get_args_parser().parse_args([*flags, "script.py"])
    return int(parsed.nproc_per_node)


def check_python(words):
    if words[0] == "-m":
        check_tool(importlib.import_module(f"{words[1]}.__main__").main, words[2:])
    elif words[0] == "-c":
        compile(words[1].replace("$NET", "pass"), "documented", "exec")
    else:
        check_script(words)


def check_script(words):
    """A script of ours with its flags, read as it reads them."""
    script, *arguments = words
    path = ROOT / script
    source = path.read_text(encoding="utf-8")
    if path.parent.name == "bench":
        flags = {word.partition("=")[0] for word in arguments if word.startswith("--")}
        assert all(f'"{flag}"' in source for flag in flags)
    elif training := re.search(r'run_training\("([\w-]+)", "(\w+)"\)', source):
        check_training(arguments, *training.groups())
    elif path.name == "quickstart.py":
        for method in ("natural", "free"):
            check_training(share_of(arguments, method, ("natural", "free")), method, "digits")
    elif path.name == "sweep.py":
        own, flags = split_arguments(arguments)
        sweep = parse_with_tyro(Sweep, own, Sweep())
        refuse_bad_flags(sweep, flags)
        for cell, config in plan(sweep, flags):
            assert config is not None, cell.error
            configure(sweep, cell, flags)
    else:
        spec = importlib.util.spec_from_file_location(f"documented_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        check_tool(getattr(module, "main", EvaluateFlags), arguments)


def check_training(arguments, method, dataset):
    if asks_for_help(arguments):
        assert help_page(arguments, method, dataset)
        return
    if "--config" in arguments:  # of a run that the reader has made
        at = arguments.index("--config")
        arguments = arguments[:at] + arguments[at + 2 :]
    command, typed = parse(arguments, method, dataset)
    resolve(command.run, typed)


def check_tool(main, arguments):
    """A tool's flags, read into its function's parameters; the function is not called."""
    refuse_unknown_flags(arguments, inspect.signature(main).parameters)

    @functools.wraps(main)
    def seen(*values, **named):
        return 0

    assert parse_with_tyro(seen, arguments) == 0


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: f"{c.page}: {' '.join(c.words)}"[:100])
def test_command(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "1")
    check(list(command.words), monkeypatch)


@pytest.mark.parametrize(
    "line",
    [
        "make fly",
        "python launch/cifar.py --method free --n 8 --data cifar10:/data",
        "python launch/cifar.py --method pgd --m 8 --data cifar10:/data",
        "python launch/imagenet_free.py --recipe imagenet-rn50-free-m5 --data /imagenet",
        "torchrun --nproc-per-gpu 4 launch/imagenet_free.py --data /imagenet",
        "python launch/evaluate.py runs/x --attack pgd-50",
        "python launch/sweep.py --methods free,pdg",
        "python -m freeadv_fast.data.resize /imagenet /in160 --sizes 160",
        "python -m freeadv_fast.nothing",
        "python bench/bench_cost.py --hours 3",
        "pip install left-pad",
        "frobnicate",
    ],
)
def test_a_wrong_command_is_found(line, monkeypatch):
    with pytest.raises((AssertionError, ValueError, ImportError, SystemExit)):
        check(line.split(), monkeypatch)


def test_the_first_two_commands_are_make_run_and_make_test():
    first = [command.words for command in commands_of("README.md")[:2]]
    assert first == [("make", "run"), ("make", "test")]


def test_readme_is_short():
    assert len(page_text("README.md").splitlines()) <= MAX_README_LINES


def anchors(page):
    """Headings as GitHub links to them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", prose(page)):
        if "://" in target:
            continue
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.resolve().relative_to(ROOT).as_posix()), (target, anchor)


@pytest.mark.parametrize("page", PAGES[1:])
def test_pages_are_linked_from_readme_and_back(page):
    assert f"]({page})" in page_text("README.md")
    assert "](../README.md" in page_text(page)


def known_flags():
    """Every flag of a training, of the sweep and of the tools."""
    names = [field.name for kind in (TrainConfig, CommandLine, Sweep, EvaluateFlags)
             for field in dataclasses.fields(kind)]  # fmt: skip
    scripts = [*(ROOT / "launch").glob("*.py"), *(ROOT / "freeadv_fast").rglob("__main__.py")]
    tools = [path.read_text(encoding="utf-8") for path in scripts]
    names += re.findall(r"^    (\w+): [^\n]+ = ", "\n".join(tools), re.M)
    flags = {"--" + name.replace("_", "-") for name in names}
    return flags | {f"--no-{flag[2:]}" for flag in flags} | OTHERS_FLAGS


@pytest.mark.parametrize("page", PAGES)
def test_flags_in_the_text_exist(page):
    spans = re.findall(r"`([^`\n]+)`", prose(page))
    named = {flag for span in spans for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)}
    assert not named - known_flags()


def expanded(name):
    """`a-{b,c}-d{1..2}` as a shell expands it."""
    brace = re.search(r"\{([^{}]*)\}", name)
    if brace is None:
        return [name]
    first, dots, last = brace[1].partition("..")
    choices = map(str, range(int(first), int(last) + 1)) if dots else brace[1].split(",")
    return [
        whole
        for choice in choices
        for whole in expanded(name[: brace.start()] + choice + name[brace.end() :])
    ]


def test_the_table_of_recipes_names_each_of_them_and_no_other():
    rows = prose("docs/recipes.md").split("\n## ")[0]
    cells = [line.split("|")[1] for line in rows.splitlines() if line.startswith("| `")]
    spans = [span for cell in cells for span in re.findall(r"`([^`]+)`", cell)]
    named = [name for span in spans for name in expanded(span)]
    assert sorted(named) == sorted(RECIPES)


def test_the_methods_have_a_row_and_a_section():
    rows = re.findall(r"^\| `(\w[\w-]*)` \|", prose("README.md"), re.M)
    assert rows == list(METHODS)
    headings = ", ".join(re.findall(r"^## (.*)$", prose("docs/methods.md"), re.M)).split(", ")
    assert set(METHODS) <= set(headings)


# Columns of the H200's tables, and the ladder's sections by the network that a row begins with.
RATES = {
    "natural": "natural",
    "free": "free",
    "eager natural": "eager",
    "plain free loop": "plain",
    "torch.compile": "compiled",
}
SECTIONS = {"ResNet-50": "resnet50_224", "PreActResNet-18": "preact_resnet18_32"}


def measured(row, ladder):
    """The results that a row of a table is about: of the file that it links, or of the ladder."""
    name = re.search(r"bench/results/h200/[^)]*", row)
    record = json.loads((ROOT / (name[0] if name else ladder)).read_text(encoding="utf-8"))
    if "sections" in record:
        network = re.match(r"\| \[?([\w-]+)", row)[1]
        record = record["sections"][SECTIONS[network]]
    return record["results"]


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md"])
def test_rates_are_those_of_their_files(page):
    """Rows of the H200's tables: whole passes a second."""
    num_rows = 0
    for table in re.findall(r"(?:^\|.*\n)+", prose(page), re.M):
        header, _, *rows = table.splitlines()
        columns = [RATES.get(cell.strip()) for cell in header.split("|")]
        if "natural" not in columns:
            continue
        for row in rows:
            results = measured(row, "bench/results/h200/ladder.json")
            rates = {
                name: f"{one['image_passes_per_second']:,.0f}" for name, one in results.items()
            }
            cells = [cell.strip() for cell in row.split("|")]
            for name, cell in zip(columns, cells, strict=True):
                assert name is None or cell == rates.get(name, ""), row
            num_rows += 1
    assert num_rows >= 3


@functools.cache
def source_words():
    """The package's text with string literals joined over line ends and their fields as `...`."""
    files = [path.read_text(encoding="utf-8") for path in (ROOT / "freeadv_fast").rglob("*.py")]
    joined = re.sub(r'"\s*\n\s*f?"', "", "\n".join(files))
    return re.sub(r"\{[^{}]*\}", "...", joined)


def error_lines():
    cells = re.findall(r"^\| `(.+?)` \|", prose("docs/troubleshooting.md"), re.M)
    return [cell for cell in cells if not cell.startswith("torchrun: ")]


@pytest.mark.parametrize("line", error_lines())
def test_error_lines_are_those_of_the_code(line):
    """Each clause stands in a message, as far as `...` does not stand for it."""
    for clause in re.split(r"\.\.\.|[;:] ", line):
        words = clause.strip(" ()`:;,")
        assert words in source_words(), words


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(language == "python" for language, _ in blocks(page))]
)
def test_python_runs(page, monkeypatch, tmp_path):
    """A page's blocks one after the other, in one namespace, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "documented"}
    for number, (language, body) in enumerate(blocks(page)):
        if language == "python":
            exec(compile(body, f"{page}, block {number}", "exec"), namespace)  # noqa: S102


def test_the_python_example_of_readme_is_short():
    (body,) = [body for language, body in blocks("README.md") if language == "python"]
    assert len([line for line in body.splitlines() if line.strip()]) <= 12


@pytest.mark.parametrize("target", ["run", "test", "lint", "clean"])
def test_makefile_has(target):
    assert target in make_targets()


def test_ci_runs_make_test():
    script = ROOT / ".ci" / "run"
    text = script.read_text(encoding="utf-8")
    assert "make test" in text
    assert "set -euo pipefail" in text


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == freeadv_fast.__version__
    assert f"## [{freeadv_fast.__version__}]" in page_text("CHANGELOG.md")
