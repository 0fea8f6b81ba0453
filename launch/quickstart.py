"""The quickest look: a natural and a free network on embedded real images, side by side.

    make run

Flags are those of the training scripts, such as --max-passes 2000, and go to the runs they are for.
"""

import sys
import time
from pathlib import Path

from freeadv_fast.cli import run_training
from freeadv_fast.cli.flags import share_of
from freeadv_fast.evaluation.report import results_table
from freeadv_fast.runs.log import read_json


def main() -> int:
    """Trains both networks, each in a folder of its own, and prints their results as a table."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    rows = []
    for method in ("natural", "free"):
        folder = Path("runs") / f"quickstart-{stamp}-{method}"
        flags = ["--output-dir", str(folder), *share_of(sys.argv[1:], method, ("natural", "free"))]
        status = run_training(method, "digits", flags)
        if status != 0:
            return status
        if not (folder / "result.json").exists():  # --dry-run
            continue
        result = read_json(folder / "result.json")
        row = {"method": method, "clean": result["clean_accuracy"]}
        row |= {f"{k} at {result['eps']}": v for k, v in result["robust_accuracy"].items()}
        row |= {"image passes": result["passes"], "seconds": round(result["train_seconds"])}
        rows.append(row)
    print(f"\n{results_table(rows)}\n\npictures: runs/quickstart-{stamp}-*/plots/*.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
