"""Exports where others load them: timm's folder, the model card, ONNX, the Hub."""

from __future__ import annotations

import json
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

import freeadv_fast as ff
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.errors import UserError
from freeadv_fast.models.normalize import StandardizedNetwork, with_normalizer
from freeadv_fast.models.zoo import build_model
from freeadv_fast.runs.export import hub, onnx
from freeadv_fast.runs.export.again import export_for, export_run
from freeadv_fast.runs.export.card import Subject, model_card
from freeadv_fast.runs.export.citations import PAPERS
from freeadv_fast.runs.export.claims import read_claims
from freeadv_fast.runs.export.network import describe, export_model
from freeadv_fast.runs.export.timm_form import timm_facts

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
CLASSES = [f"class {i}" for i in range(10)]


@pytest.fixture
def run_folder(repository, tmp_path):
    """A finished run of version 0.1.0 on the digits, of timm's test_efficientnet."""
    finished = repository / "tests" / "fixtures" / "runs" / "finished"
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def export(tmp_path):
    """Exports a fresh network of 32 px, and gives the folder and the network."""

    def call(arch, **options):
        torch.manual_seed(0)
        model = build_model(arch, 10, image_size=32, **options)
        data = {"mean": MEAN, "std": STD, "image_size": 32, "resize_size": 40}
        folder = export_model(model, tmp_path / "export", arch=arch, classes=CLASSES, **data)
        return folder, model.eval()

    return call


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("arch", ["timm/test_resnet", "timm/test_vit"])
def test_timm_loads_the_folder_and_knows_how_to_feed_it(export, arch):
    folder, model = export(arch)
    config = read(folder / "config.json")
    assert (config["arch"], config["architecture"]) == (arch, arch.removeprefix("timm/"))
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert config["num_features"] == loaded.num_features
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), model(images))
    overlay = {"file": str(folder / "model.safetensors"), "num_classes": 10}
    options = config.get("model_args", {})
    again = timm.create_model(
        config["architecture"], pretrained=True, pretrained_cfg_overlay=overlay, **options
    )
    assert torch.equal(again.eval()(images), model(images))
    fed = timm.data.resolve_data_config(model=loaded)
    assert (*fed["mean"], *fed["std"], *fed["input_size"]) == (*MEAN, *STD, 3, 32, 32)
    assert (fed["crop_pct"], fed["interpolation"], fed["crop_mode"]) == (0.8, "bilinear", "center")
    assert list(loaded.pretrained_cfg["label_names"]) == CLASSES


def test_a_name_of_torchvision_is_given_to_timm_only_where_it_means_the_same_network(export):
    torch.manual_seed(1)
    width, layers = timm_facts("resnet18", 10, 32)
    assert (width, layers["first_conv"], layers["classifier"]) == (512, "conv1", "fc")
    state = torch.get_rng_state()
    assert torch.equal(state, torch.manual_seed(1).get_state())
    assert timm_facts("preact-resnet18", 10, 32) is None
    assert timm_facts("custom (resnet18)", 10, 32) is None
    assert timm_facts("regnet_y_400mf", 10, 32) is None  # torchvision's name alone
    assert timm_facts("efficientnet_b0", 10, 32) is None  # of both, with other keys
    folder, _ = export("squeezenet1_1")
    assert "num_features" not in read(folder / "config.json")


def test_a_folder_that_is_no_export_is_left_alone(run_folder, tmp_path):
    file, theirs = tmp_path / "file", tmp_path / "theirs"
    file.write_text("mine")
    theirs.mkdir()
    (theirs / "README.md").write_text("mine")
    (theirs / "model.safetensors").write_bytes(b"mine")
    (theirs / "my_model_with_normalizer.safetensors.bak").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"--output-dir .*file: a file; name a folder"):
        export_run(run_folder, file)
    with pytest.raises(UserError, match=r"--output-dir .*: holds README.md and no export"):
        export_run(run_folder, theirs)
    assert [path.read_text() for path in sorted(theirs.iterdir())] == ["mine"] * 3
    (tmp_path / "empty").mkdir()
    folder = export_run(run_folder, tmp_path / "empty")
    (folder / "notes.txt").write_text("mine")
    (folder / "config.json").unlink()
    assert export_run(run_folder, folder) == folder
    assert (folder / "config.json").exists()
    assert (folder / "notes.txt").read_text() == "mine"


def test_the_card_says_what_was_measured_and_what_was_not(run_folder):
    record = read(run_folder / "result.json")
    text = (export_run(run_folder) / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    about = yaml.safe_load(header)
    assert about["license"] == "other"
    assert about["license_name"] == "todo-name-the-licence"
    assert about["library_name"] == "timm"
    assert about["metrics"] == ["accuracy"]
    assert {"free", "timm", "adversarial-training"} <= set(about["tags"])
    assert "| none | - | - | - | 60 | 96.67% | 88.6-99.1% |" in body
    assert "| pgd-20 | 20 | 4/255 | 1 | 60 | 35.00% | 24.2-47.6% |" in body
    for said in (
        "norm: L-infinity", "eps: 32/255", "seed: 0", "ranks: 1", "precision: float32",
        "recipe: digits-free", "m = 2", "5,588 image passes", "6 seconds on 1 x AMD EPYC",
        "AutoAttack was not run", "as few as 60 images", "TODO: the licence of these weights",
        "TODO: the licence and terms of the training data", PAPERS["free"][0].bibtex,
        'timm.create_model("local-dir:.", pretrained=True)', "freeadv_fast.load_export('.')",
    ):  # fmt: skip
        assert said in body, said
    assert record["passes"] == 5588


def test_a_run_without_result_says_that_it_was_not_evaluated(run_folder):
    (run_folder / "result.json").unlink()
    text = (export_run(run_folder) / "README.md").read_text()
    assert "**These weights were not evaluated.**" in text
    assert "nothing is known of their accuracy" in text
    assert "%" not in text.partition("## Accuracy")[2].partition("## Training")[0]
    (run_folder / "result.json").write_text("{")
    with pytest.raises(UserError, match=r"result\.json: damaged"):
        export_run(run_folder)


def test_weights_of_elsewhere_have_no_claims(run_folder, tmp_path):
    foreign = shutil.copy(run_folder / "checkpoints" / "best.pt", tmp_path / "last.pt")
    text = (export_run(run_folder, checkpoint=str(foreign)) / "README.md").read_text()
    assert "**These weights were not evaluated.**" in text


def test_onnx_of_earlier_weights_does_not_stay(run_folder, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnx, "_trace", lambda network, path, size: path.write_bytes(b"onnx"))
    monkeypatch.setattr(onnx, "disagreement", lambda *_: 0.0)
    folder = export_run(run_folder, with_onnx=True)
    assert (folder / "model.onnx").read_bytes() == b"onnx"
    assert 'InferenceSession("model.onnx")' in (folder / "README.md").read_text()
    export_run(run_folder)
    assert not (folder / "model.onnx").exists()
    assert "onnx" not in (folder / "README.md").read_text()


def test_a_card_that_the_user_changed_stays(run_folder):
    card = export_run(run_folder) / "README.md"
    ours, result = card.read_text(), (run_folder / "result.json").read_text()
    (run_folder / "result.json").unlink()
    export_run(run_folder)
    assert card.read_text() != ours
    card.write_text(ours.replace("todo-name-the-licence", "mine"))
    (line,) = export_for(str(run_folder))[1:]
    assert (
        line == f"{card} is yours and stays; its numbers may be of other weights: see README.new.md"
    )
    assert "license_name: mine" in card.read_text()
    new = card.with_name("README.new.md")
    assert "**These weights were not evaluated.**" in new.read_text()
    (run_folder / "result.json").write_text(result)
    assert len(export_for(str(run_folder))) == 1  # of the same numbers as the user's
    assert "license_name: mine" in card.read_text()
    assert not new.exists()


def test_where_onnx_refuses_the_card_is_that_of_the_new_weights(run_folder, monkeypatch):
    pytest.importorskip("onnxruntime")
    export_run(run_folder)
    (run_folder / "result.json").unlink()

    def fails(*_):
        raise UserError("--onnx: no")

    monkeypatch.setattr(onnx, "_trace", fails)
    with pytest.raises(UserError, match="--onnx: no"):
        export_run(run_folder, with_onnx=True)
    text = (run_folder / "export" / "README.md").read_text()
    assert "**These weights were not evaluated.**" in text
    assert "onnx" not in text


def record_of(**changes):
    """A result.json of today."""
    return {
        "epochs": 1.0, "passes": 10, "attack_passes": 0, "train_seconds": 7200.0,
        "clean_accuracy": 0.8, "clean_top5_accuracy": None, "robust_accuracy": {"pgd-10": 0.5},
        "attack_step": "1/255", "num_eval_images": 1000, "num_clean_images": 10_000, "best": None,
        "best_epoch": -1, "collapse": None, "seed": 3, "ranks": 2, "precision": "bfloat16",
        "device": "NVIDIA H200", "versions": {"freeadv_fast": "0.3.0", "torch": "2.11.0"},
    } | changes  # fmt: skip


def card_of(record, weights="last", folder=None, **config):
    """The card of a run on CIFAR-10."""
    config = TrainConfig(data="cifar10:data", arch="preact-resnet18", image_size=32, **config)
    claims = read_claims(record, weights, config, CLASSES, folder)
    told = describe(config.arch, CLASSES, MEAN, STD, 32, 32, per_image=False)
    return model_card(Subject(config, CLASSES, weights, claims, record, told)), claims


def test_each_weights_have_their_own_numbers():
    average = {"clean_accuracy": 0.7, "clean_top5_accuracy": None, "robust_accuracy": {}}
    record = record_of(best=average | {"clean_accuracy": 0.6}, average=average)
    for weights, accuracy in (("last", 0.8), ("best", 0.6), ("average", 0.7)):
        text, claims = card_of(record, weights)
        assert claims.clean[0].accuracy == accuracy
        assert f"| none | - | - | - | 10,000 | {accuracy:.2%} |" in text
    assert "averaged weights" in text
    assert not card_of(record_of(), "average")[1].clean
    assert "2.00 hours on 2 x NVIDIA H200" in text
    assert "datasets:\n- uoft-cs/cifar10\n" in text
    assert "library_name: freeadv_fast\n" in text


def test_evaluations_in_the_folder_count_where_they_are_of_these_weights(tmp_path):
    record = record_of(attack_parts={"autoattack": {"apgd-ce": 0.45, "square": 0.43}})
    evaluation = record | {
        "checkpoint": "last.pt", "dataset": "cifar10:./data", "eps": "4/255", "norm": "linf",
        "robust_accuracy": {"autoattack": 0.43, "pgd-10": 0.9}, "attack_log": "autoattack-a.log",
    }  # fmt: skip
    listed = {"file": "/lists/some.txt", "sha256": 64 * "a", "num_images": 10}
    others = [{"checkpoint": "best.pt"}, {"eps": "8/255"}, {"dataset": "digits"}, {"norm": "l2"}]
    others += [{"clean_accuracy": 0.5}, {"robust_accuracy": None}, {"checkpoint": "/other/last.pt"}]
    others += [
        {"dataset": "cifar10:/corrupted"},
        {"preprocessing": "Res224"},
        {"image_list": listed},
    ]
    for number, change in enumerate([{}, *others]):
        path = tmp_path / f"evaluation-{number}.json"
        path.write_text(json.dumps(evaluation | change))
    (tmp_path / "evaluation-broken.json").write_text("{")
    (tmp_path / "evaluation-list.json").write_text("[1]")
    text, claims = card_of(record, "last", tmp_path)
    assert [(str(c.attack), c.accuracy) for c in claims.robust] == [
        ("pgd-10", 0.5), ("autoattack", 0.43),
    ]  # fmt: skip
    assert claims.autoattack.origin == "evaluation-0.json"
    assert [claim.log for claim in claims.robust] == [None, "autoattack-a.log"]
    assert "| autoattack (standard) | - | - | - | 1,000 | 43.00% | 40.0-46.1% |" in text
    assert "still right after each part: apgd-ce 45.00%, square 43.00%." in text
    assert "AutoAttack was not run" not in text
    assert card_of(record, "best", tmp_path)[1].autoattack is None


def test_of_one_attack_the_most_images_count_and_then_the_newest(tmp_path):
    record = record_of(robust_accuracy={"pgd-10": 0.5, "autoattack": 0.4, "cw-9": 0.6})
    sizes = [(50, 0.1), (1000, 0.2), (4000, 0.3), (4000, 0.31), (4000, 0.32)]
    for number, (num_images, accuracy) in enumerate(sizes):
        path = tmp_path / f"evaluation-{number}.json"
        found = {"autoattack": accuracy, "cw-9": accuracy} if num_images != 1000 else {"cw-9": 0.1}
        evaluation = record | {"num_eval_images": num_images, "robust_accuracy": found}
        evaluation |= {"attack_step": "2/255"} if number == 4 else {}
        path.write_text(json.dumps(evaluation | {"checkpoint": "last.pt"}))
        os.utime(path, (10 + number % 4, 10 + number % 4))
    claims = card_of(record, "last", tmp_path)[1]
    assert [(str(c.attack), c.step, c.accuracy, c.num_images) for c in claims.robust] == [
        ("pgd-10", "1/255", 0.5, 1000), ("autoattack", None, 0.31, 4000),
        ("cw-9", "1/255", 0.31, 4000), ("cw-9", "2/255", 0.32, 4000),
    ]  # fmt: skip


def test_averaged_and_best_weights_have_their_own_parts_and_log():
    block = {
        "clean_accuracy": 0.7,
        "clean_top5_accuracy": None,
        "robust_accuracy": {"autoattack": 0.4},
    }
    parts = {"attack_parts": {"autoattack": {"apgd-ce": 0.5}}, "attack_log": "autoattack-b.log"}
    record = record_of(best=block | parts, average=block)
    found = [card_of(record, weights)[1].autoattack for weights in ("best", "average")]
    assert [(claim.parts, claim.log) for claim in found] == [
        ({"apgd-ce": 0.5}, "autoattack-b.log"), ({}, None),
    ]  # fmt: skip


def test_a_list_of_imagenets_images_is_named(tmp_path):
    classes = [f"n{number:08d}" for number in range(1000)]
    listed = {"file": "/lists/ids.txt", "sha256": 64 * "a", "num_images": 5000}
    evaluation = record_of(robust_accuracy={"autoattack": 0.3}, num_eval_images=5000)
    evaluation |= {"checkpoint": "last.pt", "image_list": listed}
    (tmp_path / "evaluation-0.json").write_text(json.dumps(evaluation))
    config = TrainConfig(data="/imagenet", arch="resnet18", image_size=32, eps="4/255")
    claims = read_claims(record_of(), "last", config, classes, tmp_path)
    assert claims.autoattack.images == f"ids.txt (sha256 {16 * 'a'})"
    told = describe(config.arch, classes, MEAN, STD, 32, 32, per_image=False)
    text = model_card(Subject(config, classes, "last", claims, record_of(), told))
    assert f"autoattack: the images of ids.txt (sha256 {16 * 'a'}).\n" in text


def test_every_method_has_its_papers():
    for method, papers in PAPERS.items():
        text, _ = card_of(None, method=method, m=1)
        assert text.count("@inproceedings") == len(papers)
        assert len(papers) == {"natural": 0, "free-trades": 2}.get(method, 1)
    assert "not made to withstand" in card_of(None, method="natural", m=1)[0]


def test_onnx_is_the_network_of_pixels_at_any_batch(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    network = with_normalizer(StandardizedNetwork(nn.Sequential(*layers)), MEAN, STD).eval()
    path = onnx.export_onnx(network, tmp_path, 8)
    session = onnxruntime.InferenceSession(path)
    (pixels,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (pixels.name, pixels.shape[1:], logits.name) == ("pixels", [3, 8, 8], "logits")
    for batch in (1, 5):
        images = torch.rand(batch, 3, 8, 8)
        found = torch.from_numpy(session.run(None, {"pixels": images.numpy()})[0])
        torch.testing.assert_close(found, network(images), rtol=1e-4, atol=1e-4)
    # A file that says something else is refused, and the one that stands stays.
    whole = path.read_bytes()
    other = nn.Sequential(network, nn.Softplus()).eval()
    assert onnx.disagreement(network, path, 8) < 1e-5
    assert onnx.disagreement(other, path, 8) > 1e-2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx, "_trace", lambda network, path, size: path.write_bytes(whole))
        with pytest.raises(UserError, match=r"--onnx: onnxruntime's logits differ .*; nothing was"):
            onnx.export_onnx(other, tmp_path, 8)
    assert [(p.name, p.read_bytes() == whole) for p in tmp_path.iterdir()] == [("model.onnx", True)]


def test_what_torch_cannot_export_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")

    def fails(*_, **__):
        raise torch.onnx.OnnxExporterError("many\nlines") from KeyError(
            "aten.odd: no such op\nmore"
        )

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(UserError, match=r"--onnx: torch cannot export this network \(.*no such op"):
        onnx.export_onnx(nn.Identity(), tmp_path, 32)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_onnx_names_the_package_that_is_missing(run_folder, monkeypatch, missing):
    pytest.importorskip("onnxruntime")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=rf"--onnx: {missing} is not installed; pip install"):
        export_for(str(run_folder), with_onnx=True)
    assert not (run_folder / "export").exists()


@pytest.fixture
def stub(monkeypatch):
    """huggingface_hub's calls, recorded; `fails` is what the upload raises."""
    import huggingface_hub

    seen = SimpleNamespace(calls=[], fails=None, token="secret")

    class Api:
        def __init__(self, **options):
            seen.calls.append(("api", options))

        def create_repo(self, name, **options):
            seen.calls.append(("create", name, options))

        def upload_folder(self, **options):
            if seen.fails:
                raise seen.fails
            seen.calls.append(("upload", options))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: seen.token)
    return seen


def test_an_export_is_uploaded_as_it_is(run_folder, stub):
    lines = export_for(str(run_folder), repository="me/net")
    assert lines[1] == "uploaded to https://huggingface.co/me/net"
    assert lines[2].endswith("README.md names no licence yet: fill in TODO, and upload again")
    _, (_, name, options), (_, upload) = stub.calls
    assert (name, options["exist_ok"]) == ("me/net", True)
    assert upload["folder_path"] == run_folder / "export"
    assert upload["repo_id"] == "me/net"


def test_an_upload_that_cannot_be_is_one_line(run_folder, stub, monkeypatch):
    export = run_folder / "export"
    for name in ("net", "a/b/c", "/net", "me/", "me/ne t", ""):
        with pytest.raises(UserError, match=rf"--push-to-hub {name}: ") as refused:
            export_for(str(run_folder), repository=name)
        assert "\n" not in str(refused.value)
    stub.token = None
    with pytest.raises(UserError, match=r"--push-to-hub: no token; log in with `hf auth login`"):
        export_for(str(run_folder), repository="me/net")
    assert not export.exists()
    stub.token, stub.fails = "secret", ConnectionError("no route\nto host")
    with pytest.raises(UserError, match=r"--push-to-hub me/net: not uploaded \(no route\)$"):
        export_for(str(run_folder), repository="me/net")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"huggingface_hub is not installed; pip install"):
        hub.check_repository("me/net")


def test_an_export_of_version_0_2_0_still_loads(export):
    folder, model = export("timm/test_resnet")
    config = read(folder / "config.json")
    ours = ("arch", "pretrained_cfg", "num_features", "label_names", "model_args")
    old = {name: value for name, value in config.items() if name not in ours}
    (folder / "config.json").write_text(json.dumps(old | {"architecture": "timm/test_resnet"}))
    pixels = torch.rand(2, 3, 32, 32)
    loaded = ff.load_export(folder)
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    torch.testing.assert_close(loaded(pixels), model((pixels - mean) / std))
    assert set(load_file(folder / "model.safetensors")) == set(model.state_dict())
