"""Names of lost and late ranks: each of 2 gloo ranks killed, stopped and late in each collective.

python bench/rank_faults.py --out bench/results/cpu/rank-faults.json

Runs tests/distributed/faults_worker.py with the trainer's own times (a beat a second, 20 s of
patience) and notes when the other rank's line came, counted from the fault. On a CPU over gloo; the
heartbeat does not use the process group, so that over NCCL the same line ends the same wait.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from harness import environment_record, write_json

WORKER = Path(__file__).resolve().parents[1] / "tests" / "distributed" / "faults_worker.py"
KINDS = (
    "gradients", "meters", "stop", "checkpoint", "minibatch", "writing", "shuffle", "barrier",
)  # fmt: skip
FAULTS = ("killed", "stopped", "late")
LIMIT_SECONDS = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    cases = [(kind, how, rank) for kind in KINDS for how in FAULTS for rank in (0, 1)]
    rows = []
    for kind, how, rank in cases:
        rows.append(run_case(kind, how, rank))
        print(rows[-1], flush=True)
    named = [row for row in rows if row["named"]]
    record = {
        "command": "python bench/rank_faults.py",
        "environment": environment_record(torch.device("cpu")),
        "cases": len(rows),
        "named_in_time": sum(row["seconds"] <= LIMIT_SECONDS for row in named),
        "median_seconds": {
            how: statistics.median(row["seconds"] for row in named if row["fault"] == how)
            for how in FAULTS
        },
        "rows": rows,
    }
    write_json(out, record)


def run_case(kind: str, how: str, rank: int) -> dict[str, object]:
    """One fault, until the other rank's line names the faulty one or a minute has passed."""
    word = "is late" if how == "late" else "is lost"
    with tempfile.TemporaryDirectory() as folder:
        log, told = Path(folder, "output.txt"), Path(folder, f"rank{1 - rank}.txt")
        launcher = [str(Path(sys.executable).with_name("torchrun")), "--standalone"]
        command = [*launcher, "--nproc-per-node", "2", str(WORKER), kind, how, str(rank), folder]
        with log.open("w") as sink:
            process = subprocess.Popen(
                [*command, "real"], stdout=sink, stderr=sink,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        at, deadline = None, time.monotonic() + 2 * LIMIT_SECONDS
        began = Path(folder, "began")
        line = ""
        while time.monotonic() < deadline and at is None:
            text = log.read_text() + (told.read_text() if told.exists() else "")
            line = next((row for row in text.splitlines() if f"rank {rank} {word}" in row), "")
            lost = next((row for row in text.splitlines() if "adversarial images" in row), "")
            if line or lost:
                line, at = line or lost, time.time()
            time.sleep(0.05)
        seconds = None if at is None else round(at - began.stat().st_mtime, 1)
        process.kill()
        process.wait()
        kill_processes_of(folder)
    return {
        "collective": kind, "fault": how, "rank": rank, "named": bool(line), "seconds": seconds,
        "line": line.removeprefix("error: "),
    }  # fmt: skip


def kill_processes_of(folder: str) -> None:
    """Ends the ranks, which torchrun gives sessions of their own; a stopped one obeys this only."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if folder.encode() in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)


if __name__ == "__main__":
    main()
