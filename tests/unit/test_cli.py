"""The command line: what is typed wins, what is wrong gets one line."""

import dataclasses

import pytest
import torch

from freeadv_fast.cli import run as cli
from freeadv_fast.cli.flags import parse, share_of
from freeadv_fast.cli.resolve import resolve
from freeadv_fast.config.file import load_config
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.errors import UserError
from freeadv_fast.recipes.catalogue import RECIPES
from freeadv_fast.runs.log import RunFolder, save_config


def parsed(line):
    """The config of a command line of launch/imagenet_free.py."""
    return parse(line.split(), "free", "imagenet")[0].run


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--eps 4", "--eps 4: larger than the whole pixel range; did you mean 4/255?"),
        ("--eps -1/255", "--eps -1/255: a perturbation cannot be negative"),
        ("--eps 0", "--eps 0: free needs a radius above 0"),
        ("--step-size 2", "--step-size 2: larger than the whole pixel range"),
        ("--m 0", "--m 0: must be at least 1"),
        ("--m four", "--m: invalid literal"),
        ("--batch-size 0", "--batch-size 0: must be at least 2"),
        ("--lr nan", "--lr nan: must be a positive number"),
        ("--lr -0.1", "--lr -0.1: must be a positive number"),
        ("--epochs 0", "--epochs 0: must be a positive number"),
        ("--bathc-size 8", "--bathc-size: no such flag; did you mean --batch-size?"),
        ("--step_sise=1/255", "--step_sise: no such flag; did you mean --step-size?"),
        ("--recipe imagenet-rn50-free", "did you mean imagenet-rn50-free-m"),
        ("--recipe imagenet-rn50-natural", "--data: recipe imagenet-rn50-natural needs it"),
        ("--schedule daily", "--schedule daily: write every:30"),
        ("--config nowhere.yaml", "--config nowhere.yaml: No such file"),
        ("--resize-size 16", "--resize-size 16: smaller than --image-size 32"),
        ("--workers 100000", "--workers 100000: more than 512"),
        ("--eps 300/255", "--eps 300/255: larger than the whole pixel range"),
        ("--seed 99999999999999999999", "--seed 99999999999999999999: must be below 2^63"),
        ("--bn-group 1", "--bn-group 1: statistics need at least 2 images"),
        ("--method fast-advprop --p-adv 0", "--p-adv 0: must be above 0 and below 1"),
        ("--method fast-advprop --p-adv 1.5", "--p-adv 1.5: must be above 0 and below 1"),
        ("--method fast-advprop --p-adv 0.01", "--p-adv 0.01: 1 adversarial and 79 clean"),
        ("--method fast-advprop --p-adv 0.05", "--aux-bn-group 8: larger than the 4 adversarial"),
        ("--method fast-advprop --m 4", "--m 4: fast-advprop does not replay minibatches"),
        ("--method fast-advprop --eps 0", "--eps 0: fast-advprop needs a radius above 0"),
        ("--method advprop --attack-steps 0", "--attack-steps 0: must be at least 1"),
        ("--method advprop --adv-weight 0", "--adv-weight 0: must be a positive number"),
        ("--mix mixup", "--mix mixup: not for free; leave it out"),
        ("--method trades --attack-warmup 2", "--attack-warmup 2: not for trades"),
        ("--method natural --mix mixup --mix-alpha -1", "--mix-alpha -1: must be a positive"),
        ("--no-shufle", "--no-shufle: no such flag; did you mean --no-shuffle?"),
    ],
)
def test_mistakes_get_one_line(line, message):
    """The flag and the fix, without line breaks."""
    with pytest.raises(UserError) as caught:
        parsed(line)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mistakes_leave_with_status_2_and_no_traceback(capsys):
    """On rank 0 the line; nothing else."""
    assert cli.run_training("free", "imagenet", ["--m", "0"]) == 2
    assert capsys.readouterr().err == "error: --m 0: must be at least 1\n"


def test_other_ranks_are_silent(capsys, monkeypatch):
    """One line for all ranks."""
    monkeypatch.setenv("RANK", "1")
    assert cli.run_training("free", "imagenet", ["--m", "0"]) == 2
    assert capsys.readouterr().err == ""


def test_without_data_the_embedded_recipe_is_used_and_flags_win():
    """The embedded recipe of the method, then what was typed."""
    assert parsed("").recipe == "digits-free"
    assert parsed("--data digits") == parsed("")
    config = parsed("--m 2 --eps 8/255 --batch-size 16")
    assert (config.data, config.m, config.batch_size) == ("digits", 2, 16)
    assert str(config.threat.eps) == "8/255"
    assert parsed("--method natural").m == 1


def test_data_selects_the_paper_row():
    """The headline job: ResNet-50, 90 epochs' budget, batch 256, drops each 30."""
    config = parsed("--m 4 --data /imagenet")
    assert config.recipe == "imagenet-rn50-free-m4-eps4"
    assert (config.arch, config.epochs, config.batch_size) == ("resnet50", 90, 256)
    assert (config.data_epochs, str(config.schedule)) == (23, "every:30")
    assert parsed("--data /imagenet --method natural").recipe == "imagenet-rn50-natural"


def test_fast_advprop_counts_both_shares_and_pays_for_its_passes():
    """80 images are 64 clean and 16 adversarial on each of 4 ranks; 105 epochs become 87."""
    config = parsed("--method fast-advprop --data /imagenet --batch-size 80")
    assert config.recipe == "imagenet-rn50-fast-advprop"
    assert (config.num_adversarial, config.cost, config.data_epochs) == (16, 1.2, 87)
    assert str(config.threat.eps) == str(config.threat.step) == "1/255"
    assert not parsed("--method fast-advprop --no-shuffle").shuffle


@pytest.mark.parametrize(
    ("recipe", "data_epochs"),
    [
        ("fast-advprop-padv0.11", 94),
        ("fast-advprop", 87),
        ("fast-advprop-padv0.33", 79),
        ("fast-advprop-padv0.5", 70),
        ("fast-advprop-mixup", 150),
        ("fast-advprop-cutmix", 175),
        ("natural-105ep", 105),
        ("advprop-pgd5", 105),
        ("advprop-pgd5-1x", 15),
        ("advprop-pgd1", 105),
        ("advprop-pgd1-1x", 35),
        ("advprop-decoupled", 105),
    ],
)
def test_advprop_recipes_have_the_papers_epochs_and_256_clean_images(recipe, data_epochs):
    """Mei et al. 2022, tables 1 to 6."""
    config = RECIPES[f"imagenet-rn50-{recipe}"]
    assert config.data_epochs == data_epochs
    num_clean = config.batch_size - (config.num_adversarial if config.is_split else 0)
    assert num_clean == 256


def test_groups_shrink_with_a_divided_batch_unless_typed(monkeypatch):
    """Eight ranks of the embedded recipe have two adversarial images each."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    recipe = RECIPES["digits-fast-advprop"]
    assert resolve(recipe, set())[0].aux_bn_group == 2
    with pytest.raises(UserError, match="--aux-bn-group 8: larger than the 2 adversarial"):
        resolve(recipe, {"aux_bn_group"})


def test_step_size_follows_eps_unless_typed():
    """Algorithm 1's step is eps."""
    assert parsed("--data /x --eps 2/255").threat.step.levels == 2
    assert parsed("--data /x --eps 4/255 --step-size 1/255").threat.step.levels == 1


def test_a_saved_config_replays(tmp_path):
    """Every recipe survives the file, and flags beside --config win."""
    for name, config in RECIPES.items():
        path = tmp_path / f"{name}.yaml"
        save_config(config, path)
        assert load_config(path) == config
    config = parsed(f"--config {tmp_path / 'imagenet-rn101-free-m4-eps4.yaml'} --seed 7")
    assert config == dataclasses.replace(RECIPES["imagenet-rn101-free-m4-eps4"], seed=7)


def test_a_damaged_config_is_refused(tmp_path):
    """Unknown fields, wrong types, not YAML at all."""
    for text, message in (
        ("m: 4\nmm: 5", "unknown fields mm"),
        ("m: [", "not a YAML file"),
        ("4", "not a saved configuration"),
        ("eps: 4", "did you mean 4/255?"),
    ):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        with pytest.raises(UserError, match="^--") as caught:
            load_config(path)
        assert message in str(caught.value)


def test_the_recipe_batch_is_the_papers_global_batch(monkeypatch):
    """256 over 4 ranks is 64 each; a typed --batch-size is per rank."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    recipe = RECIPES["imagenet-rn50-free-m4-eps4"]
    config, remarks = resolve(recipe, {"data"})
    assert config.batch_size == 64
    assert any("64 per rank" in remark for remark in remarks)
    assert resolve(recipe, {"data", "batch_size"})[0].batch_size == 256


def test_without_a_gpu_the_evaluation_is_limited_and_says_how_to_run_the_full_one(monkeypatch):
    """One PGD-20 on at most 400 images, unless typed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recipe = RECIPES["imagenet-rn50-free-m4-eps4"]
    config, remarks = resolve(recipe, set())
    assert (config.eval_attacks, config.eval_images) == (("pgd-20",), 400)
    assert any("--eval-attacks pgd-10,pgd-50,pgd-100" in remark for remark in remarks)
    config, _ = resolve(recipe, {"eval_attacks", "eval_images"})
    assert config == recipe


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--trades-beta 3", "--trades-beta 3: free does not read it; for trades, free-trades"),
        ("--method trades --no-shuffle", "--no-shuffle: trades does not read it; for fast-advprop"),
        (
            "--method natural --step_size=8/255",
            "--step-size 8/255: natural does not read it; for every method but natural",
        ),
        ("--reg-every 4", "--reg-every 4: free does not read it; for gradalign"),
        (
            "--method advprop --guard-every 4",
            "--guard-every 4: advprop does not read it; "
            "for every method but natural, fast-advprop, advprop",
        ),
    ],
)
def test_flags_of_other_methods_are_refused(line, message):
    """With the methods that read them."""
    with pytest.raises(UserError) as caught:
        parsed(line)
    assert str(caught.value) == message


def test_flags_that_change_nothing_are_not_refused(tmp_path):
    """A recipe of another method needs --m 1; GradAlign may come to read its flags."""
    recipe = "--recipe imagenet-rn50-free-m4-eps4 --data /x"
    assert parsed(f"{recipe} --method pgd --m 1").m == 1
    assert parsed("--mix none --norm linf --attack-warmup 0").mix == "none"
    assert parsed("--on-collapse gradalign --reg-every 4").reg_every == 4


def test_a_replayed_config_may_hold_what_its_method_does_not_read(tmp_path):
    """Only flags are refused; a config.yaml holds every field."""
    save_config(TrainConfig(method="free", trades_beta=3.0), tmp_path / "config.yaml")
    line = f"--config {tmp_path / 'config.yaml'}"
    assert parsed(line).trades_beta == 3
    with pytest.raises(UserError, match="--yopo-inner 4: free does not read it; for yopo"):
        parsed(f"{line} --yopo-inner 4")


def test_flags_are_shared_out_among_methods():
    """A flag that none of them reads stays, to be refused."""
    words = "--mix mixup --step-size=8/255 --m 2 --no-shuffle --lr 0.1 --resume".split()
    both = ("natural", "free")
    assert " ".join(share_of(words, "natural", both)) == (
        "--mix mixup --m 2 --no-shuffle --lr 0.1 --resume"
    )
    assert " ".join(share_of(words, "free", both)) == (
        "--step-size=8/255 --m 2 --no-shuffle --lr 0.1 --resume"
    )
    assert share_of(["--on-collapse", "gradalign", "--reg-every", "4"], "natural", both) == []


def test_steps_follow_a_typed_eps(monkeypatch):
    """A recipe's steps were made for its own radius: pgd10 at eps 8 steps by 1.6, at 16 by 3.2."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def settled(line):
        command, typed = parse(line.split(), "free", "cifar")
        return resolve(command.run, typed)

    config, remarks = settled("--method pgd --eps 16/255 --data cifar10:x")
    assert (str(config.threat.step), str(config.eval_step)) == ("3.2/255", "4/255")
    assert remarks == ["for --eps 16/255: --step-size 3.2/255, --eval-step 4/255"]
    config, _ = settled("--method pgd --eps 16/255 --step-size 1/255 --eval-step 1/255 --data x")
    assert (str(config.threat.step), str(config.eval_step)) == ("1/255", "1/255")
    config, _ = settled("--method pgd --norm l2 --eps 128/255 --data cifar10:x")
    assert (str(config.threat.step), str(config.eval_step)) == ("32/255", "16/255")
    config, remarks = settled("--method pgd --data cifar10:x")
    assert (str(config.threat.step), remarks) == ("1.6/255", [])
    assert settled("--method gradalign --data svhn:x")[0].recipe == "svhn-preact18-gradalign-eps8"


def test_a_run_that_was_killed_before_its_config_is_begun_again(tmp_path):
    """Its folder alone does not say what to train; what the line says to type does."""
    folder = tmp_path / "run"
    RunFolder(folder).claim(resume=False)
    with pytest.raises(UserError) as error:
        parsed(f"--resume {folder}")
    assert str(error.value) == (
        f"--resume {folder}: nothing to continue there, for it has no config.yaml; if a run was "
        "killed before it wrote one, type its own flags again and add "
        f"--output-dir {folder} --resume"
    )
    config = parsed(f"--m 2 {str(error.value).partition(' and add ')[2]}")
    assert (config.m, config.run_folder, config.resume) == (2, str(folder), True)
    RunFolder(folder).claim(config.resume)
