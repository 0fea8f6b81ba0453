"""Exports a run's network: safetensors under stock keys, with and without the normaliser.

python launch/export.py runs/x --output-dir exported
"""

import sys

import tyro

from freeadv_fast.cli import run_tool
from freeadv_fast.runs.saved import export_run


def main(
    run: tyro.conf.Positional[str], output_dir: str | None = None, checkpoint: str = "last"
) -> int:
    """Writes model.safetensors, model_with_normalizer.safetensors and config.json.

    Args:
        run: The run's output folder.
        output_dir: Folder to write. Default: export/ in the run's folder.
        checkpoint: last (the run's result), best (by held-out images), or a path.
    """
    print(f"wrote {export_run(run, output_dir, checkpoint)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
