"""The AutoAttack package's attacks as functions of a batch, in which no image minds the others.

Two packages hold the same attacks: `pyautoattack` of PyPI, and the authors' repository, which
installs as `autoattack`. Either is imported where it is needed, and neither is changed.

Source: Croce and Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of
diverse parameter-free attacks", section 5: the standard version.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from freeadv_fast.config.attack import ADAPTIVE, Attack
from freeadv_fast.config.threat import AnyThreatModel, L2ThreatModel
from freeadv_fast.errors import UserError
from freeadv_fast.evaluation.autoattack.log import PackageLog
from freeadv_fast.models.own import refuse_probabilities

# pip's name, then the repository's.
PACKAGES = ("pyautoattack", "autoattack")
# APGD-T's loss divides by a difference of the third and the fourth largest logit.
FEWEST_CLASSES = 4
NUM_TARGETS = 9
# A backward pass costs two forward ones.
WITH_GRADIENT = 3


class Queried:
    """The network as the package calls it: what it is asked is counted.

    Args:
        network: (n, 3, H, W) float32 pixels in [0, 1] to (n, classes) logits, in eval mode.
        count: Is told the forward passes of images of each call; one with a gradient is three.
    """

    def __init__(self, network: nn.Module, count: Callable[[int], None]) -> None:
        """Nothing is asked yet."""
        self.network = network
        self.count = count

    def __call__(self, images: Tensor) -> Tensor:
        """Logits, by way of the memory format in which convolutions are fast."""
        has_gradient = images.requires_grad and torch.is_grad_enabled()
        self.count(len(images) * (WITH_GRADIENT if has_gradient else 1))
        logits: Tensor = self.network(images.contiguous(memory_format=torch.channels_last))
        return logits


class OneImagesTorch(ModuleType):
    """torch as the package's modules see it in `one_noise`: rows of a draw are one row."""

    def __getattr__(self, name: str) -> Any:
        """All else is torch's own."""
        return getattr(torch, name)

    @staticmethod
    def rand(shape: Sequence[int]) -> Tensor:
        """`torch.rand`, drawn for one image where (n, channels, height, width) are asked for."""
        return _for_one(torch.rand, shape)

    @staticmethod
    def randn(shape: Sequence[int]) -> Tensor:
        """`torch.randn`, likewise."""
        return _for_one(torch.randn, shape)


def _for_one(draw: Callable[[Sequence[int]], Tensor], shape: Sequence[int]) -> Tensor:
    """A draw whose rows are alike, where they are images."""
    if len(shape) != 4:
        return draw(shape)
    return draw((1, *shape[1:])).expand(tuple(shape)).contiguous()


@contextlib.contextmanager
def one_noise() -> Iterator[None]:
    """Every image of a batch gets the random numbers that the package gives an image by itself.

    The package seeds torch before each attack and draws for the whole batch, so that an image's
    result hangs on its companions, which fall and leave. Within the block what comes of an image is
    what `run_standard_evaluation` with `batch_size=1` and the same seed makes of it: in any batch,
    on any rank, before and after a kill. (Square's positions are one for all images of a batch in
    the package, too; FAB-T of one restart draws nothing.)

    Only the package's modules see it, so that the network's own draws stay its own, and an
    operation costs what it costs: a `TorchFunctionMode` took 1 ms more for a step of 2 ms.
    """
    modules = [load_package(name) for name in ("autopgd_base", "square")]
    seen = OneImagesTorch("torch")
    for module in modules:
        vars(module)["torch"] = seen
    try:
        yield
    finally:
        for module in modules:
            vars(module)["torch"] = torch


@dataclasses.dataclass(frozen=True)
class Part:
    """One attack of several that an image has to stand.

    Attributes:
        name: Such as ``apgd-t``.
        perturb: (n, 3, H, W) float32 images in [0, 1], contiguous, and their (n,) int64 labels to
            points of the ball; an image that is misclassified already stays where it is.
        passes: Forward passes for an image that stands, at most.
    """

    name: str
    perturb: Callable[[Tensor, Tensor], Tensor]
    passes: int


def refuse_unfit(attacks: Sequence[Attack], num_classes: int, flag: str) -> None:
    """Refuses attacks that could not be made, before anything is trained or loaded for them.

    Args:
        attacks: Any attacks. num_classes: Of the data. flag: What named the attacks.

    Raises:
        UserError: no package, or too few classes.
    """
    packaged = [attack for attack in attacks if not attack.has_step]
    if packaged and not any(map(importlib.util.find_spec, PACKAGES)):
        raise UserError(
            f'{flag} {packaged[0]}: needs the AutoAttack package; pip install "pyautoattack>=0.2"'
        )
    for attack in packaged:
        if attack.loss != ADAPTIVE and num_classes < FEWEST_CLASSES:
            raise UserError(
                f"{flag} {attack}: its targeted losses need {FEWEST_CLASSES} classes, the data "
                f"have {num_classes}; use apgd-ce-100,cw-100"
            )


def load_package(module: str = "") -> ModuleType:
    """The package that is installed, or a module of it.

    Args:
        module: Such as ``checks``.

    Raises:
        UserError: neither is installed.
    """
    refuse_unfit([Attack.parse("autoattack")], FEWEST_CLASSES, "--attacks")
    name = next(name for name in PACKAGES if importlib.util.find_spec(name))
    return importlib.import_module(f"{name}.{module}" if module else name)


def package_version() -> str:
    """The package and its version, such as ``pyautoattack 0.2.0``.

    A clone on PYTHONPATH that pip knows nothing of has none.
    """
    name = load_package().__name__
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{name}, unknown version"


def standard(
    queried: Queried, threat: AnyThreatModel, *, num_classes: int, seed: int, device: torch.device
) -> Any:
    """The package's own object of the standard version, with its four attacks.

    With fewer than ten classes the targeted attacks take all others, where the package would ask
    for a tenth that is not there. With ten they are those of the standard version.

    Args:
        queried: The network. threat: The ball. num_classes: Of the network, at least 4.
        seed: Of each attack on each batch. device: Of the images.
    """
    build = load_package().AutoAttack
    # The repository's version prints, and takes a GPU by default.
    silent = {"verbose": False} if "verbose" in inspect.signature(build).parameters else {}
    whole = build(
        queried, norm=norm_of(threat), eps=float(threat.eps), seed=seed, device=device, **silent
    )
    whole.apgd_targeted.n_target_classes = whole.fab.n_target_classes = min(
        NUM_TARGETS, num_classes - 1
    )
    whole.fab.targeted = True
    return whole


def norm_of(threat: AnyThreatModel) -> str:
    """The ball's norm, as the package calls it."""
    return "L2" if isinstance(threat, L2ThreatModel) else "Linf"


def parts_of(
    attack: Attack,
    queried: Queried,
    threat: AnyThreatModel,
    *,
    num_classes: int,
    seed: int,
    device: torch.device,
    log: PackageLog,
) -> list[Part]:
    """The attacks that an attack by name consists of, in their order.

    Args:
        attack: ``autoattack`` or ``apgd-ce-N``.
        queried: The network. threat: The ball. num_classes: Of the network.
        seed: Of each part on each batch. device: Of the images.
        log: Takes what the package says.
    """
    if attack.loss == ADAPTIVE:
        alone = load_package("autopgd_base").APGDAttack(
            queried,
            n_iter=attack.steps,
            n_restarts=attack.restarts,
            norm=norm_of(threat),
            eps=float(threat.eps),
            seed=seed,
            device=device,
            logger=log,
        )
        return [Part(ADAPTIVE, alone.perturb, _ascent_passes(alone))]
    whole = standard(queried, threat, num_classes=num_classes, seed=seed, device=device)
    first, targeted, fab, square = whole.apgd, whole.apgd_targeted, whole.fab, whole.square
    first.logger = targeted.logger = log
    fab_passes = fab.n_restarts * (3 + fab.n_iter * (WITH_GRADIENT + 1))
    return [
        Part("apgd-ce", first.perturb, _ascent_passes(first)),
        Part("apgd-t", targeted.perturb, targeted.n_target_classes * _ascent_passes(targeted)),
        Part("fab-t", fab.perturb, fab.n_target_classes * fab_passes),
        Part("square", square.perturb, square.n_restarts * (2 + square.n_queries)),
    ]


def _ascent_passes(apgd: Any) -> int:
    """Forward passes of APGD for an image that stands, against one class."""
    return int(apgd.n_restarts * (WITH_GRADIENT * (apgd.n_iter + 1) + 1))


def examine(queried: Queried, images: Tensor, labels: Tensor, log: PackageLog) -> None:
    """Has the package look at a network on some images; its warnings go to the log.

    Args:
        queried: The network. images: (n, 3, H, W) float32, n at least 1. labels: (n,) int64.
        log: Takes warnings: of randomness, of gradients within the forward pass.

    Raises:
        UserError: the network returns probabilities, whose gradients vanish: every attack of the
            package would overstate its robustness. Their logarithms are logits like any others.
    """
    checks = load_package("checks")
    with torch.no_grad():
        outputs = queried(images)
    refuse_probabilities(outputs, "--attacks")
    checks.check_randomized(queried, images, labels, bs=len(images), logger=log)
    tracer = sys.gettrace()  # of a debugger, or of coverage; the package ends tracing
    try:
        checks.check_dynamic(queried, images, False, logger=log)
    finally:
        sys.settrace(tracer)
