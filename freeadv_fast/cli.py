"""The command line: recipe first, flags second, one line for every mistake.

`run_training` is the body of every training script in launch/. What was typed wins over the
recipe; what was not typed may still depend on the machine (`resolve`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import inspect
import io
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import tyro
import yaml

from freeadv_fast.config.file import config_to_dict, load_config
from freeadv_fast.config.method_names import Method
from freeadv_fast.config.phases import Phases
from freeadv_fast.config.presets import CPU_EVAL_ATTACKS, CPU_EVAL_IMAGES
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.schedule import Schedule
from freeadv_fast.config.threat import Perturbation
from freeadv_fast.distributed.shuffle import PeerLost
from freeadv_fast.errors import UserError
from freeadv_fast.recipes.catalogue import DEFAULTS, RECIPES, find_recipe
from freeadv_fast.session.signals import Interrupted

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """A training run. Without --data it trains on embedded real images."""

    run: tyro.conf.OmitArgPrefixes[TrainConfig]
    config: str | None = None
    """Replay a saved run: path of its config.yaml. Flags beside it win."""
    dry_run: bool = False
    """Print the resolved configuration, the steps and the first minibatch's shapes, and stop."""


def run_training(method: Method, dataset: str, argv: Sequence[str] | None = None) -> int:
    """Parses a command line, trains, and returns the process's exit status.

    Args:
        method: The script's method; --method changes it.
        dataset: ``imagenet`` or ``cifar``: whose recipe --data alone selects. Without --data the
            embedded recipe of the method is used.
        argv: Arguments; those of the process by default.
    """

    def work() -> int:
        arguments = list(sys.argv[1:] if argv is None else argv)
        command, typed = parse(arguments, method, dataset)
        from freeadv_fast.training import dry_run, train  # seconds of imports that --help can spare

        config, remarks = resolve(command.run, typed)
        if is_main_rank():
            print_plan(config, remarks, is_embedded="data" not in typed and config.data == "digits")
        if command.dry_run:
            for line in dry_run(config):
                if is_main_rank():
                    print(line)
            return 0
        train(config)
        return 0

    return guard(work)


def guard(work: Callable[[], int]) -> int:
    """Runs `work`; a user's mistake becomes one line and status 2, a signal 128 + its number."""
    try:
        return work()
    except UserError as error:
        # Each rank that waits for a lost peer says so: rank 0 may be the peer.
        if is_main_rank() or isinstance(error, PeerLost):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except Interrupted as interrupted:
        saved = "everything is saved, continue with --resume"
        if not interrupted.is_saved:
            saved = "at once; --resume continues from the last checkpoint"
        if is_main_rank():
            print(f"stopped by {interrupted}; {saved}", file=sys.stderr, flush=True)
        return 128 + interrupted.signum
    except KeyboardInterrupt:  # before or after training, when nothing needs saving
        return 128 + signal.SIGINT
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(f"error: --output-dir: {error.strerror}; free some space and add --resume",
              file=sys.stderr, flush=True)  # fmt: skip
        return 2


def is_main_rank() -> bool:
    """Whether this process speaks for all; known before the ranks have met."""
    return os.environ.get("RANK", "0") == "0"


def parse(arguments: list[str], method: Method, dataset: str) -> tuple[CommandLine, set[str]]:
    """Reads a command line on top of its recipe.

    Args:
        arguments: Without the program's name.
        method: The script's method.
        dataset: Whose recipes the user's own data are trained with.

    Returns:
        The command and the names of the fields that were typed (or come from --config).

    Raises:
        UserError: unknown flags (with the nearest name), bad values.
    """
    fields = [*dataclasses.fields(TrainConfig), *dataclasses.fields(CommandLine)]
    refuse_unknown_flags(arguments, [field.name for field in fields])
    for flag in ("--eps", "--step-size", "--eval-step"):  # here, so that the message names it
        Perturbation.parse(value_of(arguments, flag) or "0", flag)
    typed = {flag_name(argument) for argument in arguments if argument.startswith("--")}
    config_path = value_of(arguments, "--config")
    recipe = value_of(arguments, "--recipe")
    if config_path is not None:
        base = load_config(Path(config_path))
        typed |= {field.name for field in dataclasses.fields(TrainConfig)}
    elif recipe is not None:
        base = find_recipe(recipe)
    else:
        is_embedded = value_of(arguments, "--data") in (None, "digits")
        if str(value_of(arguments, "--data")).startswith("svhn:"):
            dataset = "svhn"
        defaults = DEFAULTS["digits" if is_embedded else dataset]
        base = RECIPES[defaults.get(value_of(arguments, "--method") or method, defaults[method])]
    command = parse_with_tyro(CommandLine, arguments, CommandLine(base))
    for field, part in (("image_size", "side"), ("batch_size", "batch")):
        if config_path is None and command.run.phases and field in typed:
            flag = "--" + field.replace("_", "-")
            raise UserError(f"{flag}: each of the --phases has its own {part}; leave out {flag}")
    if config_path is None and "data" not in typed and base.data != "digits":
        raise UserError(f"--data: recipe {base.recipe} needs it; give the folder of its images")
    return command, typed


def run_tool(function: Callable[..., int]) -> int:
    """Runs a script whose flags are a function's arguments; mistakes get one line.

    Args:
        function: Returns the exit status; its docstring and annotations make the help.
    """
    names = inspect.signature(function).parameters

    def work() -> int:
        arguments = sys.argv[1:]
        refuse_unknown_flags(arguments, names)
        return parse_with_tyro(function, arguments)

    return guard(work)


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


def resolve(config: TrainConfig, typed: set[str]) -> tuple[TrainConfig, list[str]]:
    """Settles what depends on the machine and was not typed.

    Args:
        config: Recipe and flags.
        typed: Fields that the user typed; they stay.

    Returns:
        The config to train with, and a remark a line about what was settled.
    """
    config, remarks = with_scaled_steps(config, typed)
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if config.phases and num_ranks > 1 and "phases" not in typed:
        config = dataclasses.replace(config, phases=config.phases.divided(num_ranks))
        remarks.append(
            f"recipe batches over {num_ranks} ranks: {config.phases} (--phases sets them per rank)"
        )
    elif not config.phases and num_ranks > 1 and "batch_size" not in typed:
        share = max(2, config.batch_size // num_ranks)
        remarks.append(
            f"recipe batch {config.batch_size} over {num_ranks} ranks: {share} per rank "
            "(--batch-size sets it per rank)"
        )
        config = with_batch_size(config, share, typed)
    if not torch.cuda.is_available() and config.eps.levels:
        if "eval_attacks" not in typed and config.eval_attacks != CPU_EVAL_ATTACKS:
            full = ",".join(config.eval_attacks)
            config = dataclasses.replace(config, eval_attacks=CPU_EVAL_ATTACKS)
            remarks.append(f"no GPU: evaluating with pgd-20 only; all: --eval-attacks {full}")
        if "eval_images" not in typed:
            config = dataclasses.replace(config, eval_images=CPU_EVAL_IMAGES)
            remarks.append(
                f"no GPU: attacking at most {CPU_EVAL_IMAGES} validation images; "
                "more: --eval-images N, or launch/evaluate.py afterwards"
            )
    return config, remarks


def with_scaled_steps(config: TrainConfig, typed: set[str]) -> tuple[TrainConfig, list[str]]:
    """The config with steps that fit a typed --eps or --norm; a recipe's were made for its own.

    In an L2 ball, where a recipe's steps mean nothing, 2.5 eps / K (`TrainConfig.threat`) and for
    evaluations eps / 8, the same for K = 20.
    """
    recipe = RECIPES.get(config.recipe)
    if recipe is None or not recipe.eps.levels or not {"eps", "norm"} & typed:
        return config, []
    share = config.eps.levels / recipe.eps.levels
    is_l2 = config.norm != recipe.norm
    changes: dict[str, Any] = {}
    if "step_size" not in typed and config.step_size is not None:
        changes["step_size"] = None if is_l2 else Perturbation(config.step_size.levels * share)
    if "eval_step" not in typed:
        levels = config.eps.levels / 8 if is_l2 else config.eval_step.levels * share
        changes["eval_step"] = Perturbation(levels)
    changes = {name: value for name, value in changes.items() if value != getattr(config, name)}
    if not changes:
        return config, []
    config = dataclasses.replace(config, **changes)
    flags = {name: f"--{name.replace('_', '-')}" for name in changes}
    return config, [
        f"for --eps {config.eps}: "
        + ", ".join(
            f"{flag} {getattr(config, name) or config.threat.step}" for name, flag in flags.items()
        )
    ]


def with_batch_size(config: TrainConfig, size: int, typed: set[str]) -> TrainConfig:
    """The config with another batch; a group that was not typed shrinks with it."""
    group = config.aux_bn_group
    if "aux_bn_group" not in typed and config.is_split:
        group = max(2, min(group, round(config.p_adv * size)))
    return dataclasses.replace(config, batch_size=size, aux_bn_group=group)


def print_plan(config: TrainConfig, remarks: list[str], is_embedded: bool) -> None:
    """Prints what will be done, before anything is."""
    if is_embedded:
        print("no --data: training on embedded real handwritten digits (32 px); "
              "--data FOLDER trains on yours")  # fmt: skip
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    print(yaml.safe_dump(config_to_dict(config), sort_keys=False).rstrip())
    sizes = [phase.batch_size for phase in config.phase_configs]
    batches = ", then ".join(f"{size * num_ranks} = {num_ranks} x {size}" for size in sizes)
    print(f"global batch {batches}, output folder {config.run_folder}")
    for remark in remarks:
        print(remark)
    sys.stdout.flush()
