"""`import freeadv_fast as ff`: quick, whole, and of one mind with the command line."""

import subprocess
import sys
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
import torch

import freeadv_fast as ff
from freeadv_fast.cli.flags import parse
from freeadv_fast.cli.resolve import resolve
from freeadv_fast.config.file import config_from_dict, config_to_dict
from freeadv_fast.config.threat import Perturbation
from freeadv_fast.errors import UserError

NAMES = ["RECIPES", "TrainConfig", "evaluate", "load_export", "load_run", "train"]


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_importing_it_imports_no_torch():
    heavy = "('torch', 'numpy', 'yaml', 'tyro')"
    code = f"import sys, freeadv_fast; print([m for m in {heavy} if m in sys.modules])"
    assert run_python(code) == ["[]"]


def test_names_are_functions_whatever_was_imported_before():
    code = (
        "import freeadv_fast.sweep, freeadv_fast as ff; print(callable(ff.train), ff.__version__)"
    )
    assert run_python(code) == ["True", ff.__version__]


def test_it_lists_what_it_has():
    assert sorted(dir(ff)) == NAMES
    assert all(getattr(ff, name).__doc__ for name in NAMES)
    with pytest.raises(AttributeError):
        _ = ff.trian


def test_the_types_travel_with_the_package():
    assert files("freeadv_fast").joinpath("py.typed").is_file()


@pytest.mark.parametrize(
    "eps", ["8/255", 8 / 255, np.float64(8 / 255), Perturbation.parse("8/255")]
)
def test_a_radius_may_be_written_as_one_likes(eps):
    assert ff.TrainConfig(eps=eps) == ff.TrainConfig(eps="8/255")
    assert ff.TrainConfig(eps=eps).threat.is_integral


@pytest.mark.parametrize("numerator", [0.5, 1, 1.25, 2, 2.5, 3, 4, 7, 8, 10, 12, 16, 32, 100, 254])
def test_a_float_is_the_fraction_that_it_was_computed_from(numerator):
    assert (
        Perturbation.parse(numerator / 255).levels == Perturbation.parse(f"{numerator}/255").levels
    )


def test_a_fraction_that_somebody_wrote_stays_what_it_is():
    assert float(Perturbation.parse("0.0157").levels) == pytest.approx(4.0035, abs=1e-12)


def typed_on(recipe, *flags):
    command, typed = parse(["--recipe", recipe, "--data", "x", *flags], "free", "cifar")
    return resolve(command.run, typed)[0]


@pytest.mark.parametrize(
    ("recipe", "flags", "changes"),
    [
        ("cifar10-wrn32-free-m8", ["--eps", "16/255"], {"eps": "16/255"}),
        ("cifar10-wrn32-free-m8", ["--eps", "16/255"], {"eps": 16 / 255}),
        (
            "cifar10-wrn32-free-m8",
            ["--eps", "16/255", "--eval-step", "1/255"],
            {"eps": "16/255", "eval_step": "1/255"},
        ),
        ("cifar10-wrn32-pgd7", ["--eps", "4/255"], {"eps": "4/255"}),
        (
            "cifar10-wrn32-pgd7",
            ["--norm", "l2", "--eps", "128/255"],
            {"norm": "l2", "eps": "128/255"},
        ),
        ("imagenet-rn50-free-m4-eps4", ["--schedule", "at:30"], {"schedule": "at:30"}),
    ],
)
def test_replace_means_what_the_flags_mean(recipe, flags, changes):
    options = {"data": "x", "eval_attacks": ("pgd-20",), "eval_images": 400}  # those of a CPU
    config = replace(ff.RECIPES[recipe], **options, **changes)
    assert config == typed_on(recipe, *flags)


def test_steps_follow_the_radius_there_and_back():
    recipe = ff.RECIPES["cifar10-wrn32-free-m8"]
    assert str(replace(recipe, eps="16/255").eval_step) == "4/255"
    assert replace(replace(recipe, eps="16/255"), eps="8/255") == recipe
    assert str(ff.TrainConfig(eps="8/255").eval_step) == "2/255"
    assert str(ff.TrainConfig(eps="8/255", eval_step="1/255").eval_step) == "1/255"


def test_a_saved_config_keeps_its_steps():
    saved = config_from_dict(config_to_dict(ff.RECIPES["cifar10-wrn32-free-m8"]))
    assert str(replace(saved, eps="16/255").eval_step) == "2/255"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("m", 4.0, "--m 4.0: must be a whole number; write 4"),
        ("m", True, "--m True: must be a whole number"),
        ("lr", "1e-2", "--lr 1e-2: must be a number; write 0.01 without quotes"),
        ("lr", None, "--lr None: must be a number"),
        ("schedule", 5, "--schedule 5: write every:30"),
        ("phases", 5, "--phases 5: write epochs:side:batch"),
        ("resume", 1, "--resume 1: must be true or false"),
        ("arch", 50, "--arch 50: must be text"),
        ("eps", 8, "--eps 8: larger than the whole pixel range; did you mean 8/255"),
        ("eps", True, "--eps True: not a perturbation"),
        ("eps", float("nan"), "--eps nan: not a perturbation"),
        ("eval_attacks", 20, "--eval-attacks 20: must be words"),
        ("bn_group", 2.5, "--bn-group 2.5: must be a whole number"),
        ("fuse", "yes", "--fuse yes: choose one of auto, on, off"),
        ("batch_size", [256], r"--batch-size \[256\]: must be a whole number"),
    ],
)
def test_a_value_of_another_type_is_refused_by_the_flag_that_sets_it(field, value, message):
    with pytest.raises(UserError, match=f"^{message}"):
        ff.TrainConfig(**{field: value})
    with pytest.raises(UserError, match=f"^{message}"):
        config_from_dict({field: value})


def test_numpy_and_paths_are_welcome(tmp_path):
    config = ff.TrainConfig(
        m=np.int64(8), lr=np.float32(0.5), data=tmp_path, eval_attacks=["pgd-5"]
    )
    assert (config.m, config.lr, config.data) == (8, 0.5, str(tmp_path))
    assert [type(config.m), type(config.lr)] == [int, float]
    assert config.eval_attacks == ("pgd-5",)
    assert ff.TrainConfig(eval_attacks="pgd-5,cw-5").eval_attacks == ("pgd-5", "cw-5")


def test_any_network_of_pixels_can_be_evaluated(capsys):
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.AvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(48, 10)
    )
    measured = ff.evaluate(network, data="digits", eps="16/255", attacks="pgd-2", num_images=30)
    assert measured.num_images == 30
    assert set(measured.robust_accuracy) == {"pgd-2"}
    assert measured.robust_accuracy["pgd-2"] <= measured.clean_accuracy
    assert "Sequential" in capsys.readouterr().out
    assert network.training
    with pytest.raises(UserError, match="--eps: evaluating anything but a run needs it"):
        ff.evaluate(network, data="digits")
    with pytest.raises(UserError, match=r"returns \(2, 3\) for two images; the data have 10"):
        ff.evaluate(
            torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 3)),
            data="digits", eps="16/255",
        )  # fmt: skip
