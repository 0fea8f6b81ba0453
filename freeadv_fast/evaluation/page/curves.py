"""Charts as geometry: lines, dots and ticks in the units of an SVG's viewBox.

The template draws them with the page's own colours, so that they are sharp at any size and follow
light and dark.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from freeadv_fast.evaluation.page.files import is_number

# Units of the viewBox: about a pixel on a phone, a little more where two charts share a line.
WIDTH, HEIGHT = 420, 240
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 10, 36
# A curve of more points is thinned to the extremes of bins: more than a bin a unit cannot be seen.
NUM_BINS = 150
NUM_MEANS = 100
# So few points are seen one by one.
MOST_DOTS = 40
# Colours of the style sheet; the eighth line has the first one's colour, and dashes.
NUM_TONES = 7
# A scatter chart goes on beyond its last point, which would be cut in half.
ROOM_BESIDE = 1.08
SOLID, DASHED, THIN = "solid", "dashed", "thin"

Points = Sequence[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        label: What it is, for the legend.
        tone: Its colour, 0..6.
        style: `SOLID`, `DASHED` or `THIN`, which tells it apart where colours do not.
        path: The `d` of an SVG path.
        dots: Centres of its points, where they are few.
    """

    label: str
    tone: int
    style: str
    path: str
    dots: tuple[tuple[float, float], ...]


@dataclasses.dataclass(frozen=True)
class Dot:
    """A point of a scatter chart."""

    x: float
    y: float
    tone: int
    label: str
    is_hollow: bool = False


@dataclasses.dataclass(frozen=True)
class Tick:
    """A place on an axis, and what is written there."""

    place: float
    text: str


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart, ready to be drawn.

    Attributes:
        title: What it shows. unit: Of its y axis. x_title: What its x axis is.
        lines: Curves. dots: Points. x_ticks: Along the bottom. y_ticks: On the left.
        marks: Places of vertical lines: something happened there.
    """

    title: str
    unit: str
    x_title: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...] = ()
    dots: tuple[Dot, ...] = ()
    marks: tuple[float, ...] = ()
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


@dataclasses.dataclass(frozen=True)
class Curve:
    """What a line is made of: a name, a colour, and (x, y) in the units of the data."""

    label: str
    points: Points
    tone: int = 0
    style: str = SOLID


@dataclasses.dataclass(frozen=True)
class Axis:
    """A straight scale from data to the viewBox.

    Attributes:
        low: Value at `start`. high: Value at `end`. ticks: Values that are written.
    """

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        """A value's place, in tenths of a unit."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


def readings(lines: Iterable[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(passes, value) of the lines of a log that have a finite value under a key."""
    return [(line["passes"], line[key]) for line in lines if is_number(line.get(key))]


def line_chart(
    title: str,
    unit: str,
    curves: Sequence[Curve],
    *,
    write: Callable[[float], str],
    limits: tuple[float, float] | None = None,
    marks: Sequence[float] = (),
    x_title: str = "image passes",
) -> Chart | None:
    """A chart of curves; None where no curve has two points.

    Args:
        title: What it shows. unit: Of the y axis.
        curves: Those without points are left out.
        write: A value of the y axis as text.
        limits: Of the y axis; from 0 or the lowest value to the highest by default.
        marks: Values of x where something happened.
        x_title: What x is.
    """
    drawn = [curve for curve in curves if curve.points]
    if max((len(curve.points) for curve in drawn), default=0) < 2:
        return None
    xs = [x for curve in drawn for x, _ in curve.points]
    ys = [y for curve in drawn for _, y in curve.points]
    across = axis(0, max(xs), LEFT, WIDTH - RIGHT, ends_at_tick=False)
    low, high = limits or (min(0.0, *ys), max(ys))
    up = axis(low, high, HEIGHT - BOTTOM, TOP)
    return Chart(
        title,
        unit,
        x_title,
        written(across, short_number),
        written(up, write),
        lines=tuple(placed(curve, across, up) for curve in drawn),
        marks=tuple(across(x) for x in marks if x <= across.high),
    )


def scatter_chart(
    title: str, unit: str, dots: Sequence[Dot], *, x_title: str, highest: float = 1.0
) -> Chart | None:
    """A chart of points, y from 0 in percent; None of none.

    Args:
        title: What it shows. unit: Of the y axis.
        dots: In the units of the data.
        x_title: What x is.
        highest: What y reaches at least.
    """
    if not dots:
        return None
    rightmost = max(dot.x for dot in dots) * ROOM_BESIDE
    across = axis(0, rightmost, LEFT, WIDTH - RIGHT, ends_at_tick=False)
    up = axis(0, highest, HEIGHT - BOTTOM, TOP)
    return Chart(
        title,
        unit,
        x_title,
        written(across, short_number),
        written(up, whole_percent),
        dots=tuple(dataclasses.replace(dot, x=across(dot.x), y=up(dot.y)) for dot in dots),
    )


def axis(low: float, high: float, start: float, end: float, ends_at_tick: bool = True) -> Axis:
    """A scale with about five round ticks.

    Args:
        low: Lowest value. high: Highest value.
        start: Place of the lowest. end: Place of the highest.
        ends_at_tick: Whether the scale goes on to the next tick above and below.
    """
    if not high > low:
        high = low + (abs(low) or 1.0)
    step = round_step((high - low) / 4.5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if ends_at_tick:
        low, high = first * step, last * step
    places = [number * step for number in range(first, last + 1)]
    slack = 1e-9 * (high - low)
    ticks = tuple(place for place in places if low - slack <= place <= high + slack)
    return Axis(low, high, start, end, ticks)


def round_step(rough: float) -> float:
    """The next of 1, 2, 2.5, 5 and 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * f for f in (1, 2, 2.5, 5, 10) if power * f >= rough * (1 - 1e-9))


def written(scale: Axis, write: Callable[[float], str]) -> tuple[Tick, ...]:
    """The ticks of a scale."""
    return tuple(Tick(scale(value), write(value)) for value in scale.ticks)


def placed(curve: Curve, across: Axis, up: Axis) -> Line:
    """A curve in the units of the viewBox."""
    places = [(across(x), up(y)) for x, y in thinned(curve.points)]
    path = "M" + "L".join(f"{x:g} {y:g}" for x, y in places)
    dots = tuple(places) if len(places) <= MOST_DOTS else ()
    return Line(curve.label, curve.tone % NUM_TONES, curve.style, path, dots)


def thinned(points: Points) -> Points:
    """The lowest and the highest point of each of `NUM_BINS` runs of points, in their order."""
    if len(points) <= 2 * NUM_BINS:
        return points
    size = math.ceil(len(points) / NUM_BINS)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        part = range(start, min(start + size, len(points)))
        extremes = {min(part, key=lambda i: points[i][1]), max(part, key=lambda i: points[i][1])}
        kept += [points[i] for i in sorted(extremes)]
    return kept


def averaged(points: Points) -> Points:
    """The means of `NUM_MEANS` runs of points, so that several curves can be told apart."""
    size = math.ceil(len(points) / NUM_MEANS)
    parts = [points[start : start + size] for start in range(0, len(points), max(size, 1))]
    return [tuple(map(statistics.fmean, zip(*part, strict=True))) for part in parts]  # type: ignore[misc]


def short_number(value: float) -> str:
    """``1.2M`` for 1,200,000."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{letter}"
    return f"{value:.6g}"


def whole_percent(value: float) -> str:
    """``40%``."""
    return f"{100 * value:.0f}%"
