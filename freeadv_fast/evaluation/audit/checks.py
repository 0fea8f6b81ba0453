"""The checks, each a question that an honest network answers with yes.

They are those of Carlini et al. 2019, "On Evaluating Adversarial Robustness" (sections 4 and 5),
most of which Athalye et al. 2018, "Obfuscated Gradients Give a False Sense of Security", section
3.1, found broken defences to fail: gradients that are masked make attacks weak, not networks
robust. A network that passes is not proved robust by it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freeadv_fast.config.attack import Attack
from freeadv_fast.config.threat import (
    AnyThreatModel,
    L2ThreatModel,
    Perturbation,
    ThreatModel,
    row_norms,
)
from freeadv_fast.errors import UserError
from freeadv_fast.evaluation.attacks import (
    cross_entropy,
    is_correct,
    logits_of,
    perturb,
    project,
    random_point,
)
from freeadv_fast.evaluation.audit.paired import TOLERANCE, Paired
from freeadv_fast.evaluation.autoattack.package import load_package, norm_of
from freeadv_fast.evaluation.sample import Sample
from freeadv_fast.runs.chance import wilson_interval

# The attack that the others are compared with, five times its steps, and five starts of it.
BASE, MORE_STEPS, RESTARTS = map(Attack.parse, ("pgd-20", "pgd-100", "pgd-20-5"))
ONE_STEP = Attack.parse("pgd-1")
# From an image to any other: 32 of these steps cross the range of pixels.
UNBOUNDED = ThreatModel(Perturbation(Fraction(255)), Perturbation(Fraction(8)))
UNBOUNDED_ATTACK = Attack.parse("pgd-50")
NOISE_DRAWS = 20
# A fifth of the standard Square attack: most images that it fools at all fall early.
SQUARE_QUERIES = 1000
# Logits of one image at two times: rounding moves them by less than this share of the largest.
ROUNDING = 1e-3


@dataclasses.dataclass(frozen=True)
class Check:
    """What was asked of a network, and what came out.

    Attributes:
        name: A word for tables.
        question: What is asked; yes is good.
        is_passed: The answer; None where it could not be asked.
        measured: One line of numbers, or why there are none.
        meaning: One line: what a no would mean.
    """

    name: str
    question: str
    is_passed: bool | None
    measured: str
    meaning: str


class Trial:
    """A network under audit, and who of its images has fallen so far.

    Attributes:
        fooled: (n,) bool, images that `BASE` fools.
        fooled_by_any: (n,) bool, images that any PGD here has fooled.

    Args:
        network: Network of (n, 3, H, W) pixels in [0, 1], in eval mode.
        sample: n images that it classifies right.
        threat: Ball and step of the accuracy that is audited.
        seed: Seed of the random starts and of noise.
    """

    def __init__(
        self, network: nn.Module, sample: Sample, threat: AnyThreatModel, seed: int
    ) -> None:
        """Runs the base attack."""
        self.network, self.sample, self.threat, self.seed = network, sample, threat, seed
        self.fooled = self.attack(network, BASE, self.starts())
        self.fooled_by_any = self.fooled

    @property
    def num_images(self) -> int:
        """Images, all of which the network classifies right."""
        return len(self.sample.labels)

    def generator(self) -> torch.Generator:
        """A new source of the same noise."""
        return torch.Generator(self.sample.images.device).manual_seed(self.seed)

    def starts(self) -> Iterator[Tensor]:
        """The random start of each restart: the same ones for every attack."""
        generator = self.generator()
        while True:
            yield self.sample.images + random_point(self.sample.images, self.threat, generator)

    def attack(
        self,
        network: nn.Module,
        attack: Attack,
        starts: Iterator[Tensor],
        *,
        threat: AnyThreatModel | None = None,
        is_standing: Tensor | None = None,
    ) -> Tensor:
        """(n,) bool, the images that an attack fools.

        Args:
            network: Whose gradients; the audited one, whose answers count then, or another.
            attack: Steps and restarts.
            starts: Each restart's start.
            threat: Ball and step; the trial's own by default.
            is_standing: (n,) bool, those to attack; all by default.
        """
        if is_standing is None:
            is_standing = torch.ones_like(self.sample.labels, dtype=torch.bool)
        return perturb(
            network,
            self.sample.images,
            self.sample.labels,
            attack=attack,
            threat=threat or self.threat,
            starts=starts,
            is_standing=is_standing,
            at_once=self.sample.at_once,
        ).is_fooled

    def misreads(self, points: Tensor) -> Tensor:
        """(n,) bool: points that the network misclassifies."""
        logits = logits_of(self.network, points, self.sample.at_once)
        return ~is_correct(logits, self.sample.labels)

    def share(self, fooled: Tensor) -> str:
        """``12 of 40``."""
        return f"{int(fooled.sum())} of {self.num_images}"


def has_slope(trial: Trial) -> Check:
    """Asks whether the loss has a gradient where attacks begin.

    The loss is the attack's, which does not underflow; how many gradients the plain cross entropy
    loses in float32 is told as well, for attacks elsewhere follow that one.
    """
    flat: list[Tensor] = []
    underflown: list[Tensor] = []
    for images, labels in _parts(trial.sample):
        points = images.detach().requires_grad_()
        with torch.enable_grad():
            logits = trial.network(points)
            losses = cross_entropy(logits, labels), _plain_cross_entropy(logits, labels)
        for loss, found in zip(losses, (flat, underflown), strict=True):
            (gradient,) = torch.autograd.grad(loss, points, retain_graph=True)
            largest = gradient.abs().amax((1, 2, 3))
            found.append((largest == 0) | ~largest.isfinite())
    is_flat = torch.cat(flat)
    measured = f"gradient zero or not finite at {trial.share(is_flat)} images"
    num_underflown = int((torch.cat(underflown) & ~is_flat).sum())
    if num_underflown:
        measured += f"; at {num_underflown} more where plain cross entropy underflows"
    return Check(
        "gradients",
        "Has the loss a slope at the images?",
        is_flat.float().mean().item() <= TOLERANCE,
        measured,
        "PGD cannot move, and what stands under it proves nothing (rounding, saturation)",
    )


def is_deterministic(trial: Trial) -> Check:
    """Asks whether the same images get the same logits twice."""
    first, second = (
        logits_of(trial.network, trial.sample.images, trial.sample.at_once) for _ in range(2)
    )
    moved = ((first - second).abs().amax() / first.abs().amax().clamp_min(1e-12)).item()
    return Check(
        "deterministic",
        "Does an image get the same logits twice?",
        moved <= ROUNDING,
        f"logits differ by {moved:.1e} of the largest",
        "attacks chase one draw of a random network; they must average over draws (EOT)",
    )


def one_step_is_weaker(trial: Trial) -> Check:
    """Asks whether one step as long as the radius fools fewer images than many steps."""
    whole = dataclasses.replace(trial.threat, step=trial.threat.eps)
    fooled = trial.attack(trial.network, ONE_STEP, iter([trial.sample.images]), threat=whole)
    return Check(
        "one step",
        "Are many steps stronger than one?",
        not Paired.of(fooled, trial.fooled).is_beyond_chance,
        f"one step fools {trial.share(fooled)}, {BASE} {int(trial.fooled.sum())}",
        "many steps are led astray: gradients near the image are masked",
    )


def noise_is_weaker(trial: Trial) -> Check:
    """Asks whether random perturbations of full size fool fewer images than gradients do."""
    generator = trial.generator()
    fooled = torch.zeros_like(trial.fooled)
    for _ in range(NOISE_DRAWS):
        points = trial.sample.images + _noise(trial.sample.images, trial.threat, generator)
        fooled |= trial.misreads(project(points, trial.sample.images, trial.threat))
    return Check(
        "noise",
        "Is PGD stronger than random noise of full size?",
        not Paired.of(fooled, trial.fooled).is_beyond_chance,
        f"{NOISE_DRAWS} draws fool {trial.share(fooled)}, {BASE} {int(trial.fooled.sum())}",
        "gradients point nowhere: they are masked",
    )


def more_steps_do_not_matter(trial: Trial) -> Check:
    """Asks whether five times the steps, from the same starts, fool the same images."""
    fooled = trial.attack(trial.network, MORE_STEPS, trial.starts())
    trial.fooled_by_any = trial.fooled_by_any | fooled
    return Check(
        "more steps",
        f"Does {BASE} find what {MORE_STEPS} finds?",
        not Paired.of(fooled, trial.fooled).is_beyond_chance,
        f"{MORE_STEPS} fools {trial.share(fooled)}, {BASE} {int(trial.fooled.sum())}",
        "the attack has not converged: measure with more steps, or longer ones",
    )


def restarts_do_not_matter(trial: Trial) -> Check:
    """Asks whether further random starts leave standing what the first has left."""
    starts = trial.starts()
    next(starts)  # the base attack's own
    rest = dataclasses.replace(RESTARTS, restarts=RESTARTS.restarts - 1)
    fooled = trial.attack(trial.network, rest, starts, is_standing=~trial.fooled)
    trial.fooled_by_any = trial.fooled_by_any | fooled
    return Check(
        "restarts",
        f"Does one start find what {RESTARTS.restarts} find?",
        not Paired.of(fooled, trial.fooled).is_beyond_chance,
        f"{RESTARTS} fools {trial.share(fooled)}, {BASE} {int(trial.fooled.sum())}",
        "the loss has many hills: measure with restarts, and doubt the gradients",
    )


def transfer_is_weaker(trial: Trial, surrogates: Mapping[str, nn.Module]) -> Check:
    """Asks whether points crafted on other networks fool fewer images than the network's own.

    Args:
        trial: The audited network.
        surrogates: Name to a network of pixels in [0, 1], in eval mode.
    """
    question = "Are the network's own gradients stronger than another network's?"
    meaning = "another network's gradients know more than its own: those are masked"
    if not surrogates:
        return Check("transfer", question, None, "no other run of these data is beside it", meaning)
    fooled = torch.zeros_like(trial.fooled)
    for network in surrogates.values():
        points = perturb(
            network.to(trial.sample.images.device),
            trial.sample.images,
            trial.sample.labels,
            attack=BASE,
            threat=trial.threat,
            starts=trial.starts(),
            # Whether the other network is right plays no part: all images are attacked.
            is_standing=torch.ones_like(trial.fooled),
            at_once=trial.sample.at_once,
        ).images
        fooled |= trial.misreads(points)
    return Check(
        "transfer",
        question,
        not Paired.of(fooled, trial.fooled).is_beyond_chance,
        f"{BASE} on {' and '.join(surrogates)} fools {trial.share(fooled)}, "
        f"its own {int(trial.fooled.sum())}",
        meaning,
    )


def square_finds_nothing(trial: Trial) -> Check:
    """Asks whether a search without gradients leaves standing what PGD has left.

    Andriushchenko et al. 2020, "Square Attack".
    """
    question = "Does PGD find what a search without gradients finds?"
    meaning = "a search without gradients fools what gradients do not: they are masked"
    try:
        build = load_package("square").SquareAttack
    except UserError as error:
        return Check("square", question, None, str(error), meaning)
    rows = (~trial.fooled_by_any).nonzero().squeeze(1)
    search = build(
        trial.network,
        norm=norm_of(trial.threat),
        n_queries=SQUARE_QUERIES,
        eps=float(trial.threat.eps),
        seed=trial.seed,
        device=trial.sample.images.device,
    )
    # The package takes views, which channels_last has none of.
    points = trial.sample.images.clone(memory_format=torch.contiguous_format)
    with torch.random.fork_rng(), torch.no_grad():
        for part in rows.split(trial.sample.at_once):
            points[part] = search.perturb(points[part], trial.sample.labels[part])
    fooled = trial.misreads(points) & ~trial.fooled_by_any
    return Check(
        "square",
        question,
        not Paired.of(fooled, torch.zeros_like(fooled)).is_beyond_chance,
        f"{SQUARE_QUERIES:,} queries fool {int(fooled.sum())} of the {len(rows)} that PGD left",
        meaning,
    )


def falls_without_bound(trial: Trial) -> Check:
    """Asks whether hardly an image stands where any image is allowed.

    The attack begins at the image: in so large a ball a random start would be noise, which fools
    anything, gradients or not.
    """
    starts = iter([trial.sample.images])
    fooled = trial.attack(trial.network, UNBOUNDED_ATTACK, starts, threat=UNBOUNDED)
    lowest, _ = wilson_interval(1 - fooled.float().mean().item(), trial.num_images)
    return Check(
        "unbounded",
        "Does everything fall at eps 255/255?",
        lowest <= TOLERANCE,
        f"{trial.share(~fooled)} stand under {UNBOUNDED_ATTACK} from the image",
        "whatever is shown, images stand: gradients are masked, or it knows one class only",
    )


def _parts(sample: Sample) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels, so many at once."""
    yield from zip(
        sample.images.split(sample.at_once), sample.labels.split(sample.at_once), strict=True
    )


def _plain_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss whose float32 gradient is 0 once a label leads by more than 103."""
    return F.cross_entropy(logits, labels, reduction="sum")


def _noise(images: Tensor, threat: AnyThreatModel, generator: torch.Generator) -> Tensor:
    """Random perturbations of full size: corners of the cube, or points of the sphere."""
    noise = torch.empty_like(images).normal_(generator=generator)
    unit = noise / row_norms(noise) if isinstance(threat, L2ThreatModel) else noise.sign()
    return unit * float(threat.eps)
