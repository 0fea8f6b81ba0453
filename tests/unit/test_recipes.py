"""Recipes as people read them: tables by paper, a row whole, the papers' numbers."""

import runpy
import signal
import subprocess
import sys

import pytest
import yaml

from freeadv_fast.config.attack import Attack
from freeadv_fast.config.file import config_from_dict
from freeadv_fast.errors import UserError
from freeadv_fast.recipes.catalogue import DEFAULTS, PAPERS, RECIPES, find_recipe
from freeadv_fast.recipes.listing import COLUMNS, recipe_page, recipe_tables
from freeadv_fast.recipes.papers import REPORTED


@pytest.fixture
def called(monkeypatch, capsys):
    """Status and output of python -m freeadv_fast.recipes."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["freeadv_fast.recipes", *arguments])
        with pytest.raises(SystemExit) as leaving:
            runpy.run_module("freeadv_fast.recipes", run_name="__main__")
        return leaving.value.code, capsys.readouterr()

    return call


def test_every_recipe_has_its_paper_and_its_name():
    assert sum(map(len, PAPERS.values())) == len(RECIPES)
    assert {name: config.recipe for name, config in RECIPES.items()} == {n: n for n in RECIPES}
    for defaults in DEFAULTS.values():
        for method, name in defaults.items():
            assert RECIPES[name].method == method


def test_the_tables_hold_every_recipe(called):
    status, printed = called()
    assert status == 0
    assert printed.out.rstrip("\n") == recipe_tables()
    parts = recipe_tables().split("\n\n")
    assert [part.splitlines()[0] for part in parts[:-1]] == list(PAPERS)
    rows = [line.split() for part in parts[:-1] for line in part.splitlines()[2:]]
    assert [row[0] for row in rows] == list(RECIPES)
    for part in parts[:-1]:
        assert tuple(part.splitlines()[1].split()) == COLUMNS


def test_rows_say_what_is_trained_and_what_the_paper_reports():
    lines = {line.split()[0]: line.split() for line in recipe_tables().splitlines() if line.strip()}
    assert lines["cifar10-wrn32-free-m8"][1:] == [
        "free", "8/255", "80,000", "updates", "wrn-32-10", "85.96", "46.19", "pgd-100", "table", "1"
    ]  # fmt: skip
    assert lines["imagenet-rn50-fast-advprop"][1:8] == [
        "fast-advprop", "1/255", "105", "epochs", "resnet50", "76.5", "-"
    ]  # fmt: skip
    assert lines["coco-retinanet50-fast-advprop"][1:] == [
        "fast-advprop", "1/255", "24", "epochs", "retinanet_resnet50_fpn", "35.8", "-", "-",
        "table", "7", "(COCO-C:", "AP", "19.0)",
    ]  # fmt: skip
    assert lines["digits-free"][1:] == ["free", "32/255", "20", "epochs", "resnet18", *"----"]


def test_reported_numbers_are_of_recipes_and_attacks_that_exist():
    assert REPORTED.keys() <= RECIPES.keys()
    for name, reported in REPORTED.items():
        assert reported.place, name
        assert reported.clean is not None or reported.robust, name
        for attack, accuracy in reported.robust.items():
            Attack.parse(attack)
            assert 0 <= accuracy <= (reported.clean or 100), name
    assert not any(name.startswith(("digits", "shapes")) for name in REPORTED)


def test_show_prints_a_row_whole_and_it_replays(called):
    status, printed = called("--show", "imagenet-rn50-free-m4-eps4")
    assert status == 0
    assert printed.out.splitlines()[:2] == [
        "# Adversarial Training for Free! (Shafahi et al. 2019)",
        "# tables 4 and 5, in percent: clean 60.21, pgd-10 32.77, pgd-50 31.88, pgd-100 31.82",
    ]
    plain = yaml.safe_load(printed.out)
    assert config_from_dict(plain) == RECIPES["imagenet-rn50-free-m4-eps4"]


def test_what_is_not_known_is_not_said():
    assert "# " not in recipe_page("digits-free").split("\n", 1)[1]
    head = recipe_page("imagenet-rn50-fgsm-rs-eps4").splitlines()[1]
    assert head == "# the paper, in percent: pgd-50-10 30.28"


def test_what_is_reported_of_a_detector_is_its_average_precision():
    assert recipe_page("coco-retinanet50-natural-2x").splitlines()[:2] == [
        "# Fast AdvProp (Mei et al. 2022), detection",
        "# table 7 (COCO-C: AP 17.6), in percent: AP 35.8",
    ]


def test_an_unknown_name_gets_the_nearest_ones(called):
    status, printed = called("--show", "cifar10-wrn32-fre-m8")
    assert status == 2
    assert printed.out == ""
    assert printed.err.startswith(
        "error: --show cifar10-wrn32-fre-m8: no such recipe; did you mean"
    )
    assert "cifar10-wrn32-free-m8" in printed.err
    assert printed.err.count("\n") == 1
    with pytest.raises(UserError, match="--recipe x: no such recipe"):
        find_recipe("x")


def test_a_reader_may_leave_early(repository):
    with subprocess.Popen(
        [sys.executable, "-m", "freeadv_fast.recipes"], cwd=repository,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 128 + signal.SIGPIPE
