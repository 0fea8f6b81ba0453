"""Writes a run's report once more, or one page that compares several.

python launch/report.py runs/x
python launch/report.py runs/x runs/y --output comparison.html
"""

import sys

import tyro

from freeadv_fast.cli import run_tool
from freeadv_fast.errors import UserError
from freeadv_fast.evaluation.page import write_comparison, write_page


def main(run: tyro.conf.Positional[list[str]], output: str | None = None) -> int:
    """Writes report.html of one run, or a page that compares several.

    Args:
        run: The output folders of finished runs, one or more.
        output: The page that compares them. Default: comparison.html in the folder that holds all
            of them.
    """
    if not run:
        raise UserError("RUN: name the folder of a finished run, or several to compare them")
    if len(run) > 1:
        print(f"wrote {write_comparison(run, output)}")
    elif output is not None:
        raise UserError(f"--output {output}: for several runs; one run's is RUN/report.html")
    else:
        print(f"wrote {write_page(run[0])}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
