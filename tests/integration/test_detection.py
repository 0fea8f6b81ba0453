"""Detectors from the command line on: trained, resumed, evaluated, exported, refused."""

import json
import os
import signal

import pytest
import torch

from coco_files import sample_folder, write_coco
from freeadv_fast import training
from freeadv_fast.cli import run_training
from freeadv_fast.runs.checkpoint import load_checkpoint

# Minibatches of several canvases: 64 x 96, 96 x 64 and 64 x 64 pixels.
FLAGS = [
    "--arch", "retinanet_resnet10_fpn_64", "--image-size", "48", "--batch-size", "4",
    "--workers", "0", "--epochs", "2", "--lr", "0.01", "--eval-attacks", "pgd-2",
    "--eval-corruptions", "brightness-1", "--log-every", "1",
]  # fmt: skip
METHODS = {
    "free": ["--m", "2", "--eps", "4/255"],
    "fast-advprop": ["--p-adv", "0.5", "--aux-bn-group", "2"],
}


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    """Coloured rectangles in COCO's layout."""
    return write_coco(tmp_path_factory.mktemp("coco"), num_images=(10, 4))


@pytest.fixture
def run(boxes):
    """Trains in this process and returns the exit status."""

    def run(method, folder, *flags):
        own = METHODS.get(method, [])
        where = ["--data", f"coco:{boxes}", "--output-dir", str(folder)]
        words = ["--method", method, *FLAGS, *own, *where, *flags]
        return run_training("fast-advprop", "coco", words)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_methods_train_detectors(run, tmp_path, capsys, method):
    """And evaluate, clean, attacked and corrupted, and export them."""
    folder = tmp_path / "run"
    assert run(method, folder) == 0
    result = json.loads((folder / "result.json").read_text())
    assert result["clean_accuracy"] is None
    assert result["robust_accuracy"] == {}
    found = result["detection"]
    assert set(found["attacks"]) == {"pgd-2"}
    assert set(found["corruptions"]) == {"brightness"}
    assert found["num_images"] == 4
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert all(line["loss"] > 0 for line in lines)
    assert not any("accuracy" in key for line in lines for key in line)
    assert not (folder / "checkpoints" / "best.pt").exists()
    assert (folder / "export" / "model.safetensors").exists()
    assert "AP50" in capsys.readouterr().out


@pytest.mark.slow
def test_photographs_are_trained_on(tmp_path, run):
    """COCO's own files, by their ids, with gaps."""
    folder = tmp_path / "run"
    data = ["--data", f"coco:{sample_folder(tmp_path)}", "--image-size", "96"]
    flags = ["--max-passes", "8", "--eps", "0", "--eval-images", "4", "--epochs", "1"]
    assert run("natural", folder, *data, *flags) == 0
    result = json.loads((folder / "result.json").read_text())
    assert (result["passes"], result["detection"]["num_images"]) == (8, 4)


def test_a_stopped_run_resumes_bit_for_bit(run, tmp_path, monkeypatch, capsys):
    """Free training, whose perturbation is of the last minibatch's shape; another evaluation."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    flags = ["--eval-corruptions", "brightness-1", "--eval-images", "2", "--eval-attacks", "pgd-1"]
    assert run("free", straight, *flags) == 0
    real, calls = training.obey_requests, []

    def interrupt(run, stop):
        calls.append(None)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        real(run, stop)

    with monkeypatch.context() as patch:
        patch.setattr(training, "obey_requests", interrupt)
        assert run("free", stopped, *flags) == 128 + signal.SIGTERM
    assert run("free", stopped, *flags, "--resume", "--eval-corruptions", "contrast-2") == 0
    ours, theirs = (load_checkpoint(f / "checkpoints" / "last.pt") for f in (stopped, straight))
    for name, value in theirs["model"].items():
        assert torch.equal(ours["model"][name], value), name
    deltas = [state["ranks"][0]["method"]["delta"] for state in (ours, theirs)]
    assert deltas[0].any()
    assert torch.equal(*deltas)
    result = json.loads((stopped / "result.json").read_text())
    assert set(result["detection"]["corruptions"]) == {"contrast"}
    capsys.readouterr()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--arch", "resnet18"], "holds boxes, and --arch resnet18 classifies"),
        (["--arch", "retinanet_vgg"], "--arch retinanet_vgg: no such detector"),
        (["--method", "trades"], "--method trades: trains classifiers only"),
        (["--mix", "mixup"], "--mix mixup"),
        (["--eval-corruptions", "foq"], "did you mean fog"),
    ],
)
def test_mistakes_get_one_line(run, tmp_path, capsys, flags, says):
    assert run("natural", tmp_path / "run", *flags) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
