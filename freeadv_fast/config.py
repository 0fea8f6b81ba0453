"""The complete description of a run: one frozen dataclass, one docstring a field.

The docstring under a field is its `--help` text. A config is never changed; derive a new one with
`dataclasses.replace`, or read the properties at the end of `TrainConfig`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

from freeadv_fast.attacks import Attack
from freeadv_fast.errors import UserError
from freeadv_fast.mixing import Mix
from freeadv_fast.schedule import Schedule
from freeadv_fast.threat import Perturbation, ThreatModel

Method = Literal["natural", "free", "fast-advprop", "advprop"]
METHODS: tuple[Method, ...] = get_args(Method)
Augment = Literal["random-resized-crop", "pad-crop-flip", "none"]
Normalization = Literal["imagenet", "cifar10", "cifar100", "symmetric", "per-image", "none"]

# Methods that replay a minibatch, and methods with a second batch-norm branch.
REPLAYING: tuple[Method, ...] = ("natural", "free")
DUAL: tuple[Method, ...] = ("fast-advprop", "advprop")
AttackStart = Literal["uniform", "zero"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]

# Without a GPU a full evaluation takes hours; 400 images and 20 steps take minutes.
CPU_EVAL_ATTACKS = ("pgd-20",)
CPU_EVAL_IMAGES = 400

# Per-channel mean and standard deviation of the training pixels in [0, 1].
PIXEL_STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
    # Pixels in [-1, 1]: AdvProp's code.
    "symmetric": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    # The network standardises each image itself (models.zoo), under autograd.
    "per-image": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run, from the data to the final evaluation."""

    recipe: str = "custom"
    """Name of the recipe that this run started from; recorded in result.json."""

    # The algorithm.
    method: Method = "free"
    """free: Algorithm 1 of "Adversarial Training for Free!". natural: ordinary training.
    fast-advprop, advprop: adversarial examples that improve clean accuracy, through an auxiliary
    batch norm; with and without reuse of the attack's gradients."""
    m: int = 4
    """Minibatch replays: forward-backward passes on each minibatch before the next one is read.
    The number of epochs is divided by m, so that the cost does not depend on it."""
    eps: Perturbation = Perturbation.parse("4/255")
    """Radius of the L-infinity ball around each image, such as 4/255. Natural training only uses
    it to attack the trained network."""
    step_size: Perturbation | None = None
    """Length of one ascent step on the perturbation, such as 4/255. Default: eps, as in the
    paper."""
    attack_steps: int = 1
    """Steps K of the attack in each update (AdvProp's PGD-K; Fast AdvProp's is 1)."""
    attack_start: AttackStart = "uniform"
    """Where the attack starts: at a uniform point of the ball, or zero, at the image itself."""
    p_adv: float = 0.2
    """Share of each minibatch that Fast AdvProp and decoupled AdvProp attack; the rest is the
    clean share."""
    decoupled: bool = False
    """AdvProp attacks the share --p-adv and trains on the rest as it is, instead of training on
    every image clean and attacked."""
    noise_weight: float = 0.5
    """Weight of an image of Fast AdvProp's noise pass; a clean image weighs 1."""
    adv_weight: float = 0.5
    """Weight of an adversarial image of Fast AdvProp and AdvProp; a clean image weighs 1."""
    sync_speed: bool = True
    """Divide each parameter's gradient by the images that it saw (Fast AdvProp, section 4.3)
    instead of by all images."""
    shuffle: bool = True
    """Shuffle Fast AdvProp's adversarial images over batch-norm groups and ranks, so that labels do
    not leak from the noise pass."""

    # The data.
    data: str = "digits"
    """ImageFolder with train/ and val/ (one folder a class), or cifar10:FOLDER, cifar100:FOLDER
    (the official python files), digits (embedded real handwritten digits), or synthetic:CLASSES
    (random pixels, for benchmarks only)."""
    image_size: int = 224
    """Side of the square images that the network sees, in pixels."""
    resize_size: int | None = None
    """Shorter side to which evaluation images are resized before the central crop.
    Default: image-size * 256/224."""
    augment: Augment = "random-resized-crop"
    """Training crops: random-resized-crop (with flip, torchvision's distribution), pad-crop-flip,
    or none (the evaluation's resize and central crop)."""
    crop_padding: int = 4
    """Pixels of zero padding on each side before the random crop of pad-crop-flip."""
    mix: Mix = "none"
    """Mix pairs of clean training images: mixup, cutmix or none (natural and the AdvProps)."""
    mix_alpha: float | None = None
    """Both parameters of the Beta distribution of the mixture. Default: 0.2 mixup, 1 cutmix."""
    workers: int = 4
    """Threads (DALI) or processes (torchvision) that decode images, per rank."""
    max_bad_fraction: float = 0.001
    """Share of the image files that may be empty, truncated or not images. They are listed and
    left out; above this share the run refuses to start."""
    holdout_images: int | None = None
    """Training images held out to choose the best checkpoint by robust accuracy; 0 for none.
    Default: 1000, at most a tenth of the training images; without a GPU 400 are attacked."""

    # The network.
    arch: str = "resnet50"
    """Network by name: torchvision's and timm's names, wrn-32-10, wrn-34-10, preact-resnet18,
    preact-resnet18-gradalign."""
    normalization: Normalization = "imagenet"
    """Pixel statistics of the network's input. symmetric: mean and std 0.5. per-image: each image
    by its own mean and standard deviation, inside the network."""
    bn_group: int | None = None
    """Images that share batch-norm statistics. 64 reproduces the paper's 4-GPU run on one GPU.
    Default: the whole minibatch of a rank."""
    aux_bn_group: int = 16
    """Images that share statistics in the auxiliary batch norm. 16 beside a main group of 64
    reproduces Fast AdvProp's 4-GPU run."""
    precision: Precision = "auto"
    """Arithmetic of the network: auto is bf16 on GPUs that have it, fp16 on older ones and fp32 on
    a CPU. Weights, loss and statistics are fp32 in any case."""
    init_from: str | None = None
    """Weights to start from: a checkpoint of ours or a plain state dict. Nothing else is read."""

    # The optimizer.
    epochs: float = 90
    """Natural budget: free-m makes ceil(epochs / m) passes over the data, Fast AdvProp
    epochs / (1 + p_adv K), AdvProp epochs / (K + 2)."""
    steps: int | None = None
    """Budget in optimizer updates, whatever m; replaces --epochs (the CIFAR recipes: 80000).
    The last minibatch is replayed to its end."""
    batch_size: int = 256
    """Images per minibatch on each rank (GPU), Fast AdvProp's two shares together. The global size
    is printed at the start."""
    lr: float = 0.1
    """Peak learning rate of SGD."""
    schedule: Schedule = Schedule.parse("every:30")
    """Learning rate over the run. every:30 divides it by 10 each ceil(30/m) data epochs; at:30,60
    at these epochs of the natural budget; steps:40000,60000 at these updates; linear:0.4 rises
    from 0 to --lr at 40 % of the updates and falls back to 0; constant."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 1e-4
    """L2 penalty on the weights."""
    decay: Literal["all", "kernels"] = "all"
    """Parameters under weight decay: all, or only convolution and linear kernels."""
    max_passes: int | None = None
    """Stop after this many images forwarded and backwarded for the weights, over all ranks, at the
    next minibatch boundary. The schedule stays that of --epochs; evaluation follows."""

    # The run.
    seed: int = 0
    """Seed of weights, order, crops and evaluation starts."""
    output_dir: str | None = None
    """Folder of this run. Default: runs/METHOD-DATA-ARCH-mM-epsE-seedS."""
    resume: bool = False
    """Continue the run in --output-dir from its newest intact checkpoint."""
    checkpoint_every: float = 600
    """Seconds between checkpoints within an epoch; each epoch's end saves one too."""
    log_every: int = 50
    """Minibatches between two lines of log.jsonl."""

    # The evaluation.
    eval_attacks: tuple[str, ...] = ("pgd-10", "pgd-50")
    """Attacks on the trained network, such as pgd-50 (50 steps), pgd-50-10 (10 restarts) or
    cw-100 (margin loss), separated by commas."""
    eval_step: Perturbation = Perturbation.parse("1/255")
    """Step of the evaluation's attacks."""
    eval_images: int | None = None
    """Validation images to attack, evenly spaced over the set. Default: all; 400 without a GPU."""

    def __post_init__(self) -> None:
        """Checks every field on its own and against the others.

        Raises:
            UserError: names the flag and the fix.
        """
        if self.method not in METHODS:
            raise UserError(f"--method {self.method}: choose one of {', '.join(METHODS)}")
        if self.m < 1:
            raise UserError(f"--m {self.m}: must be at least 1")
        if self.m > 1 and self.method not in REPLAYING:
            raise UserError(f"--m {self.m}: {self.method} does not replay minibatches; use --m 1")
        if self.batch_size < 2:
            raise UserError(f"--batch-size {self.batch_size}: must be at least 2 for batch norm")
        if self.image_size < 8:
            raise UserError(f"--image-size {self.image_size}: must be at least 8 pixels")
        if self.resize_size is not None and self.resize_size < self.image_size:
            raise UserError(
                f"--resize-size {self.resize_size}: smaller than --image-size {self.image_size}; "
                "the central crop would not fit"
            )
        for flag, optional in (
            ("--steps", self.steps),
            ("--max-passes", self.max_passes),
            ("--bn-group", self.bn_group),
            ("--eval-images", self.eval_images),
        ):
            if optional is not None and optional < 1:
                raise UserError(f"{flag} {optional}: must be at least 1")
        for flag, number in (
            ("--lr", self.lr),
            ("--epochs", self.epochs),
            ("--noise-weight", self.noise_weight),
            ("--adv-weight", self.adv_weight),
            ("--mix-alpha", 1.0 if self.mix_alpha is None else self.mix_alpha),
        ):
            if not (math.isfinite(number) and number > 0):
                raise UserError(f"{flag} {number:g}: must be a positive number")
        for flag, number in (
            ("--weight-decay", self.weight_decay),
            ("--checkpoint-every", self.checkpoint_every),
        ):
            if not (math.isfinite(number) and number >= 0):
                raise UserError(f"{flag} {number:g}: must be zero or a positive number")
        if not 0 <= self.momentum < 1:
            raise UserError(f"--momentum {self.momentum:g}: must be at least 0 and below 1")
        if not 0 <= self.max_bad_fraction < 1:
            raise UserError(
                f"--max-bad-fraction {self.max_bad_fraction:g}: must be at least 0 and below 1"
            )
        for flag, count in (
            ("--workers", self.workers),
            ("--holdout-images", self.holdout_images or 0),
            ("--crop-padding", self.crop_padding),
            ("--seed", self.seed),
        ):
            if count < 0:
                raise UserError(f"{flag} {count}: cannot be negative")
        if self.seed >= 2**63:
            raise UserError(f"--seed {self.seed}: must be below 2^63")
        if self.workers > 512:
            raise UserError(f"--workers {self.workers}: more than 512 on one rank cannot be meant")
        if self.log_every < 1:
            raise UserError(f"--log-every {self.log_every}: must be at least 1")
        for flag, group in (("--bn-group", self.bn_group), ("--aux-bn-group", self.aux_bn_group)):
            if group is not None and group < 2:
                raise UserError(f"{flag} {group}: statistics need at least 2 images")
        if self.attack_steps < 1:
            raise UserError(f"--attack-steps {self.attack_steps}: must be at least 1")
        for name in self.eval_attacks:  # a misspelt one should not be found after training
            Attack.parse(name)
        if self.mix != "none" and self.method == "free":
            raise UserError(f"--mix {self.mix}: not for free training; leave it out")
        if self.method != "natural" and self.threat.eps.levels == 0:
            raise UserError(f"--eps 0: {self.method} needs a radius above 0, such as 4/255")
        if self.method != "natural" and self.threat.step.levels == 0:
            raise UserError(f"--step-size 0: {self.method} needs a step above 0, such as 4/255")
        if self.is_split:
            self._check_shares()

    def _check_shares(self) -> None:
        """Checks the two shares of a minibatch.

        Raises:
            UserError: names the flag and the fix.
        """
        if not 0 < self.p_adv < 1:
            raise UserError(f"--p-adv {self.p_adv:g}: must be above 0 and below 1, such as 0.2")
        num_adv, size = self.num_adversarial, self.batch_size
        if not 2 <= num_adv <= size - 2:
            raise UserError(
                f"--p-adv {self.p_adv:g}: {num_adv} adversarial and {size - num_adv} clean of "
                f"--batch-size {size} images; each share needs at least 2"
            )
        if num_adv < self.aux_bn_group:
            raise UserError(
                f"--aux-bn-group {self.aux_bn_group}: larger than the {num_adv} adversarial images "
                f"of --batch-size {size}; use --aux-bn-group {num_adv} or a larger batch"
            )

    @property
    def has_branches(self) -> bool:
        """Whether the network has an auxiliary batch norm."""
        return self.method in DUAL

    @property
    def is_split(self) -> bool:
        """Whether a minibatch is divided into a clean and an adversarial share."""
        return self.method == "fast-advprop" or (self.method == "advprop" and self.decoupled)

    @property
    def num_adversarial(self) -> int:
        """Adversarial images of a rank's minibatch: round(p_adv * batch), or all of them."""
        return round(self.p_adv * self.batch_size) if self.is_split else self.batch_size

    @property
    def cost(self) -> float:
        """Forward-backward passes per image of the data, the attack's included.

        That is what an epoch costs in epochs of natural training, and what --epochs is divided by:
        m for free-m, 1 + p_adv K for Fast AdvProp and decoupled AdvProp, K + 2 for AdvProp.
        """
        if self.method in REPLAYING:
            return self.m
        return 1 + self.p_adv * self.attack_steps if self.is_split else 2 + self.attack_steps

    @property
    def weight_passes(self) -> float:
        """Of `cost`, the passes whose gradient moves the weights."""
        if self.method == "advprop":
            return 1.0 if self.decoupled else 2.0
        return self.cost

    @property
    def threat(self) -> ThreatModel:
        """The training threat model; the step is eps unless given (paper, Algorithm 1)."""
        return ThreatModel(self.eps, self.step_size or self.eps)

    @property
    def data_epochs(self) -> int:
        """Passes over the data that --epochs pays for; at least one.

        Free AT's code: ceil(epochs / m). Fast AdvProp, tables 1 and 4: epochs / cost to the nearest
        number, halves down (105 at 1 + 1/9, 1.2, 1 + 1/3, 1.5 are 94, 87, 79, 70).
        """
        if self.method in REPLAYING:
            return math.ceil(self.epochs / self.m)
        return max(1, math.ceil(self.epochs / self.cost - 0.5 - 1e-9))

    @property
    def evaluation_resize(self) -> int:
        """Shorter side of an evaluation image before the central crop, in pixels."""
        return self.resize_size or round(self.image_size * 256 / 224)

    @property
    def pixel_mean(self) -> tuple[float, ...]:
        """Per-channel mean subtracted from pixels in [0, 1]."""
        return PIXEL_STATISTICS[self.normalization][0]

    @property
    def pixel_std(self) -> tuple[float, ...]:
        """Per-channel standard deviation that divides pixels in [0, 1]."""
        return PIXEL_STATISTICS[self.normalization][1]

    @property
    def run_folder(self) -> str:
        """The output folder, or the name that says what the run is."""
        if self.output_dir is not None:
            return self.output_dir
        data = self.data.rstrip("/").rsplit("/", 1)[-1].replace(":", "-")
        eps = f"{float(self.eps.levels):g}"
        replays = f"-m{self.m}" if self.method in REPLAYING else ""
        return f"runs/{self.method}-{data}-{self.arch}{replays}-eps{eps}-seed{self.seed}"
