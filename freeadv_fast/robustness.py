"""Clean accuracy of a finished run on corrupted and shifted images, none of them attacked.

ImageNet-C (Hendrycks and Dietterich 2019), ImageNet-R (Hendrycks et al. 2021), Stylized-ImageNet
(Geirhos et al. 2019), and eight corruptions made on the fly. Each set leaves a JSON file beside
the run's result as soon as it is done.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from freeadv_fast.config import CPU_EVAL_IMAGES, TrainConfig
from freeadv_fast.config_file import load_config
from freeadv_fast.corruptions import CORRUPTIONS, SEVERITIES, CorruptedLoader
from freeadv_fast.data import Loader, build_folder_loader, build_val_loader
from freeadv_fast.data.folder import FolderLoader
from freeadv_fast.data.index import shortened
from freeadv_fast.distributed import World, join_world, leave_world
from freeadv_fast.environment import versions
from freeadv_fast.errors import UserError
from freeadv_fast.evaluate import Evaluation, evaluate
from freeadv_fast.imagenet_c import (
    ALEXNET_ERROR,
    IMAGENET_C,
    CorruptionErrors,
    alexnet_normalized,
    describe_gaps,
    describe_means,
    find_corruptions,
    find_gaps,
    subfolders,
)
from freeadv_fast.report import corruption_table, plot_corruptions
from freeadv_fast.runlog import write_json
from freeadv_fast.saved_run import SavedRun, load_run

ON_THE_FLY = {
    group: tuple(name for name, corruption in CORRUPTIONS.items() if corruption.group == group)
    for group in IMAGENET_C
}

NOT_PUBLISHED = "on-the-fly, not ImageNet-C; do not compare with published numbers"


@dataclasses.dataclass(frozen=True)
class Robustness:
    """What `evaluate_robustness` measured; None for a set that was not asked for."""

    imagenet_c: CorruptionErrors | None = None
    imagenet_r: Evaluation | None = None
    stylized: Evaluation | None = None
    on_the_fly: CorruptionErrors | None = None


def evaluate_robustness(
    run_folder: str | Path,
    *,
    imagenet_c: str | Path | None = None,
    imagenet_r: str | Path | None = None,
    stylized: str | Path | None = None,
    on_the_fly: bool = False,
    num_images: int | None = None,
    data: str | None = None,
    checkpoint: str = "best",
) -> Robustness:
    """Evaluates a run's network on corrupted and shifted sets.

    Prints a table and writes ``robustness-*.json`` and ``plots/robustness-*.png`` for each set.
    Under torchrun every rank calls this.

    Args:
        run_folder: The run's output folder.
        imagenet_c: Folder of ImageNet-C: CORRUPTION/SEVERITY/CLASS/, with or without the groups
            of its archives (noise/, blur/, ...) around.
        imagenet_r: Folder of CLASS/, classes among the run's: logits are restricted to them.
        stylized: Folder of CLASS/ or val/CLASS/, classes among the run's: all logits compete.
        on_the_fly: Corrupt the run's own validation images in memory.
        num_images: Images of each set, or of each corruption and severity, evenly spaced. Default:
            all; 400 without a GPU.
        data: Validation images to corrupt, as `--data`; the run's own by default.
        checkpoint: ``best``, ``last`` or a path.

    Returns:
        The same numbers on every rank.

    Raises:
        UserError: nothing asked for, no such run, checkpoint or folder, or classes that the
            network does not know.
    """
    if not (imagenet_c or imagenet_r or stylized or on_the_fly):
        raise UserError(
            "nothing to evaluate on: give --imagenet-c FOLDER, --imagenet-r FOLDER, "
            "--stylized FOLDER or --on-the-fly"
        )
    if num_images is not None and num_images < 1:
        raise UserError(f"--eval-images {num_images}: must be at least 1")
    world = join_world()
    try:
        run = load_run(run_folder, checkpoint)
        # Every folder is looked at before the first is evaluated, which can take hours.
        corruptions = world.together(
            lambda: _look_at_folders(run.classes, imagenet_c, imagenet_r, stylized)
        )
        trial = _Trial(run, world, _limited(num_images, world))
        measured = Robustness(
            imagenet_c=_imagenet_c(trial, str(imagenet_c), corruptions) if imagenet_c else None,
            imagenet_r=_imagenet_r(trial, Path(imagenet_r)) if imagenet_r else None,
            stylized=_stylized(trial, _stylized_classes(stylized)) if stylized else None,
            on_the_fly=_on_the_fly(trial, data) if on_the_fly else None,
        )
        world.barrier()
        return measured
    finally:
        leave_world()


def _limited(num_images: int | None, world: World) -> int | None:
    """The number of images; 400 on a machine without a GPU where the user chose none."""
    if num_images is not None or world.device.type == "cuda":
        return num_images
    if world.is_main:
        print(
            f"no GPU: at most {CPU_EVAL_IMAGES} images of each set, corruption and severity; "
            "--eval-images chooses another number",
            flush=True,
        )
    return CPU_EVAL_IMAGES


def _look_at_folders(
    known: Sequence[str],
    imagenet_c: str | Path | None,
    imagenet_r: str | Path | None,
    stylized: str | Path | None,
) -> dict[str, dict[int, Path]]:
    """Finds ImageNet-C's folders and checks that the network knows the classes of all sets.

    Returns:
        What `find_corruptions` does; empty without ImageNet-C.

    Raises:
        UserError: missing or empty folder, or unknown classes.
    """
    corruptions = find_corruptions(Path(imagenet_c)) if imagenet_c is not None else {}
    for folders in corruptions.values():
        for folder in folders.values():
            _check_classes("--imagenet-c", folder, known)
    if imagenet_r is not None:
        _check_classes("--imagenet-r", Path(imagenet_r), known)
    if stylized is not None:
        _check_classes("--stylized", _stylized_classes(stylized), known)
    return corruptions


def _stylized_classes(root: str | Path) -> Path:
    """Where the class folders of Stylized-ImageNet's validation images are."""
    val = Path(root) / "val"
    return val if val.is_dir() else Path(root)


def _check_classes(flag: str, folder: Path, known: Sequence[str]) -> None:
    """Raises UserError where a folder holds no classes, or some that the network does not know."""
    classes = [entry.name for entry in subfolders(flag, folder)]
    if not classes:
        raise UserError(f"{flag} {folder}: no class folders in it; it must hold one a class")
    _refuse_unknown(f"{flag} {folder}", classes, known)


def _refuse_unknown(what: str, classes: Sequence[str], known: Sequence[str]) -> None:
    """Raises UserError where some of the classes are none of the network's."""
    unknown = sorted(set(classes) - set(known))
    if unknown:
        raise UserError(
            f"{what}: {len(unknown)} of its {len(classes)} classes are none of the {len(known)} "
            f"that the network was trained on: {shortened(unknown)}; leave them out, or evaluate "
            "a network that knows them"
        )


class SelectedLogits(nn.Module):
    """A network of which some outputs are kept, in a given order.

    Attributes:
        columns: (k,) int64 buffer: output j is the network's output columns[j].
    """

    columns: Tensor

    def __init__(self, network: nn.Module, columns: Sequence[int]) -> None:
        """Keeps `columns` of `network`, which is shared, not copied."""
        super().__init__()
        self.network = network
        self.register_buffer("columns", torch.tensor(columns))

    def forward(self, images: Tensor) -> Tensor:
        """What the network takes to (N, k) logits."""
        logits: Tensor = self.network(images)[:, self.columns]
        return logits


@dataclasses.dataclass(frozen=True)
class _Trial:
    """A run's network and how much of each set it sees.

    Attributes:
        run: The run.
        world: The ranks.
        num_images: Images of a set, or of a corruption and severity; None for all.
    """

    run: SavedRun
    world: World
    num_images: int | None

    def folder_loader(self, folder: Path, config: TrainConfig) -> FolderLoader:
        """Opens a folder on every rank.

        Raises:
            UserError: on every rank, where one cannot read it.
        """
        return self.world.together(
            lambda: build_folder_loader(folder, config, self.world, self.num_images)
        )

    def measure(self, loader: Loader, label: str, *, is_restricted: bool = False) -> Evaluation:
        """Accuracy on clean images whose classes are some of the network's, in any order.

        Args:
            loader: This rank's share of the images.
            label: Text before the progress bar.
            is_restricted: Only the logits of the loader's classes compete.
        """
        column = {name: index for index, name in enumerate(self.run.classes)}
        own = [column[name] for name in loader.classes]
        others = [] if is_restricted else sorted(set(column.values()) - set(own))
        model = self.run.model.to(self.world.device)
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        config = self.run.config
        return evaluate(
            SelectedLogits(model, own + others),
            loader,
            (),
            config.evaluation_threat,
            world=self.world,
            mean=config.pixel_mean,
            std=config.pixel_std,
            label=label,
        )


def _already_cut(config: TrainConfig) -> TrainConfig:
    """The preprocessing of sets whose files were resized and cut to 224 pixels by their authors.

    Resizing them to 256 and cutting 224 out again loses the border and measures something else
    (RobustBench, issue 59).
    """
    return dataclasses.replace(config, resize_size=config.image_size)


def _imagenet_c(
    trial: _Trial, root: str, corruptions: Mapping[str, Mapping[int, Path]]
) -> CorruptionErrors:
    """Evaluates what there is of ImageNet-C, writes and prints it."""
    config = _already_cut(trial.run.config)
    errors: dict[str, dict[int, float]] = {}
    contents: dict[str, dict[int, tuple[int, int]]] = {}
    unreadable: list[str] = []
    num_images, seconds = 0, 0.0
    for name, folders in corruptions.items():
        for severity, folder in folders.items():
            try:
                loader = trial.folder_loader(folder, config)
            except UserError as error:
                unreadable.append(f"{name} {severity} ({str(error).removeprefix('--data: ')})")
                continue
            measured = trial.measure(loader, f"{name} {severity}/{SEVERITIES[-1]}")
            errors.setdefault(name, {})[severity] = 1 - measured.clean_accuracy
            contents.setdefault(name, {})[severity] = len(loader.classes), len(loader.index.files)
            del loader
            gc.collect()  # a decoder is a ring of references and holds threads and buffers
            num_images, seconds = max(num_images, measured.num_images), seconds + measured.seconds
    if not errors:
        raise UserError(f"--imagenet-c {root}: unreadable: {shortened(unreadable)}")
    gaps = find_gaps(contents, len(trial.run.classes))
    result = CorruptionErrors(
        errors=errors,
        averaged=tuple(name for name in errors if name in ALEXNET_ERROR and name not in gaps),
        num_in_full_mean=len(ALEXNET_ERROR),
        num_images=num_images,
        seconds=seconds,
        remarks=describe_gaps(errors, gaps, unreadable, len(trial.run.classes)),
    )
    if trial.world.is_main:
        _report_imagenet_c(trial, result, root)
    return result


def _imagenet_r(trial: _Trial, folder: Path) -> Evaluation:
    """Evaluates ImageNet-R as its authors do: only the logits of its classes compete.

    Source: github.com/hendrycks/imagenet-r, eval.py, ``net(data)[:, imagenet_r_mask]``.
    """
    loader = trial.folder_loader(folder, trial.run.config)
    measured = trial.measure(loader, "ImageNet-R", is_restricted=True)
    _report_shift(trial, "ImageNet-R", folder, measured, len(loader.classes), len(loader.classes))
    return measured


def _stylized(trial: _Trial, folder: Path) -> Evaluation:
    """Evaluates Stylized-ImageNet; all logits compete.

    Its files are cut to 224 pixels, as ImageNet-C's (its preprocess_imagenet.py: CenterCrop(224)).
    """
    loader = trial.folder_loader(folder, _already_cut(trial.run.config))
    measured = trial.measure(loader, "Stylized-ImageNet")
    known = len(trial.run.classes)
    _report_shift(trial, "Stylized-ImageNet", folder, measured, len(loader.classes), known)
    return measured


def _on_the_fly(trial: _Trial, data: str | None) -> CorruptionErrors:
    """Corrupts validation images in memory and evaluates them."""
    config = dataclasses.replace(trial.run.config, data=data or trial.run.config.data)
    loader = trial.world.together(lambda: build_val_loader(config, trial.world, trial.num_images))
    _refuse_unknown(f"--data {config.data}", loader.classes, trial.run.classes)
    clean = trial.measure(loader, "no corruption")
    errors: dict[str, dict[int, float]] = {name: {} for name in CORRUPTIONS}
    seconds = clean.seconds
    for name, row in errors.items():
        for severity in SEVERITIES:
            corrupted = CorruptedLoader(loader, name, severity, config.seed)
            measured = trial.measure(corrupted, f"{name} {severity}/{SEVERITIES[-1]}")
            row[severity] = 1 - measured.clean_accuracy
            seconds += measured.seconds
    result = CorruptionErrors(
        errors=errors,
        averaged=tuple(CORRUPTIONS),
        num_in_full_mean=len(CORRUPTIONS),
        num_images=clean.num_images,
        seconds=seconds,
        remarks=(NOT_PUBLISHED,),
        clean_error=1 - clean.clean_accuracy,
    )
    if trial.world.is_main:
        _report_on_the_fly(trial, result, config.data)
    return result


def _report_imagenet_c(trial: _Trial, measured: CorruptionErrors, folder: str) -> None:
    """Prints ImageNet-C's table and means, writes them and the chart."""
    means, lines = describe_means(measured)
    normalized = alexnet_normalized(measured)
    record = {"folder": folder, **means, "alexnet_normalized_errors": normalized}
    stem = _file_stem(trial, "imagenet-c", folder)
    title = f"{trial.run.folder.root.name} on ImageNet-C"
    _report_corruptions(trial, stem, title, IMAGENET_C, measured, record, normalized, lines)


def _report_on_the_fly(trial: _Trial, measured: CorruptionErrors, data: str) -> None:
    """Prints the table of the corruptions made here, writes it and the chart."""
    lines = [
        f"error without corruption: {measured.clean_error:.1%}",
        f"mean error, unnormalised: {measured.mean_error:.1%}",
    ]
    record = {
        "dataset": data,
        "clean_error": measured.clean_error,
        "on_the_fly_mean_error_unnormalized": measured.mean_error,
    }
    own = load_config(trial.run.folder.config).data
    stem = _file_stem(trial, "on-the-fly", "" if data == own else data)
    title = f"{trial.run.folder.root.name} on corruptions made on the fly"
    _report_corruptions(trial, stem, title, ON_THE_FLY, measured, record, None, lines)


def _report_corruptions(
    trial: _Trial,
    stem: str,
    title: str,
    groups: Mapping[str, Sequence[str]],
    measured: CorruptionErrors,
    record: dict[str, Any],
    normalized: Mapping[str, float] | None,
    lines: Sequence[str],
) -> None:
    """Writes JSON and chart under `stem`, prints the table and the lines below it."""
    record |= {
        "corruptions_in_mean": measured.averaged,
        "corruption_errors": measured.corruption_errors,
        "errors": measured.errors,
        "remarks": measured.remarks,
    }
    title += f", {measured.num_images:,} images a severity"
    path = _write(trial, stem, record, measured.num_images, measured.seconds)
    plots = trial.run.folder.plots
    plots.mkdir(exist_ok=True)
    drawn = {
        group: {name: measured.errors[name] for name in names if name in measured.errors}
        for group, names in groups.items()
    }
    references = {"mean": measured.mean_error, "no corruption": measured.clean_error}
    starred = set(measured.errors) - set(measured.averaged)
    notes = ["* not in the mean"] if starred else []
    if not measured.is_full:
        count = f"{len(measured.averaged)} of {measured.num_in_full_mean}"
        notes.append(f"mean over {count} corruptions, not the published one")
    if NOT_PUBLISHED in measured.remarks:
        notes.append(NOT_PUBLISHED)
    plot_corruptions(
        {group: errors for group, errors in drawn.items() if errors},
        plots / f"{stem}.png",
        title=title,
        references={text: error for text, error in references.items() if error is not None},
        starred=starred,
        footnote="; ".join(notes),
    )
    table = corruption_table(measured.errors, normalized)
    print(f"{title}\n\n{table}\n", *measured.remarks, *lines, sep="\n")
    print(f"wrote {path} and {plots / stem}.png", flush=True)


def _report_shift(
    trial: _Trial,
    name: str,
    folder: Path,
    measured: Evaluation,
    num_classes: int,
    num_competing: int,
) -> None:
    """Prints and writes the accuracy on a set that is shifted as a whole.

    Args:
        trial: Gives run and ranks.
        name: The set's.
        folder: Where it lies.
        measured: Its accuracy.
        num_classes: Classes of its images.
        num_competing: Logits that an answer is the largest of.
    """
    if not trial.world.is_main:
        return
    record = {
        "folder": str(folder),
        "accuracy": measured.clean_accuracy,
        "num_classes": num_classes,
        "num_competing_logits": num_competing,
    }
    stem = _file_stem(trial, name.lower(), str(folder))
    path = _write(trial, stem, record, measured.num_images, measured.seconds)
    print(
        f"{name}: accuracy {measured.clean_accuracy:.1%} on {measured.num_images:,} images of "
        f"{num_classes:,} of the network's {len(trial.run.classes):,} classes; "
        f"the answer is the largest of {num_competing:,} logits\nwrote {path}",
        flush=True,
    )


def _file_stem(trial: _Trial, name: str, source: str) -> str:
    """A name that says set, weights and number, and tells other images and weights apart.

    Args:
        trial: Gives weights and number.
        name: The set's.
        source: Where the images are from; empty for the run's own.
    """
    checkpoint = trial.run.checkpoint
    count = "all" if trial.num_images is None else trial.num_images
    stem = f"robustness-{checkpoint.stem}-{name}-n{count}"
    is_foreign = checkpoint.parent != trial.run.folder.checkpoints
    origin = [str(Path(source).resolve())] * bool(source) + [str(checkpoint.resolve())] * is_foreign
    if origin:
        stem += f"-{hashlib.sha256(' '.join(origin).encode()).hexdigest()[:8]}"
    return stem


def _write(
    trial: _Trial, stem: str, record: Mapping[str, Any], num_images: int, seconds: float
) -> Path:
    """Writes a set's record, with what it was measured on, beside the run's result."""
    config = trial.run.config
    path = trial.run.folder.root / f"{stem}.json"
    common = {
        "run": trial.run.folder.root.name,
        "checkpoint": trial.run.checkpoint.name,
        "method": config.method,
        "arch": config.arch,
        "image_size": config.image_size,
        "num_eval_images": num_images,
        "seconds": round(seconds, 3),
        "seed": config.seed,
        "versions": versions(),
    }
    write_json(path, common | dict(record))
    return path
