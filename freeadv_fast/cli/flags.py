"""What was typed: a recipe first, flags on top of it, unknown ones with the nearest name."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from freeadv_fast.config.file import CONFIG_NAME, load_config
from freeadv_fast.config.method_fields import NEUTRAL, READERS, readers_in_words, reads
from freeadv_fast.config.method_names import Method
from freeadv_fast.config.phases import Phases
from freeadv_fast.config.read import flag_of
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.schedule import Schedule
from freeadv_fast.config.task_fields import TASK_NEUTRAL, TASK_READERS, TaskName
from freeadv_fast.config.threat import Perturbation
from freeadv_fast.config.written import as_typed
from freeadv_fast.errors import UserError
from freeadv_fast.recipes.catalogue import DEFAULTS, RECIPES, find_recipe

T = TypeVar("T")

# What a task's networks are called.
NETWORKS: dict[TaskName, str] = {"classification": "classifier", "detection": "detector"}

# Data that come with the package, by the name that --data gives them, and what they are.
EMBEDDED = {
    "digits": "embedded real handwritten digits (32 px)",
    "shapes": "embedded synthetic shapes (128 px)",
}


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """A training run. Without --data it trains on embedded images."""

    run: tyro.conf.OmitArgPrefixes[TrainConfig]
    config: str | None = None
    """Replay a saved run: path of its config.yaml. Flags beside it win."""
    dry_run: bool = False
    """Print the resolved configuration, the steps and the first minibatch's shapes, and stop."""


def parse(arguments: list[str], method: Method, dataset: str) -> tuple[CommandLine, set[str]]:
    """Reads a command line on top of its recipe.

    Args:
        arguments: Without the program's name.
        method: The script's method.
        dataset: Whose recipes the user's own data are trained with.

    Returns:
        The command and the names of the fields that were typed (or come from a saved config).

    Raises:
        UserError: unknown flags (with the nearest name), bad values, flags that the method does not
            read.
    """
    fields = [*dataclasses.fields(TrainConfig), *dataclasses.fields(CommandLine)]
    refuse_unknown_flags(arguments, [field.name for field in fields])
    arguments = with_resumed_folder(arguments)
    for flag in ("--eps", "--step-size", "--eval-step"):  # here, so that the message names it
        Perturbation.parse(value_of(arguments, flag) or "0", flag)
    typed = {flag_name(argument) for argument in arguments if argument.startswith("--")}
    base, is_saved = implied_config(arguments, method, dataset), "config" in typed
    if "resume" in typed:
        folder = folder_to_resume(arguments, base)
        base, is_saved = own_config(folder, base) if not is_saved else (base, True)
        arguments = [*arguments, "--output-dir", str(folder)]
    command = parse_with_tyro(CommandLine, arguments, CommandLine(base))
    refuse_unread_flags(command.run, typed)
    if is_saved:
        return command, typed | {field.name for field in dataclasses.fields(TrainConfig)}
    for field, part in (("image_size", "side"), ("batch_size", "batch")):
        if command.run.phases and field in typed:
            flag = flag_of(field)
            raise UserError(f"{flag}: each of the --phases has its own {part}; leave out {flag}")
    if "data" not in typed and base.data not in EMBEDDED:
        raise UserError(f"--data: recipe {base.recipe} needs it; give the folder of its images")
    return command, typed


def with_resumed_folder(arguments: list[str], mark: str = CONFIG_NAME) -> list[str]:
    """The same command with ``--resume FOLDER`` as ``--resume --output-dir FOLDER``.

    Args:
        arguments: Without the program's name.
        mark: The file by which such a folder is known.

    Raises:
        UserError: two folders are named, or FOLDER holds nothing to resume.
    """
    folder = value_of(arguments, "--resume")
    if folder is None or folder.startswith("--"):
        return arguments
    other = value_of(arguments, "--output-dir")
    if other is not None and Path(other) != Path(folder):
        raise UserError(f"--resume {folder}: --output-dir names {other}; leave one of them out")
    place = Path(folder).expanduser()
    if not place.joinpath(mark).is_file():
        again = f"type its own flags again and add --output-dir {folder} --resume"
        hint = f"; if a run was killed before it wrote one, {again}" if place.is_dir() else ""
        raise UserError(f"--resume {folder}: nothing to continue there, for it has no {mark}{hint}")
    rest, is_value = [], False
    for argument in arguments:
        if argument.partition("=")[0] != "--resume" and not is_value:
            rest.append(argument)
        is_value = argument == "--resume"
    return [*rest, "--resume", "--output-dir", folder]


def folder_to_resume(arguments: list[str], base: TrainConfig) -> Path:
    """The folder of the run that --resume continues.

    --output-dir names it, or a --config that stands in a run's folder; otherwise it is the one in
    which the same command without --resume would train.
    """
    typed, config = value_of(arguments, "--output-dir"), value_of(arguments, "--config")
    if typed is not None:
        return Path(typed).expanduser()
    if config is not None and Path(config).with_name("checkpoints").is_dir():
        return Path(config).parent
    return Path(parse_with_tyro(CommandLine, arguments, CommandLine(base)).run.run_folder)


def own_config(folder: Path, base: TrainConfig) -> tuple[TrainConfig, bool]:
    """The config of the run in a folder, and whether there is one; `base` where there is none."""
    path = folder / CONFIG_NAME
    return (load_config(path), True) if path.is_file() else (base, False)


def implied_config(arguments: list[str], method: Method, dataset: str) -> TrainConfig:
    """What flags are on top of: --config's run, --recipe's, or that of --data and --method.

    A method without a recipe of its own is on top of the script's; for a detector that is Fast
    AdvProp's, with its larger batch, so it is on top of natural training there.

    Args:
        arguments: Without the program's name; only these four flags are looked at.
        method: The script's method.
        dataset: Whose recipes the user's own data are trained with.

    Raises:
        UserError: no such config or recipe.
    """
    config_path, recipe = value_of(arguments, "--config"), value_of(arguments, "--recipe")
    if config_path is not None:
        return load_config(Path(config_path))
    if recipe is not None:
        return find_recipe(recipe)
    defaults = DEFAULTS[dataset_of(value_of(arguments, "--data"), dataset)]
    chosen = value_of(arguments, "--method") or method
    other = defaults["natural"] if dataset == "coco" else defaults[method]
    return RECIPES[defaults.get(chosen, other)]


def dataset_of(data: str | None, dataset: str) -> str:
    """Whose recipes data are trained with.

    Args:
        data: What --data says; None where nothing was typed.
        dataset: Whose recipes the user's own data are trained with; ``coco`` of detectors.
    """
    if dataset == "coco":
        return "shapes" if data in (None, "shapes") else dataset
    if data is None or data == "digits":
        return "digits"
    return "svhn" if data.startswith("svhn:") else dataset


def refuse_unread_flags(config: TrainConfig, typed: set[str]) -> None:
    """Names the methods, or networks, that read a flag which the chosen one does not.

    Args:
        config: The run. typed: The fields whose flags were typed.

    Raises:
        UserError: a flag of others, set to something else than what this one does anyway.
    """
    for name, task in TASK_READERS.items():
        value = getattr(config, name)
        if name in typed and task != config.task and value not in TASK_NEUTRAL.get(name, ()):
            network = NETWORKS[config.task]
            raise UserError(f"{as_typed(name, value)}: not for a {network}; leave it out")
    for name in READERS:
        value = getattr(config, name)
        is_read = reads(config.method, name, config.on_collapse)
        if name in typed and not is_read and value != NEUTRAL.get(name):
            raise UserError(
                f"{as_typed(name, value)}: {config.method} does not read it; "
                f"for {readers_in_words(name)}"
            )


def share_of(arguments: list[str], method: str, methods: Sequence[str]) -> list[str]:
    """One method's share of flags that were typed for several: without those of the others.

    Args:
        arguments: Without the program's name.
        method: One of `methods`.
        methods: A flag that none of them reads stays, for `parse` to refuse it.
    """
    on_collapse = value_of(arguments, "--on-collapse") or "stop"
    kept: list[str] = []
    is_kept = True
    for argument in arguments:
        if argument.startswith("--"):
            readers = [name for name in methods if reads(name, flag_name(argument), on_collapse)]
            is_kept = method in readers or not readers
        if is_kept:
            kept.append(argument)
    return kept


def parse_with_tyro(target: Callable[..., T], arguments: list[str], default: T | None = None) -> T:
    """tyro's parser, its boxed complaints turned into one-line user errors.

    Args:
        target: The class or function to call with what was typed.
        arguments: Without the program's name.
        default: An instance whose fields are the defaults.
    """
    complaint = io.StringIO()
    options: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(  # type: ignore[no-any-return]
                target,
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff,),
                registry=value_registry(),
                **options,
            )
    except SystemExit as leaving:
        if leaving.code in (0, None):  # --help
            raise
        cause: BaseException | None = leaving
        while cause is not None:
            if isinstance(cause, UserError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        raise UserError(first_sentence(complaint.getvalue())) from None


def first_sentence(box: str) -> str:
    """The message inside a box that tyro drew, as one line."""
    words = []
    for line in box.splitlines()[1:]:
        text = line.strip(" │|")
        if not text or set(text) <= set("─-╰╯╭╮"):
            break
        words.append(text)
    message = " ".join(words).removeprefix("Error parsing ")
    return message or "the command line cannot be read; see --help"


def value_registry() -> tyro.constructors.ConstructorRegistry:
    """How tyro reads and shows our own types: 4/255, every:30, pgd-10,pgd-50."""
    registry = tyro.constructors.ConstructorRegistry()

    def spec(kind: type, metavar: str, read: Callable[[str], Any]) -> Any:
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar=metavar,
            instance_from_str=lambda words: read(words[0]),
            is_instance=lambda value: isinstance(value, kind),
            str_from_instance=lambda value: [
                ",".join(value) if isinstance(value, tuple) else str(value)
            ],
        )

    @registry.primitive_rule
    def rule(info: tyro.constructors.PrimitiveTypeInfo) -> Any:
        if info.type is Perturbation or info.type == Perturbation | None:
            return spec(Perturbation, "K/255", Perturbation.parse)
        if info.type is Schedule:
            return spec(Schedule, "SCHEDULE", Schedule.parse)
        if info.type is Phases:
            return spec(Phases, "PHASES", Phases.parse)
        if info.type == tuple[str, ...]:
            return spec(tuple, "NAME,NAME", lambda text: tuple(text.split(",")))
        return None

    return registry


def refuse_unknown_flags(arguments: list[str], names: Iterable[str]) -> None:
    """Names the nearest flag for one that does not exist.

    Args:
        arguments: Without the program's name.
        names: The fields or parameters that flags set; a positional ``run`` is none.

    Raises:
        UserError: an argument starts with ``--`` and is no flag of ours.
    """
    known = {"--" + name.replace("_", "-") for name in names if name != "run"}
    known |= {f"--no-{flag[2:]}" for flag in known}
    for argument in arguments:
        flag = argument.partition("=")[0].replace("_", "-")
        if argument.startswith("--") and flag not in known | {"--help"}:
            near = difflib.get_close_matches(flag, sorted(known), n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]}?" if near else "; see --help"
            raise UserError(f"{argument.partition('=')[0]}: no such flag{hint}")


def flag_name(argument: str) -> str:
    """The field that a flag sets: ``--batch-size=8`` sets ``batch_size``."""
    name = argument.removeprefix("--").partition("=")[0].replace("-", "_")
    return name.removeprefix("no_")


def value_of(arguments: list[str], flag: str) -> str | None:
    """The value typed after a flag, if any."""
    for index, argument in enumerate(arguments):
        if argument == flag and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith(flag + "="):
            return argument.partition("=")[2]
    return None
