"""Pictures are PNGs with something in them; tables line up."""

from __future__ import annotations

import math

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from freeadv_fast.config.attack import Attack
from freeadv_fast.config.threat import Perturbation, ThreatModel
from freeadv_fast.evaluation.report import plot_perturbations, plot_training
from freeadv_fast.evaluation.tables import results_table


def picture(path):
    """The pixels of a PNG that shows something."""
    assert path.read_bytes().startswith(b"\x89PNG")
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert pixels.shape[0] > 400
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    return pixels


def log_lines(num_lines):
    for index in range(num_lines):
        line = {
            "passes": 640 * (index + 1),
            "epoch": index // 4,
            "loss": 2.3 * math.exp(-index / 9),
        }
        line |= {"lr": 0.1, "passes_per_second": 900.0, "train_adversarial_accuracy": 0.5}
        if index % 4 == 3:
            line |= {"holdout_clean_accuracy": 0.8, "holdout_robust_accuracy": None}
        yield line


def test_training_curves(tmp_path):
    settings = dict(matplotlib.rcParams)
    pictures = []
    for num_lines in (0, 1, 50):
        path = tmp_path / f"{num_lines}.png"
        plot_training(list(log_lines(num_lines)), path)
        pictures.append(picture(path))
    assert not np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[1], pictures[2])
    assert dict(matplotlib.rcParams) == settings


@pytest.mark.parametrize(("num_images", "eps"), [(1, "8/255"), (9, "8/255"), (3, "0")])
def test_attacked_images(tmp_path, small_network, num_images, eps):
    network = small_network()
    images = torch.randint(0, 256, (num_images, 8, 8, 3), dtype=torch.uint8)
    labels = network.eval()(images.permute(0, 3, 1, 2) / 255).argmax(1)
    labels[1::2] = (labels[1::2] + 1) % 5
    network.train()
    plot_perturbations(
        network,
        images,
        labels,
        [f"a class with a long name {i}" for i in range(5)],
        Attack.parse("pgd-3"),
        ThreatModel(Perturbation.parse(eps), Perturbation.parse("2/255")),
        tmp_path / "perturbations.png",
    )
    picture(tmp_path / "perturbations.png")
    assert network.training


def test_table():
    rows = [
        {"model": "natural", "clean": 0.987, "pgd-20": 0.0, "images": 360},
        {"model": "free m=4", "clean": 0.95, "pgd-20": 0.7249, "images": 1360, "top-5": None},
    ]
    assert results_table(rows).splitlines() == [
        "model     clean  pgd-20  images  top-5",
        "--------  -----  ------  ------  -----",
        "natural   98.7%    0.0%     360      -",
        "free m=4  95.0%   72.5%   1,360      -",
    ]
    assert results_table([]) == ""
