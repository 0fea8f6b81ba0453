"""The result of a run as lines for the terminal."""

from __future__ import annotations

from typing import Any

from freeadv_fast.evaluation.accuracy import accuracy_table, side_by_side
from freeadv_fast.evaluation.detection.evaluate import DetectionEvaluation
from freeadv_fast.evaluation.evaluate import Evaluation
from freeadv_fast.session.result import Result


def summary(result: Result, measured: Evaluation | DetectionEvaluation) -> list[str]:
    """The result as lines for the terminal."""
    lines = [
        f"{result.method} {result.arch}: {result.passes:,} passes in {result.train_seconds:.1f} s "
        f"({result.passes_per_second:.0f} passes/s)",
        f"last weights at eps {result.eps}",
    ]
    if isinstance(measured, DetectionEvaluation):
        lines += measured.lines(result.attack_step)
    else:
        lines += accuracy_table(measured, result.attack_step).splitlines()
    if (sent := result.gradients) is not None:
        saved = sent["float32_bytes_an_update"] / sent["bytes_an_update"]
        lines.append(
            f"gradients: {sent['bytes_sent'] / 1e6:,.1f} MB left rank 0 as {sent['codec']} bytes, "
            f"{saved:.1f} times fewer than float32"
            + (", without what is averaged within a machine" if sent["machines"] > 1 else "")
        )
    lines += beside_the_last(result)
    choice = " (--export last or best)" if result.detection is None else ""
    exported = f"exported: the {result.exported} weights{choice}"
    return [*lines, exported + ", and the averaged ones" * (result.average is not None)]


def beside_the_last(result: Result) -> list[str]:
    """Averaged weights, and those that held-out images chose, beside the last ones.

    Returns:
        A table and what the choice is worth; nothing where there are only the last ones.
    """
    others: dict[str, dict[str, Any]] = {}
    best, average = result.best, result.average
    if result.detection is not None:
        precision = average and average["detection"]["clean"]["AP"]
        return [] if precision is None else [f"averaged weights: AP {precision:.1%}"]
    if average is not None:
        others["average"] = average
    if best is not None and not best["is_last"]:
        others[f"best, of epoch {best['epoch']}"] = best
    if not others:
        return []
    assert result.clean_accuracy is not None  # of a classifier
    columns = {"last": (result.clean_accuracy, result.robust_accuracy)}
    columns |= {
        t: (other["clean_accuracy"], other["robust_accuracy"]) for t, other in others.items()
    }
    lines = side_by_side(columns, result.attack_step).splitlines()
    if best is not None and not best["is_last"]:
        last = "the last average" if best["is_averaged"] and average else "the last"
        verdict = (
            f"are better than {last} by more than" if best["is_better"] else "are no better than"
        )
        lines.append(
            f"the best {verdict} chance explains, on {result.holdout_images:,} held-out images"
        )
    return lines
