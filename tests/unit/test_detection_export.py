"""A detector's export loads into torchvision; what is for classifiers refuses it in one line."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import get_args

import pytest
import safetensors.torch
import torch
import torchvision

import freeadv_fast.models.retinanet
from freeadv_fast.config.choices import AttackLoss
from freeadv_fast.config.file import config_to_yaml
from freeadv_fast.errors import UserError
from freeadv_fast.evaluation.audit.run import audit_run
from freeadv_fast.evaluation.detection.corruptions import CORRUPTIONS
from freeadv_fast.evaluation.pictures.draw import draw_pictures
from freeadv_fast.evaluation.shifts.robustness import evaluate_robustness
from freeadv_fast.models.batch_norm import add_auxiliary_bn
from freeadv_fast.models.retinanet import build_detector
from freeadv_fast.recipes.catalogue import RECIPES
from freeadv_fast.runs.export.again import export_for, export_run
from freeadv_fast.runs.export.detector import builder_lines, export_detector
from freeadv_fast.runs.export.detector_card import threat_model
from freeadv_fast.runs.export.network import load_export
from freeadv_fast.runs.export.trained import withdraw
from freeadv_fast.runs.saved import load_run
from freeadv_fast.sweep import run_sweep

CLASSES = ["circle", "square", "star"]
CONFIG = dataclasses.replace(RECIPES["shapes-fast-advprop"], image_size=128)
CLEAN = {"AP": 0.358, "AP50": 0.55, "AP75": 0.38, "APs": None, "APm": 0.4, "APl": 0.5, "AR100": 0.5}
DETECTION = {
    "clean": CLEAN, "per_class": {}, "attacks": {"pgd-10": CLEAN | {"AP": 0.123}},
    "corruptions": {"fog": {"1": 0.3, "3": 0.2}}, "mean_corrupted": 0.19, "relative": 0.531,
    "is_benchmark": False, "num_images": 200,
}  # fmt: skip
RECORD = {
    "detection": DETECTION, "ranks": 1, "device": "EPYC",
    "versions": {"freeadv_fast": "1", "torch": "2"}, "train_seconds": 60.0, "epochs": 12.0,
    "passes": 9, "attack_passes": 2, "precision": "float32",
}  # fmt: skip


@pytest.fixture(scope="module")
def detector():
    """With running statistics of its own, an auxiliary branch, and something to find."""
    torch.manual_seed(0)
    model = build_detector(CONFIG.arch, len(CLASSES))
    torch.nn.init.normal_(model.head.classification_head.cls_logits.weight, std=1.0)
    torch.nn.init.zeros_(model.head.classification_head.cls_logits.bias)
    with torch.no_grad():
        model(torch.rand(2, 3, 64, 64))
    add_auxiliary_bn(model, None)
    return model.eval()


@pytest.fixture
def run(tmp_path, detector):
    """The folder of a run that trained it."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(config_to_yaml(CONFIG))
    state = {"model": detector.state_dict(), "classes": CLASSES, "arch": CONFIG.arch}
    torch.save(state, folder / "checkpoints" / "last.pt")
    return folder


def export(model, folder, **options):
    options = {"record": None, "config": CONFIG} | options
    return export_detector(model, folder, classes=CLASSES, **options)


def code_of(card):
    return re.search(r"```python\n(.*?)```", card, re.S)[1]


def test_the_card_s_lines_find_what_the_detector_finds(tmp_path, monkeypatch, detector):
    folder = export(detector, tmp_path / "export", category_ids=[1, 3, 7])
    monkeypatch.chdir(folder)
    pixels = torch.rand(3, 128, 128)  # torchvision neither resizes nor pads it
    names = {"pixels": pixels}
    with torch.no_grad():
        exec(code_of((folder / "README.md").read_text()), names)
        mean, std = (torch.tensor(v)[:, None, None] for v in (CONFIG.pixel_mean, CONFIG.pixel_std))
        x = ((pixels - mean) / std)[None]
        outputs = detector(x)
        stock = names["model"]
        assert type(stock) is torchvision.models.detection.RetinaNet
        theirs = stock.head(list(stock.backbone(x).values()))
    torch.testing.assert_close(theirs["cls_logits"], outputs.class_logits)
    torch.testing.assert_close(theirs["bbox_regression"], outputs.box_deltas)
    (own,) = detector.predictions(outputs, torch.tensor([[128, 128]]))
    assert len(own["boxes"]) > 10
    for key, value in own.items():
        torch.testing.assert_close(names["found"][key], value, rtol=1e-4, atol=1e-3)
    config = json.loads((folder / "config.json").read_text())
    assert (config["class_names"], config["category_ids"]) == (CLASSES, [1, 3, 7])
    assert (config["image_size"], config["longest_side"], config["eps"]) == (128, 213, "1/255")


@pytest.mark.parametrize(
    "arch", ["retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2", "retinanet_resnet18_fpn"]
)
def test_torchvision_has_the_same_keys(arch):
    with torch.device("meta"):
        own = build_detector(arch, 3)
        names = {"torchvision": torchvision, "freeadv_fast": freeadv_fast}
        exec("\n".join(builder_lines(arch, 3, "min_size=64")), names)
    shapes = [
        {key: value.shape for key, value in model.state_dict().items()}
        for model in (own, names["model"])
    ]
    assert shapes[0] == shapes[1]
    assert names["model"].anchor_generator.sizes == own.anchor_generator.sizes


def test_the_card_says_what_was_measured(tmp_path, detector):
    record = RECORD | {"average": {"detection": DETECTION | {"corruptions": {}}}}
    card = (export(detector, tmp_path / "a", record=record) / "README.md").read_text()
    for said in (
        "pipeline_tag: object-detection",
        "A detector of 3 classes of objects in images whose shorter side is 128 px: AP 35.8 on 200 "
        "images, 19.0 under 1 corruption.",
        "| clean | 35.8 | 55.0 | 38.0 | - | 40.0 | 50.0 | 50.0 |",
        "| pgd-10 | 12.3 | 55.0 |",
        "Mean under 1 corruption 19.0, 53.1 % of the clean AP: AP's mean over",
        "| corruption | severity 1 | severity 3 | mean |",
        "| fog | 30.0 | 20.0 | 25.0 |",
        "within eps 1/255 of the pixel range",
        "2 of the benchmark's 75 (corruption, severity) pairs: it compares with no published mPC",
        "Measured on 200 images only",
        "torchvision's own resize in the lines below does not",
        "cost: 60 seconds on 1 x EPYC",
        "@inproceedings{mei2022fast,",
        "@inproceedings{lin2017focal,",
        "@inproceedings{lin2014microsoft,",
        "@inproceedings{michaelis2019benchmarking,",
        "TODO: the licence of these weights",
    ):
        assert said in card, said
    options = {"record": record, "weights": "average"}
    card = (export(detector, tmp_path / "b", **options) / "README.md").read_text()
    assert "Of the averaged weights on 200 validation images" in card
    assert "It was not evaluated on corrupted images." in card
    assert "michaelis" not in card
    natural = RECIPES["shapes-natural"]
    card = (export(detector, tmp_path / "c", config=natural) / "README.md").read_text()
    assert "These weights were not evaluated" in card
    assert "Trained on clean images: not made to withstand any attack." in card
    assert "adversarial-training" not in card


@pytest.mark.parametrize("attack_loss", get_args(AttackLoss))
def test_the_card_says_what_attacks_ascended(attack_loss):
    config = dataclasses.replace(RECIPES["shapes-pgd"], attack_loss=attack_loss)
    said = threat_model(config)
    assert "the perturbation raises" in said
    assert ("sum" in said) is (attack_loss in ("sum", "stronger"))
    assert ("boxes" in said) is (attack_loss != "classification")


def test_the_card_says_mpc_of_the_whole_benchmark_alone(tmp_path, detector):
    rows = dict.fromkeys(CORRUPTIONS, dict.fromkeys("12345", 0.2)) | {"fog": {"3": 0.3}}
    record = RECORD | {"detection": DETECTION | {"corruptions": rows}}
    card = (export(detector, tmp_path / "a", record=record) / "README.md").read_text()
    assert "over 71 of the benchmark's 75 (corruption, severity) pairs" in card
    assert "Mean under 15 corruptions 19.0" in card
    assert "rPC" not in card
    rows = rows | {"fog": dict.fromkeys("1245", 0.3) | {"3": None}}
    record = RECORD | {"detection": DETECTION | {"corruptions": rows, "is_benchmark": True}}
    card = (export(detector, tmp_path / "b", record=record) / "README.md").read_text()
    assert "images, mPC 19.0 on corrupted ones." in card
    assert "mPC 19.0, rPC 53.1 % of the clean AP" in card
    assert "no published" not in card
    assert "| snow | 20.0 | 20.0 | 20.0 | 20.0 | 20.0 | 20.0 |" in card
    assert "| fog | 30.0 | 30.0 | - | 30.0 | 30.0 | - |" in card  # one unknown: no mean


def test_a_run_is_read_back_and_exported(run, detector):
    saved = load_run(run)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = detector(x)
        found = saved.detector(x)
    assert not saved.detector.training
    torch.testing.assert_close(found.class_logits, expected.class_logits)
    folder = export_run(run)
    keys = safetensors.torch.load_file(folder / "model.safetensors").keys()
    assert not [key for key in keys if "aux_bn" in key]
    assert set(keys) == set(build_detector(CONFIG.arch, 3).state_dict())
    with pytest.raises(UserError, match=r"export of a detector, which torchvision loads by the li"):
        load_export(folder)
    with pytest.raises(UserError, match="model: the run trained retinanet"):
        load_run(run, model=detector)
    withdraw(folder)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("tool", "line"),
    [
        (lambda run: export_for(str(run), with_onnx=True), "--onnx: of a detector"),
        (
            lambda run: export_for(str(run), robustbench_name="Doe2026Free"),
            "--robustbench: of a detector",
        ),
        (lambda run: draw_pictures([run]), "these pictures are of classifiers"),
        (lambda run: evaluate_robustness(run, on_the_fly=True), "these sets are for classifiers"),
        (lambda run: audit_run(run), "its checks are for classifiers"),
    ],
)
def test_tools_for_classifiers_refuse_it(run, tool, line):
    with pytest.raises(UserError, match=line) as caught:
        tool(run)
    assert "\n" not in str(caught.value)
    assert CONFIG.arch in str(caught.value)
    assert not list(run.glob("export*"))


@pytest.mark.parametrize(
    "flags", [["--arch", "retinanet_resnet50_fpn"], ["--data", "coco:/data"], ["--data", "shapes"]]
)
def test_a_sweep_refuses_detectors(tmp_path, capsys, flags):
    status = run_sweep(["--output-dir", str(tmp_path / "sweep"), *flags])
    said = capsys.readouterr().err
    assert (status, said.count("\n")) == (2, 1)
    assert f"{' '.join(flags)}: a sweep is of classifiers" in said
    assert not (tmp_path / "sweep").exists()
