"""What a run says at its start and once a minute, and that its numbers are those of the run."""

import dataclasses
import re

import pytest
import torch

from freeadv_fast.cli import run_training
from freeadv_fast.config.phases import Phases
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.schedule import Schedule
from freeadv_fast.config.threat import Perturbation
from freeadv_fast.distributed.world import World
from freeadv_fast.recipes.catalogue import RECIPES
from freeadv_fast.runs import log
from freeadv_fast.runs.log import Forecast, RunFolder, RunLog, duration
from freeadv_fast.session.cost import costs_of, until
from freeadv_fast.session.prepare import prepare
from freeadv_fast.session.signals import StopRequests
from freeadv_fast.session.start import batch_text, changed_flags, method_text
from freeadv_fast.training import dry_run, train_epochs

# 114 images in minibatches of 14: eight whole ones and one of two images.
SMALL = {
    "workers": 0, "augment": "random-resized-crop", "arch": "test_resnet", "image_size": 16,
    "batch_size": 14, "epochs": 1, "m": 1, "lr": 0.01, "holdout_images": 0, "eval_images": 8,
    "eval_attacks": ("pgd-2",), "schedule": Schedule.parse("constant"), "reg_lambda": 0.1,
}  # fmt: skip

# Whole minibatches of 20 only, of which 7 images are attacked.
SHARES = {"batch_size": 20, "p_adv": 0.33, "aux_bn_group": 7}

COSTS = {
    "natural": {"method": "natural", "m": 2, "epochs": 3},
    "free": {"m": 3, "epochs": 6},
    "free, --steps": {"m": 4, "steps": 42},
    "free, --accumulate": {"m": 2, "epochs": 4, "accumulate": 4},
    "gradalign, --accumulate": {
        "method": "gradalign", "reg_every": 2, "epochs": 2, "accumulate": 2, "max_passes": 200,
    },
    "free, --max-passes": {"m": 3, "epochs": 6, "max_passes": 400},
    "free, more --max-passes than epochs": {"m": 2, "epochs": 2, "max_passes": 4000},
    "free-trades": {"method": "free-trades", "m": 2, "epochs": 2},
    "fgsm": {"method": "fgsm-rs"},
    "pgd": {"method": "pgd", "attack_steps": 2, "max_passes": 100},
    "trades": {"method": "trades", "attack_steps": 2},
    "trades, --awp": {"method": "trades", "attack_steps": 1, "awp": 0.01, "epochs": 1},
    "gradalign": {"method": "gradalign", "epochs": 2, "reg_every": 2},
    "elle": {"method": "elle"},
    "yopo": {"method": "yopo", "attack_steps": 3, "step_size": Perturbation.parse("1/255")},
    "fast-advprop": {"method": "fast-advprop", "attack_steps": 2, **SHARES},
    "advprop": {"method": "advprop", "attack_steps": 1, **SHARES},
    "advprop, decoupled": {"method": "advprop", "decoupled": True, **SHARES},
    "phases": {"m": 2, "epochs": 6, "phases": Phases.parse("0-2:16:36,2-6:24:20")},
    "phases, --max-passes": {
        "m": 2, "epochs": 6, "phases": Phases.parse("0-2:16:36,2-6:24:20"), "max_passes": 500,
    },
    "phases, gradalign": {
        "method": "gradalign", "reg_every": 3, "epochs": 3,
        "phases": Phases.parse("0-1:16:16,1-3:24:28"),
    },
}  # fmt: skip


@pytest.fixture
def start(small_images, tmp_path, world, capsys):
    """Prepares a small run; returns it and what it said, by label."""

    def start(**changes):
        config = TrainConfig(
            **SMALL | {"data": str(small_images), "output_dir": str(tmp_path / "run")} | changes
        )
        run = prepare(config, world)
        return run, by_label(capsys.readouterr().out.splitlines())

    return start


def by_label(lines):
    """Lines in two columns as lists of texts by their label."""
    texts, label = {}, None
    for line in lines:
        label = line[: log.LABEL_WIDTH].strip() or label
        texts.setdefault(label, []).append(line[log.LABEL_WIDTH :])
    return texts


def number(text):
    return int(text.replace(",", ""))


@pytest.mark.parametrize("changes", COSTS.values(), ids=COSTS)
def test_the_cost_is_what_the_run_then_counts(start, changes):
    run, said = start(**changes)
    lines = said["cost"]
    updates, passes = re.findall(r"= ([\d,]+) updates = ([\d,]+) image passes", lines[0])[0]
    for line in lines[1:]:  # the sum of the phases, or where --max-passes ends the run
        later = re.findall(r"([\d,]+) updates = ([\d,]+) image passes", line)
        updates, passes = later[0] if later else (updates, passes)
    attack = re.findall(r"and ([\d,]+) image passes for attacks alone", lines[-1])
    with StopRequests() as stop:
        train_epochs(run, stop)
    run.log.close()
    assert number(updates) == run.learner.updates
    assert number(passes) == run.progress.passes == run.log.forecast.total
    assert number(attack[0] if attack else "0") == run.progress.attack_passes


def test_equations_are_true_as_they_stand(start):
    (line,) = start(m=3, epochs=6)[1]["cost"]
    assert line == "2 data epochs x 9 minibatches x m 3 = 54 updates = 684 image passes"
    assert 2 * 9 * 3 == 54
    assert 2 * 114 * 3 == 684


def test_the_batch_is_an_equation_of_ranks_minibatches_and_images():
    config = TrainConfig(batch_size=512, accumulate=2)
    assert batch_text(config, 2) == "2,048 = 2 ranks x 2 minibatches x 512"
    assert batch_text(TrainConfig(batch_size=256), 1) == "256 = 1 rank x 256"
    phases = TrainConfig(accumulate=3, phases=Phases.parse("0-2:16:36,2-6:24:20"), epochs=6)
    assert (
        batch_text(phases, 1)
        == "108 = 1 rank x 3 minibatches x 36, then 60 = 1 rank x 3 minibatches x 20"
    )


def test_steps_are_an_equation_as_well(start):
    """42 updates end within the eleventh minibatch, which is replayed to its end."""
    (line,) = start(m=4, steps=42)[1]["cost"]
    assert line == ("11 minibatches (1.22 data epochs of 9) x m 4 = 44 updates = 568 image passes")
    assert (114 + 2 * 14) * 4 == 568


def test_each_phase_has_its_line(start):
    phases = Phases.parse("0-2:16:36,2-6:24:20")
    _, said = start(m=2, epochs=6, phases=phases, max_passes=500)
    assert said["cost"] == [
        "phase 0-2:16:36: 1 data epoch x 4 minibatches x m 2 = 8 updates = 228 image passes",
        "phase 2-6:24:20: 2 data epochs x 6 minibatches x m 2 = 24 updates = 456 image passes",
        "together 32 updates = 684 image passes",
        "--max-passes 500 ends it after 12 minibatches = 24 updates = 536 image passes",
    ]
    assert said["batch"] == ["36 = 1 rank x 36, then 20 = 1 rank x 20"]


def test_the_start_fits_a_screen(start, small_images):
    recipe = RECIPES["imagenet-rn50-free-m4-eps4"]
    run, said = start(recipe=recipe.recipe, m=4, epochs=90, seed=3, eval_attacks=("pgd-4",))
    assert list(said) == [
        "guard: off,", "method", "changed", "data", "network", "device", "batch", "cost",
        "evaluation", "output",
    ]  # fmt: skip
    assert said["method"] == [f"free, m 4, eps 4/255, step 4/255 (recipe {recipe.recipe})"]
    assert said["data"][0] == (
        f"{small_images}: 114 training images, 8 validation images, 3 classes"
    )
    assert said["data"][1].startswith("images are decoded by ")
    assert said["network"] == ["test_resnet, 0.37 M parameters, fp32"]
    assert said["device"][0].endswith(", 1 thread")
    assert said["batch"] == ["14 = 1 rank x 14"]
    assert said["evaluation"] == ["pgd-4 at eps 4/255 in steps of 1/255 on 8 validation images"]
    assert said["output"] == [f"{run.folder.root} (config.yaml holds every field)"]
    assert sum(map(len, said.values())) <= 13


def test_nothing_to_attack(start):
    _, said = start(method="natural", eps=Perturbation.parse("0"))
    assert said["method"] == ["natural"]
    assert said["evaluation"] == ["clean accuracy on 8 validation images"]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"method": "natural", "m": 2}, "natural, m 2"),
        ({"method": "pgd", "attack_steps": 10}, "pgd, K 10, eps 4/255, step 1/255"),
        (
            {"method": "pgd", "norm": "l2", "eps": Perturbation.parse("128/255")},
            "pgd, K 1, eps 128/255 in L2, step 320/255",
        ),
        (
            {"method": "fast-advprop", "aux_bn_group": 8},
            "fast-advprop, K 1, p_adv 0.2, eps 4/255, step 4/255",
        ),
    ],
)
def test_a_method_with_its_numbers(changes, text):
    assert method_text(TrainConfig(**{"m": 1} | changes)) == text


def test_only_what_differs_from_the_recipe_is_listed(world):
    recipe = RECIPES["imagenet-rn50-fast-advprop"]
    config = dataclasses.replace(
        recipe, data="/imagenet", output_dir="runs/x", resume=True, precision="fp32",
        eval_attacks=("pgd-20",), eval_images=400,
    )  # fmt: skip
    assert changed_flags(config, world) == []
    config = dataclasses.replace(
        config, lr=0.2, shuffle=False, schedule=Schedule.parse("linear:0.4"),
        eval_attacks=("pgd-2", "cw-2"), epochs=12.0,
    )  # fmt: skip
    assert changed_flags(config, world) == [
        "--no-shuffle  --epochs 12  --lr 0.2  --schedule linear:0.4  --eval-attacks pgd-2,cw-2"
    ]


def test_many_changes_are_wrapped_between_flags(world):
    """The phases' own sides and batches are no flags of their own."""
    recipe = RECIPES["imagenet-rn50-free-m4-eps4"]
    config = dataclasses.replace(
        recipe, phases=Phases.parse("0-60:128:512,60-90:288:128"), precision="fp32",
        momentum=0.8, lr=0.2, seed=3, weight_decay=2e-4, workers=8,
    )  # fmt: skip
    assert changed_flags(config, world) == [
        "--workers 8  --phases 0-60:128:512,60-90:288:128  --lr 0.2  --momentum 0.8",
        "--weight-decay 0.0002  --seed 3",
    ]


def test_a_recipes_batch_is_divided_among_the_ranks():
    """As the command line does; the recipe's whole batch on each rank is a change."""
    ranks = World(0, 4, torch.device("cpu"))
    recipe = RECIPES["imagenet-rn50-free-m4-eps4"]
    divided = dataclasses.replace(recipe, batch_size=64, precision="fp32")
    assert changed_flags(divided, ranks) == []
    whole = dataclasses.replace(divided, batch_size=256)
    assert changed_flags(whole, ranks) == ["--batch-size 256"]


def test_dry_run_says_the_whole_config_the_start_and_the_minibatch(small_images, tmp_path):
    config = TrainConfig(
        **SMALL | {"data": str(small_images), "output_dir": str(tmp_path / "run"), "m": 2}
    )
    text, *lines = dry_run(config)
    said = by_label(lines)
    assert text.startswith("recipe: custom\n")
    assert "\nm: 2\n" in text
    assert said["minibatch"] == ["images (14, 16, 16, 3) torch.uint8, labels (14,) torch.int64"]
    assert said["cost"] == ["1 data epoch x 9 minibatches x m 2 = 18 updates = 228 image passes"]
    assert not (tmp_path / "run").exists()


def test_costs_of_several_ranks(start):
    """Two ranks of 14: four whole minibatches and one of two images, which is left out."""
    run, _ = start(m=2, epochs=2)
    (cost,) = costs_of(run.config, run.budget, run.phase_loaders, num_ranks=2)
    assert cost.global_batch == 28
    four = dataclasses.replace(cost, num_batches=4, minibatches=4)
    assert four.passes == (4 * 28 * 2, 0)
    assert until(57, [four]) == [four.first(2)]


def test_larger_images_take_longer():
    """As long as they have more pixels: a first phase's rate does not hold for the last one."""
    forecast = Forecast([(1000, 100), (500, 400)])
    assert forecast.total == 1500
    assert forecast.seconds_left(0, now=200, rate=10.0) == 100 + 200
    assert forecast.seconds_left(200, now=200, rate=10.0) == 80 + 200
    assert forecast.seconds_left(1200, now=1200, rate=10.0) == 30
    assert forecast.seconds_left(1600, now=1600, rate=10.0) == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (59, "59 s"), (80, "1 min 20 s"), (15300, "4 h 15 min"), (0, "0 s")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


LINE = {
    "passes": 2560, "loss": 1.2345, "train_clean_accuracy": 0.5,
    "train_adversarial_accuracy": 0.251, "passes_per_second": 320.0,
}  # fmt: skip


@pytest.fixture
def run_log(tmp_path):
    """Opens logs of a run of 100,000 passes."""
    logs = []

    def open_log(passes=0, is_writer=True):
        folder = RunFolder(tmp_path / "run")
        folder.root.mkdir(exist_ok=True)
        logs.append(RunLog(folder, Forecast([(100_000, 1)]), 0, passes, is_writer))
        return logs[-1]

    yield open_log
    for opened in logs:
        opened.close()


def test_the_rate_is_said_once_when_it_is_known(run_log, capsys):
    """What comes before the first reading is warm-up; then it takes ten seconds."""
    opened = run_log()
    opened.tell(LINE | {"passes": 1000}, 50.0)
    opened.tell(LINE | {"passes": 2000}, 55.0)
    assert capsys.readouterr().out == ""
    opened.tell(LINE | {"passes": 5000}, 70.0)
    assert capsys.readouterr().out == "rate        200 passes/s: 8 min 20 s of training\n"
    opened.tell(LINE | {"passes": 9000}, 100.0)
    assert capsys.readouterr().out == ""


def test_a_resumed_run_says_what_is_left(run_log, capsys):
    opened = run_log(passes=40_000)
    opened.tell(LINE | {"passes": 48_000}, 50.0)
    opened.tell(LINE | {"passes": 50_000}, 60.0)
    said = capsys.readouterr().out
    assert said == "rate        200 passes/s: 8 min 20 s of training, 4 min 10 s left\n"


def test_a_run_that_is_nearly_over_has_no_rate(run_log, capsys):
    opened = run_log()
    for passes, seconds in ((90_000, 1.0), (99_000, 12.0), (99_500, 24.0)):
        opened.tell(LINE | {"passes": passes}, seconds)
    assert capsys.readouterr().out == ""


def test_a_log_file_has_a_line_every_minute(run_log, capsys, monkeypatch):
    opened = run_log()
    opened.tell(LINE, 8.0)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(log, "SECONDS_BETWEEN_LINES", 0.0)
    opened.tell(LINE, 8.0)
    assert capsys.readouterr().out == (
        "2,560 of 100,000 passes (2.6%), loss 1.234, clean 50.0%, adversarial 25.1%, "
        "320 passes/s, 5 min 5 s left\n"
    )


def test_a_terminal_has_the_bar_instead(run_log, capsys, monkeypatch):
    monkeypatch.setattr(log, "SECONDS_BETWEEN_LINES", 0.0)
    for stream in (log.sys.stdout, log.sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    opened = run_log()
    opened.tell(LINE, 8.0)
    said = capsys.readouterr()
    assert said.out == ""
    assert "[00:00<" in said.err


def test_other_ranks_say_nothing(run_log, capsys, monkeypatch):
    monkeypatch.setattr(log, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(log, "SECONDS_OF_RATE", 0.0)
    run_log(is_writer=False).tell(LINE, 8.0)
    assert capsys.readouterr().out == ""


def test_a_run_tells_its_readings(start, monkeypatch, capsys):
    """Every --log-every minibatches and at the epoch's end, where the metrics are read anyway."""
    monkeypatch.setattr(log, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(log, "SECONDS_OF_RATE", 0.0)
    run, _ = start(m=2, epochs=2, log_every=4)
    with StopRequests() as stop:
        train_epochs(run, stop)
    run.log.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" passes")[0] for line in lines if " left" in line] == [
        "112 of 228", "224 of 228", "228 of 228",
    ]  # fmt: skip


def test_a_dry_run_prints_what_unset_fields_come_to(small_images, capsys):
    flags = ["--data", str(small_images), "--method", "gradalign", "--arch", "test_resnet"]
    flags += ["--image-size", "16", "--batch-size", "12", "--augment", "none", "--eval-images", "8"]
    assert run_training("free", "cifar", [*flags, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for line in ("step_size: 8/255", "resize_size: 32", "holdout_images: 11", "guard_images: 11"):
        assert line in printed
    assert "reg_lambda: null" not in printed
