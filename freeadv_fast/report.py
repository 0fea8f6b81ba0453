"""Pictures and tables of a run: training curves, attacked images, results as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from torch import Tensor, nn

from freeadv_fast.attacks import Attack, perturb
from freeadv_fast.evaluate import eval_mode
from freeadv_fast.models.normalize import unit_images
from freeadv_fast.threat import ThreatModel

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#6E6E6E"

STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
}

ACCURACIES = (
    ("train_clean_accuracy", "training, clean", BLUE, "--"),
    ("train_adversarial_accuracy", "training, adversarial", VERMILION, "--"),
    ("holdout_clean_accuracy", "held out, clean", BLUE, "-"),
    ("holdout_robust_accuracy", "held out, under attack", VERMILION, "-"),
)


def plot_training(log_lines: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draws loss, accuracies, learning rate and speed over the image passes of a run.

    Args:
        log_lines: Lines of log.jsonl; a line may lack any key but ``passes``.
        path: PNG to write.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 6.2), layout="constrained")
        loss, accuracy, rate, speed = figure.subplots(2, 2, sharex=True).flat
        _curve(loss, log_lines, "loss", color=BLUE)
        loss.set(title="Training loss", ylabel="cross entropy (nats)")
        for key, label, color, dash in ACCURACIES:
            _curve(accuracy, log_lines, key, color=color, linestyle=dash, label=label)
        accuracy.set(title="Accuracy", ylabel="images classified correctly", ylim=(0, 1.02))
        accuracy.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        if accuracy.lines:
            accuracy.legend(loc="best")
        _curve(rate, log_lines, "lr", color=GREY)
        rate.set(title="Learning rate", ylabel="step size of SGD")
        _curve(speed, log_lines, "passes_per_second", color=GREEN)
        speed.set(title="Speed", ylabel="image passes / s")
        for axes in (rate, speed):
            axes.set_xlabel("image passes (one image forward and backward)")
            axes.set_ylim(0, 1.08 * max([*_heights(axes), 1e-9]))
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(6))
            axes.xaxis.set_major_formatter(FuncFormatter(_short_number))
        _save(figure, path)


def _curve(axes: Axes, lines: Sequence[Mapping[str, Any]], key: str, **style: Any) -> None:
    """Draws one key over passes, with markers where the points are few."""
    points = {line["passes"]: line[key] for line in lines if line.get(key) is not None}
    if points:
        marker = "o" if len(points) <= 30 else None
        axes.plot(list(points), list(points.values()), marker=marker, markersize=3, **style)


def _heights(axes: Axes) -> list[float]:
    """Every y value drawn so far."""
    return [float(y) for line in axes.lines for y in np.asarray(line.get_ydata())]


def _short_number(value: float, _position: int | None = None) -> str:
    """1.2M for 1,200,000."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def plot_perturbations(
    model01: nn.Module,
    images_u8: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    attack: Attack,
    threat: ThreatModel,
    path: str | Path,
    *,
    num_columns: int = 6,
    seed: int = 0,
) -> None:
    """Draws a column an image: the image, the perturbation, the adversarial image; with labels.

    Args:
        model01: Network of (N, 3, H, W) pixels in [0, 1]; its modes are restored.
        images_u8: (N, H, W, 3) uint8 on the network's device; those drawn are evenly spaced.
        labels: (N,) int64 on the same device.
        classes: Class names.
        attack: What to attack with; images that are misclassified already are not attacked.
        threat: Radius and step.
        path: PNG to write.
        num_columns: Images to draw, at most.
        seed: Seed of the random starts.
    """
    chosen = torch.linspace(0, len(labels) - 1, min(num_columns, len(labels))).round().long()
    chosen = chosen.to(labels.device)
    images, labels = unit_images(images_u8[chosen]), labels[chosen]
    generator = torch.Generator(images.device).manual_seed(seed)
    with eval_mode(model01):
        adversarial = perturb(
            model01, images, labels, attack=attack, threat=threat, generator=generator
        ).images
        with torch.no_grad():
            guesses = [model01(batch).argmax(1).tolist() for batch in (images, adversarial)]
    perturbation = (0.5 + (adversarial - images) * _amplification(threat)).clamp(0, 1)
    with matplotlib.rc_context(STYLE):
        size = 1.55
        figure = Figure(figsize=(size * len(labels) + 0.8, size * 3 + 1.3), layout="constrained")
        grid = figure.subplots(3, len(labels), squeeze=False)
        _show_pictures(grid, (images, perturbation, adversarial))
        _write_labels(grid, labels.tolist(), guesses, classes)
        figure.suptitle(
            f"{attack} within {threat.eps}.  Above: the true class.  "
            "Below: the prediction, green if right, red if wrong.",
            fontsize=9,
        )
        gain = f"perturbation\n(x{_amplification(threat):g}, grey is 0)"
        for axes, name in zip(grid[:, 0], ("image", gain, "adversarial\nimage"), strict=True):
            axes.set_ylabel(name, fontsize=9)
        _save(figure, path)


def _show_pictures(grid: np.ndarray, rows: Sequence[Tensor]) -> None:
    """Shows (N, 3, H, W) pictures in [0, 1], a row of axes each."""
    for axes_row, pictures in zip(grid, rows, strict=True):
        for axes, picture in zip(axes_row, pictures.permute(0, 2, 3, 1).cpu(), strict=True):
            axes.imshow(picture.numpy(), vmin=0, vmax=1, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            axes.grid(False)


def _write_labels(
    grid: np.ndarray,
    labels: Sequence[int],
    guesses: Sequence[Sequence[int]],
    classes: Sequence[str],
) -> None:
    """Writes the true class above each column, the clean and adversarial guesses below."""
    for (clean, perturbation, adversarial), label, before, after in zip(
        grid.T, labels, *guesses, strict=True
    ):
        clean.set_title(_short_name(classes[label]), loc="center", fontsize=9)
        for axes, guess in ((clean, before), (adversarial, after)):
            color = GREEN if guess == label else VERMILION
            axes.set_xlabel(_short_name(classes[guess]), color=color)
        if before != label:
            perturbation.text(
                0.5,
                0.5,
                "not attacked:\nwrong already",
                transform=perturbation.transAxes,
                ha="center",
                va="center",
                color="white",
                fontsize=8,
            )


def _amplification(threat: ThreatModel) -> float:
    """The factor that makes a perturbation of size eps span black to white around grey."""
    return round(0.5 / float(threat.eps)) if threat.eps.levels else 1.0


def _short_name(name: str, limit: int = 17) -> str:
    """A class name that fits over a picture."""
    return name if len(name) <= limit else name[: limit - 3] + "..."


def _save(figure: Figure, path: str | Path) -> None:
    """Writes a PNG without touching pyplot's global state."""
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150, format="png")


def results_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Lays results out as a plain text table.

    Args:
        rows: One mapping a line, column title to value. A float is a fraction and is shown in
            percent; text goes to the left, numbers to the right; a missing value is ``-``.

    Returns:
        Lines joined by newlines, without a last one; empty for no rows.
    """
    titles = list(dict.fromkeys(title for row in rows for title in row))
    if not titles:
        return ""
    columns = []
    for title in titles:
        values = [row.get(title) for row in rows]
        cells = [title, *map(_cell, values)]
        width = max(map(len, cells))
        is_number = not any(isinstance(value, str) for value in values)
        cells = [cell.rjust(width) if is_number else cell.ljust(width) for cell in cells]
        columns.append([cells[0], "-" * width, *cells[1:]])
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))


def _cell(value: object) -> str:
    """A table's cell as text."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else str(value)
