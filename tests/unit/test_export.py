"""Exports load where others would load them, with equal logits."""

from __future__ import annotations

import json

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file

import freeadv_fast.models.normalize
import freeadv_fast.models.zoo
from freeadv_fast.errors import UserError
from freeadv_fast.models.normalize import with_normalizer
from freeadv_fast.models.zoo import build_model
from freeadv_fast.runs.export.network import export_model, load_export

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES = [f"digit {i}" for i in range(10)]


def trained(arch, image_size=32, **options):
    """A network with running statistics of its own."""
    torch.manual_seed(0)
    model = build_model(arch, 10, image_size=image_size, **options)
    model = model.to(memory_format=torch.channels_last)
    with torch.no_grad():
        for _ in range(3):
            model(torch.rand(4, 3, image_size, image_size))
    return model


def export(model, folder, arch, mean=MEAN, std=STD, image_size=32):
    return export_model(
        model, folder / "export", arch=arch, classes=CLASSES, mean=mean, std=std,
        image_size=image_size, resize_size=40,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arch", "build"),
    [
        ("resnet18", lambda: torchvision.models.resnet18(num_classes=10)),
        ("timm/resnet18", lambda: timm.create_model("resnet18", num_classes=10)),
    ],
)
def test_plain_file_loads_into_the_stock_network(tmp_path, arch, build):
    model = trained(arch, bn_group=2)
    folder = export(model, tmp_path, arch)
    stock = build()
    stock.load_state_dict(load_file(folder / "model.safetensors"))
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(stock.eval()(x), model.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ["resnet18", "preact-resnet18", "timm/vit_tiny_patch16_224"])
def test_normalised_file_takes_pixels(tmp_path, arch):
    model = trained(arch)
    loaded = load_export(export(model, tmp_path, arch))
    assert not loaded.training
    pixels = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        expected = with_normalizer(model.eval(), MEAN, STD)(pixels)
        torch.testing.assert_close(loaded(pixels), expected, rtol=1e-5, atol=1e-5)


def test_per_image_standardisation_survives(tmp_path):
    model = trained("preact-resnet18", per_image_standardize=True)
    folder = export(model, tmp_path, "preact-resnet18", mean=(0, 0, 0), std=(1, 1, 1))
    config = json.loads((folder / "config.json").read_text())
    assert config["per_image_standardization"] is True
    pixels = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        expected = model.eval()(pixels)
        torch.testing.assert_close(load_export(folder)(pixels), expected, rtol=1e-5, atol=1e-5)
    plain = build_model("preact-resnet18", 10, image_size=32)
    plain.load_state_dict(load_file(folder / "model.safetensors"))


def test_keys_of_both_files(tmp_path):
    folder = export(trained("resnet18"), tmp_path, "resnet18")
    plain = load_file(folder / "model.safetensors")
    wrapped = load_file(folder / "model_with_normalizer.safetensors")
    assert set(plain) == set(torchvision.models.resnet18().state_dict())
    assert set(wrapped) == {"normalize.mean", "normalize.std"} | {f"model.{key}" for key in plain}
    assert wrapped["normalize.mean"].shape == (1, 3, 1, 1)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "model.safetensors", "model_with_normalizer.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("resnet18", {}),
        ("timm/vit_tiny_patch16_224", {}),
        ("preact-resnet18-gradalign", {"per_image_standardize": True}),
    ],
)
def test_the_lines_in_the_config_work(tmp_path, monkeypatch, arch, options):
    model = trained(arch, **options)
    folder = export(model, tmp_path, arch)
    config = json.loads((folder / "config.json").read_text())
    assert config["class_names"] == CLASSES
    assert (config["image_size"], config["resize_size"], config["num_classes"]) == (32, 40, 10)
    monkeypatch.chdir(folder)
    pixels = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    import safetensors.torch

    for file, lines in config["load"].items():
        names = {
            "freeadv_fast": freeadv_fast, "mean": mean, "pixels": pixels, "std": std,
            "safetensors": safetensors, "timm": timm, "torchvision": torchvision,
        }  # fmt: skip
        with torch.no_grad():
            exec("\n".join(lines), names)
            network = model.eval()
            if file != "model.safetensors" or not options:
                network = with_normalizer(network, MEAN, STD)
            torch.testing.assert_close(names["logits"], network(pixels), rtol=1e-4, atol=1e-4)


def test_what_is_not_an_export_is_refused(tmp_path):
    with pytest.raises(UserError, match="not an export"):
        load_export(tmp_path)
    folder = export(trained("resnet18"), tmp_path, "resnet18")
    (folder / "model_with_normalizer.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="damaged export"):
        load_export(folder)
    folder = export(trained("resnet18"), tmp_path, "resnet18")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_classes": 7}))
    with pytest.raises(UserError, match=r"fc\.weight is \(10, 512\) there and \(7, 512\) here"):
        load_export(folder)
    for content in ("{}", "[]", "7"):
        (folder / "config.json").write_text(content)
        with pytest.raises(UserError, match=r"config\.json is not an export's"):
            load_export(folder)
