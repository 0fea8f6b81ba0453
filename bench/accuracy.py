"""What each method's network is worth, and in how many seconds: a table of four recipes.

    python bench/accuracy.py --data /data/cifar10 --out bench/results/h200/accuracy.json

PreActResNet-18 on CIFAR-10 at eps 8/255, trained as its user would, from a shell; one run at a
time, so that seconds mean something. All figures are those of the run's own result.json: training
seconds without evaluation, accuracy clean and under PGD-50 on the 10,000 test images, in the
recipe's steps. Two things differ from the recipes. PGD-50 starts once, since ten restarts take up
to ten times as long. No image is held out, as in the papers, so that the last weights alone are
evaluated and `evaluation_seconds` are one network's.

Beside a row stand a paper's figures: of the nearest recipe that has any (`recipes/papers.py`),
which is named since network, epochs or attack are others.

The defaults should fit the budget on an H200. That is an estimate: at 51,703 passes a second
(results/h200/ladder.json, minibatches of 128) Free-8 trains 48 epochs in 46 s, FGSM-RS and the
speedrun 15 epochs of two passes an image in 29 s each, and PGD-10 8 epochs of eleven in 85 s, were
its attack's passes as dear as the weights'. PGD-50 is predicted to take 20 to 30 s (README.md).
Allowing each run 15 s to start and to export, and the first one 20 s to compile, that is 390 s.

Most important first: what the budget ends or skips is named so. The file is written after every
run; a second call of the same commit and device makes the runs that are missing, and those whose
command has changed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
from reproduce import SAID
from run_gpu import SHORTEST_SECTION_S, run_limited, succeeded

from freeadv_fast.recipes.listing import percent, table_lines
from freeadv_fast.recipes.papers import REPORTED
from freeadv_fast.runs.json_file import read_json


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        recipe: What is trained.
        epochs: Passes over the images, replays counted; of the schedule, which is shortened too.
        beside: The nearest recipe of which a paper reports figures; None where none is near.
    """

    recipe: str
    epochs: float
    beside: str | None = None


ROWS = {
    "free": Row("cifar10-preact18-free-m8-eps8", 48, "cifar10-wrn32-free-m8"),
    "fgsm": Row("cifar10-preact18-fgsm-rs-15ep", 15, "cifar10-preact18-fgsm-rs-30ep"),
    "speedrun": Row("cifar10-robust-speedrun", 15),
    "pgd": Row("cifar10-preact18-pgd10-eps8", 8, "fastat-pgd-plain"),
}

EVALUATION = ["--eval-attacks", "pgd-50", "--eval-images", "10000"]

# The clean accuracy is over all test images even here, so the network is a small one.
TINY = ["--arch", "timm/resnet10t", "--batch-size", "4", "--max-passes", "8"]
TINY += ["--eval-attacks", "pgd-4", "--eval-images", "4"]
TINY_EPOCHS = {"free": 8, "fgsm": 1, "speedrun": 1, "pgd": 1}

COLUMNS = ("method", "epochs", "training s", "warm-up s", "clean", "robust", "evaluation s",
           "a paper's clean", "robust", "of")  # fmt: skip


def command_of(method: str, flags: argparse.Namespace) -> list[str]:
    """Script and flags of a method's run, without its output folder."""
    command = ["launch/cifar.py", "--recipe", ROWS[method].recipe]
    command += ["--data", f"cifar10:{flags.data}", "--epochs", f"{flags.epochs[method]:g}"]
    return [*command, "--holdout-images", "0", *(TINY if flags.tiny else EVALUATION)]


def train(command: list[str], limit_s: float) -> dict[str, Any]:
    """Result of a run that is ended at its limit; never raises for what the run does."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        status, output = run_limited([sys.executable, *command, "--output-dir", folder], limit_s)
        outcome: dict[str, Any] = {
            "wall_s": time.monotonic() - began,
            "said": [line for line in output.splitlines() if line.startswith(SAID)],
        }
        if status == 0:
            return outcome | {"result": read_json(Path(folder) / "result.json")}
    *_, last = output.strip().split("\n")
    return outcome | {"error": f"{status}: {last}", "output": output[-1500:]}


def reported(recipe: str | None) -> dict[str, Any] | None:
    """A paper's figures, for the record."""
    return None if recipe is None else {"recipe": recipe, **dataclasses.asdict(REPORTED[recipe])}


def cells(method: str, row: dict[str, Any]) -> tuple[str, ...]:
    """A row as the table's cells, accuracies in percent."""
    own, papers = ("-",) * 5, ("-",) * 3
    if result := row.get("result"):
        ((attack, robust),) = result["robust_accuracy"].items()
        own = (
            f"{result['train_seconds']:.1f}",
            f"{result['warm_up_seconds']:.1f}",
            f"{100 * result['clean_accuracy']:.2f}",
            f"{attack} {100 * robust:.2f}",
            f"{result['evaluation_seconds']:.1f}",
        )
    if paper := row["paper"]:
        pgd = {name: value for name, value in paper["robust"].items() if name.startswith("pgd")}
        attack, robust = min(pgd.items(), key=lambda item: item[1])
        papers = (percent(paper["clean"]), f"{attack} {percent(robust)}", paper["recipe"])
    return (method, f"{row['epochs']:g}", *own, *papers)


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """All rows, and below them those that have no result, each with its reason."""
    present = {method: rows[method] for method in ROWS if method in rows}
    lines = table_lines([COLUMNS, *(cells(*item) for item in present.items())])
    for method, row in present.items():
        if reason := row.get("skipped") or row.get("error"):
            lines.append(f"{method} is missing: {reason}")
    return lines


def main() -> None:
    """Parses the flags, makes the runs that are missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10's python files")
    parser.add_argument("--methods", nargs="+", choices=ROWS, default=list(ROWS))
    for method, own in ROWS.items():
        parser.add_argument(f"--{method}-epochs", type=float, default=own.epochs, help=own.recipe)
    parser.add_argument("--budget", type=float, default=400, help="seconds for everything")
    parser.add_argument("--tiny", action="store_true", help="a CPU, to prove the script")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the result")
    flags = parser.parse_args()
    deadline = time.monotonic() + flags.budget
    flags.data = flags.data.resolve()
    typed = {method: getattr(flags, f"{method}_epochs") for method in ROWS}
    flags.epochs = TINY_EPOCHS if flags.tiny else typed
    record: dict[str, Any] = {
        "benchmark": "accuracy",
        "environment": harness.environment_record(harness.default_device()),
        "rows": {},
    }
    if flags.out.is_file():
        earlier = json.loads(flags.out.read_text())
        record["rows"] = succeeded(earlier, record["environment"], "rows")
        if gone := sorted(set(earlier["rows"]) - set(record["rows"])):
            print(f"{flags.out}: {', '.join(gone)} without a result of this commit and device")
    for method in flags.methods:
        command = command_of(method, flags)
        row: dict[str, Any] = {
            "command": " ".join(["python", *command]),
            "epochs": flags.epochs[method],
            "paper": reported(ROWS[method].beside),
        }
        if record["rows"].get(method, {}).get("command") == row["command"]:
            continue
        left = deadline - time.monotonic()
        if left < SHORTEST_SECTION_S:
            row["skipped"] = "the time was up"
        else:
            print(f"== {method} (at most {left:.0f} s)", flush=True)
            row |= train(command, left)
        record["rows"][method] = row
        harness.write_json(flags.out, record)
    print(*table(record["rows"]), sep="\n")
    if not any("result" in row for row in record["rows"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
