"""Clean and robust accuracy of a network, summed exactly over the ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from freeadv_fast.config.attack import Attack
from freeadv_fast.config.threat import AnyThreatModel
from freeadv_fast.data.loader import Batch, Loader
from freeadv_fast.distributed.world import World
from freeadv_fast.evaluation.attacks import is_correct, logits_of, perturb, random_point
from freeadv_fast.evaluation.autoattack.package import refuse_unfit
from freeadv_fast.evaluation.autoattack.standing import Standing, count_standing
from freeadv_fast.models.normalize import unit_images, with_normalizer

# Pixels that a GPU attacks at once, for each GiB of its memory: 1,024 images of CIFAR on an H200.
PIXELS_PER_GIB = 8192
# Batches that are filled with images that stand out of so many images: the last is not full.
BATCHES_OF_A_POOL = 4
# Pixels that AutoAttack takes at once without a GPU: 128 images of CIFAR, 2 of ImageNet. More are
# no faster, and a killed evaluation loses a batch.
CPU_PIXELS = 128 * 32 * 32


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a network got right.

    Attributes:
        clean_accuracy: Fraction of images whose largest logit is the label's.
        clean_top5: Fraction whose label is among the five largest; None below six classes.
        robust_accuracy: Attack's name to the fraction that is right on the image and on the points
            of all restarts.
        num_images: Images attacked, over all ranks.
        num_clean_images: Images that the clean accuracies are over; more, where attacks take a
            part of the set.
        seconds: Wall time, images' decoding included.
        attack_parts: Of attacks that consist of several, by name: part to the fraction that
            stands it and those before it.
        seed: Seed of the attacks.
        log: Name of AutoAttack's log of rank 0 in the folder; None where nothing keeps one.
        ledgers: Files of this rank's folder that make a killed evaluation go on; whoever keeps
            these accuracies forgets them (`ledger.forget`).
    """

    clean_accuracy: float
    clean_top5: float | None
    robust_accuracy: dict[str, float]
    num_images: int
    num_clean_images: int
    seconds: float
    attack_parts: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    seed: int = 0
    log: str | None = None
    ledgers: tuple[Path, ...] = dataclasses.field(default=(), repr=False, compare=False)


def evaluate(
    model: nn.Module,
    loader: Loader,
    attacks: Sequence[Attack | str],
    threat: AnyThreatModel,
    *,
    world: World,
    mean: Sequence[float],
    std: Sequence[float],
    clean_loader: Loader | None = None,
    seed: int = 0,
    progress: bool = True,
    label: str = "evaluate",
    folder: Path | None = None,
) -> Evaluation:
    """Measures clean accuracy and the accuracy under each attack.

    fp32 without TF32 or autocast, in eval mode; the model's modes are restored. Every rank calls
    it with its share of the images; no image is counted twice. Random starts are a function of
    (seed, index of a batch's first image), the same for every attack. A GPU attacks the images of
    several batches at once.

    Args:
        model: Network of normalised images, not wrapped by DDP, on `world.device`.
        loader: This rank's share of the images to attack. `Loader.epoch(0)` is read once, and
            once more where there is an attack without a step.
        attacks: Attacks or their names; may be empty.
        threat: Radius and step of all attacks.
        world: The ranks.
        mean: Per-channel mean that the network's input was normalised with, in [0, 1].
        std: Per-channel standard deviation, likewise.
        clean_loader: This rank's share of the images that the clean accuracies are over, where
            they are others than the attacked ones (`images.whole_val_loader`).
        seed: Seed of the random starts.
        progress: Draw a bar, on rank 0 of a terminal. AutoAttack says how long it takes elsewhere.
        label: Text before the bar.
        folder: Where AutoAttack keeps its log, and what it has found until this returns, so that
            it goes on there once it was killed. None keeps nothing.

    Returns:
        The same accuracies on every rank.

    Raises:
        ValueError: no images. As a `UserError` also an attack that cannot be made.
    """
    started = time.perf_counter()
    parsed = [Attack.parse(attack) for attack in attacks]
    stepped = [attack for attack in parsed if attack.has_step]
    packaged = [attack for attack in parsed if not attack.has_step]
    world.together(lambda: refuse_unfit(packaged, len(loader.classes), "--attacks"))
    network = with_normalizer(model, mean, std).to(world.device)
    options: dict[str, Any] = {"world": world, "seed": seed, "label": label, "is_shown": progress}
    found = Standing({})
    with eval_mode(network), exact_arithmetic(world.device):
        counts = count_stepped(network, loader, clean_loader, stepped, threat, **options)
        (num_clean, top1, top5, *_), (num_images, _, _, *standing) = counts.tolist()
        if num_images == 0:
            raise ValueError("no images to evaluate")
        if packaged:
            found = count_standing(
                network, loader, packaged, threat,
                at_once=packaged_at_once, folder=folder, **options,
            )  # fmt: skip
    by_name = {str(a): n / num_images for a, n in zip(stepped, standing, strict=True)}
    parts = {
        name: {part: n / num_images for part, n in own.items()}
        for name, own in found.counts.items()
    }
    by_name |= {name: min(own.values()) for name, own in parts.items()}
    return Evaluation(
        clean_accuracy=top1 / num_clean,
        clean_top5=top5 / num_clean if len(loader.classes) > 5 else None,
        robust_accuracy={str(attack): by_name[str(attack)] for attack in parsed},
        num_images=num_images,
        num_clean_images=num_clean,
        seconds=time.perf_counter() - started,
        attack_parts={name: own for name, own in parts.items() if len(own) > 1},
        seed=seed,
        log=found.log,
        ledgers=found.ledgers,
    )


def count_stepped(
    network: nn.Module,
    loader: Loader,
    clean_loader: Loader | None,
    attacks: Sequence[Attack],
    threat: AnyThreatModel,
    *,
    world: World,
    seed: int,
    label: str,
    is_shown: bool,
) -> Tensor:
    """Counts what is right clean and under the attacks that have a step; every rank calls it.

    Args:
        network: Network of [0, 1] images, in eval mode, on `world.device`.
        loader: This rank's share of the images to attack. clean_loader: As `evaluate` takes it.
        attacks: They may be none.
        threat: Radius and step.
        world: The ranks.
        seed: Seed of the random starts.
        label: Text before the bar.
        is_shown: Whether a terminal's rank 0 draws it.

    Returns:
        (2, 3 + attacks) int64, over all ranks: a row for the clean images and one for the attacked
        ones, each as `count_images` counts.
    """
    counts = torch.zeros(2, 3 + len(attacks), dtype=torch.int64, device=world.device)
    is_silent = not (is_shown and world.is_main and sys.stderr.isatty())

    def count(row: Tensor, images: Loader, attacks: Sequence[Attack]) -> None:
        bar = tqdm(
            images.epoch(0), label, images.num_batches, leave=False, disable=is_silent, unit="batch"
        )
        own = row[: 3 + len(attacks)]
        with bar:
            for batches in pooled(bar):
                own.add_(count_images(network, batches, attacks, threat, seed=seed))
                if not is_silent:
                    bar.set_postfix_str(_running_text(own, attacks))

    def count_all() -> None:
        count(counts[1], loader, attacks)
        if clean_loader is None:
            counts[0] = counts[1]
        else:
            count(counts[0], clean_loader, ())

    world.together(count_all)  # ranks may differ by a minibatch
    return world.sum_(counts)


def images_at_once(batch: Batch) -> int | None:
    """Images that go through a network together: as many as a GPU's memory and a minibatch allow.

    None on a CPU: each minibatch as it comes.
    """
    if batch.images.device.type != "cuda":
        return None
    num, height, width, _ = batch.images.shape
    memory = torch.cuda.get_device_properties(batch.images.device).total_memory / 2**30
    fitting = PIXELS_PER_GIB * memory / (height * width)
    return max(num, 1 << int(math.log2(max(1, fitting))))


def packaged_at_once(batch: Batch) -> int:
    """Images that AutoAttack takes at once; what comes of them is the same in any batch."""
    _, height, width, _ = batch.images.shape
    return images_at_once(batch) or min(128, max(8, CPU_PIXELS // (height * width)))


def pooled(batches: Iterable[Batch]) -> Iterator[list[Batch]]:
    """Minibatches that are attacked together; those without an image are left out."""
    pool: list[Batch] = []
    for batch in batches:
        if len(batch.labels) == 0:
            continue
        pool.append(batch)
        enough = BATCHES_OF_A_POOL * (images_at_once(pool[0]) or 0)
        if sum(len(each.labels) for each in pool) >= enough:
            yield pool
            pool = []
    if pool:
        yield pool


def count_images(
    network: nn.Module,
    batches: Sequence[Batch],
    attacks: Sequence[Attack],
    threat: AnyThreatModel,
    *,
    seed: int,
) -> Tensor:
    """Counts the successes on some minibatches, in smaller batches where memory is short.

    Args:
        network: Network of [0, 1] images, in eval mode.
        batches: (n, H, W, 3) uint8 images and their labels; n at least 1.
        attacks: The attacks, each from the same random starts.
        threat: Radius and step.
        seed: Seed of the random starts.

    Returns:
        (3 + attacks,) int64: images, top-1 hits, top-5 hits, images standing after each attack.
    """
    at_once = images_at_once(batches[0])
    while True:
        try:
            return _count(network, batches, attacks, threat, seed, at_once)
        except torch.OutOfMemoryError:
            if at_once is None or at_once <= len(batches[0].labels):
                raise
            at_once //= 2


def _count(
    network: nn.Module,
    batches: Sequence[Batch],
    attacks: Sequence[Attack],
    threat: AnyThreatModel,
    seed: int,
    at_once: int | None,
) -> Tensor:
    """`count_images`, so many at once."""
    images = unit_images(torch.cat([batch.images for batch in batches]))
    labels = torch.cat([batch.labels for batch in batches])
    logits = logits_of(network, images, at_once)
    best5 = logits.topk(min(5, logits.shape[1])).indices
    is_standing = is_correct(logits, labels)
    counts = torch.zeros(3 + len(attacks), dtype=torch.int64, device=labels.device)
    counts[0] = len(labels)
    counts[1] = is_standing.sum()
    counts[2] = (best5 == labels[:, None]).any(1).sum()
    for index, attack in enumerate(attacks):
        perturbed = perturb(
            network,
            images,
            labels,
            attack=attack,
            threat=threat,
            starts=random_starts(images, batches, threat, seed),
            is_standing=is_standing,
            at_once=at_once,
        )
        counts[3 + index] = (~perturbed.is_fooled).sum()
    return counts


def random_starts(
    images: Tensor, batches: Sequence[Batch], threat: AnyThreatModel, seed: int
) -> Iterator[Tensor]:
    """Yields the start of each restart: every minibatch draws from a generator of its own.

    Args:
        images: (N, 3, H, W) float32 in [0, 1], those of all minibatches.
        batches: The minibatches, N images together.
        threat: Gives the ball.
        seed: The run's.
    """
    parts = images.split([len(batch.labels) for batch in batches])
    generators = [start_generator(seed, int(b.indices[0]), images.device) for b in batches]
    while True:
        points = map(random_point, parts, [threat] * len(parts), generators)
        yield images + torch.cat(list(points))


def start_generator(seed: int, first_index: int, device: torch.device) -> torch.Generator:
    """Source of the random starts of one minibatch: a function of its arguments alone.

    torch's CPU generator keeps 32 bits of a seed; the odd multiplier (Knuth's) moves the indices of
    neighbouring seeds far apart in them.
    """
    return torch.Generator(device).manual_seed((seed * 2654435761 + first_index) % 2**32)


def _running_text(counts: Tensor, attacks: Sequence[Attack]) -> str:
    """Rank 0's accuracies so far, for the progress bar."""
    num_images, top1, _, *standing = counts.tolist()
    names = ("clean", *map(str, attacks))
    return ", ".join(
        f"{name} {count / max(num_images, 1):.1%}"
        for name, count in zip(names, (top1, *standing), strict=True)
    )


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, and no parameter asks for a gradient; afterwards all is as it was.

    Attacks need the gradient at the image alone. Where parameters ask for theirs, layers keep their
    inputs for it, and a fused batch norm, which cannot know who asks, sums its gradients.
    """
    modes = [(module, module.training) for module in model.modules()]
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training
        for parameter in asking:
            parameter.requires_grad_()


@contextlib.contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """fp32 as written: no autocast, no TF32 in products and convolutions.

    Restarts attack the images that still stand, so batch sizes vary, and cuDNN's search for the
    fastest kernel would run anew for each: it is off too.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    saved = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    matmul.allow_tf32 = cudnn.allow_tf32 = cudnn.benchmark = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = saved
