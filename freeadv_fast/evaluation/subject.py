"""What users have evaluated: a saved run, under other attacks or on other images, or a network.

What a network may be, and how it is read, is in `candidate`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from freeadv_fast.config.attack import Attack, doubt_about_steps, parsed
from freeadv_fast.config.choices import Norm
from freeadv_fast.config.file import load_config, remarks_on
from freeadv_fast.config.phases import Phases
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.task_fields import has_boxes
from freeadv_fast.config.threat import Perturbation
from freeadv_fast.data.loader import Loader
from freeadv_fast.data.preprocessing import find_preprocessing
from freeadv_fast.data.view import View, read_image_list
from freeadv_fast.distributed.world import World, joined_world
from freeadv_fast.errors import UserError
from freeadv_fast.evaluation.asked import (
    NETWORK_ATTACKS,
    Asked,
    config_for,
    limit_without_gpu,
    made_folder,
    names_of,
    refuse_still_attacks,
    scale_step,
)
from freeadv_fast.evaluation.autoattack.ledger import forget
from freeadv_fast.evaluation.candidate import (
    Candidate,
    find_candidate,
    refuse_different_networks,
    refuse_unread,
)
from freeadv_fast.evaluation.detection.corruptions import listed_names
from freeadv_fast.evaluation.detection.evaluate import DetectionEvaluation
from freeadv_fast.evaluation.detection.run import evaluate_run, refuse_unfit
from freeadv_fast.evaluation.evaluate import Evaluation, eval_mode
from freeadv_fast.evaluation.evaluate import evaluate as measure
from freeadv_fast.evaluation.images import open_val, other_classes, whole_val_loader
from freeadv_fast.evaluation.written import print_accuracies, write_evaluation
from freeadv_fast.models.own import check_logits, refuse_probabilities
from freeadv_fast.runs.saved import SavedRun, is_run, load_run

NOT_CORRUPTED = "is for detectors; launch/robustness.py corrupts a classifier's images"


def evaluate(
    subject: str | Path | SavedRun | nn.Module,
    *,
    data: str | None = None,
    attacks: Sequence[Attack | str] | str | None = None,
    eps: Perturbation | str | float | None = None,
    step: Perturbation | str | float | None = None,
    num_images: int | None = None,
    checkpoint: str = "last",
    model: nn.Module | None = None,
    norm: Norm | None = None,
    image_size: int | None = None,
    arch: str | None = None,
    mean: Sequence[float] | str | None = None,
    std: Sequence[float] | str | None = None,
    preprocessing: str | None = None,
    image_list: str | Path | None = None,
    output_dir: str | Path | None = None,
    corruptions: Sequence[str] | str | None = None,
) -> Evaluation | DetectionEvaluation:
    """Measures clean accuracy and the accuracy under each attack, and prints a table.

    Of a run that trained a detector it measures average precision, and that under corruption too.

    Of a run, and of an export in a run's folder, it also writes ``evaluation-*.json`` beside the
    run's result, which it never touches; of anything else where `output_dir` says so. fp32 without
    TF32, in eval mode. Under torchrun every rank calls this. The clean accuracy is over all
    validation images, however few are attacked; without a GPU only those of at most 64 pixels a
    side are all read, of larger ones the attacked. A detector's precision is over the attacked.

    Args:
        subject: A run's folder, what `load_run` returned, an export's folder, a file of weights
            (anybody's, read without running code), ``module:function`` that builds a network, or
            any network of (n, 3, H, W) float32 pixels in [0, 1] to (n, classes) logits; a network
            is left in its mode, on the device of the evaluation.
        data: Validation images, as `--data`: ``/imagenet``, ``cifar10:FOLDER``, ``digits``.
            Default: the run's own; anything else needs it.
        attacks: Such as ``["pgd-50", "cw-50"]`` or ``"pgd-50,cw-50"``; by default the run's own,
            and PGD-50 of a network. Without a GPU the default is at most PGD-20 on at most 400
            images.
        eps: Radius, such as ``"4/255"`` or ``4 / 255``; the run's own by default; anything else
            needs it.
        step: Step of the attacks; by default the run's own in proportion to `eps`, and eps / 4 for
            a network.
        num_images: Validation images to attack, evenly spaced; by default as the run, or all. A
            detector is evaluated on these alone.
        checkpoint: Of a run's folder: ``last`` (the run's result), ``best`` (by held-out images)
            or a path.
        model: Your own network where the run trained one, as for `load_run`; or the one that a file
            of weights belongs to, in place of `arch`.
        norm: Of the ball of what is no run, ``linf`` or ``l2``. Default: that in which the run was
            trained of which it is an export, in its folder, or a checkpoint; else linf.
        image_size: Side of the images that a network takes, in pixels. Default: an export's own, 32
            for CIFAR, SVHN and digits, 224 for folders.
        arch: The network whose weights a file holds, by its name in torchvision, timm or here.
        mean: Per-channel mean that normalises the input of a file's network, as ``"0.5,0.5,0.5"``
            or three numbers in [0, 1], where the file does not hold it. Default: the library's for
            a folder of images, CIFAR's for CIFAR. std: Likewise what divides, above 0.
        preprocessing: Of a folder's images, by RobustBench's names: ``Res256Crop224``,
            ``BicubicRes256Crop224``, ``Crop288``, ``Res224`` or ``none``; read by PIL, as there.
            Default: the run's or export's, and resize by 256/224 and a central crop.
        image_list: File that lists the images to take, CLASS/FILE a line, such as RobustBench's
            imagenet_test_image_ids.txt. Default: all.
        output_dir: Folder of ``evaluation-*.json``. Default: the run's; none without a run.
        corruptions: Of a detector: ``"all"`` for the 15 of COCO-C at five severities, or such as
            ``"fog,snow-3"`` (one severity). Default: none.

    Returns:
        The accuracies or the average precisions, fractions.

    Raises:
        UserError: no such subject, checkpoint or data, a bad attack, data of other classes, or a
            flag that the subject does not read; a `ValueError` with one line.
    """
    chosen: dict[str, Any] = {
        "data": data,
        "eval_attacks": None if attacks is None else names_of(attacks),
        "eps": None if eps is None else Perturbation.parse(eps),
        "eval_step": None if step is None else Perturbation.parse(step, "--step"),
        "eval_images": num_images,
        "eval_corruptions": None if corruptions is None else listed_names(corruptions),
    }
    refuse_still_attacks(chosen)
    if preprocessing is not None:
        find_preprocessing(preprocessing)
    of_a_file: dict[str, Any] = {"arch": arch, "mean": mean, "std": std}
    with joined_world() as world:
        listed = folder = None
        if image_list is not None:
            listed = world.on_main(lambda: read_image_list(image_list))
        if output_dir is not None:  # made now: an attack may take hours
            folder = world.on_main(lambda: made_folder(Path(output_dir)))
        asked = Asked(chosen, View(preprocessing, listed), folder)
        if isinstance(subject, str | Path):
            place = subject
            if world.on_main(lambda: is_run(place)):
                subject = world.together(lambda: load_run(place, checkpoint, model=model))
        if isinstance(subject, SavedRun):
            of_others = of_a_file | {"norm": norm, "image_size": image_size}
            refuse_unread(of_others, "a run's config says it")
            return _evaluate_run(subject, asked, world)
        refuse_unread({"corruptions": chosen["eval_corruptions"]}, NOT_CORRUPTED)
        refuse_unread(
            {"checkpoint": None if checkpoint == "last" else checkpoint}, "the subject is no run"
        )
        for flag, example in (("data", "cifar10:FOLDER"), ("eps", "8/255")):
            if chosen[flag] is None:
                raise UserError(
                    f"--{flag}: evaluating anything but a run needs it, such as --{flag} {example}"
                )
        candidate = world.together(
            lambda: find_candidate(subject, data=chosen["data"], model=model, **of_a_file)
        )
        return _evaluate_candidate(candidate, asked, image_size, norm, world)


def _evaluate_run(run: SavedRun, asked: Asked, world: World) -> Evaluation | DetectionEvaluation:
    """`evaluate` of a run, with what the user chose instead of the run's own."""
    chosen, view = dict(asked.chosen), asked.view
    is_detector = run.config.task == "detection"
    if is_detector:
        unread = {"image_list": view.image_list, "preprocessing": view.preprocessing}
        refuse_unread(unread, "a detector sees whole images, those of its annotations")
        refuse_unfit(run.config, chosen)
        chosen["eval_corruptions"] = chosen["eval_corruptions"] or ()  # the run's may take hours
    else:
        refuse_unread({"corruptions": chosen["eval_corruptions"]}, NOT_CORRUPTED)
    if world.is_main and chosen["eval_step"] is None:
        for line in remarks_on(run.folder.config):
            print(line, flush=True)
    if world.device.type != "cuda" and run.config.eval_images is None:
        doing = "evaluating on" if is_detector else "attacking"
        limit_without_gpu(chosen, run.config.eval_attacks, world, view, doing)
    scale_step(chosen, run.config, world)
    if view.image_list is not None and chosen["eval_images"] is None:
        run = dataclasses.replace(run, config=dataclasses.replace(run.config, eval_images=None))
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if view.way is not None:  # what is seen is neither a phase's nor resized as the config says
        side = view.way.image_size or run.config.image_size
        chosen |= {"image_size": side, "resize_size": 0, "phases": Phases(), "phase_data": ()}
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, **chosen))
    folder = asked.output_dir or run.folder.root
    if is_detector:
        return evaluate_run(run, folder, *_subject_of(run, folder), world)
    measured = _measure(run, asked, world)
    if world.is_main:
        title = f"{run.folder.root.name}, {run.weights}"
        path = _write_run(run, asked, measured)
        forget(measured.ledgers)
        print_accuracies(title, run.config, measured, view)
        print(f"wrote {path}", flush=True)
    world.barrier()
    return measured


def _evaluate_candidate(
    candidate: Candidate, asked: Asked, image_size: int | None, norm: Norm | None, world: World
) -> Evaluation:
    """`evaluate` of a network that no run of ours describes."""
    chosen, view = dict(asked.chosen), asked.view
    if has_boxes(chosen["data"]):
        raise UserError(
            f"--data {chosen['data']}: images with boxes, on which only the run of a detector is "
            "evaluated; name its folder, or a classifier's images"
        )
    if world.device.type != "cuda":
        limit_without_gpu(chosen, NETWORK_ATTACKS, world, view)
    config = config_for(candidate, chosen, image_size, norm, view)
    loader = open_val(config, world, config.eval_images, view)
    if candidate.classes is not None and loader.classes != candidate.classes:
        raise UserError(other_classes(config.data, loader, len(candidate.classes)))
    network = world.together(lambda: candidate.build(len(loader.classes), config.image_size))
    if candidate.is_loaded:
        refuse_different_networks(network, candidate.title, world)
    if world.is_main and candidate.lines:
        print("\n".join(candidate.lines), flush=True)
    network.to(world.device)
    with eval_mode(network):
        _check_outputs(network, candidate.title, len(loader.classes), config.image_size, world)
    folder = asked.output_dir or candidate.run_folder
    measured = _measure_on(network, loader, config, view, world, folder)
    if world.is_main:
        if folder is not None:
            path = _write_candidate(candidate, folder, config, view, measured)
            forget(measured.ledgers)
        print_accuracies(candidate.title, config, measured, view)
        if folder is not None:
            print(f"wrote {path}", flush=True)
    world.barrier()
    return measured


def _check_outputs(
    network: nn.Module, title: str, num_classes: int, image_size: int, world: World
) -> None:
    """Refuses a network whose outputs for a few images are no logits.

    Raises:
        UserError: they are of another shape or type, or probabilities.
    """
    check_logits(network, title, num_classes, image_size, world.device)
    noise = torch.rand((8, 3, image_size, image_size), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        refuse_probabilities(network(noise.to(world.device)), f"model {title}")


def _measure(run: SavedRun, asked: Asked, world: World) -> Evaluation:
    """Evaluates the run's network as its config says."""
    config, view = run.config, asked.view
    loader = open_val(config, world, config.eval_images, view)
    if loader.classes != run.classes:
        raise UserError(other_classes(config.data, loader, len(run.classes)))
    model = run.model.to(world.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if view.way is not None:
        with eval_mode(model):
            check_logits(model, config.arch, len(run.classes), config.image_size, world.device)
    folder = asked.output_dir or run.folder.root
    return _measure_on(model, loader, config, view, world, folder)


def _measure_on(
    model: nn.Module,
    loader: Loader,
    config: TrainConfig,
    view: View,
    world: World,
    folder: Path | None,
) -> Evaluation:
    """Evaluates a network of the config's normalised images; `folder` keeps AutoAttack's log."""
    if world.is_main:
        attacks = parsed(config.eval_attacks)
        for line in doubt_about_steps(attacks, config.evaluation_threat, "--step"):
            print(line, flush=True)
    return measure(
        model,
        loader,
        config.eval_attacks,
        config.evaluation_threat,
        world=world,
        mean=config.pixel_mean,
        std=config.pixel_std,
        clean_loader=world.together(lambda: whole_val_loader(config, world, view)),
        seed=config.seed,
        folder=folder,
    )


def _write_run(run: SavedRun, asked: Asked, measured: Evaluation) -> Path:
    """Writes a run's evaluation."""
    folder = asked.output_dir or run.folder.root
    subject, origin = _subject_of(run, folder)
    stem = Path(run.weights).stem
    return write_evaluation(
        folder, subject, run.config, asked.view, measured, stem=stem, origin=origin
    )


def _subject_of(run: SavedRun, folder: Path) -> tuple[dict[str, Any], str | None]:
    """What a run's evaluation is of: its record's first entries, and where that is from.

    The latter is None of the run's own images and weights. Others get a name of their own, and so
    does all that is written elsewhere, where another run of the same name may be written too.
    """
    config = run.config
    is_own = (
        run.is_own
        and config.data == load_config(run.folder.config).data
        and folder.resolve() == run.folder.root.resolve()
    )
    subject = {
        "run": run.folder.root.name,
        "checkpoint": run.weights,
        "method": config.method,
        "dataset": config.data,
        "arch": config.arch,
    }
    return subject, None if is_own else f"{config.data} {run.checkpoint.resolve()}"


def _write_candidate(
    candidate: Candidate, folder: Path, config: TrainConfig, view: View, measured: Evaluation
) -> Path:
    """Writes the evaluation of anything else."""
    mean, std = (part and list(part) for part in (candidate.mean, candidate.std))
    network = f"{candidate.title} {candidate.origin} {mean} {std}"
    return write_evaluation(
        folder,
        {
            "subject": candidate.title,
            "checkpoint": candidate.title,
            "dataset": config.data,
            "mean": mean,
            "std": std,
        },
        config,
        view,
        measured,
        stem=re.sub(r"[^\w.-]+", "-", candidate.title).strip("-"),
        origin=f"{network} {config.data} {config.image_size} {config.norm}",
    )
