"""A small network, and the files in which others would save it."""

from __future__ import annotations

import timm
import torch
from torch import nn

from freeadv_fast.config.file import config_to_dict
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.models.zoo import build_model

MEAN, STD = (0.47, 0.45, 0.38), (0.26, 0.25, 0.24)
TINY = "timm/test_resnet"
SIDE = 16


def tiny(num_classes=3):
    """A network of 0.4 M parameters with running statistics of its own."""
    torch.manual_seed(num_classes)
    network = timm.create_model("test_resnet", num_classes=num_classes)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 1)
    return network.eval()


def prefixed(weights, prefix):
    return {f"{prefix}{key}": value for key, value in weights.items()}


def statistics(mean_key, std_key, shape=(1, 3, 1, 1)):
    return {mean_key: torch.tensor(MEAN).view(shape), std_key: torch.tensor(STD).view(shape)}


def madry(weights):
    """MadryLab's robustness: AttackerModel in DataParallel, its attacker a second time."""
    twin = prefixed(weights, "module.attacker.model.")
    normalizers = statistics("module.normalizer.new_mean", "module.normalizer.new_std", (3, 1, 1))
    wrong = {
        "module.attacker.normalize.new_mean": torch.zeros(3, 1, 1),
        "module.attacker.normalize.new_std": torch.ones(3, 1, 1),
    }
    model = wrong | twin | normalizers | prefixed(weights, "module.model.")
    return {"model": model, "optimizer": {"state": {}}, "schedule": None, "epoch": 105}


# Files that hold what normalises their input.
NORMALIZED = {
    "RobustBench": lambda w: statistics("normalize.mean", "normalize.std") | prefixed(w, "model."),
    "RobustBench, in ranks": lambda w: {
        "state_dict": prefixed(
            statistics("normalize.mean", "normalize.std") | prefixed(w, "model."), "module."
        )
    },
    "MadryLab": madry,
    "a Sequential": lambda w: statistics("0.mean", "0.std") | prefixed(w, "1."),
    "mu and sigma": lambda w: {"state_dict": statistics("mu", "sigma") | w},
}
# Files that do not: --mean and --std say it.
BARE = {
    "a bare state dict": lambda w: w,
    "RobustBench, without": lambda w: {"state_dict": prefixed(w, "module.")},
    "Free AT and Fast AT, ImageNet": lambda w: {
        "epoch": 30,
        "arch": "resnet50",
        "state_dict": prefixed(w, "module."),
        "best_prec1": torch.tensor(43.4),
        "optimizer": {},
    },
    "timm": lambda w: {"arch": "x", "state_dict": w, "state_dict_ema": dict.fromkeys(w, 0)},
    "GradAlign": lambda w: {"last": w, "best": {key: value + 1 for key, value in w.items()}},
}


def own_checkpoint(path, normalization):
    """What a run of ours saves."""
    config = TrainConfig(
        method="natural", m=1, arch=TINY, image_size=SIDE, normalization=normalization
    )
    torch.manual_seed(0)
    standardize = normalization == "per-image"
    model = build_model(TINY, 3, image_size=SIDE, per_image_standardize=standardize).eval()
    classes = [f"class{i}" for i in range(3)]
    saved = {"arch": TINY, "classes": classes, "config": config_to_dict(config)}
    torch.save(saved | {"model": model.state_dict(), "progress": {}}, path)
    return model
