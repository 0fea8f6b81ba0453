"""An attack that cannot reach its ball's edge proves no robustness, and the user is told so."""

from __future__ import annotations

import json

import pytest
import torch
from fixed_batches import FixedLoader, finished_run, fixed_val_loader

from freeadv_fast.cli.flags import parse
from freeadv_fast.cli.resolve import resolve
from freeadv_fast.config.attack import Attack, doubt_about_steps, passes
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.threat import L2ThreatModel, Perturbation, ThreatModel
from freeadv_fast.distributed.world import World
from freeadv_fast.errors import UserError
from freeadv_fast.evaluation import images
from freeadv_fast.evaluation.accuracy import (
    accuracy_table,
    interval_text,
    side_by_side,
)
from freeadv_fast.evaluation.evaluate import Evaluation, evaluate
from freeadv_fast.evaluation.subject import evaluate as evaluate_run
from freeadv_fast.recipes.catalogue import RECIPES
from freeadv_fast.runs.chance import wilson_interval
from freeadv_fast.training import dry_run

MEAN, STD = (0.5, 0.4, 0.6), (0.2, 0.25, 0.3)
THREAT = ThreatModel(Perturbation.parse("2/255"), Perturbation.parse("1/255"))


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """A finished run of a small network on fixed batches."""
    monkeypatch.setattr(images, "build_val_loader", fixed_val_loader)
    return finished_run(tmp_path / "run")


def doubts(attacks, eps, step, kind=ThreatModel):
    threat = kind(Perturbation.parse(eps), Perturbation.parse(step))
    return doubt_about_steps([Attack.parse(name) for name in attacks], threat)


@pytest.mark.parametrize("kind", [ThreatModel, L2ThreatModel])
def test_steps_that_do_not_add_up_to_the_radius(kind):
    (line,) = doubts(["pgd-20", "pgd-50"], "32/255", "1/255", kind)
    assert line == (
        "too weak: pgd-20 in steps of 1/255 cannot cross eps 32/255; try --eval-step 4/255"
    )
    assert doubts(["pgd-32", "cw-50-10"], "32/255", "1/255", kind) == []
    assert doubts(["pgd-20"], "32/255", "4/255", kind) == []


def test_a_step_across_the_whole_ball():
    (line,) = doubts(["pgd-10"], "4/255", "9/255")
    assert line == (
        "too coarse: pgd-10 in steps of 9/255 leaps over eps 4/255; try --eval-step 1/255"
    )
    assert doubts(["pgd-10"], "4/255", "8/255") == []
    assert doubts([], "4/255", "9/255") == []
    assert doubts(["pgd-10"], "0", "1/255") == []


def test_the_step_that_is_proposed_can_be_typed_and_is_enough():
    for steps in (1, 2, 3, 7, 20, 1000):
        (line,) = doubts([f"pgd-{steps}"], "7/255", "0.00001" if steps < 1000 else "0.0000001")
        step = line.rpartition(" ")[2]
        assert doubts([f"pgd-{steps}"], "7/255", step) == []


def test_no_recipe_is_doubted():
    for recipe in RECIPES.values():
        attacks = [Attack.parse(name) for name in recipe.eval_attacks]
        assert doubt_about_steps(attacks, recipe.evaluation_threat) == [], recipe.recipe


def resolved(line):
    command, typed = parse(line.split(), "free", "imagenet")
    return resolve(command.run, typed)


@pytest.mark.parametrize(("eval_step", "is_doubted"), [("1/255", True), ("8/255", False)])
def test_a_run_says_so_before_it_trains(small_images, tmp_path, eval_step, is_doubted):
    config = TrainConfig(
        data=str(small_images), arch="test_resnet", image_size=16, m=2, batch_size=8, workers=0,
        eps="32/255", eval_step=eval_step, eval_attacks="pgd-20", output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    lines = [line for line in dry_run(config) if "too weak" in line]
    assert len(lines) == is_doubted
    assert not is_doubted or "pgd-20 in steps of 1/255 cannot cross eps 32/255" in lines[0]


def test_step_0_is_refused(run_folder):
    for method in ("free", "natural"):
        with pytest.raises(UserError, match="--eval-step 0: attacks that stand still"):
            TrainConfig(method=method, m=1, eval_step="0")
    TrainConfig(method="natural", m=1, eps="0", eval_step="0")  # nothing is attacked
    with pytest.raises(UserError, match="--step 0: an attack that stands still"):
        evaluate_run(run_folder, step="0")


def test_evaluating_again_says_so_once(run_folder, capsys):
    evaluate_run(run_folder, attacks="pgd-2", eps="32/255", step="1/255", num_images=3)
    assert capsys.readouterr().out.count("pgd-2 in steps of 1/255 cannot cross eps 32/255") == 1


# 13 of 20: scipy.stats.binomtest(13, 20).proportion_ci(0.95, "wilson"), and so on.
@pytest.mark.parametrize(
    ("right", "num_images", "low", "high"),
    [(13, 20, 0.43285, 0.81883), (0, 400, 0.0, 0.009512), (400, 400, 0.990488, 1.0),
     (68, 400, 0.136370, 0.209969), (1, 1, 0.206549, 1.0)],
)  # fmt: skip
def test_wilson_intervals_are_scipys(right, num_images, low, high):
    found = wilson_interval(right / num_images, num_images)
    assert found == pytest.approx((low, high), abs=1e-4)


def test_an_interval_beside_accuracies_of_few_images():
    assert interval_text(68 / 400, 400) == "13.6-21.0%"
    assert interval_text(0.5, 4999) == "48.6-51.4%"
    assert interval_text(0.5, 5000) == "-"


def test_the_table_says_all_that_makes_an_attack_weak_or_strong():
    measured = Evaluation(0.953, None, {"pgd-20": 0.17, "cw-100-10": 0.0}, 400, 10000, 1.0)
    assert accuracy_table(measured, "1/255").splitlines() == [
        "attack     steps  step   restarts  images  accuracy  95% interval",
        "---------  -----  -----  --------  ------  --------  ------------",
        "none           -  -             -  10,000     95.3%  -",
        "pgd-20        20  1/255         1     400     17.0%  13.6-21.0%",
        "cw-100-10    100  1/255        10     400      0.0%  0.0-1.0%",
    ]


def test_so_does_the_table_of_several_networks():
    networks = {"last": (0.953, {"pgd-20": 0.17, "cw-9-10": 0.0}), "best": (0.9, {"pgd-20": 0.2})}
    assert side_by_side(networks, "1/255").splitlines() == [
        "attack   steps  step   restarts   last   best",
        "-------  -----  -----  --------  -----  -----",
        "none         -  -             -  95.3%  90.0%",
        "pgd-20      20  1/255         1  17.0%  20.0%",
        "cw-9-10      9  1/255        10   0.0%      -",
    ]


def test_clean_accuracy_is_over_all_images_and_attacks_over_some(small_network, world):
    network = small_network()
    some, every = FixedLoader([7, 5]), FixedLoader([7, 5, 0, 4])
    alone = evaluate(network, some, ["pgd-2"], THREAT, world=world, mean=MEAN, std=STD)
    both = evaluate(
        network, some, ["pgd-2"], THREAT, world=world, mean=MEAN, std=STD, clean_loader=every
    )
    clean = evaluate(network, every, [], THREAT, world=world, mean=MEAN, std=STD)
    assert (alone.num_images, alone.num_clean_images) == (12, 12)
    assert (both.num_images, both.num_clean_images) == (12, 16)
    assert both.robust_accuracy == alone.robust_accuracy
    assert both.clean_accuracy == clean.clean_accuracy != alone.clean_accuracy


def test_a_run_is_clean_on_all_images_whatever_is_attacked(run_folder):
    measured = evaluate_run(run_folder, attacks="pgd-1", num_images=5)
    assert (measured.num_images, measured.num_clean_images) == (5, 9)
    (path,) = run_folder.glob("evaluation-*")
    record = json.loads(path.read_text())
    assert (record["num_eval_images"], record["num_clean_images"]) == (5, 9)


@pytest.mark.parametrize(
    ("device", "side", "eval_images", "reads_all"),
    [("cuda", 224, 400, True), ("cpu", 64, 400, True), ("cpu", 224, 400, False),
     ("cuda", 224, None, False), ("cpu", 32, None, False)],
)  # fmt: skip
def test_which_images_are_read_clean(monkeypatch, device, side, eval_images, reads_all):
    """All where that is cheap; None stands for "those that are attacked"."""
    monkeypatch.setattr(images, "build_val_loader", lambda _, __, count, ___: ("all", count))
    config = TrainConfig(image_size=side, eval_images=eval_images)
    world = World(0, 1, torch.device(device))
    found = images.whole_val_loader(config, world)
    assert found == (("all", None) if reads_all else None)


def test_without_a_gpu_no_attack_is_replaced_by_a_dearer_one(monkeypatch, run_folder, capsys):
    """Fast AdvProp's recipes attack with PGD-10: PGD-20 in its place would cost twice as much."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert passes(("pgd-10",)) < passes(("pgd-20",)) < passes(("pgd-10", "pgd-50-10"))
    for line, attacks in (
        ("--method fast-advprop --eval-attacks pgd-10", ("pgd-10",)),
        ("--recipe imagenet-rn50-fast-advprop --data /x", ("pgd-10",)),
        ("--recipe cifar10-wrn32-free-m8 --data cifar10:/x", ("pgd-20",)),
    ):
        config, remarks = resolved(line)
        assert config.eval_attacks == attacks, line
        assert any("pgd-20 only" in text for text in remarks) == (attacks == ("pgd-20",))
    measured = evaluate_run(run_folder)  # of the run's own pgd-2
    assert list(measured.robust_accuracy) == ["pgd-2"]
    assert "pgd-20" not in capsys.readouterr().out


def test_a_budget_that_no_pass_fits_into_gets_a_line():
    _, remarks = resolved("--m 100 --epochs 20")
    assert [line for line in remarks if line.startswith("--epochs")] == [
        "--epochs 20: one pass over the data costs 100, 5 times as many; --epochs 100 says so"
    ]
    for line in ("--m 4 --epochs 90", "--m 8 --epochs 20", "--m 100 --epochs 100"):
        assert not any(remark.startswith("--epochs") for remark in resolved(line)[1])
