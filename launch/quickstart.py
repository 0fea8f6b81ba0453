"""The quickest look: a natural and a free network on embedded real images, side by side.

    make run

Flags are those of the training scripts, such as --max-passes 2000, and go to the runs they are for.
"""

import sys
import time
from pathlib import Path

from freeadv_fast.cli import run_training
from freeadv_fast.cli.flags import share_of
from freeadv_fast.evaluation.accuracy import side_by_side
from freeadv_fast.evaluation.page import write_comparison
from freeadv_fast.runs.json_file import read_json


def main() -> int:
    """Trains both networks, each in a folder of its own, and prints their results as a table."""
    start, networks = f"runs/quickstart-{time.strftime('%Y%m%d-%H%M%S')}", {}
    for method in ("natural", "free"):
        folder = Path(f"{start}-{method}")
        flags = ["--output-dir", str(folder), *share_of(sys.argv[1:], method, ("natural", "free"))]
        status = run_training(method, "digits", flags)
        if status != 0:
            return status
        if (folder / "result.json").exists():  # none after --dry-run
            result = read_json(folder / "result.json")
            networks[method] = result["clean_accuracy"], result["robust_accuracy"]
    if networks:
        print(f"\n{' and '.join(networks)} at eps {result['eps']}")
        print(side_by_side(networks, result["attack_step"]))
        page = write_comparison([f"{start}-{method}" for method in networks], f"{start}.html")
        print(f"\nreports: {start}-*/report.html, and both together: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
