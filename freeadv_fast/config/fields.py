"""The fields of a run, one docstring each, and what follows from them.

The docstring under a field is its `--help` text. `run.TrainConfig` adds what makes a field's value
sure to be meant: reading, scaling, checking.
"""

from __future__ import annotations

import dataclasses
import math
import re
from fractions import Fraction
from typing import Literal, Self

from freeadv_fast.config.choices import (
    AttackLoss,
    AttackStart,
    Augment,
    Compress,
    DatAttack,
    DatMode,
    DatUnlabelled,
    Decay,
    Mix,
    Norm,
    Normalization,
    OnCollapse,
    OptimizerName,
    Precision,
    RegThrough,
    Switch,
)
from freeadv_fast.config.method_names import DUAL, REPLAYING, SECOND_ORDER, Method
from freeadv_fast.config.phases import Phases
from freeadv_fast.config.presets import PIXEL_STATISTICS, preset_lambda
from freeadv_fast.config.schedule import Schedule
from freeadv_fast.config.task_fields import TaskName, task_of
from freeadv_fast.config.threat import AnyThreatModel, L2ThreatModel, Perturbation, ThreatModel

DEFAULT_EPS = Perturbation.parse("4/255")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFields:
    """What a run is described by; `TrainConfig` is the one to use."""

    recipe: str = "custom"
    """Row of a paper's table to start from; `python -m freeadv_fast.recipes` lists them. Default:
    what --data and --method imply."""

    # The algorithm.
    method: Method = "free"
    """free: Algorithm 1 of "Adversarial Training for Free!". natural: ordinary training. fgsm,
    fgsm-rs, n-fgsm: one attack step from the image, from a point of the ball, from wider noise.
    gradalign, elle: fgsm with a term against catastrophic overfitting. pgd: K attack steps.
    trades, free-trades: clean accuracy against the distance of predictions. yopo: K passes with
    n cheap steps each. dat: clean and attacked images with one weight, for large batches.
    fast-advprop, advprop: adversarial examples that improve clean accuracy, through an
    auxiliary batch norm; with and without reuse of the attack's gradients."""
    m: int = 4
    """Minibatch replays: forward-backward passes on each minibatch before the next one is read.
    The number of epochs is divided by m, so that the cost does not depend on it."""
    eps: Perturbation = DEFAULT_EPS
    """Radius of the L-infinity ball around each image, such as 4/255. Natural training only uses
    it to attack the trained network."""
    step_size: Perturbation | None = None
    """Length of one ascent step on the perturbation, such as 4/255. Default: the paper's; eps for
    free and the single-step methods, 1.25 eps for fgsm-rs and dat's fgsm, 2.5 eps / K for pgd,
    trades and dat's pgd, eps / 4 for yopo."""
    attack_steps: int = 1
    """Steps K of the attack in each update: pgd, trades, dat's pgd, AdvProp's PGD-K (Fast AdvProp's
    is 1); K of yopo."""
    attack_start: AttackStart = "uniform"
    """Where the attack starts: at a uniform point of the ball, or zero, at the image itself."""
    attack_loss: AttackLoss = "sum"
    """What attacks that train a detector ascend: the sum of its losses, that of classes or of boxes
    alone, or for each image the stronger of these two, along which the sum rises faster
    (Det-AdvProp). The evaluation's ascend the sum."""
    attack_warmup: float = 0.0
    """Epochs over which the attack grows from nothing: the step of fgsm, fgsm-rs, n-fgsm and
    gradalign, the ball and the step of pgd. GradAlign's SVHN recipes take 5."""
    noise_radius: float = 2.0
    """Radius of n-fgsm's noise in units of eps."""
    reg_lambda: float | None = None
    """Weight of gradalign's or elle's term. Default: gradalign's value for CIFAR-10 at this eps,
    and 4000 for elle."""
    reg_every: int = 2
    """Updates from one of gradalign's terms to the next; the weight grows as much."""
    reg_through: RegThrough = "second"
    """Gradients that gradalign differentiates: the second, as the authors' code does, or both, as
    the paper's text says."""
    reg_adaptive: bool = True
    """elle's weight is 0 until the loss is suddenly less linear; then it is --reg-lambda and decays
    by 0.99 an update (ELLE-A)."""
    trades_beta: float = 6.0
    """Weight of the distance between clean and adversarial predictions in trades."""
    awp: float = 0.0
    """Adversarial weight perturbation of pgd and trades: weights descend the loss where each tensor
    has moved up it by this share gamma of its length, at the price of the loss's passes once more.
    0 for none; Wu et al. 2020 take 0.01 for pgd and 0.005 for trades."""
    yopo_inner: int = 3
    """Steps n through the first layer in each of yopo's K passes."""
    dat_attack: DatAttack = "pgd"
    """DAT's attack: pgd trains on clean images and on those that K steps have moved; fgsm on those
    of one step from a random start alone, as the authors' code does."""
    dat_mode: DatMode = "eval"
    """Batch norm of dat's pgd attacks: running statistics (eval), as the authors' code does, or
    those of the attacked images (train)."""
    dat_clean_weight: float = 1.0
    """Weight lambda of the clean images' loss in dat's pgd."""
    dat_unlabelled: DatUnlabelled = "pseudo-labels"
    """What dat asks of unlabelled images: their pseudo labels, as the authors' code does, or, as
    the paper's text says, that clean and attacked predictions agree (kl)."""
    norm: Norm = "linf"
    """Ball of pgd and trades: linf or l2."""
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
    (the official python files), svhn:FOLDER (the official .mat files), digits (embedded real
    handwritten digits), or synthetic:CLASSES (random pixels, for benchmarks only). For detectors
    coco:FOLDER (annotations/ beside the images, as COCO's archives) or shapes (embedded synthetic
    shapes)."""
    image_size: int = 224
    """Side of the square images that the network sees, in pixels; with --phases, the last one's.
    A detector sees whole images, their shorter side so long unless the longer one would exceed
    1333/800 of it."""
    resize_size: int | None = None
    """Shorter side to which evaluation images are resized before the central crop; 0 for none: the
    crop is cut out of the stored image. Default: image-size * 256/224."""
    augment: Augment = "random-resized-crop"
    """Training crops: random-resized-crop (with flip, torchvision's distribution), pad-crop-flip,
    pad-crop (without flip, for digits and letters),
    or none (the evaluation's resize and central crop); of detectors flip or none."""
    crop_padding: int = 4
    """Pixels of zero padding on each side before the random crop of pad-crop and pad-crop-flip."""
    mix: Mix = "none"
    """Mix pairs of clean training images: mixup, cutmix or none (natural and the AdvProps)."""
    mix_alpha: float | None = None
    """Both parameters of the Beta distribution of the mixture. Default: 0.2 mixup, 1 cutmix."""
    label_smoothing: float = 0.0
    """Share of each label that is spread evenly over all classes, in the losses that train weights
    and in the logs; in [0, 1). Attacks of free, yopo, fast-advprop, the fgsm family and dat's fgsm
    ascend the smoothed loss, those of pgd, dat's pgd, gradalign, elle and advprop the plain one."""
    unlabelled: str | None = None
    """More images to train on beside those of --data, with pseudo labels instead of true ones: the
    pickle of Carmon et al. (data, extrapolated_targets) or an .npz with image and label, such as
    EDM's. For dat, pgd and trades."""
    unlabelled_fraction: float = 0.5
    """Share of each minibatch that --unlabelled fills. An epoch is one pass over --data."""
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
    """Network by name: torchvision's and timm's names, wrn-28-10, wrn-32-10, wrn-34-10,
    preact-resnet18, preact-resnet18-gradalign, and with a 3x3 stem cifar-resnet18 and
    cifar-resnet50. Detectors: retinanet_resnet50_fpn and retinanet_resnet50_fpn_v2 (torchvision's),
    retinanet_resnet18_fpn, retinanet_resnet10_fpn_64."""
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
    fuse: Switch = "auto"
    """Batch norm, residual addition and ReLU as one kernel, and a 7x7 stem as a 4x4 convolution in
    space-to-depth layout. auto: both on a GPU with Triton, the stem alone for free training on a
    CPU, neither for methods with second derivatives."""
    graphs: Switch = "auto"
    """One CUDA graph launch per update. auto: on GPUs, but not with --mix; over several ranks
    after a trial beside the eager update, and not with --compress."""
    init_from: str | None = None
    """Weights to start from: a checkpoint of ours or a plain state dict. Nothing else is read."""

    # The optimizer.
    epochs: float = 90
    """Passes over the data; for the methods that promise natural training's price, its budget:
    free-m makes ceil(epochs / m) passes, Fast AdvProp epochs / (1 + p_adv K), AdvProp
    epochs / (K + 2)."""
    steps: int | None = None
    """Budget in optimizer updates, whatever m; replaces --epochs (the CIFAR recipes: 80000).
    The last minibatch is replayed to its end."""
    batch_size: int = 256
    """Images per minibatch on each rank (GPU), Fast AdvProp's two shares together. The global size
    is printed at the start. With --phases, the last one's."""
    accumulate: int = 1
    """Minibatches that a rank adds up to one update. Each is a batch of its own to batch norm and
    attack; schedule, replays and log count updates."""
    phases: Phases = Phases()
    """Image and batch size by epochs of the natural budget, such as
    0-6:128:512,6-12:224:224,12-15:288:128 (epochs:side:batch on each rank); none for one of each.
    The best weights are chosen anew in each phase; the last one's side is evaluated."""
    phase_data: tuple[str, ...] = ()
    """Folders that hold the training images of each phase, separated by commas, such as smaller
    copies of --data, whose validation images are evaluated. Default: --data for every phase."""
    lr: float = 0.1
    """Peak learning rate."""
    schedule: Schedule = Schedule.parse("every:30")
    """Learning rate over the run. every:30 divides it by 10 each ceil(30/m) data epochs; at:30,60
    at these epochs of the natural budget; steps:40000,60000 at these updates; linear:0.4 rises
    from 0 to --lr at 40 % of the updates and falls back to 0; onecycle:0.3 is torch's OneCycleLR,
    which is at --lr after 30 % of the updates, and onecycle-epochs:0.3 steps once a data epoch;
    piecewise:0=0,1=1,6=0.1 draws lines
    between these factors of --lr at these epochs of the natural budget; constant."""
    warmup_epochs: float = 0.0
    """Epochs of the natural budget, the first of --epochs, over which the learning rate rises to
    --lr in a straight line; --schedule begins where they end."""
    momentum: float = 0.9
    """Momentum of SGD; beta_1 of lalr."""
    weight_decay: float = 1e-4
    """L2 penalty on the weights."""
    decay: Decay = "all"
    """Parameters under weight decay: all, only convolution and linear kernels, or no-bn for all but
    batch norm's."""
    optimizer: OptimizerName = "sgd"
    """sgd is torch's SGD, fused on a GPU; sgd-foreach torch's foreach operations and apex-sgd the
    kernel of NVIDIA's apex, both for comparison. lalr: layer-wise adaptive rates for large batches,
    Adam's direction at the length of each tensor."""
    lalr_min: float = 0.0
    """Lower bound c_l of a tensor's norm in lalr's step."""
    lalr_max: float = 10.0
    """Upper bound c_u of a tensor's norm in lalr's step."""
    lalr_exempt: bool = False
    """lalr moves batch norm's parameters and biases by Adam's direction at --lr itself. The
    authors' code does so only while they are zero; afterwards their rate falls to next to
    nothing."""
    ema: float | None = None
    """Keep an average of the weights beside them that forgets by this factor with each update, such
    as 0.9995, and evaluate and export both. Held-out images choose among averages then. Default: no
    average."""
    compress: Compress = "none"
    """Average gradients over ranks in one byte an element, both ways: bucket scales 512 of them by
    their largest magnitude, paper a whole tensor by its L2 norm, which zeroes nearly all of a large
    one. It pays between machines on slow networks only (docs/large-batches.md)."""
    max_passes: int | None = None
    """Stop after this many images forwarded and backwarded for the weights, over all ranks, at the
    next minibatch boundary. The schedule stays that of --epochs; evaluation follows."""

    # The run.
    seed: int = 0
    """Seed of weights, order, crops and evaluation starts."""
    output_dir: str | None = None
    """Folder of this run. Default: runs/METHOD-DATA-ARCH-mM-epsE-seedS."""
    resume: bool = False
    """Continue the run in FOLDER, or in --output-dir, from its newest intact checkpoint. Its own
    config.yaml is what flags are on top of: --epochs, --max-passes, the evaluation, --workers and
    where --data are may change."""
    checkpoint_every: float = 600
    """Seconds between checkpoints within an epoch; each epoch's end saves one too."""
    log_every: int = 50
    """Minibatches between two lines of log.jsonl."""

    # The guard against catastrophic overfitting, for the methods that seek robustness.
    guard_every: int | None = None
    """Minibatches between two checks of robust accuracy and gradient alignment on held-out images;
    0 for none. Default: as many as keep the checks at 1 % of the passes."""
    guard_images: int | None = None
    """Held-out images of a check, evenly spaced over them. Default: 64, or all where there are
    fewer."""
    on_collapse: OnCollapse = "stop"
    """What follows when robust accuracy collapses. Each goes back to the last good state; stop ends
    the training there, restore goes on at half the learning rate (the same run would collapse the
    same way), gradalign goes on with GradAlign. A third collapse stops the run in any case."""

    # The evaluation.
    eval_attacks: tuple[str, ...] = ("pgd-10", "pgd-50")
    """Attacks on the trained network, such as pgd-50 (50 steps), pgd-50-10 (10 restarts), cw-100
    (margin loss), apgd-ce-100 (steps that adapt) or autoattack, separated by commas."""
    eval_step: Perturbation = Perturbation.parse("1/255").chosen_in(DEFAULT_EPS, "linf")
    """Step of the evaluation's attacks. Default: the recipe's, in proportion to --eps."""
    eval_corruptions: tuple[str, ...] = ()
    """Corruptions under which a detector is evaluated, separated by commas: names of COCO-C's 15 or
    all, each at its five severities, or such as fog-3 for one of them; none for none. Default: the
    recipe's."""
    eval_images: int | None = None
    """Validation images to attack, evenly spaced over the set; a detector is evaluated on these
    alone. Default: all; 400 without a GPU."""
    export: Literal["last", "best"] = "last"
    """Weights to export: the last ones, whose accuracies are the result, or those that held-out
    images chose."""

    def as_recipe(self, name: str) -> Self:
        """The same run under a recipe's name; its steps are those chosen for its ball."""
        return dataclasses.replace(
            self,
            recipe=name,
            step_size=self.step_size and self.step_size.chosen_in(self.eps, self.norm),
            eval_step=self.eval_step.chosen_in(self.eps, self.norm),
        )

    def phase_config(self, number: int) -> Self:
        """A phase as a run of its own, on its own training images.

        Its evaluation resizes in the proportion of the run's --resize-size, or by default.
        """
        phase, resize = self.phases[number], self.resize_size
        if phase.image_size != self.image_size:
            resize = round(resize * phase.image_size / self.image_size) if resize else None
        return dataclasses.replace(
            self,
            data=self.phase_data[number] if self.phase_data else self.data,
            image_size=phase.image_size,
            resize_size=resize,
            batch_size=phase.batch_size,
            phases=Phases(),
            phase_data=(),
        )

    @property
    def phase_configs(self) -> tuple[Self, ...]:
        """Each phase as a run of its own; without --phases the run itself."""
        if not self.phases:
            return (self,)
        return tuple(self.phase_config(number) for number in range(len(self.phases)))

    @property
    def phase_ends(self) -> tuple[int, ...]:
        """The data epoch at which each phase ends; the last is `data_epochs`."""
        ends = [phase.end for phase in self.phases] or [self.epochs]
        return tuple(self._data_epochs_of(end) for end in ends)

    @property
    def task(self) -> TaskName:
        """Whether the network classifies or detects."""
        return task_of(self.arch)

    @property
    def longest_side(self) -> int:
        """Longest side of a detector's image in pixels: 1333 where the shorter one is 800."""
        return round(self.image_size * 1333 / 800)

    @property
    def is_second_order(self) -> bool:
        """Whether training differentiates a gradient, or may come to do so after a collapse."""
        return self.method in SECOND_ORDER or self.on_collapse == "gradalign"

    @property
    def is_recordable(self) -> bool:
        """Whether an update can become a CUDA graph; mixtures are drawn on the host."""
        return self.mix == "none"

    @property
    def can_pack_input(self) -> bool:
        """Whether the network's input may be in space-to-depth layout.

        Not where something else than the stem reads it as an image: per-image standardisation, L2
        steps, mixtures, YOPO's first layer, a detector's padding.
        """
        return (
            self.task == "classification"
            and self.normalization != "per-image"
            and self.norm == "linf"
            and self.mix == "none"
            and self.method != "yopo"
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
    def update_size(self) -> int:
        """Images of a rank in one update: all its minibatches."""
        return self.accumulate * self.batch_size

    @property
    def num_unlabelled(self) -> int:
        """Unlabelled images of a rank in one update: round(fraction * images), or none."""
        return round(self.unlabelled_fraction * self.update_size) if self.unlabelled else 0

    @property
    def cost(self) -> float:
        """Epochs of the budget that one pass over the data takes; --epochs is divided by it.

        The papers that promise the price of natural training count so: m for free-m, 1 + p_adv K
        for Fast AdvProp and decoupled AdvProp, K + 2 for AdvProp. The others' epochs are passes
        over the data.
        """
        if self.method in REPLAYING:
            return self.m
        if self.method not in DUAL:
            return 1
        return 1 + self.p_adv * self.attack_steps if self.is_split else 2 + self.attack_steps

    @property
    def weight_passes(self) -> float:
        """Passes per image of the data whose gradient moves the weights."""
        match self.method:
            case "trades" | "free-trades":
                return 2 * self.m
            case "elle":  # three points for the linearity of the loss
                return 4
            case "yopo":
                return self.attack_steps
            case "dat":
                return 2 if self.dat_attack == "pgd" else 1
            case "fast-advprop":
                return self.cost
            case "advprop":
                return 1 if self.decoupled else 2
        return self.m

    @property
    def threat(self) -> AnyThreatModel:
        """The training threat model; the step is the paper's unless given.

        Free AT, GradAlign and N-FGSM step by eps, FGSM-RS and DAT-FGSM by 1.25 eps, YOPO by
        eps / 4; 2.5 eps / K (Madry et al.'s code for MNIST, TRADES' 2/255 at eps 8/255 and K 10)
        lets PGD reach every point of the ball.
        """
        share = Fraction(1)
        match self.method:
            case "fgsm-rs":
                share = Fraction(5, 4)
            case "dat" if self.dat_attack == "fgsm":
                share = Fraction(5, 4)
            case "pgd" | "trades" | "dat":
                share = Fraction(5, 2 * self.attack_steps)
            case "yopo":
                share = Fraction(1, 4)
        step = self.step_size or Perturbation(self.eps.levels * share)
        kind = L2ThreatModel if self.norm == "l2" else ThreatModel
        return kind(self.eps, step)

    @property
    def evaluation_threat(self) -> AnyThreatModel:
        """The ball of training, walked in steps of --eval-step."""
        kind = L2ThreatModel if self.norm == "l2" else ThreatModel
        return kind(self.eps, self.eval_step)

    @property
    def term_weight(self) -> float:
        """lambda of GradAlign's or ELLE's term."""
        if self.reg_lambda is not None:
            return self.reg_lambda
        if self.method == "elle":
            return 4000.0  # lambda_max of ELLE-A, Abad Rocamora et al. 2024
        return preset_lambda("cifar10", float(self.eps.levels))

    @property
    def data_epochs(self) -> int:
        """Passes over the data that --epochs pays for."""
        return self._data_epochs_of(self.epochs)

    def _data_epochs_of(self, epochs: float) -> int:
        """Passes over the data that so many epochs of the natural budget pay for; at least one.

        Free AT's code: ceil(epochs / m). Fast AdvProp, tables 1 and 4: epochs / cost to the nearest
        number, halves down (105 at 1 + 1/9, 1.2, 1 + 1/3, 1.5 are 94, 87, 79, 70).
        """
        if self.method in REPLAYING:
            return math.ceil(epochs / self.m)
        return max(1, math.ceil(epochs / self.cost - 0.5 - 1e-9))

    @property
    def evaluation_resize(self) -> int:
        """Shorter side of an evaluation image before the central crop, in pixels; 0: as stored."""
        if self.resize_size is None:
            return round(self.image_size * 256 / 224)
        return self.resize_size

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
        arch = re.sub(r"^custom \((.+)\)$", r"custom-\1", self.arch)  # so named by `models.own`
        return f"runs/{self.method}-{data}-{arch}{replays}-eps{eps}-seed{self.seed}"
