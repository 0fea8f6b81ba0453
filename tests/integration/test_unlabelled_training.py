"""Runs with unlabelled images: what they count, and that they stop, move and resume."""

import json
import os
import pickle
import signal

import numpy as np
import pytest
import torch
from torch import nn

from freeadv_fast import training
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.errors import UserError
from freeadv_fast.runs.checkpoint import load_checkpoint
from freeadv_fast.session import prepare
from freeadv_fast.session.cost import costs_of
from freeadv_fast.session.signals import Interrupted

# 50 labelled images in shares of 8, the last one of 2, with as many unlabelled ones: 100 an epoch.
OPTIONS = {
    "image_size": 32, "augment": "pad-crop-flip", "batch_size": 16, "m": 1, "bn_group": None,
    "unlabelled_fraction": 0.5, "epochs": 2, "schedule": "constant", "eps": "8/255",
    "attack_steps": 2, "holdout_images": 10, "guard_images": 10, "eval_images": 10,
    "eval_attacks": "pgd-2", "log_every": 1, "workers": 0,
}  # fmt: skip
METHODS = {
    "pgd": {"method": "pgd"},
    "trades": {"method": "trades"},
    "dat": {"method": "dat"},
    "dat-kl": {"method": "dat", "dat_unlabelled": "kl"},
    "dat-fgsm": {"method": "dat", "dat_attack": "fgsm", "attack_steps": 1},
    "accumulated": {"method": "dat", "batch_size": 4, "accumulate": 4},
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


@pytest.fixture
def files(tmp_path):
    """Images whose label is their shade: CIFAR-10's layout, and unlabelled ones."""
    random = np.random.default_rng(3)

    def images(count):
        labels = np.arange(count) % 10
        shades = 25 * labels[:, None] + random.integers(0, 20, (count, 3072))
        return shades.astype(np.uint8), labels

    place = tmp_path / "cifar"
    place.mkdir()
    for name in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]:
        data, labels = images(12)
        (place / name).write_bytes(pickle.dumps({b"data": data, b"labels": labels.tolist()}, 2))
    names = {b"label_names": [b"%d" % label for label in range(10)]}
    (place / "batches.meta").write_bytes(pickle.dumps(names, 2))
    data, labels = images(30)
    np.savez(tmp_path / "pool.npz", image=data.reshape(-1, 32, 32, 3), label=labels)
    return place, tmp_path / "pool.npz"


@pytest.fixture
def start(files, tmp_path, monkeypatch):
    """Trains in this process; `stop_after` minibatches it gets SIGTERM."""
    real = training.obey_requests

    def run(folder, name, stop_after=None, **options):
        calls = []

        def obey(run, stop):
            calls.append(None)
            if len(calls) == stop_after:
                os.kill(os.getpid(), signal.SIGTERM)
            real(run, stop)

        monkeypatch.setattr(training, "obey_requests", obey)
        paths = {
            "data": f"cifar10:{files[0]}", "output_dir": str(tmp_path / folder),
            "unlabelled": str(files[1]),
        }  # fmt: skip
        config = TrainConfig(**(OPTIONS | METHODS[name] | paths | options))
        if stop_after is None:
            training.train(config, network())
        else:
            with pytest.raises(Interrupted):
                training.train(config, network())

    return run


def last(folder):
    return load_checkpoint(folder / "checkpoints" / "last.pt")


def weights(folder):
    return last(folder)["model"]


@pytest.mark.parametrize("name", METHODS)
def test_trains_and_costs_what_was_foretold(name, start, tmp_path, monkeypatch):
    foretold = []

    def watched(*arguments):
        foretold.extend(costs_of(*arguments))
        return foretold

    monkeypatch.setattr(prepare, "costs_of", watched)
    start("run", name)
    done = last(tmp_path / "run")["progress"]
    (cost,) = foretold
    assert (cost.num_images, cost.num_batches) == (100, 7)
    assert (done["passes"], done["attack_passes"]) == cost.passes
    assert done["passes"] == 2 * 100 * (1 if name in ("pgd", "dat-fgsm") else 2)
    assert done["attack_passes"] == 2 * 100 * (1 if name == "dat-fgsm" else 2)
    lines = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) >= 14
    assert np.isfinite(losses).all()


@pytest.mark.parametrize("name", ["pgd", "dat-kl"])
def test_resumes_bit_for_bit_with_the_file_elsewhere(name, start, files, tmp_path):
    start("straight", name)
    start("stopped", name, stop_after=9)
    moved = files[1].rename(tmp_path / "moved.npz")
    start("stopped", name, unlabelled=str(moved), resume=True)
    straight, stopped = (weights(tmp_path / folder) for folder in ("straight", "stopped"))
    for key, value in straight.items():
        assert torch.equal(stopped[key], value), key


def test_unlabelled_images_change_the_weights(start, files, tmp_path):
    """Other pseudo labels are other weights, unless only predictions are compared."""
    with np.load(files[1]) as arrays:
        images, labels = arrays["image"], arrays["label"]
    others = tmp_path / "others.npz"
    np.savez(others, image=images, label=(labels + 1) % 10)
    for name, is_equal in (("dat", False), ("dat-kl", True)):
        start(f"{name}-own", name)
        start(f"{name}-others", name, unlabelled=str(others))
        own, other = (weights(tmp_path / f"{name}-{kind}") for kind in ("own", "others"))
        assert all(torch.equal(own[key], other[key]) for key in own) is is_equal


def test_other_images_are_refused_when_it_resumes(start, files, tmp_path):
    start("run", "pgd", stop_after=2)
    start("plain", "pgd", stop_after=2, unlabelled=None)
    with np.load(files[1]) as arrays:
        images, labels = arrays["image"], arrays["label"]
    fewer = str(tmp_path / "fewer.npz")
    np.savez(fewer, image=images[1:], label=labels[1:])
    for folder, file, words in (
        ("run", fewer, "not the images that the run was trained on under"),
        ("run", None, "--unlabelled None: the run was made with"),
        ("plain", str(files[1]), "the run was made without; leave it out"),
    ):
        with pytest.raises(UserError, match=words):
            start(folder, "pgd", unlabelled=file, resume=True)


def test_the_start_says_what_is_read_and_what_it_costs(start, capsys):
    """Seven minibatches an epoch, whatever the share of unlabelled images brings with it."""
    start("run", "pgd", stop_after=1)
    out = capsys.readouterr().out
    assert "50 training images, 10 held out" in out
    assert "pool.npz, 8 of each minibatch's 16, memory-mapped" in out
    assert "2 data epochs x 7 minibatches = 14 updates = 200 image passes" in out
