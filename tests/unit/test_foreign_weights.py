"""Weights that others saved: their wrappings, their prefixes, their classes, their code."""

from __future__ import annotations

import argparse
import types

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.errors import UserError
from freeadv_fast.models.zoo import build_model
from freeadv_fast.runs.checkpoint import load_checkpoint, load_weights
from freeadv_fast.runs.foreign import printable
from freeadv_fast.session.network import build_network

ARCH = "resnet18"


@pytest.fixture(scope="module")
def stock():
    """torchvision's network for ten classes, with weights of its own."""
    torch.manual_seed(5)
    return torchvision.models.resnet18(num_classes=10).state_dict()


def fresh(num_classes=10, **options):
    torch.manual_seed(0)
    return build_model(ARCH, num_classes, image_size=32, **options)


def prefixed(weights, prefix):
    return {f"{prefix}{key}": value for key, value in weights.items()}


def twice(weights):
    """MadryLab: the network, and the network inside its attacker, each beside a normaliser."""
    mean, std = (torch.rand(3, 1, 1) for _ in range(2))
    wrong = {key: value + 1 for key, value in weights.items()}
    attacker = prefixed(wrong, "module.attacker.model.")
    normaliser = {"module.normalizer.new_mean": mean, "module.attacker.normalize.new_std": std}
    return attacker | prefixed(weights, "module.model.") | normaliser


STATISTICS = {"normalize.mean": torch.rand(1, 3, 1, 1), "normalize.std": torch.rand(1, 3, 1, 1)}

# How others save; each is a function of torchvision's state dict.
LAYOUTS = {
    "a bare state dict": lambda w: w,
    "torchvision's and timm's reference scripts": lambda w: {"model": w, "epoch": 3},
    "examples/imagenet": lambda w: {"state_dict": prefixed(w, "module."), "best_acc1": 3.0},
    "model_state_dict": lambda w: {"model_state_dict": w, "optimizer_state_dict": {}},
    "kuangliu's pytorch-cifar": lambda w: {"net": prefixed(w, "module."), "acc": 93.0},
    "an average alone": lambda w: {"state_dict_ema": w},
    "trained before its average": lambda w: {
        "state_dict_ema": {key: value + 1 for key, value in w.items()},
        "state_dict": w,
    },
    "wrapped twice": lambda w: {"model": {"state_dict": {"model": w}, "epoch": 1}},
    "torch.compile": lambda w: prefixed(w, "_orig_mod."),
    "compiled ranks": lambda w: prefixed(w, "module._orig_mod."),
    "compiled layers": lambda w: {
        key.replace("layer1.", "layer1._orig_mod."): value for key, value in w.items()
    },
    "Lightning": lambda w: {"state_dict": prefixed(w, "model."), "hparams_name": "args"},
    "Lightning, compiled": lambda w: {"state_dict": prefixed(w, "model._orig_mod.")},
    "MadryLab": lambda w: {"model": twice(w), "epoch": 150},
    "RobustBench": lambda w: STATISTICS | prefixed(w, "model."),
    "statistics beside the weights": lambda w: w | {"mean": torch.rand(3), "std": torch.rand(3)},
    "a Sequential with a normaliser": lambda w: {"0.mean": torch.rand(3)} | prefixed(w, "1."),
    "a name of the user's own": lambda w: prefixed(w, "student.backbone."),
    "before torch 0.4.1": lambda w: {k: v for k, v in w.items() if "num_batches" not in k},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_known_wrappings_and_prefixes_are_unwrapped(tmp_path, stock, layout):
    path = tmp_path / "weights.pth"
    torch.save(LAYOUTS[layout](dict(stock)), path)
    model = fresh()
    assert load_weights(model, load_checkpoint(path), ARCH, "--init-from x") == []
    loaded = model.state_dict()
    for key, value in stock.items():
        if "num_batches" not in key:
            assert torch.equal(loaded[key], value), key


@pytest.mark.parametrize("layout", ["a bare state dict", "MadryLab", "Lightning"])
def test_behind_a_per_image_standardiser_too(stock, layout):
    """Its network's names are ``model.conv1.weight``: a prefix that others use as well."""
    model = fresh(per_image_standardize=True)
    load_weights(model, LAYOUTS[layout](dict(stock)), ARCH, "--init-from x")
    for key, value in model.model.state_dict().items():
        assert torch.equal(value, stock[key]), key


def test_safetensors_too(tmp_path, stock):
    path = tmp_path / "weights.safetensors"
    save_file(STATISTICS | prefixed({k: v.clone() for k, v in stock.items()}, "model."), path)
    model = fresh()
    load_weights(model, load_checkpoint(path), ARCH, "--init-from x")
    assert torch.equal(model.state_dict()["fc.weight"], stock["fc.weight"])
    path.write_bytes(b"\x1b[31m no tensors")
    with pytest.raises(UserError, match="damaged or not a checkpoint") as caught:
        load_checkpoint(path)
    assert str(caught.value).isprintable()


def test_a_script_s_arguments_are_no_code(tmp_path, stock):
    """argparse.Namespace, as Free AT, Fast AT and many others save it, and numpy's numbers."""
    arguments = argparse.Namespace(lr=0.1, steps=[1, 2], nested=types.SimpleNamespace(a=1))
    state = {"args": arguments, "state_dict": stock, "best": np.float64(3.5), "n": np.int64(3)}
    torch.save(state, tmp_path / "weights.pt")
    loaded = load_checkpoint(tmp_path / "weights.pt")
    assert loaded["args"].lr == 0.1
    assert (loaded["best"], loaded["n"]) == (3.5, 3)
    load_weights(fresh(), loaded, ARCH, "--init-from x")
    old = tmp_path / "old.pt"
    torch.save(state, old, _use_new_zipfile_serialization=False)
    load_weights(fresh(), load_checkpoint(old), ARCH, "--init-from x")


class Touch:
    """What an attacker's checkpoint would do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("is_zip", [True, False])
def test_what_only_code_can_load_is_refused_by_name(tmp_path, stock, is_zip):
    options = {"_use_new_zipfile_serialization": is_zip}
    path, touched = tmp_path / "weights.pt", tmp_path / "touched"
    torch.save({"state_dict": stock, "extra": Touch(touched)}, path, **options)
    with pytest.raises(UserError, match=r"--init-from .*: holds .*open, which only running") as one:
        load_checkpoint(path, "--init-from")
    assert not touched.exists()
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    torch.save(network, path, **options)
    with pytest.raises(UserError, match=r"holds .*torch\.nn\.modules\.") as two:
        load_checkpoint(path, "--init-from")
    for caught in (one, two):
        assert str(caught.value).isprintable()
        assert "torch.save(model.state_dict(), FILE)" in str(caught.value)


def test_a_torchscript_program_is_called_one(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "net.pt")
    with pytest.raises(UserError, match="holds a TorchScript program"):
        load_checkpoint(tmp_path / "net.pt")


def test_no_terminal_escape_reaches_the_terminal(tmp_path, stock):
    path = tmp_path / "weights.pt"
    torch.save(stock | {"\x1b[31mred\x1b[0m\nkey": torch.zeros(1)}, path)
    with pytest.raises(UserError) as caught:
        load_weights(fresh(), load_checkpoint(path), "resnet18", "--init-from x")
    assert str(caught.value).isprintable()
    torch.save({"arch": "\x1b]0;title\x07", "model": {"x": torch.zeros(1)}}, path)
    with pytest.raises(UserError) as caught:
        load_weights(fresh(), load_checkpoint(path), "resnet18", "--init-from x")
    assert str(caught.value).isprintable()
    assert printable("\x1b[1mbold\x1b[0m\nsecond") == "bold"
    assert len(printable("x" * 1000)) == 200


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda w: w.update({"conv1.weight": torch.zeros(64, 3, 3, 3)}),
         "conv1.weight is (64, 3, 3, 3) there and (64, 3, 7, 7) here"),
        (lambda w: w.pop("layer2.0.conv1.weight"), "layer2.0.conv1.weight is missing"),
        (lambda w: w.update({"layer5.weight": torch.zeros(1)}), "layer5.weight has no place here"),
        (lambda w: w.update({"fc.weight": torch.zeros(7, 512), "fc.bias": torch.zeros(7)}),
         "fc.weight is (7, 512) there and (10, 512) here"),
    ],
)  # fmt: skip
def test_the_first_tensor_that_does_not_fit_is_named(stock, change, complaint):
    weights = dict(stock)
    change(weights)
    with pytest.raises(UserError) as caught:
        load_weights(fresh(), {"model": weights}, ARCH, "--checkpoint x")
    assert str(caught.value) == (
        f"--checkpoint x: belongs to another network, not --arch {ARCH} with these classes "
        f"({complaint})"
    )


def test_a_deeper_network_is_not_taken_for_this_one():
    """resnet34 holds every name of resnet18, with the same shapes."""
    deeper = torchvision.models.resnet34(num_classes=10).state_dict()
    with pytest.raises(UserError, match="holds resnet34, not --arch resnet18"):
        load_weights(fresh(), {"arch": "resnet34", "model": deeper}, ARCH, "--init-from x")


SOURCES = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=1000),
    "squeezenet1_1": lambda: torchvision.models.squeezenet1_1(num_classes=1000),
    "timm/resnet18": lambda: timm.create_model("resnet18"),
    "timm/vit_tiny_patch16_224": lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=32, num_classes=1000
    ),
    "googlenet": lambda: torchvision.models.googlenet(init_weights=False),  # auxiliary classifiers
}


@pytest.mark.parametrize("arch", ["resnet18", "squeezenet1_1", "timm/resnet18",
                                  "timm/vit_tiny_patch16_224", "googlenet"])  # fmt: skip
def test_a_head_of_another_width_starts_afresh(tmp_path, arch, capsys):
    """Fine-tuning from torchvision and timm: the classifier is new, with a line."""
    source = SOURCES[arch]().state_dict()
    path = tmp_path / "weights.pth"
    torch.save(source, path)
    side = 64 if arch == "squeezenet1_1" else 32
    config = TrainConfig(method="natural", m=1, arch=arch, image_size=side, init_from=str(path))
    torch.manual_seed(1)
    model = build_network(config, list("abcdefg"), is_fresh=True)
    printed = capsys.readouterr().out
    assert printed.startswith(f"--init-from {path}: is for 1,000 classes, here are 7; ")
    assert printed.count("\n") == 1
    torch.manual_seed(1)
    start = build_model(arch, 7, image_size=side).state_dict()
    afresh = [key for key, value in model.state_dict().items() if value.shape != source[key].shape]
    assert 1 <= len(afresh) <= 2
    for key, value in model.state_dict().items():
        expected = start[key] if key in afresh else source[key]
        assert torch.equal(value, expected), key
        assert key not in afresh or key in printed


def test_only_fine_tuning_leaves_a_head_out(tmp_path, stock):
    """A run that is evaluated must be what was trained."""
    with pytest.raises(UserError, match=r"fc\.weight is \(10, 512\) there and \(7, 512\) here"):
        load_weights(fresh(7), {"model": stock}, ARCH, "--checkpoint x")
    body = dict(stock) | {"conv1.weight": torch.zeros(64, 3, 3, 3)}
    with pytest.raises(UserError, match=r"conv1\.weight is"):
        load_weights(fresh(7), {"model": body}, ARCH, "--init-from x", is_fine_tuned=True)


class Own(nn.Module):
    """A network whose own names look like wrappings, and which keeps more than tensors."""

    def __init__(self):
        super().__init__()
        self.module = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1))
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(4, 5))
        self.count = 0

    def forward(self, images):
        return self.model(self.module(images))

    def get_extra_state(self):
        return {"count": self.count}

    def set_extra_state(self, state):
        self.count = state["count"]


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
def test_names_of_the_user_s_own_are_no_wrappings(prefix):
    trained, model = Own(), Own()
    trained.count = 7
    load_weights(model, {"model": prefixed(trained.state_dict(), prefix)}, "custom (Own)", "x")
    assert model.count == 7
    for key in ("module.0.weight", "model.1.bias"):
        assert torch.equal(model.state_dict()[key], trained.state_dict()[key])
