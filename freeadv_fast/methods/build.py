"""What the trainer asks of an algorithm, and the algorithm that a config names."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.threat import ThreatModel
from freeadv_fast.methods.advprop import AdvProp
from freeadv_fast.methods.dat import Dat
from freeadv_fast.methods.elle import Elle
from freeadv_fast.methods.fast_advprop import FastAdvProp, Shuffle
from freeadv_fast.methods.fgsm import Fgsm
from freeadv_fast.methods.free import Free
from freeadv_fast.methods.gradalign import GradAlign
from freeadv_fast.methods.natural import Natural
from freeadv_fast.methods.passes import Passes
from freeadv_fast.methods.pgd import Pgd
from freeadv_fast.methods.trades import FreeTrades, Trades
from freeadv_fast.methods.yopo import Yopo
from freeadv_fast.step.learner import Learner


class TrainingMethod(Protocol):
    """What the trainer asks of an algorithm."""

    seeks_robustness: bool
    """Whether the best weights are those of highest robust accuracy, not of highest clean one."""

    def train_minibatch(self, images: Tensor, labels: Tensor, global_size: int) -> Passes:
        """Trains on one minibatch: images (n, H, W, 3) uint8, labels (n,) int64.

        `global_size` counts the minibatch's images over all ranks.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What outlives a minibatch, such as the perturbation; saved per rank."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a saved state."""
        ...


def build_method(
    config: TrainConfig,
    learner: Learner,
    device: torch.device,
    num_classes: int,
    shuffle: Shuffle | None = None,
) -> TrainingMethod:
    """The algorithm that a config names, bound to a learner.

    Args:
        config: The run.
        learner: The network in training; from now on it takes this config's minibatches.
        device: Where training runs.
        num_classes: Of the data.
        shuffle: Moves Fast AdvProp's adversarial images between batch-norm groups and ranks.
    """
    learner.minibatch_size = config.batch_size
    threat = config.threat
    if config.method == "pgd":
        return Pgd(
            learner,
            threat,
            attack_steps=config.attack_steps,
            start=config.attack_start,
            awp=config.awp,
        )
    if config.method == "trades":
        return Trades(
            learner,
            threat,
            attack_steps=config.attack_steps,
            beta=config.trades_beta,
            awp=config.awp,
        )
    assert isinstance(threat, ThreatModel)  # TrainConfig gives an L2 ball to these two only
    mixing: dict[str, Any] = {"kind_of_mix": config.mix, "mix_alpha": config.mix_alpha}
    buffer: dict[str, Any] = {
        "minibatch_shape": (config.update_size, config.image_size, config.image_size, 3),
        "device": device,
    }
    branches: dict[str, Any] = mixing | {
        "attack_steps": config.attack_steps,
        "uniform_start": config.attack_start == "uniform",
        "adv_weight": config.adv_weight,
        "sync_speed": config.sync_speed,
    }
    match config.method:
        case "natural":
            return Natural(learner, m=config.m, **mixing)
        case "free":
            return Free(learner, threat, m=config.m, **buffer)
        case "fgsm":
            return Fgsm(learner, threat, start="zero")
        case "fgsm-rs":
            return Fgsm(learner, threat, start="uniform")
        case "n-fgsm":
            return Fgsm(learner, threat, start="noisy", noise=config.noise_radius)
        case "gradalign":
            return GradAlign(
                learner,
                threat,
                weight=config.term_weight,
                every=config.reg_every,
                through=config.reg_through,
            )
        case "elle":
            return Elle(
                learner, threat, lambda_max=config.term_weight, adaptive=config.reg_adaptive
            )
        case "free-trades":
            return FreeTrades(learner, threat, m=config.m, beta=config.trades_beta, **buffer)
        case "yopo":
            return Yopo(
                learner, threat, outer_steps=config.attack_steps, inner_steps=config.yopo_inner
            )
        case "dat" if config.dat_attack == "fgsm":
            return Fgsm(learner, threat, start="uniform")
        case "dat":
            return Dat(
                learner,
                threat,
                attack_steps=config.attack_steps,
                mode=config.dat_mode,
                clean_weight=config.dat_clean_weight,
                has_marks=config.dat_unlabelled == "kl" and config.num_unlabelled > 0,
            )
        case "advprop":
            return AdvProp(
                learner,
                threat,
                num_classes=num_classes,
                p_adv=config.p_adv if config.decoupled else None,
                **branches,
            )
        case "fast-advprop":
            return FastAdvProp(
                learner,
                threat,
                p_adv=config.p_adv,
                noise_weight=config.noise_weight,
                shuffle=shuffle if config.shuffle else None,
                **branches,
            )
