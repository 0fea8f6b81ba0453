"""Errors on hand-made trees against errors computed by hand; what is missing is said."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import shutil

import pytest
import torch
from PIL import Image
from torch import nn

from forked import run_script
from freeadv_fast.config.presets import CPU_EVAL_IMAGES
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.errors import UserError
from freeadv_fast.evaluation.shifts import robustness
from freeadv_fast.evaluation.shifts.corruptions import CORRUPTIONS
from freeadv_fast.evaluation.shifts.imagenet_c import (
    ALEXNET_ERROR,
    IMAGENET_C,
    CorruptionErrors,
    describe_means,
)
from freeadv_fast.evaluation.shifts.robustness import evaluate_robustness
from freeadv_fast.runs.log import RunFolder, save_config
from freeadv_fast.runs.saved import SavedRun

# Not in the order of the colour channels, nor is any set's: names must decide, not places.
CLASSES = ["n03", "n01", "n02"]
COLORS = {"n01": (200, 10, 10), "n02": (10, 200, 10), "n03": (10, 10, 200)}
CHANNEL = {"n01": 0, "n02": 1, "n03": 2}

# AlexNet's error at severities 1 to 5, from timm's imagenetc_alexnet_error_rates_list.
ALEXNET_BY_SEVERITY = {
    "gaussian_noise": (0.69528, 0.82542, 0.93554, 0.98138, 0.99452),
    "shot_noise": (0.71224, 0.85108, 0.93574, 0.98182, 0.99146),
    "impulse_noise": (0.78374, 0.89808, 0.9487, 0.9872, 0.99548),
    "defocus_blur": (0.65624, 0.73202, 0.85036, 0.91364, 0.94714),
    "glass_blur": (0.64308, 0.75054, 0.88806, 0.91622, 0.93344),
    "motion_blur": (0.5843, 0.70048, 0.82108, 0.8975, 0.92638),
    "zoom_blur": (0.70008, 0.76992, 0.80784, 0.84198, 0.87198),
    "snow": (0.71726, 0.88392, 0.86468, 0.9187, 0.94952),
    "frost": (0.6139, 0.79734, 0.8879, 0.89942, 0.9343),
    "fog": (0.67474, 0.7605, 0.84378, 0.8726, 0.945),
    "brightness": (0.4514, 0.48502, 0.54048, 0.62166, 0.7244),
    "contrast": (0.64548, 0.7615, 0.88874, 0.9776, 0.9927),
    "elastic_transform": (0.52596, 0.70116, 0.55686, 0.64076, 0.80554),
    "pixelate": (0.52218, 0.5462, 0.73728, 0.87092, 0.91262),
    "jpeg_compression": (0.51002, 0.54718, 0.57294, 0.65458, 0.74778),
}


class ReadsColor(nn.Module):
    """The class of a picture is the colour that it has most of."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images):
        channels = images.mean((2, 3)) * self.weight
        return channels[:, [CHANNEL[name] for name in CLASSES]]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run whose network reads colours, decoded by PIL in this process."""
    folder = RunFolder(tmp_path / "run")
    folder.checkpoints.mkdir(parents=True)
    config = TrainConfig(
        image_size=8, normalization="none", batch_size=16, workers=0, data=str(tmp_path / "data")
    )
    save_config(config, folder.config)
    (folder.root / "result.json").write_text("kept")
    saved = SavedRun(folder, config, folder.checkpoints / "best.pt", CLASSES, ReadsColor())
    monkeypatch.setattr(robustness, "load_run", lambda *_: saved)
    monkeypatch.setattr("freeadv_fast.data.build.available_backend", lambda: "torchvision")
    return folder.root


def paint(folder, colors, size=8):
    """Writes one flat picture a colour into folder/CLASS/; `colors` maps classes to colours."""
    for name, painted in colors.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index, color in enumerate(painted):
            Image.new("RGB", (size, size), COLORS[color]).save(folder / name / f"{index}.png")


def paint_wrongly(folder, num_wrong, num_images=4):
    """A severity's folder: `num_images` pictures of n01, the first `num_wrong` in green."""
    wrong = ["n02"] * num_wrong + ["n01"] * (num_images - num_wrong)
    paint(folder, {"n01": wrong, "n02": ["n02"], "n03": ["n03"] * 3})


def record_of(run, pattern):
    (path,) = run.glob(pattern)
    return json.loads(path.read_text())


def test_both_means_are_those_computed_by_hand(run, tmp_path, capsys):
    """Eight pictures a severity, of which (corruption's place + severity) mod 5 are wrong."""
    errors = {}
    for place, name in enumerate(ALEXNET_BY_SEVERITY):
        errors[name] = [((place + severity) % 5) / 8 for severity in range(1, 6)]
        for severity, error in enumerate(errors[name], 1):
            paint_wrongly(tmp_path / "c" / name / str(severity), round(error * 8))
    paint_wrongly(tmp_path / "c" / "saturate" / "1", 4)  # not in the mean
    measured = evaluate_robustness(run, imagenet_c=tmp_path / "c").imagenet_c
    for name, row in errors.items():
        assert list(measured.errors[name].values()) == pytest.approx(row)
    mean = sum(sum(row) / 5 for row in errors.values()) / 15
    mce = sum(sum(row) / sum(ALEXNET_BY_SEVERITY[name]) for name, row in errors.items()) / 15
    assert measured.mean_error == pytest.approx(mean)
    record = record_of(run, "robustness-best-imagenet-c-n400-*.json")
    assert record["mean_corruption_error_unnormalized"] == pytest.approx(mean)
    assert record["mce_alexnet_normalized"] == pytest.approx(mce, abs=1e-5)
    assert record["errors"]["saturate"] == {"1": 0.5}
    assert record["num_eval_images"] == 8
    out = capsys.readouterr().out
    assert f"mean corruption error, unnormalised (as in Fast AdvProp): {mean:.1%}" in out
    assert f"mCE, normalised by AlexNet (Hendrycks and Dietterich): {mce:.1%}" in out
    assert f"no GPU: at most {CPU_EVAL_IMAGES} images" in out
    assert "missing" not in out
    assert "the network knows 3 classes, AlexNet's errors are of 1,000" in out
    (picture,) = (run / "plots").glob("robustness-best-imagenet-c-n400-*.png")
    with Image.open(picture) as chart:
        assert chart.width > 1500
    assert (run / "result.json").read_text() == "kept"


def test_alexnet_means_are_those_of_the_severities():
    assert list(ALEXNET_ERROR) == [n for g in list(IMAGENET_C)[:4] for n in IMAGENET_C[g]]
    for name, row in ALEXNET_BY_SEVERITY.items():
        assert sum(row) / 5 == pytest.approx(ALEXNET_ERROR[name], abs=1e-5)


def test_archive_groups_and_what_is_missing_or_partial(run, tmp_path, capsys):
    """Layout of the archives; a mean over some corruptions is never called mCE."""
    root = tmp_path / "c"
    for name in ("gaussian_noise", "shot_noise", "impulse_noise"):
        for severity in range(1, 6):
            paint_wrongly(root / "noise" / name / str(severity), 2)
    for severity in (1, 2):
        paint_wrongly(root / "blur" / "zoom_blur" / str(severity), 4)
    for severity in range(1, 6):
        paint_wrongly(root / "weather" / "fog" / str(severity), 4)
        paint_wrongly(root / "weather" / "snow" / str(severity), 4)
        paint_wrongly(root / "digital" / "contrast" / str(severity), 4)
    (root / "weather" / "fog" / "3" / "n03" / "2.png").unlink()
    shutil.rmtree(root / "weather" / "snow" / "5" / "n02")
    (root / "digital" / "contrast" / "2" / "n02" / "0.png").write_bytes(b"")
    (root / "digital" / "pixelate" / "1").mkdir(parents=True)
    measured = evaluate_robustness(run, imagenet_c=root, num_images=100).imagenet_c
    assert measured.averaged == ("gaussian_noise", "shot_noise", "impulse_noise")
    assert measured.mean_error == pytest.approx(2 / 8)
    assert measured.errors["zoom_blur"] == {1: 0.5, 2: 0.5}
    assert measured.errors["fog"][3] == pytest.approx(4 / 7)
    missing, partial, unreadable, _ = measured.remarks
    assert missing == (
        "missing: defocus_blur, glass_blur, motion_blur, frost, brightness, elastic_transform, "
        "pixelate, jpeg_compression"
    )
    assert partial == (
        "partial: zoom_blur (no severity 3; no severity 4; no severity 5), "
        "snow (2 of 3 classes at 5), fog (7 of 8 images at 3), contrast (no severity 2)"
    )
    assert unreadable.startswith("unreadable: contrast 2 (")
    record = record_of(run, "robustness-best-imagenet-c-n100-*.json")
    assert "mce_alexnet_normalized" not in record
    assert record["partial_mean_corruption_error_unnormalized"] == pytest.approx(0.25)
    out = capsys.readouterr().out
    assert "over 3 of 15 corruptions, normalised by AlexNet, not the mCE" in out
    assert "no GPU" not in out


def test_without_a_complete_corruption_there_is_no_mean():
    measured = CorruptionErrors({"fog": {1: 0.5}}, (), 15, 8, 1.0)
    record, lines = describe_means(measured)
    assert set(record.values()) == {None}
    assert lines == ["no corruption is complete: no mean"]


def test_files_are_not_resized_and_cut_again(run, tmp_path):
    """RobustBench #59: a red frame around blue decides only where nothing is cut off."""
    for severity in range(1, 6):
        folder = tmp_path / "c" / "fog" / str(severity) / "n01"
        folder.mkdir(parents=True)
        picture = Image.new("RGB", (224, 224), COLORS["n01"])
        picture.paste(COLORS["n03"], (33, 33, 191, 191))  # 49.8 %; of the central 7/8, 65 %
        picture.save(folder / "0.png")
    measured = evaluate_robustness(run, imagenet_c=tmp_path / "c")
    assert measured.imagenet_c.errors["fog"] == dict.fromkeys(range(1, 6), 0.0)
    renditions = tmp_path / "c" / "fog" / "1"
    assert evaluate_robustness(run, stylized=renditions).stylized.clean_accuracy == 1


def test_logits_are_restricted_for_renditions_only(run, tmp_path):
    """Blue pictures of n02 with more green than red: right where n03 cannot be answered."""
    folder = tmp_path / "set"
    paint(folder, {"n01": ["n01"], "n02": ["n02"]})
    Image.new("RGB", (8, 8), (20, 90, 200)).save(folder / "n02" / "blue.png")
    measured = evaluate_robustness(run, imagenet_r=folder, stylized=folder)
    assert measured.imagenet_r.clean_accuracy == 1
    assert measured.stylized.clean_accuracy == pytest.approx(2 / 3)
    record = record_of(run, "robustness-best-imagenet-r-*.json")
    assert (record["num_classes"], record["num_competing_logits"]) == (2, 2)
    record = record_of(run, "robustness-best-stylized-imagenet-*.json")
    assert (record["num_classes"], record["num_competing_logits"]) == (2, 3)


def test_other_folders_and_numbers_get_files_of_their_own(run, tmp_path):
    for name in ("one", "two"):
        paint(tmp_path / name / "val", {"n01": ["n01"] * 3})
        paint(tmp_path / name / "train", {"n02": ["n02"]})
        evaluate_robustness(run, stylized=tmp_path / name)
    measured = evaluate_robustness(run, stylized=tmp_path / "one", num_images=2)
    assert measured.stylized.num_images == 2
    assert len(list(run.glob("robustness-*.json"))) == 3


def test_corruptions_on_the_fly(run, tmp_path, capsys):
    for split in ("train", "val"):
        paint(tmp_path / "data" / split, {name: [name] * 2 for name in COLORS}, size=12)
    first = evaluate_robustness(run, on_the_fly=True).on_the_fly
    assert first.errors == evaluate_robustness(run, on_the_fly=True).on_the_fly.errors
    assert list(first.errors) == list(CORRUPTIONS)
    assert all(sorted(row) == [1, 2, 3, 4, 5] for row in first.errors.values())
    assert (first.clean_error, first.num_images, first.is_full) == (0, 6, True)
    record = record_of(run, "robustness-best-on-the-fly-n400.json")
    assert not any("mce" in key or "mean_corruption" in key for key in record)
    text = "on-the-fly, not ImageNet-C; do not compare with published numbers"
    assert text in record["remarks"]
    assert text in capsys.readouterr().out
    assert (run / "plots" / "robustness-best-on-the-fly-n400.png").stat().st_size > 10_000


def test_mistakes_are_found_before_anything_is_evaluated(run, tmp_path):
    paint(tmp_path / "good", {"n01": ["n01"]})
    paint(tmp_path / "strange", {"n01": ["n01"]})
    for name in ("n77", "n78"):
        (tmp_path / "strange" / name).mkdir()
    (tmp_path / "empty").mkdir()
    for options, message in (
        ({}, "nothing to evaluate on: give --imagenet-c FOLDER, .* or --on-the-fly"),
        ({"stylized": "nowhere"}, "--stylized nowhere: no such folder"),
        ({"imagenet_r": tmp_path / "empty"}, "--imagenet-r .*: no class folders in it"),
        ({"imagenet_c": tmp_path / "good"}, "--imagenet-c .*: no corruption in it; it must hold"),
        (
            {"stylized": tmp_path / "good", "imagenet_r": tmp_path / "strange"},
            "--imagenet-r .*strange: 2 of its 3 classes are none of the 3 .*: n77, n78; leave",
        ),
        ({"on_the_fly": True, "num_images": 0}, "--eval-images 0: must be at least 1"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            evaluate_robustness(run, **options)
        assert "\n" not in str(caught.value)
    assert not list(run.glob("robustness-*"))


def test_other_classes_on_the_fly_are_refused(run, tmp_path):
    for split in ("train", "val"):
        paint(tmp_path / "other" / split, {"n01": ["n01"], "n02": ["n02"]})
        (tmp_path / "other" / split / "n01").rename(tmp_path / "other" / split / "n99")
    with pytest.raises(UserError, match=r"--data .*other: 1 of its 2 classes .*: n99"):
        evaluate_robustness(run, on_the_fly=True, data=str(tmp_path / "other"))


def test_the_script_has_every_flag_that_its_lines_name(repository):
    """``--data`` was named by a line of the corruptions made on the fly, and refused."""
    path = repository / "launch" / "robustness.py"
    spec = importlib.util.spec_from_file_location("robustness_script", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    flags = {"num_images": "eval_images", "run_folder": "run"}
    asked = [flags.get(name, name) for name in inspect.signature(evaluate_robustness).parameters]
    assert sorted(asked) == sorted(inspect.signature(script.main).parameters)


def test_the_script_names_its_flags(repository, tmp_path):
    script = repository / "launch" / "robustness.py"
    done = run_script(script, "runs/x", output=tmp_path / "output")
    assert done.returncode == 2
    assert done.stderr.startswith("error: nothing to evaluate on: give --imagenet-c FOLDER")
    assert len(done.stderr.splitlines()) == 1


def test_foreign_weights_get_a_file_of_their_own(run, tmp_path, monkeypatch):
    paint(tmp_path / "data" / "val", {name: [name] for name in COLORS})
    own = robustness.load_run()
    foreign = dataclasses.replace(own, checkpoint=tmp_path / "elsewhere" / "best.pt")
    stems = []
    for saved in (own, foreign):
        monkeypatch.setattr(robustness, "load_run", lambda *_, saved=saved: saved)
        evaluate_robustness(run, on_the_fly=True)
        stems.append({path.name for path in run.glob("robustness-*.json")})
    assert len(stems[0]) == 1
    assert len(stems[1]) == 2
