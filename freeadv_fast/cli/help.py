"""What --help prints: flags by what they are for, with the defaults that the other flags imply.

A flag's text is the docstring of its field, or of the argument that it sets. tyro, which reads the
command line, is not asked: it knows neither which method reads a flag nor what a group is for.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from docstring_parser import DocstringParam, parse_from_object

from freeadv_fast.cli.flags import (
    EMBEDDED,
    NETWORKS,
    CommandLine,
    implied_config,
    value_of,
)
from freeadv_fast.config.fields import RunFields
from freeadv_fast.config.method_fields import readers_in_words, reads
from freeadv_fast.config.method_names import METHODS, Method
from freeadv_fast.config.phases import Phases
from freeadv_fast.config.read import field_types, flag_of
from freeadv_fast.config.schedule import Schedule
from freeadv_fast.config.task_fields import TASK_READERS, task_of
from freeadv_fast.config.threat import Perturbation
from freeadv_fast.config.written import as_typed, as_written

HELP_FLAGS = ("--help", "-h", "--help-all")

# A group's title by its first field, in the order of `RunFields`; the first is named by the method.
GROUPS = {
    "recipe": "method",
    "data": "data",
    "arch": "network",
    "epochs": "optimizer",
    "seed": "run",
    "guard_every": "guard against a collapse of robustness",
    "eval_attacks": "evaluation",
}

# What --no-X does: shown where X is the default, whose own text would say the opposite.
NEGATIVES = {
    "decoupled": "Train on every image clean and attacked, instead of attacking the share --p-adv "
    "and training on the rest as it is.",
    "reg_adaptive": "Keep elle's weight at --reg-lambda, instead of 0 until the loss is suddenly "
    "less linear, and decaying from --reg-lambda after that (ELLE instead of ELLE-A).",
    "lalr_exempt": "lalr moves batch norm's parameters and biases as every other tensor, as the "
    "authors' code does.",
    "sync_speed": "Divide each parameter's gradient by all images, instead of by those that it saw "
    "(Fast AdvProp, section 4.3).",
    "shuffle": "Do not shuffle Fast AdvProp's adversarial images over batch-norm groups and ranks, "
    "so that labels leak from the noise pass.",
}

# What stands for a value that is none of some words, by its field or its type.
STAND_INS: dict[Any, str] = {
    "recipe": "NAME",
    "arch": "NAME",
    "phase_data": "PATH,PATH",
    "attacks": "NAME,NAME",
    "checkpoint": "NAME",
    "preprocessing": "NAME",
    "robustbench": "NAME",
    "push_to_hub": "OWNER/NAME",
    "mean": "X,X,X",
    "std": "X,X,X",
    "eps": "K/255",
    "methods": "NAME,NAME",
    "seeds": "N,N",
    "step": "K/255",
    int: "N",
    float: "X",
    str: "PATH",
    tuple[str, ...]: "NAME,NAME",
    Perturbation: "K/255",
    Schedule: "SCHEDULE",
    Phases: "PHASES",
}

NARROWEST, WIDEST = 80, 100
TEXT_COLUMN = 26
NO_BREAK = "\N{NO-BREAK SPACE}"


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag as help shows it.

    Attributes:
        form: What is typed, with a stand-in for the value: ``--eps K/255``.
        text: What it does, and its default.
    """

    form: str
    text: str


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether help is wanted, whatever else was typed."""
    return any(flag in arguments for flag in HELP_FLAGS)


def help_page(arguments: list[str], method: Method, dataset: str) -> str:
    """The help of a training script, as wide as the terminal.

    Args:
        arguments: Without the program's name. They imply the recipe whose defaults are shown;
            unknown ones do not matter.
        method: The script's method.
        dataset: Whose recipes the user's own data are trained with.

    Raises:
        UserError: no such --config or --recipe.
    """
    defaults = implied_defaults(arguments, method, dataset)
    on_collapse = value_of(arguments, "--on-collapse") or "stop"
    groups, others = grouped_flags(defaults, on_collapse)
    last = "--help-all shows the flags of other methods too"
    if "--help-all" in arguments:
        groups["other methods"] = others
        last = "--help hides the flags of other methods"
    head = page(origin_of(defaults, arguments), "[flags]", groups)
    return f"{head}\n\n{last}"


def tool_page(tool: Callable[..., Any]) -> str:
    """The help of a script that does not train, as wide as the terminal.

    Args:
        tool: The function whose arguments its flags set, or the dataclass whose fields.
    """
    docstring = parse_from_object(tool)
    described, hints = in_words(docstring.params), typing.get_type_hints(tool, include_extras=True)
    groups: dict[str, list[Flag]] = {}
    typed = []
    for name, parameter in inspect.signature(tool).parameters.items():
        if typing.get_origin(hints[name]) is typing.Annotated:  # tyro.conf.Positional
            typed.append(name.upper())
            groups.setdefault("arguments", []).append(Flag(name.upper(), described[name]))
            continue
        flag = tool_flag(name, hints[name], parameter.default, described[name])
        groups.setdefault("flags", []).append(flag)
        if parameter.default is parameter.empty:
            typed.append(flag.form)
    about = " ".join(filter(None, (docstring.short_description, docstring.long_description)))
    return page(about, " ".join([*typed, "[flags]"]), groups)


def page(about: str, typed: str, groups: Mapping[str, Sequence[Flag]]) -> str:
    """A page of help, as wide as the terminal.

    Args:
        about: What stands above all.
        typed: What follows the script's name.
        groups: Flags by their group's title.
    """
    width = max(NARROWEST, min(shutil.get_terminal_size((WIDEST, 0)).columns, WIDEST))
    head = [*wrapped(about, width), f"usage: {program()} {typed}"]
    bodies = (
        [title, *(line for flag in flags for line in rendered(flag, width))]
        for title, flags in groups.items()
    )
    return "\n\n".join("\n".join(lines) for lines in (head, *bodies))


def program() -> str:
    """What is typed to start this script."""
    spec = sys.modules["__main__"].__spec__
    is_package = spec is not None and Path(sys.argv[0]).name == "__main__.py"
    return f"python -m {spec.parent}" if spec is not None and is_package else sys.argv[0]


def implied_defaults(arguments: list[str], method: Method, dataset: str) -> dict[str, Any]:
    """Each flag's default by its field; None for --data where the recipe needs the user's own."""
    base = implied_config(arguments, method, dataset)
    defaults = {name: getattr(base, name) for name in field_types()}
    defaults |= {"config": None, "dry_run": False}
    if base.data not in EMBEDDED:
        defaults["data"] = None
    chosen = value_of(arguments, "--method")
    return defaults | ({"method": chosen} if chosen in METHODS else {})


def origin_of(defaults: dict[str, Any], arguments: list[str]) -> str:
    """Whose defaults are shown, in a sentence."""
    config_path = value_of(arguments, "--config")
    if config_path is not None:
        return f"Defaults are those of the run in {config_path}."
    recipe = defaults["recipe"]
    return f"Defaults are those of recipe {recipe}; --data, --method and --recipe imply others."


def grouped_flags(
    defaults: dict[str, Any], on_collapse: str
) -> tuple[dict[str, list[Flag]], list[Flag]]:
    """The flags that method and network read, by their group's title, and those of others."""
    method, task = defaults["method"], task_of(defaults["arch"])
    groups: dict[str, list[Flag]] = {}
    others: list[Flag] = []
    for title, names in fields_by_group().items():
        heading = f"method: {method}" if title == "method" else title
        for name in names:
            flag, reader = flag_for(name, defaults[name]), TASK_READERS.get(name, task)
            if reader != task:
                others.append(Flag(flag.form, f"[{NETWORKS[reader]}s] {flag.text}"))
            elif reads(method, name, on_collapse):
                groups.setdefault(heading, []).append(flag)
            else:
                others.append(Flag(flag.form, f"[{readers_in_words(name)}] {flag.text}"))
    return groups, others


def fields_by_group() -> dict[str, list[str]]:
    """The fields behind the flags, by their group's title."""
    groups: dict[str, list[str]] = {}
    title = ""
    for field in dataclasses.fields(RunFields):
        title = GROUPS.get(field.name, title)
        groups.setdefault(title, []).append(field.name)
    groups["run"] += ["config", "dry_run"]
    return groups


def flag_for(name: str, default: Any) -> Flag:
    """The flag of a field; a field that is true by default has the flag that makes it false."""
    if name == "resume":
        return Flag("--resume [FOLDER]", texts()[name])
    if isinstance(default, bool):
        return Flag(as_typed(name, not default), NEGATIVES[name] if default else texts()[name])
    return Flag(f"{flag_of(name)} {stand_in(name)}", with_default(texts()[name], default))


def tool_flag(name: str, hint: Any, default: Any, text: str) -> Flag:
    """The flag of a tool's argument, which is false by default where it is a bool."""
    if name == "resume":
        return Flag("--resume [FOLDER]", text)
    if hint is bool:
        return Flag(flag_of(name), text)
    return Flag(f"{flag_of(name)} {stand_in(name, hint)}", with_default(text, default))


def with_default(text: str, default: Any) -> str:
    """A flag's text, its default in place of the rule that it follows."""
    text, _, said = text.partition(" Default: ")
    if default not in (None, (), inspect.Parameter.empty):
        said = as_written(default)
    return text + (said and f" Default:{NO_BREAK}{said}")


@functools.cache
def texts() -> dict[str, str]:
    """Each field's docstring, as one line."""
    params = [*parse_from_object(RunFields).params, *parse_from_object(CommandLine).params]
    return in_words(params)


def in_words(params: Sequence[DocstringParam]) -> dict[str, str]:
    """Each parameter's text, as one line."""
    return {param.arg_name: " ".join((param.description or "").split()) for param in params}


def stand_in(name: str, hint: Any = None) -> str:
    """What stands for a value: ``{mixup,cutmix,none}``, ``N``, ``K/255``.

    Args:
        name: The field that the flag sets. hint: Its type; None for that of a run's field.
    """
    hint = field_types().get(name, str) if hint is None else hint
    # A union with a Literal is typing's, any other the language's.
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    alternatives = typing.get_args(hint) if is_union else (hint,)
    (kind,) = (kind for kind in alternatives if kind is not type(None))
    if typing.get_origin(kind) is Literal:
        return f"{{{','.join(typing.get_args(kind))}}}"
    return STAND_INS[name if name in STAND_INS else kind]


def rendered(flag: Flag, width: int) -> list[str]:
    """A flag's lines: what is typed on the left, or on lines of its own where that is long."""
    text = [" " * TEXT_COLUMN + line for line in wrapped(flag.text, width - TEXT_COLUMN)]
    form = "  " + flag.form
    if len(form) + 2 <= TEXT_COLUMN:
        return [form.ljust(TEXT_COLUMN) + text[0].lstrip(), *text[1:]]
    name, _, choices = flag.form.partition(" ")
    margin = f"  {name} "
    words = wrapped(choices.replace(",", ", "), width - len(margin))
    lines = [" " * len(margin) + line.replace(", ", ",") for line in words]
    return [margin + lines[0].lstrip(), *lines[1:], *text]


def wrapped(text: str, width: int) -> list[str]:
    """Lines of a text, without breaks inside flags and names."""
    lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    return [line.replace(NO_BREAK, " ") for line in lines]
