"""A run goes on although its data changed: what left and what came is said, the rest stays."""

import os
import shutil
import signal

import numpy as np
import pytest
import torch

from freeadv_fast import training
from freeadv_fast.cli import run_training
from freeadv_fast.data.names import keys_of
from freeadv_fast.runs.checkpoint import load_checkpoint, save_checkpoint
from freeadv_fast.session.prepare import deal_images

# 108 of 114 images train, five minibatches of 24 an epoch, the last one of 12; m = 2.
FLAGS = [
    "--workers", "0", "--augment", "random-resized-crop", "--arch", "test_resnet",
    "--image-size", "16", "--batch-size", "24", "--epochs", "8", "--m", "2", "--eps", "8/255",
    "--holdout-images", "6", "--guard-images", "6", "--eval-images", "8", "--eval-attacks", "pgd-2",
    "--log-every", "2", "--bn-group", "None",
]  # fmt: skip


@pytest.fixture
def data(small_images, tmp_path):
    """A copy of the small image folder, to be changed."""
    return shutil.copytree(small_images, tmp_path / "data")


@pytest.fixture
def dealt(monkeypatch):
    """The loaders of each session, the latest last."""
    sessions = []

    def watched(*arguments):
        sessions.append(deal_images(*arguments))
        return sessions[-1]

    monkeypatch.setattr("freeadv_fast.session.prepare.deal_images", watched)
    return sessions


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Trains in this process; `stop_after` minibatches it gets SIGTERM."""
    real = training.obey_requests

    def run(data, *flags, stop_after=None):
        calls = []

        def obey(run, stop):
            calls.append(None)
            if len(calls) == stop_after:
                os.kill(os.getpid(), signal.SIGTERM)
            real(run, stop)

        monkeypatch.setattr(training, "obey_requests", obey)
        folder = tmp_path / "run"
        resume = ["--resume"] if (folder / "checkpoints").exists() else []
        paths = ["--data", str(data), "--output-dir", str(folder), *resume]
        return run_training("free", "imagenet", [*FLAGS, *paths, *flags])

    return run


def last(tmp_path):
    return load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")


def names_of(stream_loader):
    index = stream_loader.index
    return {index.names[row] for row in stream_loader.stream.rows}


def stopped():
    return 128 + signal.SIGTERM


def test_one_removed_file_moves_no_other(data, start, dealt, tmp_path, capsys):
    """A held-out image and a trained one leave: the rest is on its side, in its order."""
    assert start(data, stop_after=3) == stopped()
    before = dealt[0][0]
    held, trained = sorted(names_of(before.holdout)), sorted(names_of(before.train))
    for name in (held[2], trained[40]):
        (data / "train" / name).unlink()
    capsys.readouterr()
    assert start(data) == 0
    gone = ", ".join(sorted([held[2], trained[40]]))
    assert (
        f"training images changed since the checkpoint: 2 left ({gone}); the others keep their "
        "order, their crops and their side of the split"
    ) in capsys.readouterr().out.splitlines()
    after = dealt[1][0]
    assert names_of(after.holdout) == set(held) - {held[2]}
    assert names_of(after.train) == set(trained) - {trained[40]}
    orders = [
        [loaders.train.index.names[row] for row in loaders.train.stream.order(1)]
        for loaders in (before, after)
    ]
    assert orders[1] == [name for name in orders[0] if name != trained[40]]
    assert (tmp_path / "run" / "result.json").exists()


def test_what_came_is_trained_on_and_what_changed_is_named(data, start, dealt, capsys):
    assert start(data, stop_after=3) == stopped()
    held = names_of(dealt[0][0].holdout)
    train = data / "train"
    shutil.copy(train / "class1" / "0.jpg", train / "class0" / "new.jpg")
    shutil.copy(train / "class1" / "0.jpg", train / "class1" / "another.jpg")
    with (train / "class2" / "5.jpg").open("ab") as file:
        file.write(bytes(7))
    assert start(data) == 0
    assert (
        "2 came (class0/new.jpg, class1/another.jpg), 1 changed (class2/5.jpg);"
    ) in capsys.readouterr().out
    assert names_of(dealt[1][0].holdout) == held
    assert {"class0/new.jpg", "class1/another.jpg"} < names_of(dealt[1][0].train)


def test_a_held_out_image_that_comes_back_is_held_out(data, start, dealt, tmp_path):
    assert start(data, stop_after=2) == stopped()
    (name, *_) = held = sorted(names_of(dealt[0][0].holdout))
    aside = tmp_path / "aside.jpg"
    (data / "train" / name).rename(aside)
    assert start(data, stop_after=2) == stopped()
    assert names_of(dealt[1][0].holdout) == set(held) - {name}
    aside.rename(data / "train" / name)
    assert start(data) == 0
    assert names_of(dealt[2][0].holdout) == set(held)


def test_the_same_data_under_another_path_is_the_same_run(data, start, tmp_path, capsys):
    """Bit for bit, and so is a folder that was written anew."""
    assert start(data) == 0
    straight = last(tmp_path)
    shutil.rmtree(tmp_path / "run")
    assert start(data, stop_after=7) == stopped()
    moved = shutil.copytree(data, tmp_path / "elsewhere" / "data", copy_function=shutil.copyfile)
    shutil.rmtree(data)
    capsys.readouterr()
    assert start(moved) == 0
    assert "training images changed" not in capsys.readouterr().out
    resumed = last(tmp_path)
    for name, value in straight["model"].items():
        assert torch.equal(resumed["model"][name], value), name


def test_other_images_under_another_path_are_refused(data, start, tmp_path, capsys):
    """A moved folder may lack files, as advised for bad ones, and holds no others."""
    assert start(data, stop_after=3) == stopped()
    moved = shutil.copytree(data, tmp_path / "moved")
    (moved / "train" / "class0" / "3.jpg").rename(moved / "train" / "class0" / "three.jpg")
    capsys.readouterr()
    assert start(moved) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"error: --data {moved}: not the images that the run was trained on under {data}: "
        "1 left (class0/3.jpg), 1 came (class0/three.jpg); resume it with those"
    )
    assert error.count("\n") == 1
    (moved / "train" / "class0" / "three.jpg").unlink()
    assert start(moved) == 0
    assert "1 left (class0/3.jpg)" in capsys.readouterr().out


def test_other_classes_are_refused(data, start, capsys):
    assert start(data, stop_after=3) == stopped()
    for split in ("train", "val"):
        (data / split / "class1").rename(data / split / "kind1")
    capsys.readouterr()
    assert start(data) == 2
    error = capsys.readouterr().err
    assert error == (
        f"error: --data {data}: its classes are not those that the run was trained on: "
        "class1 left, kind1 came; resume it with the same classes\n"
    )


@pytest.mark.parametrize("kept", [96, 60])
def test_a_place_that_is_no_more_ends_its_epoch(data, start, dealt, tmp_path, kept):
    """Stopped after four of five minibatches; now there are four, or three."""
    assert start(data, stop_after=4) == stopped()
    for name in sorted(names_of(dealt[0][0].train))[kept:]:
        (data / "train" / name).unlink()
    assert last(tmp_path)["progress"]["minibatch"] == 4
    assert start(data, stop_after=1) == stopped()
    progress = last(tmp_path)["progress"]
    assert (progress["epoch"], progress["minibatch"]) == (1, 0)
    assert dealt[1][0].train.num_batches == -(-kept // 24)
    assert start(data) == 0  # to the last update of the smaller budget
    assert (tmp_path / "run" / "result.json").exists()


def without_names(tmp_path):
    """Makes the checkpoint one from before images were known by their names."""
    state = last(tmp_path)
    del state["data"]
    save_checkpoint(state, tmp_path / "run" / "checkpoints")


def test_a_checkpoint_without_names_goes_on_with_a_line(data, start, tmp_path, capsys):
    assert start(data, stop_after=3) == stopped()
    without_names(tmp_path)
    assert start(data) == 0
    assert "held-out images are drawn anew" in capsys.readouterr().out


def test_a_checkpoint_without_names_cannot_follow_a_moved_folder(data, start, tmp_path, capsys):
    assert start(data, stop_after=3) == stopped()
    without_names(tmp_path)
    moved = data.rename(tmp_path / "moved")
    capsys.readouterr()
    assert start(moved) == 2
    assert capsys.readouterr().err.startswith(f"error: --data {moved}: the checkpoint is from bef")


def test_a_checkpoint_holds_the_keys_of_what_is_held_out(data, start, dealt, tmp_path):
    assert start(data, stop_after=1) == stopped()
    keys = last(tmp_path)["data"]["held_out"].numpy().view(np.uint64)
    held = sorted(names_of(dealt[0][0].holdout))
    assert sorted(keys.tolist()) == sorted(keys_of(held).tolist())
