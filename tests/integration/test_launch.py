"""The scripts as a person types them, on real images."""

import json
import shutil
import zipfile

import pytest
import torch
import yaml

from forked import run_ranks, run_script
from freeadv_fast.cli import run_training

SHORT = ["--max-passes", "320", "--eval-images", "24", "--holdout-images", "20"]
SMALL = [*SHORT, "--arch", "timm/test_efficientnet"]


@pytest.fixture
def imagenette(test_data, tmp_path):
    """Twelve training and six validation images of each Imagenette class, as an ImageFolder."""
    for archive, per_class in (("imagenette224_train_a.zip", 12), ("imagenette224_val.zip", 6)):
        counts = {}
        with zipfile.ZipFile(test_data / "imagenette224" / archive) as images:
            for name in images.namelist():
                folder = name.rsplit("/", 1)[0]
                if not name.endswith("/") and counts.setdefault(folder, 0) < per_class:
                    counts[folder] += 1
                    images.extract(name, tmp_path / "imagenette")
    return tmp_path / "imagenette"


@pytest.mark.slow
def test_embedded_digits_end_to_end(pictures, tmp_path, monkeypatch, capsys):
    """No --data: trains, evaluates, draws, exports; every file of a run is there."""
    monkeypatch.chdir(tmp_path)
    assert run_training("free", "imagenet", [*SHORT, "--m", "2"]) == 0
    first_line = capsys.readouterr().out.splitlines()[0]
    assert first_line.startswith("no --data: training on embedded real handwritten digits")
    folder = tmp_path / "runs" / "free-digits-resnet18-m2-eps32-seed0"
    result = json.loads((folder / "result.json").read_text())
    assert result["passes"] >= 320
    assert result["passes"] < 320 + 64 * 2
    assert set(result["robust_accuracy"]) == {"pgd-20"}
    for key in ("clean_accuracy", "train_seconds", "passes_per_second", "versions", "device"):
        assert result[key] is not None
    assert (result["method"], result["m"], result["num_eval_images"]) == ("free", 2, 24)
    assert 0 <= result["robust_accuracy"]["pgd-20"] <= result["clean_accuracy"] <= 1
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["eps"], config["data"], config["m"]) == ("32/255", "digits", 2)
    environment = json.loads((folder / "env.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__
    assert "extension" in environment["build"]
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for line in lines:
        assert {"passes", "epoch", "loss", "passes_per_second"} <= set(line)
    assert any("holdout_robust_accuracy" in line for line in lines)
    for picture in ("training.png", "perturbations.png"):
        assert (folder / "plots" / picture).read_bytes().startswith(b"\x89PNG")
    assert (folder / "checkpoints" / "best.pt").exists()
    assert any(folder.glob("events.out.tfevents.*"))


@pytest.mark.slow
def test_quickstart_shows_that_the_natural_model_falls_and_the_free_one_stands(
    repository, tmp_path, monkeypatch
):
    """A shortened `make run`: the table, and at least 20 points between the two."""
    monkeypatch.chdir(tmp_path)
    done = run_script(
        repository / "launch" / "quickstart.py", "--eval-images", "120", "--epochs", "8",
        "--arch", "timm/test_efficientnet", output=tmp_path / "output",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = {}
    assert len(list((tmp_path / "runs").glob("*/report.html"))) == 2
    assert len(list((tmp_path / "runs").glob("*.html"))) == 1  # both beside each other
    for path in (tmp_path / "runs").glob("*/result.json"):
        result = json.loads(path.read_text())
        results[result["method"]] = result
    natural, free = results["natural"], results["free"]
    assert natural["clean_accuracy"] > 0.8
    assert free["clean_accuracy"] > 0.6
    gap = free["robust_accuracy"]["pgd-20"] - natural["robust_accuracy"]["pgd-20"]
    assert gap >= 0.2, done.stdout
    assert natural["eps"] == free["eps"]
    title, head, _, clean, robust, *_ = done.stdout.splitlines()[-7:]
    assert title == "natural and free at eps 32/255"
    assert head.split() == ["attack", "steps", "step", "restarts", "natural", "free"]
    shown = [f"{result['clean_accuracy']:.1%}" for result in (natural, free)]
    assert clean.split() == ["none", "-", "-", "-", *shown]
    shown = [f"{result['robust_accuracy']['pgd-20']:.1%}" for result in (natural, free)]
    assert robust.split() == ["pgd-20", "20", free["attack_step"], "1", *shown]


def test_two_ranks_train_on_real_jpegs(repository, imagenette, tmp_path, monkeypatch):
    """One result, the global batch printed, running statistics averaged, and their averages."""
    monkeypatch.chdir(tmp_path)
    done = run_ranks(
        2, repository / "launch" / "imagenet_free.py", "--m", "4", "--data", imagenette,
        "--arch", "test_resnet", "--image-size", "64", "--batch-size", "8",
        "--max-passes", "160", "--eval-images", "11", "--holdout-images", "10",
        "--workers", "1", "--eval-attacks", "pgd-2", "--ema", "0.9", output=tmp_path / "output",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("16 = 2 ranks x 8") == 1
    (path,) = (tmp_path / "runs").glob("*/result.json")
    result = json.loads(path.read_text())
    assert (result["ranks"], result["num_eval_images"], result["passes"]) == (2, 11, 192)
    state = torch.load(path.parent / "checkpoints" / "last.pt", weights_only=True)
    own = [rank["buffers"]["bn1.running_mean"] for rank in state["ranks"]]
    torch.testing.assert_close(state["model"]["bn1.running_mean"], (own[0] + own[1]) / 2)
    assert not torch.equal(own[0], own[1])
    average = state["average"]
    own = [rank["average"]["bn1.running_mean"] for rank in state["ranks"]]
    torch.testing.assert_close(average["model"]["bn1.running_mean"], (own[0] + own[1]) / 2)
    assert not torch.equal(own[0], own[1])
    assert result["average"]["decay"] == average["decay"] == 0.9
    assert (path.parent / "export-average" / "config.json").exists()
    deltas = [rank["method"]["delta"] for rank in state["ranks"]]
    assert not torch.equal(deltas[0], deltas[1])


def test_a_mistake_on_two_ranks_is_said_once(repository, tmp_path):
    """Rank 0 prints the line."""
    script = repository / "launch" / "imagenet_free.py"
    done = run_ranks(2, script, "--data", "nowhere", output=tmp_path / "output")
    assert done.returncode != 0
    assert done.stderr.count("error: --data nowhere") == 1


def test_dry_run_writes_nothing(tmp_path, monkeypatch, capsys):
    """The resolved configuration, the steps, the first minibatch's shapes."""
    monkeypatch.chdir(tmp_path)
    assert run_training("free", "imagenet", ["--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "eps: 32/255" in out
    assert "images (64, 32, 32, 3) torch.uint8" in out
    assert not (tmp_path / "runs").exists()


def test_a_saved_run_replays_to_the_same_weights(tmp_path, monkeypatch):
    """--config RUN/config.yaml is the same run again."""
    monkeypatch.chdir(tmp_path)
    assert run_training("free", "imagenet", [*SMALL, "--output-dir", "one"]) == 0
    assert (
        run_training("free", "imagenet", ["--config", "one/config.yaml", "--output-dir", "two"])
        == 0
    )
    one, two = (torch.load(f"{name}/checkpoints/last.pt", weights_only=True) for name in
                ("one", "two"))  # fmt: skip
    for name, value in one["model"].items():
        assert torch.equal(value, two["model"][name]), name


def test_evaluate_and_export_a_run(repository, tmp_path, monkeypatch):
    """launch/evaluate.py adds attacks to a finished run; its result.json stays as it was."""
    monkeypatch.chdir(tmp_path)
    assert run_training("free", "imagenet", [*SMALL, "--output-dir", "run"]) == 0
    before = (tmp_path / "run" / "result.json").read_bytes()
    shutil.rmtree(tmp_path / "run" / "export")
    done = run_script(
        repository / "launch" / "evaluate.py", "run", "--attacks", "pgd-3,cw-3",
        "--eval-images", "16", output=tmp_path / "evaluate",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "cw-3" in done.stdout
    assert (tmp_path / "run" / "result.json").read_bytes() == before
    assert list((tmp_path / "run").glob("evaluation-*.json"))
    assert "evaluation-last-pgd-3_cw-3" in (tmp_path / "run" / "report.html").read_text()
    script = repository / "launch" / "export.py"
    done = run_script(script, "run", output=tmp_path / "export")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "export" / "config.json").exists()
