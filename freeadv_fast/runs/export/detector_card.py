"""README.md of a detector's export: what was measured, what was not, and how torchvision loads it.

In the form of a classifier's card. Average precisions are percents, as detection papers print them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from freeadv_fast.config.method_names import DUAL
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.runs.export.card import FEW_IMAGES, LICENSE_TODO, WEIGHTS, Subject, licence
from freeadv_fast.runs.export.card import training as training_lines
from freeadv_fast.runs.export.citations import COCO, COCO_C, PAPERS, RETINANET
from freeadv_fast.runs.export.claims import Claims
from freeadv_fast.runs.export.datasets import Dataset, dataset_of
from freeadv_fast.runs.export.network import PLAIN

PRECISIONS = {
    "AP": "AP",
    "AP50": "AP50",
    "AP75": "AP75",
    "APs": "AP small",
    "APm": "AP medium",
    "APl": "AP large",
    "AR100": "AR100",
}


@dataclasses.dataclass(frozen=True)
class DetectorSubject:
    """What a card is about.

    Attributes:
        config: Of the run.
        classes: Class names in the order of the logits.
        weights: ``last``, ``average`` or a checkpoint's path.
        record: What the run's result.json holds; None where there is none.
        exported: What the export's config.json says.
    """

    config: TrainConfig
    classes: Sequence[str]
    weights: str
    record: Mapping[str, Any] | None
    exported: Mapping[str, Any]

    @property
    def dataset(self) -> Dataset:
        """The training data."""
        return dataset_of(self.config.data, self.classes)

    @property
    def measured(self) -> Mapping[str, Any]:
        """What result.json says of these weights as ``detection``; empty where it says nothing."""
        record = self.record or {}
        if self.weights == "average":
            record = record.get("average") or {}
        elif self.weights != "last":
            record = {}
        return record.get("detection") or {}


def detector_card(subject: DetectorSubject) -> str:
    """The text of README.md."""
    config = subject.config
    sections = {
        "Threat model": threat_model(config),
        "Average precision": average_precision(subject),
        "Corrupted images": corrupted(subject),
        "Training": training(subject),
        "Limits": limits(subject),
        "Loading": loading(subject),
        "Licence": licence(subject.dataset),
        "Citation": citation(subject),
    }
    parts = [
        header(subject),
        f"# {config.arch}, {config.method}, {subject.dataset.title}",
        summary(subject),
    ]
    parts += [f"## {name}\n\n{text}" for name, text in sections.items() if text]
    return "\n\n".join(parts) + "\n"


def header(subject: DetectorSubject) -> str:
    """The YAML by which the Hub files a model."""
    tags = ["object-detection", "retinanet", subject.config.method, "torchvision", "freeadv_fast"]
    if subject.config.method != "natural":
        tags.insert(2, "adversarial-training")
    lines = ["license: other", f"license_name: {LICENSE_TODO}", "library_name: freeadv_fast"]
    lines += ["pipeline_tag: object-detection", "tags:", *(f"- {tag}" for tag in tags)]
    lines += ["datasets:", f"- {subject.dataset.hub}"] if subject.dataset.hub else []
    return "\n".join(["---", *lines, "---"])


def summary(subject: DetectorSubject) -> str:
    """One sentence: what it is, and what it is worth."""
    config, measured = subject.config, subject.measured
    what = (
        f"A detector of {len(subject.classes)} classes of objects in images whose shorter side is "
        f"{config.image_size} px"
    )
    if not measured:
        return f"{what}. **These weights were not evaluated.**"
    worth = f"AP {percent(measured['clean']['AP'])} on {measured['num_images']:,} images"
    if corruptions := measured.get("corruptions"):
        mean = percent(measured["mean_corrupted"])
        worth += (
            f", mPC {mean} on corrupted ones"
            if measured["is_benchmark"]
            else f", {mean} under {counted(corruptions)}"
        )
    return f"{what}: {worth}."


def threat_model(config: TrainConfig) -> str:
    """What was trained on, and what it is for."""
    if config.method == "natural":
        return "Trained on clean images: not made to withstand any attack."
    lines = [
        f"- trained on images perturbed within eps {config.eps} of the pixel range [0, 1] in "
        "L-infinity; perturbed pixels stay in [0, 1], padding is never perturbed",
        "- the perturbation raises "
        + {
            "sum": "the sum of the losses of classes and boxes",
            "classification": "the loss of classes",
            "box": "the loss of boxes",
            "stronger": "of each image the one of the losses of classes and boxes along which "
            "their sum rises faster",
        }[config.attack_loss],
    ]
    if config.method in DUAL:
        lines.append(
            "- adversarial examples served clean and corrupted images: not made to withstand "
            "attacks"
        )
    return "\n".join(lines)


def average_precision(subject: DetectorSubject) -> str:
    """The table: the clean images, and an attack a line."""
    measured = subject.measured
    if not measured:
        return "These weights were not evaluated."
    clean = measured["clean"]
    rows = [("clean", clean), *(measured.get("attacks") or {}).items()]
    table = [("images", *PRECISIONS.values())]
    table += [(name, *(percent(own.get(key)) for key in PRECISIONS)) for name, own in rows]
    which = WEIGHTS.get(subject.weights, subject.weights)
    attacked = ""
    if measured.get("attacks"):
        attacked = (
            f" Attacks: L-infinity, eps {subject.config.eps}, step {subject.config.eval_step}, on "
            "the sum of the losses of classes and boxes."
        )
    return (
        f"{as_table(table)}\n\nOf the {which} weights on {measured['num_images']:,} validation "
        "images, in percent, by COCO's protocol (AP: mean over IoU thresholds .50 to .95); from "
        f"the run's result.json.{attacked}"
    )


def corrupted(subject: DetectorSubject) -> str:
    """AP by corruption and severity, and what it comes to; empty where none was evaluated."""
    measured = subject.measured
    corruptions = measured.get("corruptions") or {}
    if not corruptions:
        return ""
    severities = sorted({severity for row in corruptions.values() for severity in row}, key=int)
    table = [("corruption", *(f"severity {severity}" for severity in severities), "mean")]
    for name, row in corruptions.items():
        cells = (percent(row.get(severity)) for severity in severities)
        table.append((name.replace("_", " "), *cells, percent(mean_of(row))))
    mean, relative = percent(measured["mean_corrupted"]), percent(measured["relative"])
    means = (
        f"mPC {mean}, rPC {relative} % of the clean AP"
        if measured["is_benchmark"]
        else f"Mean under {counted(corruptions)} {mean}, {relative} % of the clean AP"
    )
    return (
        f"{means}: AP's mean over corruptions of its mean over severities, as in [Benchmarking "
        f"Robustness in Object Detection]({COCO_C.url}) ({COCO_C.short}).\n\n{as_table(table)}"
    )


def mean_of(row: Mapping[Any, float | None]) -> float | None:
    """The mean over the severities of a corruption; None where one of them is undefined."""
    known = [value for value in row.values() if value is not None]
    return sum(known) / len(known) if known and len(known) == len(row) else None


def counted(corruptions: Mapping[str, Any]) -> str:
    """``1 corruption``, ``2 corruptions``."""
    return f"{len(corruptions)} corruption" + "s" * (len(corruptions) != 1)


def training(subject: DetectorSubject) -> str:
    """How it was trained, and what that cost: as of a classifier."""
    return training_lines(
        Subject(
            subject.config,
            subject.classes,
            subject.weights,
            Claims(),
            subject.record,
            subject.exported,
        )
    )


def limits(subject: DetectorSubject) -> str:
    """What nobody should conclude from the tables."""
    measured, lines = subject.measured, []
    if not measured:
        lines.append("These weights were not evaluated: nothing is known of their precision.")
    else:
        if measured["num_images"] < FEW_IMAGES:
            lines.append(
                f"Measured on {measured['num_images']:,} images only: other images may say "
                "otherwise."
            )
        lines.append(
            "Measured on images that PIL resized, averaging over pixels where it reduces; "
            "torchvision's own resize in the lines below does not, and can score differently."
        )
    if not measured.get("attacks"):
        lines.append("It was not attacked: nothing is known of what an adversary can do to it.")
    else:
        lines.append("Attacks that were made bound its robustness from above; others may do more.")
    lines.append(untested_corruptions(measured))
    lines.append("One training run, one seed: how much another would differ is not known.")
    return "\n".join(f"- {line}" for line in lines if line)


def untested_corruptions(measured: Mapping[str, Any]) -> str:
    """How much of the benchmark the mean under corruption is over; empty of the whole."""
    corruptions = measured.get("corruptions") or {}
    if not corruptions:
        return "It was not evaluated on corrupted images."
    if measured["is_benchmark"]:
        return ""
    return (
        f"The mean under corruption is over {sum(map(len, corruptions.values()))} of the "
        "benchmark's 75 (corruption, severity) pairs: it compares with no published mPC."
    )


def loading(subject: DetectorSubject) -> str:
    """The lines by which torchvision loads the network."""
    lines = subject.exported["load"][PLAIN]
    is_ours = any("freeadv_fast" in line for line in lines)
    imports = ["import freeadv_fast.models.retinanet"] * is_ours
    lines = [*imports, "import safetensors.torch", "import torchvision", "", *lines]
    code = "\n".join(lines)
    return (
        "In this folder; `pixels` is one image, (3, H, W) in [0, 1], of any size: torchvision "
        "resizes and normalises it, and gives boxes back in its own pixels.\n\n"
        f"```python\n{code}\n```\n\n"
        '`found["boxes"]` are (n, 4), x1, y1, x2, y2; `found["labels"]` are indices into '
        '`class_names` of config.json, from 0: no class stands for the background; '
        '`found["scores"]` fall.'
    )  # fmt: skip


def citation(subject: DetectorSubject) -> str:
    """The method's papers, the network's, and those that the numbers are due to."""
    papers = [*PAPERS[subject.config.method], RETINANET, COCO]
    papers += [COCO_C] if subject.measured.get("corruptions") else []
    return "\n\n".join(f"```bibtex\n{paper.bibtex}\n```" for paper in papers)


def as_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as Markdown; the first one is the head."""
    head, *rest = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, f"|{' --- |' * len(rows[0])}", *rest])


def percent(fraction: float | None) -> str:
    """``35.8`` of .358; a dash where it is undefined."""
    return "-" if fraction is None else f"{100 * fraction:.1f}"
