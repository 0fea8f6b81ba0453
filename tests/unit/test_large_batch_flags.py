"""The flags of large batches as a person meets them: mistakes, remarks, the start, a dry run."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from torch import nn

from freeadv_fast.cli import run_training
from freeadv_fast.cli.flags import parse
from freeadv_fast.cli.resolve import resolve
from freeadv_fast.recipes.catalogue import RECIPES
from freeadv_fast.session.conclude import gradient_traffic
from freeadv_fast.session.start import batch_text, changed_flags, gradient_lines

FINISHED, REFUSED = 0, 2
# Short, should one of the mistakes be trained on.
SHORT = ["--arch", "test_resnet", "--max-passes", "64", "--workers", "0"]


@pytest.fixture
def pool(tmp_path):
    """Unlabelled images of digits' size, with pseudo labels."""
    path = tmp_path / "pool.npz"
    labels = np.arange(40) % 10
    np.savez(path, image=np.zeros((40, 32, 32, 3), np.uint8), label=labels)
    return path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--accumulate 0", "--accumulate 0: must be at least 1"),
        ("--method fast-advprop --accumulate 2", "--accumulate 2: not for fast-advprop"),
        ("--optimizer lalr --lalr-min 3 --lalr-max 2", "--lalr-min 3: above --lalr-max 2"),
        ("--lalr-max -1", "--lalr-max -1: must be zero or a positive number"),
        ("--lalr-max nan", "--lalr-max nan: must be zero or a positive number"),
        ("--unlabelled POOL --unlabelled-fraction 1", "--unlabelled-fraction 1: must be at least"),
        ("--unlabelled POOL --unlabelled-fraction -0.1", "--unlabelled-fraction -0.1: must be at"),
        ("--unlabelled nowhere.npz", "--unlabelled nowhere.npz: "),
        ("--method natural --unlabelled POOL", "--unlabelled POOL: not for natural"),
        ("--dat-attack fgsm --dat-unlabelled kl", "--dat-unlabelled kl: compares with clean"),
        ("--method pgd --dat-attack fgsm", "--dat-attack fgsm: pgd does not read it; for dat"),
        ("--epochs 4 --warmup-epochs 4", "--warmup-epochs 4: leaves nothing of --epochs 4"),
        ("--warmup-epochs -1", "--warmup-epochs -1: must be zero or a positive number"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(line, message, pool, tmp_path, capsys):
    arguments = line.replace("POOL", str(pool)).split()
    output = tmp_path / "run"
    arguments = ["--method", "dat"] * ("--method" not in line) + [*arguments, *SHORT]
    status = run_training("dat", "cifar", [*arguments, "--output-dir", str(output)])
    error = capsys.readouterr().err
    assert status == REFUSED
    assert error.startswith("error: " + message.replace("POOL", str(pool))), error
    assert len(error.splitlines()) == 1
    assert not output.exists()


@pytest.mark.parametrize(
    ("ranks", "line", "size", "remark"),
    [
        (1, "", 64, None),
        (1, "--accumulate 4", 16, "over 4 minibatches: 16 per minibatch (--"),
        (4, "", 16, "over 4 ranks: 16 per rank (--"),
        (4, "--accumulate 2", 8, "over 4 ranks and 2 minibatches: 8 per minibatch (--"),
        (
            3,
            "--accumulate 2",
            10,
            "over 3 ranks and 2 minibatches: 10 per minibatch, 60 in all (--",
        ),
        (64, "--accumulate 2", 2, "64 ranks and 2 minibatches: 2 per minibatch, 256 in all (--"),
        (4, "--accumulate 2 --batch-size 64", 64, None),
    ],
)
def test_a_recipes_batch_is_divided_and_said_to_be(ranks, line, size, remark, monkeypatch):
    """A typed one stays: it is that of a rank's minibatch."""
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    command, typed = parse(["--method", "dat", *line.split()], "dat", "cifar")
    config, remarks = resolve(command.run, typed)
    assert config.batch_size == size
    (said,) = [text for text in remarks if "recipe batch" in text] or [None]
    assert said is None if remark is None else remark in said


def test_a_divided_batch_is_no_change_of_the_recipe(world):
    """Nobody has typed it; --accumulate is listed, and another batch too."""
    four = dataclasses.replace(world, size=4)
    recipe = dataclasses.replace(RECIPES["digits-dat"], precision="fp32")  # auto, on a CPU
    divided = dataclasses.replace(recipe, accumulate=2, batch_size=8)
    assert changed_flags(divided, four) == ["--accumulate 2"]
    typed = dataclasses.replace(recipe, accumulate=2, batch_size=16)
    assert changed_flags(typed, four) == ["--batch-size 16  --accumulate 2"]
    assert batch_text(typed, 4) == "128 = 4 ranks x 2 minibatches x 16"


@pytest.mark.parametrize("codec", ["bucket", "paper"])
def test_the_start_says_how_gradients_travel(codec):
    config = dataclasses.replace(RECIPES["digits-dat"], compress=codec)
    near, far = (SimpleNamespace(num_machines=number) for number in (1, 3))
    assert gradient_lines(RECIPES["digits-dat"], None) == []
    assert gradient_lines(config, None) == [
        f"--compress {codec}: nothing to do, one rank sends none"
    ]
    assert gradient_lines(config, near) == [f"{codec} codec, one byte an element between ranks"]
    (line,) = gradient_lines(config, far)
    assert line.endswith("between 3 machines, float32 within each")


@pytest.mark.parametrize(
    ("num_compressed", "num_bytes", "bytes_an_update"), [(0, 0, None), (3, 300, 100), (8, 800, 100)]
)
def test_updates_on_one_rank_do_not_count_as_saved(
    num_compressed, num_bytes, bytes_an_update, world
):
    """8 updates, some of them alone; all of them where two ranks came for the evaluation only."""
    learner = SimpleNamespace(
        compression=SimpleNamespace(num_machines=1), updates=8,
        compressed_updates=num_compressed, gradient_bytes=num_bytes,
    )  # fmt: skip
    run = SimpleNamespace(
        learner=learner, world=dataclasses.replace(world, size=2), model=nn.Linear(9, 10),
        config=dataclasses.replace(RECIPES["digits-dat"], compress="bucket"),
    )  # fmt: skip
    sent = gradient_traffic(run)
    assert (sent and sent["bytes_an_update"]) == bytes_an_update
    assert sent is None or sent["float32_bytes_an_update"] == 2 * 1 * 4 * 100 // 2


def test_a_dry_run_shows_all_of_it_and_writes_nothing(pool, tmp_path, capsys):
    """A minibatch of two times 16 images, of which 8 are unlabelled."""
    asked = {
        "method": "dat", "dat_mode": "train", "dat_clean_weight": 0.5, "dat_unlabelled": "kl",
        "optimizer": "lalr", "lalr_min": 0.01, "lalr_max": 5.0, "accumulate": 2,
        "compress": "bucket", "warmup_epochs": 1.0, "unlabelled": str(pool),
        "unlabelled_fraction": 0.25, "batch_size": 16,
    }  # fmt: skip
    flags = [text for k, v in asked.items() for text in (f"--{k.replace('_', '-')}", str(v))]
    output = tmp_path / "run"
    arguments = [*flags, "--lalr-exempt", *SHORT, "--output-dir", str(output), "--dry-run"]
    assert run_training("dat", "cifar", arguments) == FINISHED
    printed = capsys.readouterr()
    assert printed.err == ""
    start = printed.out.index("\nrecipe: digits-dat") + 1
    block, _, rest = printed.out[start:].partition("\nmethod  ")
    config = yaml.safe_load(block)
    assert {name: config[name] for name in asked} == asked
    assert config["lalr_exempt"] is True
    for words in (
        "32 = 1 rank x 2 minibatches x 16",
        "pool.npz, 8 of each minibatch's 32",
        "--compress bucket: nothing to do, one rank sends none",
        "images (32, 32, 32, 3) torch.uint8",
    ):
        assert words in rest, rest
    assert not output.exists()
