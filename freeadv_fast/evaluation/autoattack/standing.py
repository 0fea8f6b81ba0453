"""Which images stand each part of an attack: counted over all ranks, dealt anew for each part.

An image's fate hangs on no other image (`package.one_noise`), so any rank may attack any of them.
All ranks hold the images of a pool; before each part those that still stand are dealt round robin,
so that no rank waits for one whose images stand longer, and batches stay full as images fall.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from freeadv_fast.config.attack import Attack
from freeadv_fast.config.threat import AnyThreatModel, row_norms
from freeadv_fast.data.loader import Batch, Loader
from freeadv_fast.distributed.world import World
from freeadv_fast.errors import UserError
from freeadv_fast.evaluation.attacks import is_correct
from freeadv_fast.evaluation.autoattack.ledger import Ledger, digest_of, keys_of
from freeadv_fast.evaluation.autoattack.log import PackageLog
from freeadv_fast.evaluation.autoattack.package import (
    NUM_TARGETS,
    Part,
    Queried,
    examine,
    load_package,
    norm_of,
    one_noise,
    package_version,
    parts_of,
)
from freeadv_fast.evaluation.autoattack.progress import Progress
from freeadv_fast.models.normalize import unit_images

# Images that all ranks hold at a time: all of CIFAR, 3,566 of 224 pixels a side.
POOL_BYTES = 2**29
# What comes before every attack: an image that is wrong as it is has fallen.
CLEAN = Part("clean", lambda images, labels: images, 1)


@dataclasses.dataclass(frozen=True)
class Standing:
    """How many images stand.

    Attributes:
        counts: Attack's name to its parts' to the images, over all ranks, that stand it and those
            before it.
        ledgers: Files that are needed no longer once this is written; none where they hold what
            another evaluation of the network, killed before, can go on from.
        log: Name of rank 0's log in the folder; None where nothing keeps one.
    """

    counts: dict[str, dict[str, int]]
    ledgers: tuple[Path, ...] = ()
    log: str | None = None


class Pool(NamedTuple):
    """Images that every rank holds, in the order of their rows.

    Attributes:
        images: (N, H, W, 3) uint8 on the device. labels: (N,) int64 there.
        keys: What they go by in a ledger.
    """

    images: Tensor
    labels: Tensor
    keys: list[str]


def count_standing(
    network: nn.Module,
    loader: Loader,
    attacks: Sequence[Attack],
    threat: AnyThreatModel,
    *,
    world: World,
    seed: int,
    at_once: Callable[[Batch], int],
    folder: Path | None,
    label: str,
    is_shown: bool,
) -> Standing:
    """Attacks the images of all ranks with the package's attacks.

    Every rank calls it. The network is in eval mode and fp32.

    Args:
        network: Network of [0, 1] images, on `world.device`.
        loader: This rank's share of the images.
        attacks: ``autoattack`` and ``apgd-ce-N``.
        threat: The ball.
        world: The ranks.
        seed: The package's.
        at_once: Images that go through the network together, for a minibatch like them.
        folder: Where the log and what was found so far are kept; None for nowhere.
        label: Text before the progress bar.
        is_shown: Whether rank 0 shows progress.

    Raises:
        UserError: the network returns no logits, or nothing can be written into the folder.
    """
    if folder is not None:
        folder = usable(folder, world)
    progress = Progress(label, loader.num_images, is_shown and world.is_main)
    digest = digest_of(network, threat, seed, package_version()) if folder else ""
    log = PackageLog(folder and folder / log_name(digest, world.rank), progress.say)
    ledger = Ledger(folder, digest, world.rank, progress.say)
    queried = Queried(network, progress.count)
    siege = Siege(queried, world, threat, at_once, ledger, log, progress)
    parts = {
        str(attack): parts_of(
            attack, queried, threat, num_classes=len(loader.classes), seed=seed,
            device=world.device, log=log,
        )
        for attack in attacks
    }  # fmt: skip
    describe(attacks, threat, loader, seed, log, progress)
    if ledger.found:
        log.info("goes on where an earlier start ended")
        progress.say(
            f"going on where an earlier start ended; delete {ledger.pattern} to begin anew"
        )
    devices = [world.device] if world.device.type == "cuda" else []
    with torch.random.fork_rng(devices), repeatable(), one_noise(), progress.bar:
        counts = siege.count(loader, parts)
    if world.is_main:
        summarise(counts, loader.num_images, log)
    return Standing(
        {name: {part.name: counts[name, part.name] for part in own} for name, own in parts.items()},
        tuple(ledger.paths) if siege.is_spent(parts) else (),
        log_name(digest, 0) if folder else None,
    )


def usable(folder: Path, world: World) -> Path | None:
    """The folder, made by rank 0; None on another machine that does not see it.

    Raises:
        UserError: it cannot be made.
    """

    def make() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output-dir {folder}: {error.strerror or error}") from None

    world.on_main(make)
    return folder if folder.is_dir() else None


def log_name(digest: str, rank: int) -> str:
    """The log of a rank; rank 0's is the one to show."""
    return f"autoattack-{digest}{f'-rank{rank}' if rank else ''}.log"


def describe(
    attacks: Sequence[Attack],
    threat: AnyThreatModel,
    loader: Loader,
    seed: int,
    log: PackageLog,
    progress: Progress,
) -> None:
    """Writes down what is attacked with what, and says where it is not the standard version."""
    names = ", ".join(map(str, attacks))
    log.info(
        f"{names} of {package_version()}: {loader.num_images} images, {len(loader.classes)} "
        f"classes, {norm_of(threat)} eps {threat.eps}, seed {seed}, as with batch_size=1"
    )
    others = len(loader.classes) - 1
    if others < NUM_TARGETS and any(attack.steps == 0 for attack in attacks):
        text = f"targeted attacks take all {others} other classes, not {NUM_TARGETS}"
        log.info(text)
        progress.say(text)


def summarise(counts: Counter[tuple[str, str]], num_images: int, log: PackageLog) -> None:
    """Writes the accuracies down, and has the package judge what Square alone has found."""
    shares = {name: counts[name] / max(num_images, 1) for name in counts}
    for (attack, part), share in shares.items():
        log.info(f"{attack}: robust accuracy after {part.upper()}: {share:.2%}")
    ensemble = {part: share for (attack, part), share in shares.items() if attack == "autoattack"}
    load_package("checks").check_square_sr(ensemble, logger=log)


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """cuDNN sums in the same order every time: a resumed evaluation equals one go."""
    was = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = was


@dataclasses.dataclass
class Siege:
    """One evaluation on this rank: what it needs at every part of every attack.

    Attributes:
        queried: The network. world: The ranks. threat: The ball.
        at_once: Images of a batch.
        ledger: What was found. log: What was said. progress: What is shown.
        num_at_once: `at_once` of these images; less where memory was short.
        is_examined: Whether the package has looked at the network.
        seen: Keys of the images of all pools so far.
    """

    queried: Queried
    world: World
    threat: AnyThreatModel
    at_once: Callable[[Batch], int]
    ledger: Ledger
    log: PackageLog
    progress: Progress
    num_at_once: int = 0
    is_examined: bool = False
    seen: set[str] = dataclasses.field(default_factory=set)

    def count(self, loader: Loader, parts: dict[str, list[Part]]) -> Counter[tuple[str, str]]:
        """Images that stand, by attack and part, over all pools."""
        counts: Counter[tuple[str, str]] = Counter()
        unseen = loader.num_images
        whole = {name: sum(part.passes for part in own) for name, own in parts.items()}
        for pool in self.pools(loader):
            unseen -= len(pool.keys)
            self.seen.update(pool.keys)
            later = unseen * (1 + sum(whole.values()))
            all_of_them = torch.ones(len(pool.keys), dtype=torch.bool)
            right = self.stand(pool, all_of_them, "clean", CLEAN, later)
            for number, (name, own) in enumerate(parts.items()):
                standing = right
                others = int(right.sum()) * sum(list(whole.values())[number + 1 :])
                ahead = whole[name]
                for part in own:
                    ahead -= part.passes
                    later_of_these = int(standing.sum()) * ahead
                    standing = self.stand(
                        pool, standing, name, part, later + others + later_of_these
                    )
                    counts[name, part.name] += int(standing.sum())
        return counts

    def is_spent(self, parts: dict[str, list[Part]]) -> bool:
        """Whether the ledger held nothing but what `count` has been asked for."""
        made = {(name, part.name) for name, own in parts.items() for part in own}
        made.add(("clean", CLEAN.name))
        found = self.ledger.found
        return made >= found.keys() and all(self.seen >= own.keys() for own in found.values())

    def pools(self, loader: Loader) -> Iterator[Pool]:
        """The images of all ranks, so many at a time; every rank goes through as many pools."""
        batches = loader.epoch(0)
        while True:
            own = self.world.together(lambda: _gathered(batches, POOL_BYTES // self.world.size))
            if not self.world.max_on_host([len(own)])[0]:
                return
            if own and not self.num_at_once:
                self.num_at_once = self.at_once(own[0])
            self.num_at_once = self.world.max_on_host([self.num_at_once])[0]
            yield shared(own, self.world)

    def stand(self, pool: Pool, standing: Tensor, attack: str, part: Part, later: int) -> Tensor:
        """Which images stand one more part.

        Args:
            pool: The images. standing: (N,) bool on the CPU, those that are attacked.
            attack: Its name. part: The part.
            later: Passes of all ranks after this part, at most.

        Returns:
            (N,) bool on the CPU, the same on every rank.
        """
        known = self.known(pool, attack, part)
        rows = standing.nonzero().squeeze(1)
        own = rows[self.world.rank :: self.world.size]
        verdicts = torch.zeros_like(known)

        def attack_own() -> None:
            left, done = len(own), 0
            for batch in torch.tensor_split(own, max(1, -(-len(own) // self.num_at_once))):
                todo = batch[known[:, batch].sum(0) == 0]
                self.progress.expect(
                    f"{part.name}, {len(rows):,} of {self.progress.num_images:,} images stand",
                    (left - done) * part.passes + later / self.world.size,
                )
                if len(todo):
                    stands = self.attacked(pool, todo, part)
                    stood = stands.tolist()
                    self.ledger.add(attack, part.name, [pool.keys[row] for row in todo], stood)
                    verdicts[0, todo], verdicts[1, todo] = stands.int(), (~stands).int()
                    self.progress.batch_is_done()
                done += len(batch)

        self.world.together(attack_own)
        return standing & (self._merged(verdicts) + known)[0].bool()

    def known(self, pool: Pool, attack: str, part: Part) -> Tensor:
        """(2, N) int32 on the CPU: above 0 who stood a part in an earlier start, and who fell."""
        known = torch.zeros(2, len(pool.keys), dtype=torch.int32)
        found = self.ledger.found.get((attack, part.name), {})
        for row, key in enumerate(pool.keys):
            if key in found:
                known[0 if found[key] else 1, row] = 1
        return self._merged(known)

    def attacked(self, pool: Pool, rows: Tensor, part: Part) -> Tensor:
        """(n,) bool on the CPU: which rows stand a part; in halves where memory is short."""
        try:
            return self._attacked(pool, rows, part)
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
            self.num_at_once = max(1, self.num_at_once // 2)
        return torch.cat([self.attacked(pool, half, part) for half in torch.tensor_split(rows, 2)])

    def _attacked(self, pool: Pool, rows: Tensor, part: Part) -> Tensor:
        """`attacked`, all at once."""
        started = time.monotonic()
        images = unit_images(pool.images[rows.to(pool.images.device)]).contiguous()
        labels = pool.labels[rows.to(pool.labels.device)]
        if not self.is_examined:
            examine(self.queried, images, labels, self.log)
            self.is_examined = True  # not before: memory may be too short for so many
        points = part.perturb(images, labels).detach()
        with torch.no_grad():
            stands = is_correct(self.queried(points), labels).cpu()
        if part is not CLEAN:
            moved = points - images
            far = row_norms(moved) if norm_of(self.threat) == "L2" else moved.abs()
            self.log.info(
                f"{part.name} - {int((~stands).sum())} out of {len(rows)} successfully perturbed, "
                f"{time.monotonic() - started:.1f} s, max {norm_of(self.threat)} perturbation: "
                f"{float(far.max()):.5f}, nan: {int(points.isnan().sum())}, "
                f"max: {float(points.max()):.5f}, min: {float(points.min()):.5f}"
            )
        return stands

    def _merged(self, marks: Tensor) -> Tensor:
        """A sum over the ranks of a tensor on the CPU."""
        if self.world.size == 1:
            return marks
        return self.world.sum_(marks.to(self.world.device)).cpu()


def _gathered(batches: Iterator[Batch], num_bytes: int) -> list[Batch]:
    """The next minibatches of a rank, up to so many bytes of pixels; none at the end."""
    own: list[Batch] = []
    for batch in batches:
        if len(batch.labels):
            own.append(batch)
            num_bytes -= batch.images.numel()
        if num_bytes <= 0:
            break
    return own


def shared(own: Sequence[Batch], world: World) -> Pool:
    """Minibatches of all ranks as one pool on every rank; some ranks may have none."""
    device = world.device
    side = world.max_on_host(list(own[0].images.shape[1:]) if own else [0, 0, 0])
    images = torch.cat(
        [torch.empty(0, *side, dtype=torch.uint8, device=device), *(b.images for b in own)]
    )
    none = torch.empty(0, dtype=torch.int64, device=device)
    labels = torch.cat([none, *(batch.labels for batch in own)])
    indices = torch.cat([none, *(batch.indices.to(device) for batch in own)])
    if world.size > 1:
        sizes = torch.zeros(world.size, dtype=torch.int64, device=device)
        sizes[world.rank] = len(labels)
        counts = world.sum_(sizes).tolist()
        first = sum(counts[: world.rank])

        def from_all(values: Tensor) -> Tensor:
            whole = values.new_zeros(sum(counts), *values.shape[1:])
            whole[first : first + len(values)] = values
            return world.sum_(whole)

        images, labels, indices = from_all(images), from_all(labels), from_all(indices)
    order = indices.argsort(stable=True)
    images, labels = images[order], labels[order]
    return Pool(images, labels, keys_of(images, labels, indices[order]))
