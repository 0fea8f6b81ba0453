"""Free training and its natural twins: Shafahi et al. 2019, "Adversarial Training for Free!".

Numbers come from the paper where its text gives them and from the authors' code otherwise. Other
papers' recipes start from these three.
"""

from __future__ import annotations

from dataclasses import replace

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.schedule import Schedule
from freeadv_fast.config.threat import Perturbation

# Tables 1 and 2: WideResNet 32-10, 80,000 updates whatever m, eps 8. The authors' TensorFlow code:
# 2 px of padding, per-image standardisation, decay on convolution and linear kernels only.
CIFAR10 = TrainConfig(
    recipe="cifar10",
    data="cifar10:data",
    image_size=32,
    resize_size=32,
    augment="pad-crop-flip",
    crop_padding=2,
    arch="wrn-32-10",
    normalization="per-image",
    steps=80_000,
    batch_size=128,
    lr=0.1,
    schedule=Schedule.parse("steps:40000,60000"),
    weight_decay=2e-4,
    decay="kernels",
    m=8,
    eps=Perturbation.parse("8/255"),
    eval_attacks=("pgd-20", "pgd-100", "cw-100", "pgd-20-10"),
    eval_step=Perturbation.parse("2/255"),
)
CIFAR100 = replace(CIFAR10, data="cifar100:data", eval_attacks=("pgd-20", "pgd-100"))

# Tables 3 to 5: batch 256 on four GPUs, so 64 images share batch-norm statistics; the rate drops
# by 10 each ceil(30/m) epochs; decay on every parameter; attacks of step 1/255.
IMAGENET = TrainConfig(
    recipe="imagenet",
    data="imagenet",
    image_size=224,
    arch="resnet50",
    bn_group=64,
    epochs=90,
    batch_size=256,
    lr=0.1,
    schedule=Schedule.parse("every:30"),
    weight_decay=1e-4,
    m=4,
    eps=Perturbation.parse("2/255"),
    eval_attacks=("pgd-10", "pgd-50", "pgd-100"),
    eval_step=Perturbation.parse("1/255"),
)


def smoothed_and_averaged(config: TrainConfig) -> TrainConfig:
    """A recipe with smoothed labels and averaged weights, at the FastAT Benchmark's values."""
    return replace(config, label_smoothing=0.4, ema=0.9995)


def rows() -> dict[str, TrainConfig]:
    """Tables 1 to 5, figure 1, and section 4's comparison with YOPO."""
    rows = {}
    # Tables 1 and 2, free rows; the natural rows; figure 1, natural training with replay.
    for data, base, free_m in (
        ("cifar10", CIFAR10, (2, 4, 8, 10)),
        ("cifar100", CIFAR100, (2, 4, 6, 8, 10)),
    ):
        for m in free_m:
            rows[f"{data}-wrn32-free-m{m}"] = replace(base, m=m)
            # In no paper.
            rows[f"{data}-wrn32-free-m{m}-averaged"] = smoothed_and_averaged(replace(base, m=m))
        for m in (1, 2, 4, 8, 10):
            name = f"{data}-wrn32-natural" + (f"-replay-m{m}" if m > 1 else "")
            rows[name] = replace(base, method="natural", m=m)
    # Section 4's comparison with YOPO: WRN-34-10, batch 256, m = 10.
    rows["cifar10-wrn34-free-m10"] = replace(CIFAR10, arch="wrn-34-10", batch_size=256, m=10)
    # Table 3: ResNet-50 at eps 2.
    rows["imagenet-rn50-natural"] = replace(IMAGENET, method="natural", m=1)
    for m in (2, 4, 6, 8):
        rows[f"imagenet-rn50-free-m{m}-eps2"] = replace(IMAGENET, m=m)
    # Tables 4 and 5: eps 4, three depths.
    for depth in (50, 101, 152):
        rows[f"imagenet-rn{depth}-free-m4-eps4"] = replace(
            IMAGENET, arch=f"resnet{depth}", eps=Perturbation.parse("4/255")
        )
    return rows
