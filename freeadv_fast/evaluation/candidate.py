"""Networks that no run's folder describes: exports, files of weights, functions, modules."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import nn

from freeadv_fast.config.choices import Norm
from freeadv_fast.config.file import CONFIG_NAME, load_config
from freeadv_fast.distributed.world import World
from freeadv_fast.errors import UserError
from freeadv_fast.evaluation.weights_file import (
    WeightsFile,
    normalization_of,
    normalized_network,
    read_statistics,
    read_weights_file,
)
from freeadv_fast.models.digest import digest_weights
from freeadv_fast.models.own import first_line
from freeadv_fast.runs.export.network import CONFIG, load_export

FUNCTION = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A network of pixels in [0, 1], as far as it is known without images.

    Attributes:
        title: What it is called in the table.
        build: From the number of classes, and the side of the images in pixels, to the network.
        lines: What the user should know, a line each.
        classes: Their names in the order of the logits, where something says them.
        image_size: Side of the images in pixels, where something says it. resize_size: Shorter side
            before the central crop, likewise.
        norm: Of the ball that it was trained within, likewise.
        run_folder: The run that it is of; evaluations are written there.
        origin: Where it is from, which tells it from another one of the same title.
        mean: Per channel, what its normaliser subtracts from pixels, where one is known. std: What
            divides them.
        is_loaded: Whether every rank has loaded it by itself.
    """

    title: str
    build: Callable[[int, int], nn.Module]
    lines: Sequence[str] = ()
    classes: list[str] | None = None
    image_size: int | None = None
    resize_size: int | None = None
    norm: Norm | None = None
    run_folder: Path | None = None
    origin: str = ""
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    is_loaded: bool = True


def find_candidate(
    subject: str | Path | nn.Module,
    *,
    data: str,
    arch: str | None,
    mean: Sequence[float] | str | None,
    std: Sequence[float] | str | None,
    model: nn.Module | None,
) -> Candidate:
    """Finds out what a subject is that is no run, and reads it as far as that needs no images.

    Args:
        subject: An export's folder, a file of weights, ``module:function``, or a network.
        data: What the network will be evaluated on.
        arch: The network's name, for a file of weights.
        mean: Per-channel mean that normalises the input of a file's network. std: Likewise.
        model: The user's own module, for an export of it or for a file of its weights.

    Raises:
        UserError: it is none of these, cannot be read, or flags do not fit it.
    """
    of_a_file = {"arch": arch, "mean": mean, "std": std}
    if isinstance(subject, nn.Module):
        refuse_unread(of_a_file, "a network of pixels was handed over")
        return Candidate(type(subject).__name__, lambda *_: subject, is_loaded=False)
    path = Path(subject).expanduser()
    if path.is_dir():
        refuse_unread(of_a_file, f"{subject} is a folder, which says it itself")
        return export_candidate(path, model)
    if path.is_file():
        file = read_weights_file(path, arch, model)
        return file_candidate(file, read_statistics(mean, std), data)
    if (named := FUNCTION.fullmatch(str(subject))) is not None:
        refuse_unread(of_a_file, f"{subject} builds the network, of pixels in [0, 1]")
        built = call_builder(*named.groups())
        return Candidate(str(subject), lambda *_: built)
    raise UserError(
        f"SUBJECT {subject}: no such run's folder, export or file of weights; and no "
        "module:function either"
    )


def refuse_unread(flags: Mapping[str, object], why: str) -> None:
    """Refuses flags that a subject does not read.

    Raises:
        UserError: one of them was given.
    """
    for name, value in flags.items():
        if value is not None:
            raise UserError(f"--{name.replace('_', '-')}: {why}; leave it out")


def export_candidate(folder: Path, model: nn.Module | None) -> Candidate:
    """An export's network; evaluations of one in a run's folder are the run's.

    Raises:
        UserError: the folder holds neither a run nor an export.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"SUBJECT {folder}: neither a run's folder, which has {CONFIG_NAME}, nor an export, "
            f"which has {CONFIG}"
        )
    network = load_export(folder, model=model)
    described = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    parent = folder.resolve().parent
    is_runs = (parent / CONFIG_NAME).is_file()
    return Candidate(
        f"{parent.name}/{folder.resolve().name}",
        lambda *_: network,
        classes=described["class_names"],
        image_size=described["image_size"],
        resize_size=described["resize_size"],
        norm=load_config(parent / CONFIG_NAME).norm if is_runs else None,
        run_folder=parent if is_runs else None,
        origin=str(folder.resolve()),
        mean=described["mean"],
        std=described["std"],
    )


def file_candidate(
    file: WeightsFile, typed: tuple[Sequence[float], Sequence[float]] | None, data: str
) -> Candidate:
    """The network of a file of weights.

    Raises:
        UserError: nothing says what normalises its input.
    """
    normalization, lines = normalization_of(file, typed, data)
    return Candidate(
        file.title,
        lambda num_classes, image_size: normalized_network(
            file.build(num_classes, image_size, data), normalization
        ),
        lines,
        classes=file.state["classes"] if file.config is not None else None,
        image_size=file.image_size,
        resize_size=file.config.evaluation_resize if file.config is not None else None,
        norm=file.config.norm if file.config is not None else None,
        origin=str(file.path.resolve()),
        mean=normalization.mean,
        std=normalization.std,
    )


def call_builder(module: str, function: str) -> nn.Module:
    """Calls a function of the user's without arguments; it builds a network.

    Args:
        module: Installed, or in the working directory. function: Its name there.

    Raises:
        UserError: no such module or function, what it raised, or what it returned is no network.
    """
    origin = f"SUBJECT {module}:{function}"
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        imported = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's own code raises
        kind = type(error).__name__
        raise UserError(
            f"{origin}: {module} cannot be imported ({kind}: {first_line(error)})"
        ) from None
    builder = getattr(imported, function, None)
    if not callable(builder):
        known = [name for name, value in vars(imported).items() if callable(value)]
        near = difflib.get_close_matches(function, known, n=1, cutoff=0.5)
        hint = f"; did you mean {module}:{near[0]}?" if near else ""
        raise UserError(f"{origin}: {module} has no function {function}{hint}")
    try:
        network = builder()
    except (Exception, SystemExit) as error:
        kind = type(error).__name__
        raise UserError(f"{origin}: it raised {kind}: {first_line(error)}") from None
    if not isinstance(network, nn.Module):
        raise UserError(
            f"{origin}: it returned a {type(network).__name__}; it must build a torch.nn.Module of "
            "pixels in [0, 1]"
        )
    return network


def refuse_different_networks(network: nn.Module, title: str, world: World) -> None:
    """Compares what every rank has loaded by itself; all ranks together.

    Raises:
        UserError: on every rank; a rank holds other weights than rank 0.
    """
    if world.size == 1:
        return
    digests = world.gather_on_host(digest_weights(network).hex())

    def refuse() -> None:
        others = [rank for rank, other in enumerate(digests) if other != digests[0]]
        if others:
            raise UserError(
                f"SUBJECT {title}: rank {others[0]} has other weights than rank 0; give every "
                "rank the same"
            )

    world.on_main(refuse)
