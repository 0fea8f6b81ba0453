"""Exports a run's network for use elsewhere: timm, torchvision, the Hub, ONNX, RobustBench.

python launch/export.py runs/x --output-dir exported --onnx
"""

import sys

import tyro

from freeadv_fast.cli import run_tool
from freeadv_fast.runs.export.again import export_for


def main(
    run: tyro.conf.Positional[str],
    output_dir: str | None = None,
    checkpoint: str = "last",
    onnx: bool = False,
    robustbench: str | None = None,
    push_to_hub: str | None = None,
) -> int:
    """Writes the weights as safetensors, config.json and a model card.

    Args:
        run: The run's output folder.
        output_dir: Folder to write. Default: export/ in the run's folder.
        checkpoint: last (the run's result), best (by held-out images), average, or a path.
        onnx: Write model.onnx too, which takes pixels in [0, 1] and any batch.
        robustbench: Name of the model there, such as Doe2026Free_RN50; write all that a submission
            takes to export-robustbench/NAME/ in the run's folder.
        push_to_hub: Upload the folder to OWNER/NAME on the Hugging Face Hub.
    """
    for line in export_for(run, output_dir, checkpoint, onnx, robustbench, push_to_hub):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
