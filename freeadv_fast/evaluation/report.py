"""Pictures of runs: training curves, attacked images, accuracies over the radius of a sweep."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from torch import Tensor, nn

from freeadv_fast.config.attack import Attack
from freeadv_fast.config.threat import AnyThreatModel
from freeadv_fast.evaluation.attacks import perturb
from freeadv_fast.evaluation.evaluate import eval_mode
from freeadv_fast.evaluation.tables import one_line
from freeadv_fast.models.normalize import unit_images

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#6E6E6E"
INK = "#222222"
# Methods are told apart by colour, mark and dash: 7 colours, and the second round is dashed.
SWEEP_COLORS = (BLUE, VERMILION, GREEN, ORANGE, "#56B4E9", "#CC79A7", "#8C564B")
SWEEP_MARKS = "osD^vPX"
# Methods stand side by side around their radius, this share of the axis apart.
SWEEP_DODGE = 0.004

# Longest title, in characters: what fits over the narrowest chart.
LONGEST_TITLE = 90
# Longest name of a class over a picture, and of a corruption or method beside an axis.
LONGEST_NAME, LONGEST_LABEL = 17, 40

STYLE: Any = {
    # Folders may be called $1_$5: names are drawn as they are, and never read as formulas.
    "text.parse_math": False,
    "text.usetex": False,
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
    ("guard_robust_accuracy", "guard, under attack", ORANGE, "-"),
    ("guard_alignment", "guard, gradient alignment", GREEN, ":"),
)


def plot_training(log_lines: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draws loss, accuracies, learning rate and speed over the image passes of a run.

    The guard's gradient alignment, a cosine, is drawn among the accuracies, 1 being 100 %: the two
    collapse together. A detector has no accuracies.

    Args:
        log_lines: Lines of log.jsonl; a line may lack any key but ``passes``.
        path: PNG to write.
    """
    has_accuracies = any(key in line for line in log_lines for key, *_ in ACCURACIES)
    is_detector = bool(log_lines) and not has_accuracies
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.4, 3.4 if is_detector else 6.2), layout="constrained")
        shape = (1, 3) if is_detector else (2, 2)
        loss, *middle, rate, speed = figure.subplots(*shape, sharex=True).flat
        _curve(loss, log_lines, "loss", color=BLUE)
        loss.set(title="Training loss", ylabel="cross entropy (nats)")
        if is_detector:
            loss.set(ylabel="of classes and boxes, an image")
        for accuracy in middle:
            _accuracies(figure, accuracy, log_lines)
        _curve(rate, log_lines, "lr", color=GREY)
        rate.set(title="Learning rate", ylabel="step size of SGD")
        _curve(speed, log_lines, "passes_per_second", color=GREEN)
        speed.set(title="Speed", ylabel="image passes / s")
        for axes in (*[loss] * is_detector, rate, speed):
            axes.set_xlabel("image passes (one image forward and backward)")
            axes.set_ylim(0, 1.08 * max([*_heights(axes), 1e-9]))
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(6))
            axes.xaxis.set_major_formatter(FuncFormatter(_short_number))
        save(figure, path)


def _accuracies(figure: Figure, axes: Axes, log_lines: Sequence[Mapping[str, Any]]) -> None:
    """Draws all accuracies into one chart, and names them beside it."""
    for key, label, color, dash in ACCURACIES:
        _curve(axes, log_lines, key, color=color, linestyle=dash, label=label)
    axes.set(title="Accuracy", ylabel="images classified correctly", ylim=(0, 1.02))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if axes.lines:
        figure.legend(handles=axes.lines, loc="outside right upper")


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
    threat: AnyThreatModel,
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
        save(figure, path)


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
        clean.set_title(drawable(classes[label], LONGEST_NAME), loc="center", fontsize=9)
        for axes, guess in ((clean, before), (adversarial, after)):
            color = GREEN if guess == label else VERMILION
            axes.set_xlabel(drawable(classes[guess], LONGEST_NAME), color=color)
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


def _amplification(threat: AnyThreatModel) -> float:
    """The factor that makes a perturbation of size eps span black to white around grey."""
    return round(0.5 / float(threat.eps)) if threat.eps.levels else 1.0


def plot_sweep(cells: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draws robust and clean accuracy over the radius: a line a method, a dot a run.

    A line goes through the means over the seeds; where there are several, a bar spans one
    standard deviation (n - 1) to each side, as far as there are accuracies. A run that collapsed is
    a cross.

    Args:
        cells: Runs: ``method``, ``eps_levels`` (radius in 1/255), ``clean`` and ``robust`` as
            fractions, ``attack`` (name of the robust one), ``collapsed``. A run without ``robust``
            is left out.
        path: PNG to write.
    """
    runs = [cell for cell in cells if cell["robust"] is not None]
    methods = list(dict.fromkeys(run["method"] for run in runs))
    attacks = dict.fromkeys(run["attack"] for run in runs)
    radii = sorted({float(run["eps_levels"]) for run in runs})
    gap = SWEEP_DODGE * (radii[-1] - radii[0])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 4.2), layout="constrained")
        robust, clean = figure.subplots(1, 2, sharex=True, sharey=True)
        for axes, key in ((robust, "robust"), (clean, "clean")):
            for number, method in enumerate(methods):
                own = [run for run in runs if run["method"] == method]
                _sweep_line(axes, own, key, number, gap * (number - (len(methods) - 1) / 2))
            axes.set_xlabel("radius eps (1/255)")
            axes.set_xticks(radii, [f"{radius:g}" for radius in radii])
        title = drawable(f"Accuracy under {', '.join(attacks)}", LONGEST_TITLE // 2)
        robust.set(title=title, ylim=(0, 1))
        robust.set_ylabel("validation images classified correctly")
        robust.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        clean.set_title("Accuracy on clean images")
        _sweep_legend(figure, robust, runs)
        save(figure, path)


def _sweep_line(
    axes: Axes, runs: Sequence[Mapping[str, Any]], key: str, number: int, shift: float
) -> None:
    """Draws method number `number`: its runs, their means, and the spread over seeds."""
    color = SWEEP_COLORS[number % len(SWEEP_COLORS)]
    by_radius: dict[float, list[float]] = {}
    for run in sorted(runs, key=lambda run: float(run["eps_levels"])):
        place = run["eps_levels"] + shift
        by_radius.setdefault(place, []).append(run[key])
        cross = {"marker": "x", "s": 34, "color": INK, "linewidth": 1.1, "zorder": 5}
        dot = {"marker": "o", "s": 9, "color": color, "alpha": 0.45, "linewidth": 0}
        style: dict[str, Any] = cross if run["collapsed"] else dot
        axes.scatter(place, run[key], clip_on=False, **style)
    _, caps, bars = axes.errorbar(
        list(by_radius),
        [float(np.mean(values)) for values in by_radius.values()],
        yerr=np.transpose([_spread(values) for values in by_radius.values()]),
        label=drawable(runs[0]["method"], LONGEST_LABEL),
        color=color,
        marker=SWEEP_MARKS[number % len(SWEEP_MARKS)],
        linestyle="-" if number < len(SWEEP_COLORS) else "--",
        markersize=4,
        capsize=2.5,
        elinewidth=1.1,
        linewidth=1.3,
        clip_on=False,
    )
    for part in (*caps, *bars):
        part.set_clip_on(False)


def _spread(accuracies: Sequence[float]) -> tuple[float, float]:
    """How far one standard deviation reaches below and above the mean, within 0 and 1."""
    mean = float(np.mean(accuracies))
    deviation = float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else 0.0
    return min(deviation, mean), min(deviation, 1 - mean)


def _sweep_legend(figure: Figure, axes: Axes, runs: Sequence[Mapping[str, Any]]) -> None:
    """Names the methods on the right, and what bars and crosses mean."""
    handles, names = axes.get_legend_handles_labels()
    if any(run["collapsed"] for run in runs):
        handles.append(Line2D([], [], color=INK, marker="x", linestyle="none"))
        names.append("run that collapsed")
    num_seeds = len({run["seed"] for run in runs})
    note = f"mean and std of {num_seeds} seeds" if num_seeds > 1 else "one seed"
    figure.legend(handles, names, loc="outside right upper", title=note, title_fontsize=8)


def drawable(text: str, limit: int) -> str:
    """A user's text in one line of printable characters that fits.

    Args:
        text: Whatever a folder may be called.
        limit: Characters; a longer text ends in three dots.
    """
    line = one_line(text)
    return line if len(line) <= limit else line[: limit - 3] + "..."


def save(figure: Figure, path: str | Path) -> None:
    """Writes a PNG without touching pyplot's global state."""
    FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        # An emoji is a box in DejaVu Sans; the user cannot do anything about it.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(path, dpi=150, format="png")
