"""Every method as a person runs it: on real digits, guarded, stopped, resumed, evaluated."""

import json
import os
import signal

import pytest
import torch

from freeadv_fast.cli import run_training
from freeadv_fast.config.method_names import DUAL, METHODS
from freeadv_fast.methods.passes import Passes
from freeadv_fast.session.method import build_phase_method

# timm's smallest ResNet; a few minibatches; a check of the guard in between.
FLAGS = {
    "--arch": "test_resnet", "--batch-size": "20", "--max-passes": "160", "--epochs": "20",
    "--eval-images": "16", "--holdout-images": "16", "--eval-attacks": "pgd-2", "--log-every": "1",
    "--workers": "1",
}  # fmt: skip
GUARD_FLAGS = {"--guard-images": "16", "--guard-every": "2"}
OWN_FLAGS = {
    "free": {"--m": "2"},
    "free-trades": {"--m": "2", "--max-passes": "320"},
    "elle": {"--max-passes": "320"},
    "yopo": {"--max-passes": "240"},
    "fast-advprop": {"--p-adv": "0.4", "--aux-bn-group": "4"},
    "advprop": {"--aux-bn-group": "4"},
}


def run(method, folder, *more):
    """The exit status of launch/cifar.py --method METHOD."""
    guard = {} if method in ("natural", *DUAL) else GUARD_FLAGS
    flags = FLAGS | guard | OWN_FLAGS.get(method, {}) | {"--output-dir": str(folder)}
    words = [word for pair in flags.items() for word in pair]
    return run_training("free", "cifar", ["--method", method, *words, *more])


def stop_after(monkeypatch, num_minibatches):
    """Sends this process a SIGTERM when so many minibatches are done."""

    def build(*arguments):
        method = build_phase_method(*arguments)
        train, left = method.train_minibatch, [num_minibatches]

        def train_and_stop(images, labels, global_size) -> Passes:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return train(images, labels, global_size)

        method.train_minibatch = train_and_stop
        return method

    monkeypatch.setattr("freeadv_fast.session.prepare.build_phase_method", build)


@pytest.mark.parametrize("method", METHODS)
def test_trains_is_guarded_stops_resumes_and_is_evaluated(method, tmp_path, monkeypatch):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert run(method, straight) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert run(method, stopped) == 128 + signal.SIGTERM
    assert not (stopped / "result.json").exists()
    assert run(method, stopped, "--resume") == 0

    models = [
        torch.load(folder / "checkpoints" / "last.pt", weights_only=True)["model"]
        for folder in (straight, stopped)
    ]
    for name, value in models[0].items():
        assert torch.equal(models[1][name], value), name
    result = json.loads((stopped / "result.json").read_text())
    assert result["method"] == method
    assert result["passes"] >= 160
    assert set(result["robust_accuracy"]) == {"pgd-2"}
    assert result["collapse"] is None
    lines = [json.loads(line) for line in (stopped / "log.jsonl").read_text().splitlines()]
    is_guarded = method not in ("natural", *DUAL)
    assert any("guard_robust_accuracy" in line for line in lines) is is_guarded
    assert len({line["passes"] for line in lines}) > 3
