"""README.md of an export: the model card that the Hugging Face Hub shows.

It says what was measured and what was not. What the user alone can know, the licence, is marked
TODO; nothing is invented.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from freeadv_fast.config.attack import ENSEMBLE
from freeadv_fast.config.method_names import DUAL
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.runs.chance import wilson_interval
from freeadv_fast.runs.export.citations import PAPERS
from freeadv_fast.runs.export.claims import Claim, Claims
from freeadv_fast.runs.export.datasets import Dataset, dataset_of
from freeadv_fast.runs.export.network import NORMALIZED, ONNX, PLAIN

# The Hub takes `other` with any name of its own beside it, and refuses what it does not know.
LICENSE_TODO = "todo-name-the-licence"
# Below so many images the interval says more than the accuracy; AutoAttack's usual number.
FEW_IMAGES = 1000
NORMS = {"linf": "L-infinity", "l2": "L2"}
WEIGHTS = {"average": "averaged", "best": "best (by held-out images)"}


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a card is about.

    Attributes:
        config: Of the run.
        classes: Class names in the order of the logits.
        weights: ``last``, ``best``, ``average`` or a checkpoint's path.
        claims: What was measured of them.
        record: What the run's result.json holds; None where there is none.
        exported: What the export's config.json says.
        has_onnx: Whether model.onnx lies beside it.
    """

    config: TrainConfig
    classes: Sequence[str]
    weights: str
    claims: Claims
    record: Mapping[str, Any] | None
    exported: Mapping[str, Any]
    has_onnx: bool = False

    @property
    def is_timm(self) -> bool:
        """Whether timm builds the network and takes its weights (`timm_form`)."""
        return "num_features" in self.exported

    @property
    def dataset(self) -> Dataset:
        """The training data."""
        return dataset_of(self.config.data, self.classes)


def model_card(subject: Subject) -> str:
    """The text of README.md."""
    config = subject.config
    title = f"{config.arch}, {config.method}, {subject.dataset.title}"
    sections = {
        "Threat model": threat_model(config),
        "Accuracy": accuracy(subject),
        "Training": training(subject),
        "Limits": limits(subject),
        "Loading": loading(subject),
        "Licence": licence(subject.dataset),
        "Citation": citation(config),
    }
    parts = [header(subject), f"# {title}", summary(subject)]
    parts += [f"## {name}\n\n{text}" for name, text in sections.items() if text]
    return "\n\n".join(parts) + "\n"


def header(subject: Subject) -> str:
    """The YAML by which the Hub files a model."""
    config, hub = subject.config, subject.dataset.hub
    library = "timm" if subject.is_timm else "freeadv_fast"
    tags = ["image-classification", "adversarial-robustness", "adversarial-training"]
    tags = tags[: 1 if config.method == "natural" else 3]
    lines = ["license: other", f"license_name: {LICENSE_TODO}", f"library_name: {library}"]
    lines += ["pipeline_tag: image-classification", "tags:"]
    lines += [f"- {tag}" for tag in dict.fromkeys([*tags, config.method, library, "freeadv_fast"])]
    lines += ["datasets:", f"- {hub}"] if hub else []
    return "\n".join(["---", *lines, "metrics:", "- accuracy", "---"])


def summary(subject: Subject) -> str:
    """One sentence: what it is, and what it is worth."""
    config = subject.config
    what = f"An image classifier of {len(subject.classes)} classes at {config.image_size} px"
    if not subject.claims.clean:
        return f"{what}. **These weights were not evaluated.**"
    worth = f"{subject.claims.clean[0].accuracy:.1%} of clean images right"
    if subject.claims.robust:
        least = min(subject.claims.robust, key=lambda claim: claim.accuracy)
        worth += f", {least.accuracy:.1%} under {least.attack} at eps {config.eps}"
    return f"{what}: {worth}."


def threat_model(config: TrainConfig) -> str:
    """The attacker that the numbers are about."""
    lines = [
        f"- norm: {NORMS[config.norm]}",
        f"- eps: {config.eps} of the pixel range [0, 1]",
        "- untargeted, by an attacker who knows the weights; perturbed pixels stay in [0, 1]",
    ]
    if config.method == "natural":
        lines.append("- trained on clean images: not made to withstand any attack")
    if config.method in DUAL:
        lines.append("- adversarial examples served clean accuracy: not made to withstand attacks")
    return "\n".join(lines)


def accuracy(subject: Subject) -> str:
    """The table: an attack a line, with all that makes it weak or strong."""
    claims = subject.claims
    if not claims.clean:
        return "These weights were not evaluated."
    titles = ("attack", "steps", "step", "restarts", "images", "accuracy", "95 % interval")
    rows = [titles, ("---",) * len(titles), *map(_row, (*claims.clean, *claims.robust))]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines += [""] + [_parts(claim) for claim in claims.robust if claim.parts]
    lines += [f"{c.attack}: the images of {c.images}.\n" for c in claims.robust if c.images]
    elsewhere = {c.origin for c in claims.robust} - {"result.json"}
    origin = f" and {', '.join(sorted(elsewhere))}" if elsewhere else ""
    which = WEIGHTS.get(subject.weights, subject.weights)
    lines.append(
        f"Of the {which} weights, in float32; from the run's result.json{origin}. An image counts "
        "where it is right clean and at every point that the attack found."
    )
    return "\n".join(lines)


def _row(claim: Claim) -> tuple[str, ...]:
    """One accuracy as the cells of its line."""
    attack = claim.attack
    low, high = wilson_interval(claim.accuracy, claim.num_images)
    name = str(attack) if attack else f"none{', top-5' if claim.is_top5 else ''}"
    has_steps = attack is not None and attack.loss != ENSEMBLE
    return (
        f"{name} (standard)" if attack and not has_steps else name,
        str(attack.steps) if attack and has_steps else "-",
        claim.step or "-",
        str(attack.restarts) if attack and has_steps else "-",
        f"{claim.num_images:,}",
        f"{claim.accuracy:.2%}",
        f"{100 * low:.1f}-{high:.1%}",
    )


def _parts(claim: Claim) -> str:
    """What still stood after each part of an attack."""
    parts = ", ".join(f"{name} {value:.2%}" for name, value in claim.parts.items())
    return f"{claim.attack}, still right after each part: {parts}.\n"


def training(subject: Subject) -> str:
    """How it was trained, and what that cost."""
    config, record = subject.config, subject.record
    cited = " and ".join(f"[{p.title}]({p.url}) ({p.short})" for p in PAPERS[config.method])
    lines = [
        f"method: {config.method}{f', {cited}' if cited else ''}",
        f"recipe: {config.recipe}",
        f"data: {subject.dataset.title} at {config.image_size} px, augmentation {config.augment}",
        f"network: {config.arch}, from {_start(config)}",
        *_extras(config),
        f"optimizer: {config.optimizer}, rate {config.lr:g}, schedule {config.schedule}, "
        f"{config.batch_size} images a rank, weight decay {config.weight_decay:g}",
        f"seed: {config.seed}",
    ]
    if record is not None:
        lines += _cost(record)
    return "\n".join(f"- {line}" for line in lines)


def _start(config: TrainConfig) -> str:
    """What the weights were before."""
    return "random weights" if config.init_from is None else "weights of elsewhere (--init-from)"


def _extras(config: TrainConfig) -> list[str]:
    """What not every training has."""
    lines = []
    if config.method in ("free", "free-trades"):
        lines.append(f"replays of each minibatch: m = {config.m}")
    if config.unlabelled is not None:
        lines.append("with additional images, pseudo-labelled")
    if config.ema is not None:
        lines.append(f"average of the weights beside them: decay {config.ema:g}")
    if config.label_smoothing:
        lines.append(f"label smoothing: {config.label_smoothing:g}")
    if config.awp:
        lines.append(f"adversarial weight perturbation: gamma {config.awp:g}")
    return lines


def _cost(record: Mapping[str, Any]) -> list[str]:
    """What the training cost, by result.json."""
    ranks, versions = record["ranks"], record["versions"]
    hours = record["train_seconds"] / 3600
    took = f"{hours:.2f} hours" if hours >= 0.1 else f"{record['train_seconds']:.0f} seconds"
    return [
        f"budget: {record['epochs']:g} epochs, {record['passes']:,} image passes for the weights "
        f"and {record['attack_passes']:,} for perturbations alone",
        f"cost: {took} on {ranks} x {record['device']}, without evaluation",
        f"precision: {record['precision']}",
        f"ranks: {ranks}",
        f"software: freeadv_fast {versions['freeadv_fast']}, torch {versions['torch']}",
    ]


def limits(subject: Subject) -> str:
    """What nobody should conclude from the table."""
    config, claims, record = subject.config, subject.claims, subject.record
    lines = []
    if not claims.clean:
        lines.append("These weights were not evaluated: nothing is known of their accuracy.")
    elif claims.autoattack is None:
        lines.append(
            "AutoAttack was not run. Attacks that were may overestimate how much the network "
            "withstands."
        )
    few = {c.num_images for c in (*claims.clean, *claims.robust) if c.num_images < FEW_IMAGES}
    if few:
        lines.append(f"Measured on as few as {min(few):,} images: mind the intervals.")
    lines.append(
        f"Not evaluated: norms other than {NORMS[config.norm]}, radii other than {config.eps}, "
        "corrupted and shifted images, attackers who adapt to this network in particular."
    )
    lines.append("One training run, one seed: how much another would differ is not known.")
    if record is not None and record.get("collapse"):
        at = record["collapse"]["detected_at_passes"]
        lines.append(f"Robustness collapsed while it trained, at {at:,} passes; what followed: "
                     f"{record['collapse']['action']}.")  # fmt: skip
    if config.normalization == "per-image":
        lines.append("`model.safetensors` takes images that were standardised one by one.")
    return "\n".join(f"- {line}" for line in lines)


def loading(subject: Subject) -> str:
    """The lines that load the network, each by the library that they are for."""
    lines = subject.exported["load"]
    libraries = {
        "torchvision": "torchvision, safetensors.torch",
        "freeadv_fast": "freeadv_fast.models.zoo, safetensors.torch",
    }
    source = subject.exported["architecture_source"]
    blocks = [lines[NORMALIZED]]
    if subject.is_timm:
        blocks.append(["import timm", *timm_lines(subject.exported)])
    if source in libraries:
        blocks.append([f"import {libraries[source]}", *lines[PLAIN]])
    if subject.has_onnx:
        blocks.append(
            [
                "import onnxruntime",
                f'session = onnxruntime.InferenceSession("{ONNX}")',
                '(logits,) = session.run(None, {"pixels": pixels.numpy()})',
            ]
        )
    written = "\n\n".join("```python\n" + "\n".join(block) + "\n```" for block in blocks)
    return (
        "In this folder; `pixels` are (N, 3, "
        f"{subject.config.image_size}, {subject.config.image_size}) in [0, 1]:\n\n{written}"
    )


def timm_lines(exported: Mapping[str, Any]) -> list[str]:
    """How timm loads the folder, and the same once it is on the Hub."""
    if exported["per_image_standardization"]:
        fed = "freeadv_fast.models.normalize.PerImageStandardizer()(pixels)"
    else:
        fed = "(pixels - mean) / std"
    return [
        'model = timm.create_model("local-dir:.", pretrained=True)  # or "hf-hub:OWNER/NAME"',
        f"logits = model.eval()({fed})",
    ]


def licence(dataset: Dataset) -> str:
    """What the user must fill in."""
    return (
        f"TODO: the licence of these weights; it stands at the top of this file too, as "
        f"`{LICENSE_TODO}`.\n\n"
        f"TODO: the licence and terms of the training data ({dataset.title}), which may bind what "
        "was trained on them.\n\n"
        "The code, freeadv_fast, is under Apache-2.0."
    )


def citation(config: TrainConfig) -> str:
    """The method's papers; none of natural training."""
    return "\n\n".join(f"```bibtex\n{paper.bibtex}\n```" for paper in PAPERS[config.method])
