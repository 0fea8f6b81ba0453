"""A run's folder and what is written into it while training goes on.

Only rank 0 writes. Nothing here is called within a step: metrics are read from the device every
`--log-every` minibatches, the bar moves by counts that the host knows.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from freeadv_fast.config.file import config_to_yaml
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.errors import UserError
from freeadv_fast.runs.whole_file import renamed_when_whole


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    with renamed_when_whole(path) as partial:
        partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def save_config(config: TrainConfig, path: Path) -> None:
    """Writes a config so that ``--config PATH`` replays the run, whole or not at all."""
    with renamed_when_whole(path) as partial:
        partial.write_text(config_to_yaml(config), encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object."""
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


class RunFolder:
    """Paths of a run: config.yaml, env.json, log.jsonl, checkpoints/, result.json, plots/, export/.

    Args:
        root: The output folder.
    """

    def __init__(self, root: Path) -> None:
        """Names the paths; touches nothing."""
        self.root = root
        self.config = root / "config.yaml"
        self.environment = root / "env.json"
        self.log = root / "log.jsonl"
        self.result = root / "result.json"
        self.checkpoints = root / "checkpoints"
        self.plots = root / "plots"
        self.export = root / "export"

    def claim(self, resume: bool) -> None:
        """Makes the folder, or refuses one that holds something else.

        Raises:
            UserError: the folder is not empty and the run is not resumed, or it cannot be made.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            is_used = any(self.root.iterdir())
            if resume or not is_used:
                for folder in (self.checkpoints, self.plots):
                    folder.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"--output-dir {self.root}: {error.strerror or error}") from None
        if is_used and not resume:
            raise UserError(
                f"--output-dir {self.root}: holds another run; add --resume to continue it "
                "or choose another folder"
            )


class RunLog:
    """log.jsonl, TensorBoard and, on a terminal, a progress bar.

    Args:
        folder: The run's folder.
        total_passes: Image passes of the whole run, for the bar.
        log_bytes: Length of log.jsonl at the checkpoint that is resumed; lines after it belong to
            work that will be done again, so the file is cut there.
        passes: Image passes done before.
        is_writer: False on every rank but 0: nothing is written.
    """

    def __init__(
        self, folder: RunFolder, total_passes: int, log_bytes: int, passes: int, is_writer: bool
    ) -> None:
        """Opens the files."""
        self.is_writer = is_writer
        if not is_writer:
            return
        self.file = folder.log.open("a+b")
        self.file.truncate(min(log_bytes, self.file.seek(0, os.SEEK_END)))
        self.file.seek(0, os.SEEK_END)
        self.board = SummaryWriter(str(folder.root), purge_step=passes or None)
        self.bar = tqdm(
            total=total_passes,
            initial=passes,
            unit=" passes",
            unit_scale=True,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )

    @property
    def num_bytes(self) -> int:
        """Length of log.jsonl so far; 0 on ranks that do not write."""
        return self.file.tell() if self.is_writer else 0

    def advance(self, passes: int) -> None:
        """Moves the bar by image passes."""
        if self.is_writer:
            self.bar.update(passes)

    def write(self, line: dict[str, Any]) -> None:
        """Appends a line to log.jsonl and TensorBoard and shows it beside the bar."""
        if not self.is_writer:
            return
        self.file.write(json.dumps(line).encode() + b"\n")
        self.file.flush()
        for name, value in line.items():
            if isinstance(value, int | float) and name != "passes":
                self.board.add_scalar(name, value, line["passes"])
        shown = {
            "loss": ("loss", ".3f"),
            "clean": ("train_clean_accuracy", ".1%"),
            "adversarial": ("train_adversarial_accuracy", ".1%"),
        }
        self.bar.set_postfix(
            {word: format(line[key], form) for word, (key, form) in shown.items() if key in line}
        )

    def say(self, text: str) -> None:
        """Prints a line without tearing the bar."""
        if self.is_writer:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        """Closes files and bar."""
        if self.is_writer:
            self.bar.close()
            self.file.close()
            self.board.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
