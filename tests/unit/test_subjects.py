"""What else is evaluated than runs: exports, files, functions; what is refused, and how."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch
from fixed_batches import FixedLoader
from foreign_files import SIDE, TINY, own_checkpoint, tiny
from torch import nn

import freeadv_fast
from freeadv_fast.config.file import load_config
from freeadv_fast.config.presets import PIXEL_STATISTICS
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.distributed.world import World
from freeadv_fast.errors import UserError
from freeadv_fast.evaluation import images
from freeadv_fast.evaluation.candidate import (
    call_builder,
    refuse_different_networks,
)
from freeadv_fast.evaluation.subject import evaluate
from freeadv_fast.runs.export.network import export_model
from freeadv_fast.runs.log import save_config

QUICK = {"eps": "8/255", "attacks": "pgd-1", "num_images": 6}


def evaluated(subject, data, **options):
    return evaluate(str(subject), data=str(data), **(QUICK | options))


def test_a_file_is_evaluated_and_written_where_it_is_asked(
    tmp_path, small_images, capsys, monkeypatch
):
    """Of the listed images, seen as asked; without --output-dir nothing is written."""
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": tiny().state_dict()}, "weights.pt")
    names = [f"class{c}/{i}.jpg" for c in range(3) for i in range(2)]
    (tmp_path / "ids.txt").write_text("\n".join(names))
    options = {"arch": TINY, "image_size": SIDE}
    evaluated("weights.pt", small_images, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.txt", "weights.pt"]
    seen = {"image_list": "ids.txt", "preprocessing": "Res224", "num_images": None}
    measured = evaluated("weights.pt", small_images, arch=TINY, output_dir="out", **seen)
    assert measured.num_images == measured.num_clean_images == len(names)
    (path,) = (tmp_path / "out").glob("evaluation-weights.pt-timm-test_resnet-pgd-1-*-n6-*.json")
    record = json.loads(path.read_text())
    assert record["subject"] == "weights.pt (timm/test_resnet)"
    assert record["preprocessing"] == "Res224"
    assert record["image_list"]["num_images"] == record["num_eval_images"] == 6
    assert len(record["image_list"]["sha256"]) == 64
    assert (record["eps"], record["attack_step"]) == ("8/255", "2/255")
    out = capsys.readouterr().out
    assert f"images: the 6 of ids.txt (sha256 {record['image_list']['sha256'][:16]}...)" in out
    assert "preprocessing: Res224" in out
    assert "at most 400" not in out.split("normalisation")[-1]


@pytest.fixture
def run_with_export(tmp_path, small_images):
    """A run's folder with an export and a checkpoint, of the small images' three classes."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    model = own_checkpoint(run / "checkpoints/last.pt", "cifar10")
    config = TrainConfig(
        method="natural", m=1, arch=TINY, image_size=SIDE, normalization="cifar10",
        data=str(small_images), eval_attacks="pgd-1", eval_images=6, workers=0, augment="none",
    )  # fmt: skip
    save_config(config, run / "config.yaml")
    mean, std = PIXEL_STATISTICS["cifar10"]
    classes, sizes = [f"class{i}" for i in range(3)], {"image_size": SIDE, "resize_size": SIDE + 2}
    export_model(model, run / "export", arch=TINY, classes=classes, mean=mean, std=std, **sizes)
    return run


def test_an_export_is_evaluated_and_written_into_its_run(run_with_export, small_images):
    """As the run itself, whose network it is: same images, same attack, same accuracies."""
    run = run_with_export
    export = evaluated(run / "export", small_images)
    (path,) = run.glob("evaluation-run-export-pgd-1-eps8-step2-n6-*.json")
    assert json.loads(path.read_text())["subject"] == "run/export"
    itself = evaluated(run, small_images)
    assert export.robust_accuracy == itself.robust_accuracy
    seen = evaluated(run, small_images, preprocessing="Res224", output_dir=run / "seen")
    assert seen.num_images == 6
    (path,) = (run / "seen").glob("evaluation-last-*.json")
    assert json.loads(path.read_text())["preprocessing"] == "Res224"


def test_the_ball_is_that_of_the_run(run_with_export, small_images, capsys):
    """An export in its folder says so; what nothing is known of is told by --norm."""
    run, asked = run_with_export, {"attacks": []}
    config = load_config(run / "config.yaml")
    save_config(dataclasses.replace(config, method="pgd", norm="l2"), run / "config.yaml")
    evaluated(run / "export", small_images, **asked)
    file = run / "checkpoints" / "last.pt"  # its own config says linf
    for norm in (None, "l2"):
        evaluated(file, small_images, norm=norm, output_dir=run / "file", **asked)
    paths = [*run.glob("evaluation-*.json"), *(run / "file").iterdir()]
    assert sorted(json.loads(path.read_text())["norm"] for path in paths) == ["l2", "l2", "linf"]
    assert capsys.readouterr().out.count("at eps 8/255 in L2") == 2
    with pytest.raises(UserError, match="--norm: a run's config says it; leave it out"):
        evaluated(run, small_images, norm="l2")


def test_files_of_one_name_are_not_written_over_each_other(tmp_path, small_images):
    """Neither those of another folder, nor the same one under another normalisation."""
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        torch.save(tiny().state_dict(), tmp_path / place / "model.pt")
    asked = {"arch": TINY, "image_size": SIDE, "output_dir": tmp_path / "all", "attacks": []}
    for options in ({}, {"mean": "0,0,0", "std": "1,1,1"}):
        evaluated(tmp_path / "a" / "model.pt", small_images, **asked, **options)
    evaluated(tmp_path / "b" / "model.pt", small_images, **asked)
    records = [json.loads(path.read_text()) for path in (tmp_path / "all").iterdir()]
    assert len(records) == 3
    assert [0, 0, 0] in [record["mean"] for record in records]
    assert [1, 1, 1] in [record["std"] for record in records]


BUILDERS = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))

def raises():
    raise RuntimeError("no such file: weights.pt\\nsecond line")

def number():
    return 3

def pair():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x
    return Pair()

def probabilities():
    return nn.Sequential(build(), nn.Softmax(1))

def features():
    return nn.Flatten()

LIMIT = 3
"""


@pytest.fixture
def builders(tmp_path, monkeypatch):
    """A module in the working directory."""
    (tmp_path / "my_networks.py").write_text(BUILDERS)
    (tmp_path / "my_broken.py").write_text("import not_installed_anywhere\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield "my_networks"
    for name in ("my_networks", "my_broken"):
        sys.modules.pop(name, None)


def test_a_function_builds_a_network(builders, small_images, capsys):
    measured = evaluated(f"{builders}:build", small_images, image_size=SIDE)
    assert measured.num_images == 6
    assert "my_networks:build at eps 8/255" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("subject", "complaint"),
    [
        ("my_networks:raises", "it raised RuntimeError: no such file: weights.pt"),
        ("my_networks:number", "it returned a int; it must build a torch.nn.Module"),
        ("my_networks:biuld", "my_networks has no function biuld; did you mean my_networks:build?"),
        ("my_networks:LIMIT", "my_networks has no function LIMIT"),
        ("my_broken:build", r"my_broken cannot be imported \(ModuleNotFoundError: No module named"),
        ("nowhere:build", r"nowhere cannot be imported \(ModuleNotFoundError: No module named"),
    ],
)
def test_functions_that_build_none_are_refused_in_a_line(builders, subject, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        call_builder(*subject.split(":"))
    assert str(caught.value).startswith(f"SUBJECT {subject}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        ("pair", "model my_networks:pair: returns tuple; hand over a module that returns the"),
        (
            "probabilities",
            "model my_networks:probabilities: the network returns probabilities, not",
        ),
        ("features", r"returns \(2, 768\) for two images; the data have 3 classes"),
    ],
)
def test_outputs_that_are_no_logits_are_refused(builders, small_images, function, complaint):
    with pytest.raises(UserError, match=complaint):
        evaluated(f"{builders}:{function}", small_images, image_size=SIDE)


@pytest.fixture
def weights(tmp_path):
    torch.save(tiny().state_dict(), tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"eps": None}, "--eps: evaluating anything but a run needs it, such as --eps 8/255"),
        ({"data": None}, "--data: evaluating anything but a run needs it, such as --data cifar10:"),
        ({"arch": None}, "a file of weights; --arch NAME says which network they are of"),
        ({"arch": "tset_resnet"}, "--arch tset_resnet: no such network; did you mean"),
        ({"arch": "retinanet_resnet50_fpn"}, "a detector's weights are evaluated as a run only"),
        ({"data": "coco:/x"}, "--data coco:/x: images with boxes, on which only the run of a det"),
        ({"data": "shapes"}, "--data shapes: images with boxes"),
        ({"arch": "timm/test_vit"}, "belongs to another network, not --arch timm/test_vit"),
        ({"mean": "0.5,0.5,0.5"}, "--mean: give --std with it"),
        ({"std": (1, 1, 1)}, "--std: give --mean with it"),
        ({"mean": "124,116,104", "std": "1,1,1"}, "--mean 124,116,104: pixels are in [0, 1]"),
        ({"mean": "0.5", "std": "1,1,1"}, "--mean 0.5: needs three numbers, such as 0.485,"),
        ({"mean": "0,0,0", "std": "1,1,0"}, "--std 1,1,0: must be above 0 and at most 1"),
        ({"data": "digits"}, "--mean: nothing says what normalises images of digits; give --mean"),
        ({"preprocessing": "Crop"}, "--preprocessing Crop: no such preprocessing"),
        ({"preprocessing": "Crop288", "image_size": 224}, "--image-size 224: --preprocessing Crop"),
        ({"image_list": "nowhere.txt"}, "--image-list nowhere.txt: No such file"),
        ({"checkpoint": "best"}, "--checkpoint: the subject is no run; leave it out"),
        ({"output_dir": __file__}, "test_subjects.py: File exists"),
    ],
)  # fmt: skip
def test_what_a_file_cannot_be_asked_is_refused(weights, small_images, options, complaint):
    asked = {"data": str(small_images), "arch": TINY, **QUICK} | options
    with pytest.raises(UserError) as caught:
        evaluate(str(weights), **asked)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_classes_are_refused(tmp_path, small_images, run_with_export):
    torch.save(tiny(7).state_dict(), tmp_path / "seven.pt")
    with pytest.raises(UserError, match=r"seven\.pt: a network of 7 classes; --data .* has 3"):
        evaluated(tmp_path / "seven.pt", small_images, arch=TINY, image_size=SIDE)
    with pytest.raises(UserError, match="--data synthetic:4: its 4 classes are not the 3 that"):
        evaluated(run_with_export / "export", "synthetic:4")


class Touch:
    """What an attacker's checkpoint would do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_code_in_a_file_is_refused_and_not_run(tmp_path, small_images):
    state = {"state_dict": tiny().state_dict(), "extra": Touch(tmp_path / "touched")}
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(UserError, match=r"SUBJECT .*bad\.pt: holds .*open, which only running"):
        evaluated(tmp_path / "bad.pt", small_images, arch=TINY)
    assert not (tmp_path / "touched").exists()


def test_flags_that_a_subject_does_not_read_are_refused(run_with_export, small_images, builders):
    run = run_with_export
    for subject, flag, why in (
        (run, "arch", "a run's config says it"),
        (run, "image_size", "a run's config says it"),
        (run / "export", "mean", "is a folder, which says it itself"),
        (f"{builders}:build", "arch", "builds the network, of pixels in"),
    ):
        with pytest.raises(UserError, match=f"--{flag.replace('_', '-')}: .*{why}"):
            evaluated(subject, small_images, **{flag: 1})


def test_what_is_nothing_is_refused(tmp_path, small_images):
    with pytest.raises(UserError, match=r"SUBJECT .*nowhere: no such run's folder, export or file"):
        evaluated(tmp_path / "nowhere", small_images)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"neither a run's folder, which has config\.yaml, nor"):
        evaluated(tmp_path / "empty", small_images)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UserError, match=r"SUBJECT .*text: damaged or not a checkpoint"):
        evaluated(tmp_path / "text", small_images, arch=TINY)


@dataclasses.dataclass(frozen=True)
class TwoRanks(World):
    """Rank 0 of two; the other's digest is given."""

    other: str = ""

    def gather_on_host(self, value):
        return [value, self.other or value]

    def on_main(self, work):
        return work()


def test_ranks_that_hold_other_weights_are_named():
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    cpu = torch.device("cpu")
    refuse_different_networks(network, "m:f", TwoRanks(0, 2, cpu))
    with pytest.raises(UserError, match="SUBJECT m:f: rank 1 has other weights than rank 0"):
        refuse_different_networks(network, "m:f", TwoRanks(0, 2, cpu, other="x"))


def test_the_front_door_takes_them_too(weights, monkeypatch):
    monkeypatch.setattr(images, "build_val_loader", lambda *_: FixedLoader([3], num_classes=3))
    measured = freeadv_fast.evaluate(weights, data="/x", arch=TINY, image_size=8, **QUICK)
    assert measured.num_images == 3
