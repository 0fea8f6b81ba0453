"""A submission to RobustBench: its files, and one line for what cannot be one.

That RobustBench itself loads and reads them is proved in tests/peers.
"""

from __future__ import annotations

import dataclasses
import io
import json
import shutil

import pytest
import torch
from torch import nn

from freeadv_fast.config.attack import Attack
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.errors import UserError
from freeadv_fast.runs.export.again import export_for
from freeadv_fast.runs.export.claims import Claim, Claims
from freeadv_fast.runs.export.datasets import CIFAR10, dataset_of
from freeadv_fast.runs.export.robustbench import export_robustbench, preprocessing, submission_of
from freeadv_fast.runs.export.robustbench_networks import form_of
from freeadv_fast.runs.log import RunFolder
from freeadv_fast.runs.saved import SavedRun

NAME = "Doe2026Free_RN18"
WNIDS = [f"n{number:08d}" for number in range(1000)]
CLEAN, PGD = Claim(None, 0.8, 10_000), Claim(Attack.parse("pgd-50-10"), 0.5, 10_000, "2/255")
AUTOATTACK = Claim(Attack.parse("autoattack"), 0.456, 1000, seed=3)


@pytest.fixture
def submit(tmp_path):
    """Writes a submission of a run and gives its folder and the lines that were said."""

    def call(claims, classes=CIFAR10, name=NAME, has_result=True, **fields):
        fields = {"data": "cifar10:d", "arch": "preact-resnet18", "eps": "8/255"} | fields
        config = TrainConfig(image_size=32, normalization="cifar10", **fields)
        model = nn.Sequential(nn.Flatten(), nn.Linear(3072, len(classes)))
        run = SavedRun(
            RunFolder(tmp_path), config, tmp_path / "checkpoints" / "last.pt", list(classes), model
        )
        lines = export_robustbench(submission_of(name, run, claims, has_result=has_result))
        return tmp_path / "export-robustbench" / name, lines

    return call


def test_the_json_is_in_their_form(submit):
    folder, lines = submit(Claims([CLEAN], [PGD, AUTOATTACK]))
    text = (folder / "model_info" / "cifar10" / "Linf" / f"{NAME}.json").read_text()
    assert json.loads(text) == {
        "link": "TODO: the paper's address",
        "name": "TODO: the paper's title",
        "authors": "TODO: the authors, separated by commas",
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": "cifar10",
        "venue": "TODO: venue and year",
        "architecture": "PreActResNet-18",
        "eps": "8/255",
        "clean_acc": "80.00",
        "reported": "45.60",
        "autoattack_acc": "45.60",
    }
    assert text.startswith('{\n  "link": ')
    assert lines[0] == f"wrote {folder}"
    assert "AutoAttack saw 1,000 images; RobustBench asks for 10,000" in lines


def test_the_issue_is_filled_in(submit, tmp_path):
    for number, name in enumerate(
        ("autoattack-new.log", "autoattack-new-rank1.log", "autoattack-newest.log")
    ):
        (tmp_path / name).write_text(f"log {number}")
    claimed = dataclasses.replace(AUTOATTACK, log="autoattack-new.log", images="ids.txt")
    submit(Claims([CLEAN], [dataclasses.replace(AUTOATTACK, log="autoattack-newest.log")]))
    folder, lines = submit(Claims([CLEAN], [PGD, claimed]), init_from="x.pt")
    text = (folder / "issue.md").read_text()
    for said in (
        f"[New Model] {NAME}", "- **Architecture**: PreActResNet-18", "- **Threat Model**: Linf",
        "- **eps**: 8/255", "- **Clean accuracy**: 80.00%", "- **Robust accuracy**: 45.60%",
        "- **Additional data**: true", "- **Paper Title**: TODO", "- [x] I use an architecture",
        "AutoAttack, standard version, on 1,000 images, seed 3, those of ids.txt; log: "
        "autoattack-new.log, attached",
        "- [ ] I agree to release", "PreActResNet(PreActBlock, [2, 2, 2, 2], num_classes=10,",
    ):  # fmt: skip
        assert said in text, said
    logs = {path.name: path.read_text() for path in folder.glob("*.log")}
    assert logs == {"autoattack-new.log": "log 0", "autoattack-new-rank1.log": "log 1"}
    assert not any("log" in line for line in lines)
    (tmp_path / "autoattack-new.log").unlink()
    folder, lines = submit(Claims([CLEAN], [claimed]))
    assert not list(folder.glob("*.log"))
    assert lines[-1] == f"AutoAttack's log is not in {tmp_path}; RobustBench asks for it"


def test_what_is_reported_is_autoattacks_and_names_have_folders_of_their_own(submit):
    few = Claim(Attack.parse("cw-50"), 0.1, 50, "2/255")
    first, _ = submit(Claims([CLEAN], [few, PGD]))
    second, _ = submit(Claims([CLEAN], [few, AUTOATTACK]), name="Doe2026Fast")
    for folder, reported in ((first, "10.00"), (second, "45.60")):
        (path,) = folder.rglob(f"{folder.name}.json")
        assert json.loads(path.read_text())["reported"] == reported
        assert [p.name for p in folder.glob("*.pt")] == [f"{folder.name}.pt"]
    assert first != second


def test_without_autoattack_the_number_is_blank_and_a_line_says_so(submit):
    folder, lines = submit(Claims([CLEAN], [PGD]))
    (path,) = folder.rglob(f"{NAME}.json")
    info = json.loads(path.read_text())
    assert (info["autoattack_acc"], info["reported"]) == ("", "50.00")
    assert any("no AutoAttack, so that autoattack_acc is blank: python launch/" in x for x in lines)
    assert "TODO: AutoAttack was not run" in (folder / "issue.md").read_text()


@pytest.mark.parametrize(
    ("classes", "data", "prefix", "normalizer"),
    [
        (CIFAR10, "cifar10:d", "model.model.", {"normalize.mean", "normalize.std"}),
        (WNIDS, "/imagenet", "model.", set()),
    ],
)
def test_the_checkpoint_is_what_their_loader_takes(submit, classes, data, prefix, normalizer):
    folder, _ = submit(Claims([CLEAN], [AUTOATTACK]), classes, data=data, arch="resnet50")
    state = torch.load(io.BytesIO((folder / f"{NAME}.pt").read_bytes()))["state_dict"]
    assert set(state) == {f"{prefix}1.weight", f"{prefix}1.bias"} | normalizer
    entry = (folder / "model_zoo_entry.py").read_text()
    network = f'torchvision.models.get_model("resnet50", num_classes={len(classes)})'
    assert f"lambda: normalize_model({network}, mean, std)" in entry
    assert ("preprocessing" in entry) == (data == "/imagenet")


def test_a_network_that_they_do_not_have_is_left_to_do(submit):
    folder, _ = submit(Claims([CLEAN], [AUTOATTACK]), arch="wrn-32-10")
    assert "- [ ] I use an architecture" in (folder / "issue.md").read_text()
    assert "TODO: its code has to be added" in (folder / "model_zoo_entry.py").read_text()
    standardised = TrainConfig(normalization="per-image", arch="resnet18", image_size=32)
    assert not form_of(standardised, 10).is_known
    own = TrainConfig(arch="custom (Net)", image_size=32)
    assert (form_of(own, 10).is_known, form_of(own, 10).title) == (False, "custom (Net)")


def test_data_are_known_by_their_classes():
    assert dataset_of("/data", CIFAR10).robustbench == "cifar10"
    assert dataset_of("/data", CIFAR10[::-1]).robustbench is None
    assert dataset_of("/data", WNIDS).robustbench == "imagenet"
    assert dataset_of("imagenet", WNIDS[:100]).robustbench is None
    assert dataset_of("cifar100:d", ["x"] * 100).robustbench == "cifar100"
    assert dataset_of("svhn:d", ["0"] * 10).hub == "ufldl-stanford/svhn"
    assert preprocessing(224, 256) == "Res256Crop224"
    assert preprocessing(288, 0) == "Crop288"
    assert preprocessing(160, 182) == "TODO: Resize(182) and CenterCrop(160)"


@pytest.mark.parametrize(
    "name", ["", "Doe", "doe2026Free", "Doe2026", "Doe2026Free RN", "a/b", ".."]
)
def test_a_name_that_is_none_is_one_line(submit, tmp_path, name):
    with pytest.raises(UserError, match=r"--robustbench .*: write first author, year and first w"):
        submit(Claims([CLEAN], [PGD]), name=name)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_submitted_is_one_line(submit, repository, tmp_path):
    with pytest.raises(UserError, match=r"--robustbench: .* has no result\.json; a submission"):
        submit(Claims(), has_result=False)
    with pytest.raises(UserError, match=r"--robustbench: .* says nothing of its last\.pt weights"):
        submit(Claims())
    with pytest.raises(UserError, match=r"ranks networks of CIFAR-10, CIFAR-100 and ImageNet; "):
        submit(Claims([CLEAN]), data="digits")
    (tmp_path / "export-robustbench" / NAME).mkdir(parents=True)
    (tmp_path / "export-robustbench" / NAME / "thesis.tex").write_text("mine")
    with pytest.raises(
        UserError, match=rf"export-robustbench/{NAME}: holds thesis\.tex and no export"
    ):
        submit(Claims([CLEAN], [PGD]))
    run = shutil.copytree(repository / "tests" / "fixtures" / "runs" / "finished", tmp_path / "r")
    with pytest.raises(UserError, match=r"is of scikit-learn's handwritten digits"):
        export_for(str(run), robustbench_name=NAME)
    assert not (run / "export").exists()
    with pytest.raises(UserError, match=r"--robustbench nobody: write first author"):
        export_for(str(run), robustbench_name="nobody")
