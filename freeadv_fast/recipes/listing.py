"""Recipes as a person reads them: all of them in tables, or one whole."""

from __future__ import annotations

from collections.abc import Sequence

from freeadv_fast.config.file import config_to_yaml
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.recipes.catalogue import PAPERS, find_recipe
from freeadv_fast.recipes.papers import REPORTED, Reported

COLUMNS = ("recipe", "method", "eps", "budget", "network", "clean", "robust", "under", "in")


def recipe_tables() -> str:
    """All recipes, a table for each paper, with its numbers where they are known."""
    tables = (
        "\n".join([title, *table_lines([COLUMNS, *(cells(*row) for row in recipes.items())])])
        for title, recipes in PAPERS.items()
    )
    last = "Accuracies, AP of detectors, as the papers report them, in percent."
    return "\n\n".join([*tables, f"{last} --show NAME prints a recipe whole."])


def cells(name: str, config: TrainConfig) -> tuple[str, ...]:
    """A recipe's line of the table."""
    epochs = f"{config.epochs:g} epochs"
    budget = f"{config.steps:,} updates" if config.steps else epochs
    return (name, config.method, str(config.eps), budget, config.arch, *numbers(name))


def numbers(name: str) -> tuple[str, ...]:
    """What its paper reports: clean, robust under the attack that leaves least, and where."""
    reported = REPORTED.get(name, Reported("-"))
    attack, robust = min(reported.robust.items(), key=lambda item: item[1], default=("-", None))
    return (percent(reported.clean), percent(robust), attack, reported.place)


def percent(accuracy: float | None) -> str:
    """An accuracy, or the dash of one that is not known."""
    return "-" if accuracy is None else f"{accuracy:g}"


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, its columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def recipe_page(name: str) -> str:
    """A recipe whole: what its paper reports, as comments, and a config.yaml for --config.

    Raises:
        UserError: no such recipe; the message names the nearest ones.
    """
    config = find_recipe(name, "--show")
    (paper,) = (title for title, recipes in PAPERS.items() if name in recipes)
    comments = [paper]
    reported = REPORTED.get(name)
    if reported is not None:
        what = "AP" if config.task == "detection" else "clean"
        clean = {} if reported.clean is None else {what: reported.clean}
        accuracies = clean | dict(reported.robust)
        said = ", ".join(f"{what} {percent(value)}" for what, value in accuracies.items())
        took = "" if reported.seconds is None else f"; trained in {reported.seconds:,.0f} s"
        comments.append(f"{reported.place}, in percent: {said}{took}")
    return "".join(f"# {line}\n" for line in comments) + config_to_yaml(config).rstrip()
