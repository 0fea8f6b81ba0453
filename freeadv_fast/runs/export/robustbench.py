"""A submission to RobustBench: their JSON, their issue, a checkpoint that their loader takes.

Their form is that of RobustBench/robustbench at 78fcc9e (March 2025): README's "Adding a new
model", `.github/ISSUE_TEMPLATE/new-model.md`, `model_info/DATASET/NORM/NAME.json`, and
`load_model` in `robustbench/utils.py`. What only the authors of a submission know is marked TODO.
"""

from __future__ import annotations

import dataclasses
import io
import re
import shutil
from pathlib import Path

import torch
from torch import Tensor

from freeadv_fast.errors import UserError
from freeadv_fast.models.batch_norm import without_auxiliary
from freeadv_fast.models.normalize import InputNormalizer, plain_network
from freeadv_fast.runs.export.claims import Claims
from freeadv_fast.runs.export.datasets import Dataset, dataset_of
from freeadv_fast.runs.export.folder import claim, write_bytes, write_record, write_text
from freeadv_fast.runs.export.robustbench_networks import Form, form_of
from freeadv_fast.runs.saved import SavedRun

FOLDER = "export-robustbench"
ENTRY = "model_zoo_entry.py"
NORMS = {"linf": "Linf", "l2": "L2"}
# <Name><Year><FirstWordOfTitle>, and which of several models; what load_model takes for a path.
NAME = re.compile(r"[A-Z][A-Za-z-]*(19|20)\d\d[A-Z][A-Za-z0-9-]*(_[A-Za-z0-9_.-]+)?")


@dataclasses.dataclass(frozen=True)
class Submission:
    """One model for their leaderboard.

    Attributes:
        name: Their identifier of it, such as ``Doe2026Free_RN50``.
        run: Which trained it.
        claims: What was measured of its weights.
        dataset: With a leaderboard there.
        form: How they build the network.
    """

    name: str
    run: SavedRun
    claims: Claims
    dataset: Dataset
    form: Form

    @property
    def norm(self) -> str:
        """Their name of the threat model."""
        return NORMS[self.run.config.norm]

    @property
    def eps(self) -> str:
        """The radius as their files write it: ``8/255`` in L-infinity, ``0.5`` in L2."""
        eps = self.run.config.eps
        return str(eps) if self.run.config.norm == "linf" else f"{float(eps):.3g}"

    @property
    def has_other_data(self) -> bool:
        """Whether more than the data set itself taught the network."""
        return self.run.config.unlabelled is not None or self.run.config.init_from is not None


def submission_of(
    name: str, run: SavedRun, claims: Claims, *, has_result: bool = True
) -> Submission:
    """Checks what there is before anything is written.

    Args:
        name: RobustBench's identifier, such as ``Doe2026Free_RN50``.
        run: The run.
        claims: What was measured of its weights.
        has_result: Whether the run is finished.

    Raises:
        UserError: a name that is none, a run without a result, or data of which there is no
            leaderboard.
    """
    check_name(name)
    if not has_result or not claims.clean:
        what = (
            "has no result.json" if not has_result else f"says nothing of its {run.weights} weights"
        )
        raise UserError(
            f"--robustbench: {run.folder.root} {what}; a submission needs measured accuracies"
        )
    dataset = dataset_of(run.config.data, run.classes)
    if dataset.robustbench is None:
        raise UserError(
            f"--robustbench: it ranks networks of CIFAR-10, CIFAR-100 and ImageNet; this one is of "
            f"{dataset.title}"
        )
    return Submission(name, run, claims, dataset, form_of(run.config, len(run.classes)))


def export_robustbench(submission: Submission) -> list[str]:
    """Writes ``RUN/export-robustbench/NAME``: all that a submission takes.

    ``model_info/DATASET/NORM/NAME.json``, ``NAME.pt``, ``model_zoo_entry.py``, ``issue.md`` and,
    where AutoAttack was run here, the log of the evaluation that is claimed.

    Returns:
        Lines for the user: what was written, and what is left to do.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """
    name, run_folder = submission.name, submission.run.folder.root
    folder = run_folder / FOLDER / name
    claim(folder, ENTRY)
    write_text(folder / ENTRY, entry(submission))
    info = folder / "model_info" / (submission.dataset.robustbench or "") / submission.norm
    info.mkdir(parents=True, exist_ok=True)
    write_record(info / f"{name}.json", model_info(submission))
    write_bytes(folder / f"{name}.pt", checkpoint(submission))
    for earlier in folder.glob("autoattack-*.log"):
        earlier.unlink()
    log = claimed_log(submission)
    if log is not None:
        for path in (log, *log.parent.glob(f"{log.stem}-rank*.log")):
            shutil.copyfile(path, folder / path.name)
    write_text(folder / "issue.md", issue(submission, log))
    return [f"wrote {folder}", *left_to_do(submission, log)]


def check_name(name: str) -> None:
    """Refuses what is no identifier of theirs.

    Raises:
        UserError: with the form.
    """
    if NAME.fullmatch(name) is None:
        raise UserError(
            f"--robustbench {name}: write first author, year and first word of the title, and an "
            "architecture if you like: Doe2026Free_RN50"
        )


def percent(accuracy: float) -> str:
    """An accuracy as their files write it: ``43.21``."""
    return f"{100 * accuracy:.2f}"


def model_info(submission: Submission) -> dict[str, object]:
    """Their JSON: its keys in their order, accuracies in percent, as text with two decimals."""
    claims = submission.claims
    best_attack = claims.autoattack
    # No minimum beside it: others may be of fewer images.
    reported = claims.robust if best_attack is None else [best_attack]
    least = min((claim.accuracy for claim in reported), default=None)
    return {
        "link": "TODO: the paper's address",
        "name": "TODO: the paper's title",
        "authors": "TODO: the authors, separated by commas",
        "additional_data": submission.has_other_data,
        "number_forward_passes": 1,
        "dataset": submission.dataset.robustbench,
        "venue": "TODO: venue and year",
        "architecture": submission.form.title,
        "eps": submission.eps,
        "clean_acc": percent(claims.clean[0].accuracy),
        "reported": "" if least is None else percent(least),
        "autoattack_acc": "" if best_attack is None else percent(best_attack.accuracy),
    }


def checkpoint(submission: Submission) -> bytes:
    """``{"state_dict": ...}`` as their `load_model` takes it for the network of `entry`.

    It strips ``model.`` from each name once, and for ImageNet puts it before each name again, where
    the normaliser's constants are in their code.
    """
    config = submission.run.config
    plain = without_auxiliary(plain_network(submission.run.model).state_dict())
    if submission.dataset.robustbench == "imagenet":
        state: dict[str, Tensor] = {f"model.{key}": value for key, value in plain.items()}
    else:
        normalizer = InputNormalizer(config.pixel_mean, config.pixel_std).state_dict()
        state = {f"normalize.{key}": value for key, value in normalizer.items()}
        state |= {f"model.model.{key}": value for key, value in plain.items()}
    buffer = io.BytesIO()
    torch.save({"state_dict": {k: v.detach().cpu().contiguous() for k, v in state.items()}}, buffer)
    return buffer.getvalue()


def entry(submission: Submission) -> str:
    """The model's entry for ``robustbench/model_zoo/DATASET.py``, with what it imports."""
    config, form = submission.run.config, submission.form
    place = f"robustbench/model_zoo/{submission.dataset.robustbench}.py"
    fields = {
        "gdrive_id": repr("TODO: of NAME.pt, once it is there".replace("NAME", submission.name))
    }
    if submission.dataset.robustbench == "imagenet":
        fields["preprocessing"] = repr(preprocessing(config.image_size, config.evaluation_resize))
    lines = [f'"""The entry of {submission.name} for {place}, in its {submission.norm} models."""']
    lines += ["", *form.imports, f"mean, std = {config.pixel_mean}, {config.pixel_std}", ""]
    lines += [f'ENTRY = ("{submission.name}", {{', f'    "model": {form.builder},']
    lines += [f'    "{name}": {value},' for name, value in fields.items()]
    return "\n".join([*lines, "})", ""])


def preprocessing(image_size: int, resize_size: int) -> str:
    """Their name of a resize and central crop (`robustbench.data.PREPROCESSINGS`)."""
    names = {(224, 256): "Res256Crop224", (288, 0): "Crop288"}
    resize = f"Resize({resize_size}) and " if resize_size else ""
    return names.get((image_size, resize_size), f"TODO: {resize}CenterCrop({image_size})")


def claimed_log(submission: Submission) -> Path | None:
    """AutoAttack's log of what is claimed, that of rank 0; None where there is none."""
    found, root = submission.claims.autoattack, submission.run.folder.root
    path = None if found is None or found.log is None else root / found.log
    return path if path is not None and path.is_file() else None


def left_to_do(submission: Submission, log: Path | None) -> list[str]:
    """What a submission still lacks, a line each."""
    found, run = submission.claims.autoattack, submission.run.folder.root
    lines = ["fill in what says TODO: paper, authors, venue, addresses"]
    again = f"python launch/evaluate.py {run} --attacks autoattack"
    if found is None:
        return [*lines, f"no AutoAttack, so that autoattack_acc is blank: {again}"]
    wanted = submission.dataset.num_test_images or 0
    if found.num_images < wanted:
        lines.append(f"AutoAttack saw {found.num_images:,} images; RobustBench asks for {wanted:,}")
    return lines + ([] if log else [f"AutoAttack's log is not in {run}; RobustBench asks for it"])


def issue(submission: Submission, log: Path | None) -> str:
    """Their template "New Model(s)", filled in as far as the run knows."""
    info, form = model_info(submission), submission.form
    found = submission.claims.autoattack
    method = "TODO: AutoAttack was not run"
    if found is not None:
        method = f"AutoAttack, standard version, on {found.num_images:,} images, seed {found.seed}"
        if found.images is not None:
            method += f", those of {found.images}"
    if log is not None:
        method += f"; log: {log.name}, attached"
    fields = {
        "Architecture": info["architecture"],
        "Threat Model": submission.norm,
        "eps": info["eps"],
        "Clean accuracy": f"{info['clean_acc']}%",
        "Robust accuracy": f"{info['autoattack_acc'] or 'TODO: '}%",
        "Additional data": "true" if submission.has_other_data else "false",
        "Evaluation method": method,
        "Checkpoint and code": f"TODO: the address of {submission.name}.pt and of your code",
    }
    return _TEMPLATE.format(
        name=submission.name,
        claim="\n".join(f"- **{title}**: {value}" for title, value in fields.items()),
        included="x" if form.is_known else " ",
        entry=entry(submission).rstrip(),
    )


_TEMPLATE = """\
<!-- title of the issue: [New Model] {name} -->

# Paper Information

- **Paper Title**: TODO
- **Paper URL**: TODO
- **Paper authors**: TODO

# Leaderboard Claim(s)

## Model 1

{claim}

# Model Zoo:

- [ ] I want to add my models to the Model Zoo (check if true)
- [{included}] I use an architecture that is included among those of RobustBench's model zoo, in
  torchvision or in `timm`. If not, I added the link to the architecture implementation.
- [ ] I agree to release my model(s) under MIT license (check if true) **OR** under a custom
  license, located here: TODO

The entry for the Model Zoo:

```python
{entry}
```
"""
