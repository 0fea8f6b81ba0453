"""The audit is red on a network whose gradients are masked, and green on honest ones."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fixed_batches import FixedLoader
from torch import nn

from freeadv_fast.cli import evaluate as tool
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.threat import L2ThreatModel, Perturbation, ThreatModel
from freeadv_fast.errors import UserError
from freeadv_fast.evaluation import images
from freeadv_fast.evaluation.audit import checks, surrogates
from freeadv_fast.evaluation.audit import run as audit_module
from freeadv_fast.evaluation.audit.checks import (
    Trial,
    falls_without_bound,
    has_slope,
    is_deterministic,
    restarts_do_not_matter,
    square_finds_nothing,
    transfer_is_weaker,
)
from freeadv_fast.evaluation.audit.paired import TOLERANCE, Paired
from freeadv_fast.evaluation.audit.run import audit, audit_run, audit_table, verdict
from freeadv_fast.evaluation.autoattack.package import PACKAGES
from freeadv_fast.evaluation.sample import Sample
from freeadv_fast.runs.log import RunFolder, save_config
from freeadv_fast.runs.saved import SavedRun

SIDE, NUM_CLASSES = 8, 6
EPS = ThreatModel(Perturbation.parse("12/255"), Perturbation.parse("2/255"))


class Staircase(nn.Module):
    """Rounds pixels to eight levels: the slope of every step is zero."""

    def forward(self, pixels):
        return (pixels * 8).round() / 8


class Noisy(nn.Module):
    """Every call sees other pixels."""

    def forward(self, pixels):
        return pixels + 0.1 * torch.randn_like(pixels)


def linear(seed=0):
    """The simplest honest network: its gradient is the same everywhere."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, NUM_CLASSES)).eval()


def masked():
    """The same network behind a staircase."""
    return nn.Sequential(Staircase(), linear()).eval()


def seen_by(network, count=64):
    """Random images, and what a network takes them for."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(count, 3, SIDE, SIDE, generator=generator) * 0.6 + 0.2
    pixels = pixels.contiguous(memory_format=torch.channels_last)  # as loaders give them
    with torch.no_grad():
        labels = network(pixels).argmax(1)
    return Sample(pixels, labels, [f"class {i}" for i in range(NUM_CLASSES)], 24)


def verdicts(found):
    return {check.name: check.is_passed for check in found}


@pytest.fixture(autouse=True)
def _few_queries(monkeypatch):
    """Square's thousand would take longer than all the rest."""
    monkeypatch.setattr(checks, "SQUARE_QUERIES", 60)


def trained(network, sample):
    """Fits a network to a few images: it is honest, and sure of them."""
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(network(sample.images), sample.labels).backward()
        optimizer.step()
    return network.eval()


@pytest.mark.parametrize("kind", ["linear", "convolutional"])
def test_an_honest_network_passes(kind, small_network):
    sample = seen_by(linear(), 24)
    sample.labels.clamp_(max=4)  # the small network has five classes
    network = trained(linear(1) if kind == "linear" else small_network(), sample)
    found = audit(network, sample, EPS, surrogates={"another": linear(5)})
    failed = [check for check in found if check.is_passed is False]
    assert not failed, failed
    assert len(found) == 9
    fooled, count = re.match(r"pgd-100 fools (\d+) of (\d+)", found[4].measured).groups()
    assert 0 < int(fooled) <= int(count) == 24
    assert verdict(found).startswith("no check failed")
    assert "FAIL" not in audit_table(found)


@pytest.mark.parametrize("ball", [EPS, "l2"])
def test_masked_gradients_are_found(ball):
    """PGD fools nothing beyond noise, and everything that follows no gradient of it does."""
    threat = ball
    if ball == "l2":
        threat = L2ThreatModel(Perturbation.parse("150/255"), Perturbation.parse("20/255"))
    network = masked()
    found = audit(network, seen_by(network, 24), threat, surrogates={"smooth": linear()})
    results = verdicts(found)
    assert results["gradients"] is False
    assert results["transfer"] is False
    assert results["unbounded"] is False
    if results["square"] is not None:  # it is installed
        assert results["square"] is False
    assert results["deterministic"] is True
    table = audit_table(found)
    assert "FAIL gradients: PGD cannot move" in table
    assert "is not to be trusted" in table.splitlines()[-1]


def test_scaled_logits_are_no_flat_loss():
    """The attack's loss keeps its slope where cross entropy underflows; the audit tells of it."""
    network = nn.Sequential(linear(), Scale(1e4)).eval()
    trial = Trial(network, seen_by(network, 16), EPS, 0)
    check = has_slope(trial)
    assert check.is_passed
    assert "more where plain cross entropy underflows" in check.measured


class Scale(nn.Module):
    """Logits that lead by thousands."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, logits):
        return logits * self.factor


def test_random_networks_are_found():
    network = nn.Sequential(Noisy(), linear()).eval()
    check = is_deterministic(Trial(network, seen_by(network, 16), EPS, 0))
    assert check.is_passed is False


def test_each_restart_is_another_one():
    """The base attack's own start is not counted twice, and images that it fooled stay fooled."""
    network = linear()
    trial = Trial(network, seen_by(network, 32), EPS, 0)
    first, second = itertools.islice(trial.starts(), 2)
    assert not torch.equal(first, second)
    assert torch.equal(next(trial.starts()), first)
    before = trial.fooled.clone()
    restarts_do_not_matter(trial)
    assert (trial.fooled_by_any & before).equal(before)


def test_what_cannot_be_asked_is_not_run(monkeypatch):
    network = linear()
    trial = Trial(network, seen_by(network, 8), EPS, 0)
    for package in PACKAGES:
        monkeypatch.setitem(sys.modules, package, None)
    square = square_finds_nothing(trial)
    assert square.is_passed is None
    assert 'pip install "pyautoattack>=0.2"' in square.measured
    assert transfer_is_weaker(trial, {}).is_passed is None
    assert falls_without_bound(trial).is_passed
    assert "not run" in audit_table([square])
    assert verdict([square]) == (
        "no check failed, 1 not run: nothing here speaks against the robust accuracy"
    )


@pytest.mark.parametrize(
    ("first", "second", "images", "is_beyond"),
    [
        (0, 0, 50, False),
        (1, 0, 50, False),
        (3, 0, 50, False),
        (10, 0, 50, True),
        (10, 8, 50, False),
        (29, 0, 1000, False),  # a sound network's own
        (60, 5, 1000, True),
        (0, 30, 50, False),
    ],
)
def test_chance(first, second, images, is_beyond):
    pair = Paired(first, second, images)
    assert pair.is_beyond_chance == is_beyond
    fooled = torch.zeros(2, images, dtype=torch.bool)
    fooled[0, :first] = True
    fooled[1, first : first + second] = True
    assert Paired.of(*fooled) == pair


def test_the_bound_is_the_paired_differences():
    """Against the definition: the mean of +1, -1 and 0 over the images, and its standard error."""
    differences = torch.tensor([1.0] * 14 + [-1.0] * 2 + [0.0] * 84)
    error = differences.std(correction=0).item() / math.sqrt(100)
    pair = Paired(14, 2, 100)
    assert pair.excess == pytest.approx(differences.mean().item())
    assert pair.is_beyond_chance == (pair.excess - 1.959964 * error > TOLERANCE)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of a linear network, and validation images that it classifies right."""
    folder = RunFolder(tmp_path / "runs" / "own")
    folder.checkpoints.mkdir(parents=True)
    config = TrainConfig(image_size=SIDE, normalization="none", eps="12/255", eval_step="2/255")
    save_config(config, folder.config)
    (folder.root / "result.json").write_text("kept")

    def val_loader(config, world, num_images, *view):
        loader = FixedLoader([num_images or 9], num_classes=NUM_CLASSES, image_size=SIDE)
        for batch in loader.batches:
            batch.labels.copy_(linear()(batch.images.permute(0, 3, 1, 2) / 255).argmax(1))
        return loader

    def load(path, checkpoint="last", **_):
        seed = 0 if "own" in str(path) else 1
        root = RunFolder(folder.root.parent / ("own" if seed == 0 else "other"))
        return SavedRun(root, config, root.checkpoints / "last.pt", classes(), linear(seed))

    monkeypatch.setattr(images, "build_val_loader", val_loader)
    for module in (audit_module, surrogates):
        monkeypatch.setattr(module, "load_run", load)
    return folder


def classes():
    return [f"class {i}" for i in range(NUM_CLASSES)]


def test_audit_of_a_run(run, capsys):
    found = audit_run(run.root, num_images=8, step="3/255")
    record = json.loads((run.root / "audit.json").read_text())
    assert list(record) == [
        "run",
        "checkpoint",
        "eps",
        "norm",
        "attack_step",
        "data",
        "num_images",
        "seed",
        "versions",
        "checks",
    ]
    assert (record["run"], record["checkpoint"]) == ("own", "last.pt")
    assert (record["eps"], record["attack_step"], record["num_images"]) == ("12/255", "3/255", 8)
    assert [set(check) for check in record["checks"]] == [
        {"name", "question", "is_passed", "measured", "meaning"}
    ] * len(found)
    assert all("\n" not in check.measured + check.meaning for check in found)
    printed = capsys.readouterr().out
    assert "audit of own, last.pt, at eps 12/255: 8 images" in printed
    assert "no other run of these data is beside it" in printed
    assert (run.root / "result.json").read_text() == "kept"


def test_a_run_beside_it_is_the_surrogate(run):
    """Its other weights are the same ones here, and a folder that is no run is passed over."""
    other = RunFolder(run.root.parent / "other")
    other.root.mkdir()
    (run.root.parent / "a-note").mkdir()
    save_config(TrainConfig(image_size=SIDE, method="pgd", m=1), other.config)
    found = surrogates.find_surrogates(audit_module.load_run(run.root))
    assert list(found) == ["other"]


def test_mistakes_are_one_line(run, monkeypatch):
    with pytest.raises(UserError, match="--audit: nowhere is no run's folder"):
        audit_run("nowhere")
    with pytest.raises(UserError, match="--eps 0: an attack needs a radius"):
        audit_run(run.root, eps="0")
    with pytest.raises(UserError, match="--step 0"):
        audit_run(run.root, step="0")
    monkeypatch.setenv("RANK", "1")
    assert audit_run(run.root) == []
    network = linear()
    sample = seen_by(network, 4)
    sample.labels.add_(1).remainder_(NUM_CLASSES)
    with pytest.raises(UserError, match="classifies none of 4 images right"):
        audit(network, sample, EPS)


def test_an_audit_of_averaged_weights_says_so(run, monkeypatch):
    load = audit_module.load_run

    def averaged(path, checkpoint="last"):
        return dataclasses.replace(load(path), is_averaged=checkpoint == "average")

    monkeypatch.setattr(audit_module, "load_run", averaged)
    audit_run(run.root, num_images=2, checkpoint="average")
    assert json.loads((run.root / "audit.json").read_text())["checkpoint"] == "average"


def test_the_tool_checks_an_audit_first(run, monkeypatch):
    """Before hours of evaluation; and the page shows the evaluation if the audit then fails."""
    done = []
    monkeypatch.setattr(tool, "evaluate", lambda subject, **_: done.append(subject))
    monkeypatch.setattr(tool, "refresh_page", lambda folder: done.append(str(folder)))
    flags = tool.EvaluateFlags(str(run.root), attacks="pgd-2", audit=True)
    for change, line in (
        ({"subject": "nowhere"}, "--audit: nowhere is no run's folder; only runs are audited"),
        ({"image_list": "x"}, "--image-list: an audit does not read it; leave it out"),
        ({"output_dir": "x"}, "--output-dir: an audit does not read it"),
    ):
        with pytest.raises(UserError, match=line):
            tool.run_evaluation(dataclasses.replace(flags, **change))
    assert done == []
    with pytest.raises(UserError, match="--eps 0: an attack needs a radius"):
        tool.run_evaluation(dataclasses.replace(flags, eps="0"))
    assert done == [str(run.root)] * 2


def test_the_page_of_the_folder_that_was_written_is_drawn_anew(run, monkeypatch):
    drawn = []
    monkeypatch.setattr(tool, "evaluate", lambda subject, **_: None)
    monkeypatch.setattr(tool, "refresh_page", drawn.append)
    for subject, options in (
        (run.root, {}),
        (run.root / "export", {}),
        ("m:f", {"output_dir": "x"}),
    ):
        tool.run_evaluation(tool.EvaluateFlags(str(subject), **options))
    assert drawn == [run.root, run.root.resolve(), Path("x")]


def test_colors_are_for_terminals(run):
    found = audit_run(run.root, num_images=2)
    plain = audit_table(found)
    assert "\033" not in plain
    colored = audit_table(found, has_colors=True)
    assert "\033[32mpass\033[0m" in colored
    assert plain == colored.replace("\033[32m", "").replace("\033[33m", "").replace("\033[0m", "")
