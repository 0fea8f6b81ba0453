"""A run's folder and what is written into it while training goes on.

Only rank 0 writes. Nothing here is called within a step: metrics are read from the device every
`--log-every` minibatches, the bar moves by counts that the host knows.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from freeadv_fast.config.file import CONFIG_NAME, config_to_yaml
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.errors import UserError
from freeadv_fast.runs.whole_file import renamed_when_whole

LABEL_WIDTH = 12

# Training that is timed before its rate is said. What comes before the first reading is not: cuDNN
# tries its algorithms, Triton compiles, updates are recorded.
SECONDS_OF_RATE = 10.0
SECONDS_BETWEEN_LINES = 60.0

# What was measured of a run's weights later; none of it holds once they are trained further.
MEASURED_LATER = ("evaluation-*.json", "robustness-*.json", "audit.json")

# What the bar and the lines show of a reading: the word, the key in log.jsonl, the form.
SHOWN = (
    ("loss", "loss", ".3f"),
    ("clean", "train_clean_accuracy", ".1%"),
    ("adversarial", "train_adversarial_accuracy", ".1%"),
)


def save_config(config: TrainConfig, path: Path) -> None:
    """Writes a config so that ``--config PATH`` replays the run, whole or not at all."""
    with renamed_when_whole(path) as partial:
        partial.write_text(config_to_yaml(config), encoding="utf-8")


def labelled(label: str, lines: Sequence[str]) -> list[str]:
    """Lines beside a label in the first column; none of no lines."""
    labels = [label] + [""] * (len(lines) - 1)
    return [f"{a:<{LABEL_WIDTH}}{b}" for a, b in zip(labels, lines, strict=False)]


class RunFolder:
    """Paths of a run: config.yaml, env.json, log.jsonl, checkpoints/, result.json and the others.

    With averaged weights also export-average/.

    Args:
        root: The output folder.
    """

    def __init__(self, root: Path) -> None:
        """Names the paths; touches nothing."""
        self.root = root
        self.config = root / CONFIG_NAME
        self.environment = root / "env.json"
        self.log = root / "log.jsonl"
        self.result = root / "result.json"
        self.report = root / "report.html"
        self.checkpoints = root / "checkpoints"
        self.plots = root / "plots"
        self.export = root / "export"
        self.export_average = root / "export-average"

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

    def set_result_aside(self) -> Path | None:
        """Renames result.json to the first free result-N.json of a run that goes on.

        Returns:
            Its new path; None where there was no result.
        """
        if not self.result.exists():
            return None
        numbered = (self.root / f"result-{number}.json" for number in itertools.count(1))
        kept = next(path for path in numbered if not path.exists())
        self.result.rename(kept)
        return kept

    def set_evaluations_aside(self) -> Path | None:
        """Moves what was measured of the weights so far into the first free before-N/.

        Returns:
            That folder; None where nothing was measured.
        """
        found = [path for pattern in MEASURED_LATER for path in sorted(self.root.glob(pattern))]
        if not found:
            return None
        numbered = (self.root / f"before-{number}" for number in itertools.count(1))
        kept = next(path for path in numbered if not path.exists())
        kept.mkdir()
        for path in found:
            path.rename(kept / path.name)
        return kept


class Forecast:
    """How long passes will take. A pass over larger images takes longer, as it has more pixels.

    Attributes:
        total: Passes of the whole run.

    Args:
        phases: Passes of each phase, and the pixels of an image in it.
    """

    def __init__(self, phases: Sequence[tuple[int, int]]) -> None:
        """Adds the passes up."""
        self._phases = phases
        self.total = sum(passes for passes, _ in phases)

    def seconds_left(self, done: int, now: int, rate: float) -> float:
        """Seconds of training from some passes on.

        Args:
            done: Passes from which on to count.
            now: Passes at which the rate was measured.
            rate: Passes a second there.
        """
        pixels_now, pixels_left, end = 1, 0, 0
        for passes, pixels in self._phases:
            if end < now:
                pixels_now = pixels
            end += passes
            pixels_left += pixels * min(passes, max(0, end - done))
        return pixels_left / pixels_now / rate


def duration(seconds: float) -> str:
    """A length of time in its two largest units: ``4 h 15 min``, ``1 min 20 s``, ``45 s``."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes_of_hour = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes_of_hour} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


class RunLog:
    """log.jsonl, TensorBoard and, on a terminal, a progress bar; elsewhere a line every minute.

    Args:
        folder: The run's folder.
        forecast: Image passes of the whole run, for the bar and the time left.
        log_bytes: Length of log.jsonl at the checkpoint that is resumed; lines after it belong to
            work that will be done again, so the file is cut there.
        passes: Image passes done before.
        is_writer: False on every rank but 0: nothing is written.
    """

    def __init__(
        self, folder: RunFolder, forecast: Forecast, log_bytes: int, passes: int, is_writer: bool
    ) -> None:
        """Opens the files."""
        self.is_writer = is_writer
        if not is_writer:
            return
        self.forecast = forecast
        self.resumed_at = passes
        self.first_reading: tuple[int, float] | None = None
        self.is_rate_said = False
        self.has_terminal = sys.stdout.isatty() and sys.stderr.isatty()
        self.said_at = time.monotonic()
        self.file = folder.log.open("a+b")
        self.file.truncate(min(log_bytes, self.file.seek(0, os.SEEK_END)))
        self.file.seek(0, os.SEEK_END)
        self.folder = folder
        self.board: SummaryWriter | None = None
        # What was written for these passes stands: of what TensorBoard shows, only later points go.
        self.decorate(lambda: self.open_board(folder, passes + 1 if passes else None))
        self.bar = tqdm(
            total=forecast.total,
            initial=passes,
            unit=" passes",
            unit_scale=True,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )

    def open_board(self, folder: RunFolder, purge_step: int | None) -> None:
        """Opens TensorBoard's file; it hides what earlier sessions wrote from a step on."""
        self.board = SummaryWriter(str(folder.root), purge_step=purge_step)

    def reopen(self) -> None:
        """Begins the files anew, in a folder that somebody has removed and that is there again."""
        self.file.close()
        self.file = self.folder.log.open("a+b")
        self.decorate(lambda: self.open_board(self.folder, None))

    def decorate(self, work: Callable[[], object]) -> None:
        """Does something for TensorBoard. No run ends because that cannot be: a line says so, once.

        Its thread raises what it met (a full disk, a folder gone) at a later call.
        """
        try:
            work()
        except Exception as error:
            self.board = None
            self.say(f"TensorBoard: off, {type(error).__name__}: {' '.join(str(error).split())}")

    def settle(self) -> int:
        """Brings what is written so far to disk, before a checkpoint counts it as done.

        Returns:
            Length of log.jsonl; 0 on ranks that do not write.
        """
        if not self.is_writer:
            return 0
        if (board := self.board) is not None:
            self.decorate(board.flush)
        return self.file.tell()

    def advance(self, passes: int) -> None:
        """Moves the bar by image passes."""
        if self.is_writer:
            self.draw_bar(lambda: self.bar.update(passes))

    def draw_bar(self, draw: Callable[[], object]) -> None:
        """Draws the bar, as long as there is a terminal to draw it on."""
        try:
            draw()
        except OSError:
            self.bar.disable = True

    def write(self, line: dict[str, Any]) -> None:
        """Appends a line to log.jsonl and TensorBoard and shows it beside the bar."""
        if not self.is_writer:
            return
        self.file.write(json.dumps(line).encode() + b"\n")
        self.file.flush()
        if (board := self.board) is not None:
            self.decorate(lambda: add_scalars(board, line))
        self.draw_bar(lambda: self.bar.set_postfix(shown(line)))

    def tell(self, line: dict[str, Any], train_seconds: float) -> None:
        """Says how training goes: its rate, once, and without a terminal a line every minute.

        Args:
            line: A new reading, as `write` takes it.
            train_seconds: Seconds of training until then, without evaluation.
        """
        if not self.is_writer:
            return
        if not self.is_rate_said:
            self.say_rate(line["passes"], train_seconds)
        if not self.has_terminal and time.monotonic() - self.said_at >= SECONDS_BETWEEN_LINES:
            self.said_at = time.monotonic()
            self.say(self.minute_line(line))

    def say_rate(self, passes: int, train_seconds: float) -> None:
        """Says the rate and what it means as soon as it is known, unless the end is near."""
        if self.first_reading is None:
            self.first_reading = passes, train_seconds
            return
        seconds = train_seconds - self.first_reading[1]
        if seconds < SECONDS_OF_RATE:
            return
        self.is_rate_said = True
        rate = (passes - self.first_reading[0]) / seconds
        left = self.forecast.seconds_left(passes, passes, rate)
        if left < SECONDS_OF_RATE:
            return
        whole = duration(self.forecast.seconds_left(0, passes, rate))
        still = f", {duration(left)} left" if self.resumed_at else ""
        text = f"{rate:,.0f} passes/s: {whole} of training{still}"
        self.say(*labelled("rate", [text]))

    def minute_line(self, line: dict[str, Any]) -> str:
        """A reading as a line of a log file."""
        passes, rate, total = line["passes"], line["passes_per_second"], self.forecast.total
        words = [f"{passes:,} of {total:,} passes ({passes / total:.1%})"]
        words += [f"{word} {value}" for word, value in shown(line).items()]
        left = self.forecast.seconds_left(passes, passes, rate)
        return ", ".join([*words, f"{rate:,.0f} passes/s", f"{duration(left)} left"])

    def say(self, text: str) -> None:
        """Prints a line without tearing the bar."""
        if self.is_writer:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        """Closes files and bar."""
        if self.is_writer:
            self.draw_bar(self.bar.close)
            self.file.close()
            if (board := self.board) is not None:
                self.decorate(board.close)


def add_scalars(board: SummaryWriter, line: dict[str, Any]) -> None:
    """A line's numbers, at the image passes until then."""
    for name, value in line.items():
        if isinstance(value, int | float) and name != "passes":
            board.add_scalar(name, value, line["passes"])


def shown(line: dict[str, Any]) -> dict[str, str]:
    """What users see of a reading, as far as it is there."""
    return {word: format(line[key], form) for word, key, form in SHOWN if key in line}


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
