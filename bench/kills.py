"""A hundred kills: runs that are ended at any moment must finish as if nothing had happened.

python bench/kills.py --kills 100 --out bench/results/cpu/kills.json

free, fgsm-rs and fast-advprop on 1 and 2 ranks train a small network on the embedded digits. Each
run is started, killed with SIGKILL or SIGTERM at a moment drawn at random, resumed, killed again,
and after KILLS_OF_A_RUN of them left to finish. Its weights, optimizer, log and accuracies are then
compared, bit for bit, with those of a run that nobody has disturbed.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import environment_record, write_json

CHILD = Path(__file__).with_name("kills_child.py")
METHODS = ("free", "fgsm-rs", "fast-advprop")
RANKS = (1, 2)
# Each run is killed in four of the first and, because the result ends it, then in one of the last.
EARLY, LATE = ("start", "minibatch", "saving", "guard", "selection"), ("evaluation", "export")
# How many of the calls that a moment is made of may pass before the kill, and how long it may wait
# after that call has begun, in seconds: about as long as the call takes here.
CALLS = {"minibatch": 20, "saving": 3, "guard": 2}
LONGEST_DELAY = {"start": 1.0, "minibatch": 0.05, "saving": 0.05, "guard": 0.1, "selection": 0.3,
                 "evaluation": 0.5, "export": 0.3}  # fmt: skip
KILLS_OF_A_RUN = 5

FLAGS = [
    "--arch", "timm/test_efficientnet", "--workers", "1", "--epochs", "6", "--batch-size", "40",
    "--holdout-images", "60", "--eval-images", "40", "--eval-attacks", "pgd-5",
    "--log-every", "5", "--checkpoint-every", "1",
]  # fmt: skip
GUARD_FLAGS = ["--guard-images", "20", "--guard-every", "7"]
OWN_FLAGS = {"free": ["--m", "2"], "fast-advprop": ["--aux-bn-group", "4"]}
# What a log line and a result say of time and place.
NOT_COMPARED = {
    "passes_per_second",
    "guard_seconds",
    "train_seconds",
    "warm_up_seconds",
    "evaluation_seconds",
    "versions",
    "device",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    flags = parser.parse_args()
    draw = random.Random(flags.seed)
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    try:
        rows = campaign(folder, flags.kills, draw)
    finally:
        shutil.rmtree(folder)
    kills = [kill for row in rows for kill in row["kills"]]
    record = {
        "environment": environment_record(torch.device("cpu")),
        "kills": len(kills),
        "by_moment": dict(collections.Counter(kill["moment"] for kill in kills)),
        "by_signal": dict(collections.Counter(kill["signal"] for kill in kills)),
        "runs": len(rows),
        "runs_with_a_result": sum(row["has_result"] for row in rows),
        "runs_equal_to_the_last_bit": sum(row["differences"] == [] for row in rows),
        "rows": rows,
    }
    write_json(flags.out, record)
    print({key: record[key] for key in record if key not in ("rows", "environment")})


def campaign(folder: Path, num_kills: int, draw: random.Random) -> list[dict[str, Any]]:
    """Runs until so many kills have hit."""
    references: dict[tuple[str, int], Path] = {}
    rows: list[dict[str, Any]] = []
    cases = [(method, ranks) for ranks in RANKS for method in METHODS]
    while sum(len(row["kills"]) for row in rows) < num_kills:
        method, ranks = cases[len(rows) % len(cases)]
        if (method, ranks) not in references:
            reference = folder / f"{method}-{ranks}"
            start(method, ranks, reference, None)
            references[method, ranks] = reference
        left = num_kills - sum(len(row["kills"]) for row in rows)
        run = folder / f"run{len(rows)}"
        kills = kill_and_resume(method, ranks, run, draw, min(KILLS_OF_A_RUN, left))
        rows.append({
            "method": method, "ranks": ranks, "kills": kills,
            "has_result": (run / "result.json").exists(),
            "differences": differences(run, references[method, ranks]),
        })  # fmt: skip
        print(rows[-1], flush=True)
        shutil.rmtree(run)
    return rows


def kill_and_resume(
    method: str, ranks: int, run: Path, draw: random.Random, num_kills: int
) -> list[dict[str, Any]]:
    """Kills a run so many times, each in another moment, and lets it finish."""
    kills: list[dict[str, Any]] = []
    early = [moment for moment in EARLY if moment != "guard" or method != "fast-advprop"]
    moments = draw.sample(early, KILLS_OF_A_RUN - 1) + draw.sample(LATE, 1)
    for moment in moments[:num_kills]:
        kill = {
            "moment": moment,
            "signal": draw.choice(["SIGKILL", "SIGTERM"]),
            "call": draw.randint(1, CALLS.get(moment, 1)),
            "delay": round(draw.uniform(0, LONGEST_DELAY[moment]), 3),
            "rank": draw.randrange(ranks),
        }
        if (run / "result.json").exists():
            break
        if start(method, ranks, run, kill) != 0:
            kills.append(kill)
    start(method, ranks, run, None)
    return kills


def start(method: str, ranks: int, run: Path, kill: dict[str, Any] | None) -> int:
    """Starts or resumes a run; the exit status. A kill that found no moment to hit leaves 0."""
    guard = [] if method == "fast-advprop" else GUARD_FLAGS
    training = ["--method", method, "--output-dir", str(run), *FLAGS, *guard]
    training += OWN_FLAGS.get(method, [])
    training += ["--resume"] if run.exists() else []
    python = [sys.executable]
    if ranks > 1:
        torchrun = str(Path(sys.executable).with_name("torchrun"))
        python = [torchrun, "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*python, str(CHILD), json.dumps(kill), *training],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    if done.returncode != 0 and kill is None:
        raise SystemExit(f"{method} on {ranks} ranks did not finish:\n{done.stdout}{done.stderr}")
    wait_for_ranks(run)
    return done.returncode


def wait_for_ranks(run: Path) -> None:
    """torchrun may be gone before its ranks are."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        listed = subprocess.run(["pgrep", "-f", str(run)], capture_output=True, check=False)
        if listed.returncode != 0:
            return
        time.sleep(0.1)


def differences(run: Path, reference: Path) -> list[str]:
    """What is not equal in two finished runs."""
    found = []
    states = [load(folder / "checkpoints" / "last.pt") for folder in (run, reference)]
    for part in ("model", "learner", "ranks"):
        if not equal(states[0][part], states[1][part]):
            found.append(f"last.pt: {part}")
    for name in ("log.jsonl", "result.json"):
        mine, theirs = (plain((folder / name).read_text()) for folder in (run, reference))
        if mine != theirs:
            found.append(name)
    return found


def load(path: Path) -> dict[str, Any]:
    """A checkpoint on the CPU."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def equal(a: Any, b: Any) -> bool:
    """Whether two nested states hold the same bits."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def plain(text: str) -> list[dict[str, Any]]:
    """JSON lines, or a JSON object, without what differs from run to run."""
    records = [json.loads(text)] if text.startswith("{\n") else map(json.loads, text.splitlines())
    return [{k: v for k, v in record.items() if k not in NOT_COMPARED} for record in records]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
