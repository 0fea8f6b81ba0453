"""The detector's script: which recipe data imply, which flags it reads, what it refuses."""

import dataclasses
import re

import pytest
import torch

from freeadv_fast.cli import run as cli
from freeadv_fast.cli.flags import parse
from freeadv_fast.cli.resolve import resolve
from freeadv_fast.config.task_fields import TASK_READERS
from freeadv_fast.errors import UserError
from freeadv_fast.recipes.catalogue import DEFAULTS, RECIPES


def parsed(line):
    """The config of a command line of launch/coco_retinanet.py."""
    return parse(line.split(), "fast-advprop", "coco")[0].run


@pytest.mark.parametrize(
    ("line", "recipe"),
    [
        ("", "shapes-fast-advprop"),
        ("--method free", "shapes-free"),
        ("--data shapes --method natural", "shapes-natural"),
        ("--data coco:/coco", "coco-retinanet50-fast-advprop"),
        ("--data=coco:/coco --method=natural", "coco-retinanet50-natural-2x"),
        ("--data coco:/coco --method free", "coco-retinanet50-free-m4-eps4"),
        ("--data coco:/coco --method pgd", "coco-retinanet50-natural-2x"),  # there is no own
        ("--method n-fgsm", "shapes-natural"),
        ("--recipe coco-retinanet50-natural-1x --data coco:/coco", "coco-retinanet50-natural-1x"),
        ("--recipe digits-free", "digits-free"),
    ],
)
def test_data_and_method_imply_a_recipe(line, recipe):
    config = parsed(line)
    assert config.recipe == recipe
    assert config.data == ("coco:/coco" if "coco:" in line else RECIPES[recipe].data)


@pytest.mark.parametrize("data", ["", " --data coco:/coco"])
@pytest.mark.parametrize("method", ["fgsm", "fgsm-rs", "n-fgsm", "pgd"])
def test_only_fast_advprop_adds_attacked_images_to_a_minibatch(method, data):
    natural, other = (parsed(f"--method {name}{data}") for name in ("natural", method))
    assert (other.method, other.batch_size) == (method, natural.batch_size)
    assert other.aux_bn_group == natural.aux_bn_group


def test_every_method_that_has_a_default_trains_a_detector():
    for dataset in ("coco", "shapes"):
        for method, name in DEFAULTS[dataset].items():
            config = RECIPES[name]
            assert (config.method, config.task) == (method, "detection")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--recipe coco-retinanet50-natural-1x", "--data: recipe coco-retinanet50-natural-1x"),
        ("--data /imagenet", "--data /imagenet: holds no boxes"),
        ("--data digits", "--data digits: holds no boxes"),
        ("--method trades", "--method trades: trains classifiers only"),
        ("--augment pad-crop-flip", "--augment pad-crop-flip: cuts images, and boxes with them"),
        ("--attack-loss box", "--attack-loss box: not for fast-advprop"),
        ("--resize-size 256", "--resize-size 256: not for a detector; leave it out"),
        ("--crop-padding 2", "--crop-padding 2: not for a detector"),
        ("--method free --guard-images 8", "--guard-images 8: not for a detector"),
        ("--method natural --mix mixup", "--mix mixup: not for a detector"),
        ("--eval-attacks cw-20", "--eval-attacks cw-20: a detector is attacked by pgd-STEPS only"),
        ("--aux-bn-group 8", "--aux-bn-group 8: larger than the 2 adversarial images"),
    ],
)  # fmt: skip
def test_mistakes_get_one_line(line, message):
    with pytest.raises(UserError) as caught:
        parsed(line)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", ["shapes", "coco:/coco"])
def test_classifiers_take_no_boxes_and_read_no_detectors_flags(data):
    with pytest.raises(UserError, match=f"--data {data}: holds boxes, and --arch wrn-32-10"):
        parse(["--data", data], "free", "cifar")
    with pytest.raises(UserError, match="--eval-corruptions fog: not for a classifier"):
        parse(["--eval-corruptions", "fog"], "free", "cifar")


def test_what_a_detector_does_anyway_may_be_said():
    line = "--holdout-images 0 --on-collapse stop --mix none --export last --attack-loss sum"
    assert parsed(f"--method free {line}") == parsed("--method free")


def test_help_shows_what_a_detector_reads(capsys):
    assert cli.run_training("pgd", "coco", ["--help"]) == 0
    flags = set(re.findall(r"^  --([\w-]+)", capsys.readouterr().out, re.M))
    flags = {flag.removeprefix("no-").replace("-", "_") for flag in flags}
    for name, task in TASK_READERS.items():
        assert (name in flags) == (task == "detection"), name
    assert cli.run_training("fast-advprop", "coco", ["--help-all"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^  --crop-padding N +\[classifiers\] Pixels of zero padding", shown, re.M)


def test_the_start_says_that_the_shapes_are_synthetic(capsys):
    cli.print_remarks(["a remark"], "shapes")
    assert capsys.readouterr().out == (
        "no --data: training on embedded synthetic shapes (128 px); "
        "--data coco:FOLDER trains on yours\na remark\n"
    )
    cli.print_remarks([], "digits")
    assert "handwritten digits (32 px); --data FOLDER trains" in capsys.readouterr().out
    cli.print_remarks([], "")
    assert capsys.readouterr().out == ""


def test_the_papers_schedule_and_shares(monkeypatch):
    """24 epochs' budget is 20 passes; 16 clean images beside 4 attacked ones, two each a rank."""
    config = parsed("--data coco:/coco")
    assert (config.data_epochs, config.num_adversarial, str(config.eps)) == (20, 4, "1/255")
    assert (config.image_size, config.longest_side) == (800, 1333)
    assert RECIPES["coco-retinanet50-free-m4-eps4"].data_epochs == 6
    monkeypatch.setenv("WORLD_SIZE", "2")
    shared, _ = resolve(config, {"data"})
    assert (shared.batch_size, shared.num_adversarial, shared.aux_bn_group) == (10, 2, 2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="--p-adv 0.2: 1 adversarial and 4 clean of --batch-size 5"):
        resolve(config, {"data"})
    line = "--data coco:/coco --batch-size 10 --aux-bn-group 2"  # as the script's docstring says
    typed, _ = resolve(parsed(line), {"data", "batch_size", "aux_bn_group"})
    assert (typed.batch_size, typed.num_adversarial, typed.aux_bn_group) == (10, 2, 2)


def test_a_cpu_attacks_no_more_images_than_the_recipe(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config, remarks = resolve(parsed(""), set())
    assert (config.eval_images, config.eval_attacks, remarks) == (200, ("pgd-10",), [])
    assert resolve(parsed("--data coco:/coco"), {"data"})[0].eval_images == 400
    line, typed = "--data coco:/coco --method natural --eps 0", {"data", "method", "eps"}
    config, remarks = resolve(parsed(line), typed)
    assert config.eval_images == 400
    assert "no GPU: evaluating at most 400 validation images" in "".join(remarks)
    classifier = parse(["--method", "natural", "--eps", "0"], "free", "cifar")[0].run
    assert resolve(dataclasses.replace(classifier, eval_images=None), typed)[0].eval_images is None
