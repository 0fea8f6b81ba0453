"""The words that a run's fields may be set to, beside the methods (`method_names`)."""

from __future__ import annotations

from typing import Literal

Augment = Literal["random-resized-crop", "pad-crop-flip", "pad-crop", "flip", "none"]
Normalization = Literal["imagenet", "cifar10", "cifar100", "symmetric", "per-image", "none"]
AttackStart = Literal["uniform", "zero"]
AttackLoss = Literal["sum", "classification", "box", "stronger"]
Norm = Literal["linf", "l2"]
Mix = Literal["none", "mixup", "cutmix"]
RegThrough = Literal["second", "both"]
DatAttack = Literal["pgd", "fgsm"]
DatMode = Literal["eval", "train"]
DatUnlabelled = Literal["pseudo-labels", "kl"]
Decay = Literal["all", "kernels", "no-bn"]
OptimizerName = Literal["sgd", "sgd-foreach", "apex-sgd", "lalr"]
Compress = Literal["none", "paper", "bucket"]
OnCollapse = Literal["stop", "restore", "gradalign"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Switch = Literal["auto", "on", "off"]
