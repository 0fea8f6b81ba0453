"""What --resume reads, what typed flags may change of it, and what is named instead."""

import dataclasses
import json
import shutil

import pytest
import torch

from forked import run_ranks
from freeadv_fast import training
from freeadv_fast.cli import run_training
from freeadv_fast.cli.flags import parse
from freeadv_fast.config.file import load_config
from freeadv_fast.errors import UserError
from freeadv_fast.runs.checkpoint import load_checkpoint
from freeadv_fast.session.changes import changes_for_ranks, differences, for_ranks
from freeadv_fast.session.signals import Interrupted

# Two data epochs of five minibatches of 24 images, each replayed twice.
FLAGS = [
    "--data", "(small_images)", "--workers", "0", "--augment", "random-resized-crop",
    "--arch", "test_resnet", "--image-size", "16", "--batch-size", "24", "--epochs", "4",
    "--m", "2", "--eps", "8/255", "--holdout-images", "6", "--eval-images", "8",
    "--eval-attacks", "pgd-2", "--log-every", "2", "--guard-every", "0",
]  # fmt: skip
PASSES = 2 * 2 * 108


@pytest.fixture(scope="module", autouse=True)
def _images(small_images):
    """FLAGS train on the small image folder."""
    FLAGS[1] = str(small_images)


@pytest.fixture(scope="module")
def _finished(tmp_path_factory, _images):
    """A finished run."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run_training("free", "imagenet", [*FLAGS, "--output-dir", str(folder)]) == 0
    return folder


@pytest.fixture
def finished(_finished, tmp_path):
    """A copy of it."""
    return shutil.copytree(_finished, tmp_path / "run")


@pytest.fixture
def interrupted(finished):
    """The same run as if it had been killed before its evaluation."""
    (finished / "result.json").unlink()
    return finished


def resume(capsys, *flags):
    """Exit status and output of a command that names no flag of the run but these."""
    capsys.readouterr()
    status = run_training("free", "imagenet", ["--resume", *map(str, flags)])
    said = capsys.readouterr()
    return status, said.out + said.err


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("form", ["--resume X", "--resume=X", "--output-dir X", "--config"])
def test_a_run_is_named_by_its_folder_alone(interrupted, capsys, form):
    """The run's own config is what flags are on top of: nothing of it has to be typed again."""
    flags = {
        "--resume X": ["--resume", str(interrupted)],
        "--resume=X": [f"--resume={interrupted}"],
        "--output-dir X": ["--output-dir", str(interrupted), "--resume"],
        "--config": ["--config", str(interrupted / "config.yaml"), "--resume"],
    }[form]
    assert run_training("natural", "cifar", flags) == 0
    said = capsys.readouterr().out
    assert f"resuming from {interrupted}/checkpoints/last.pt" in said
    assert "changed:" not in said
    assert (result_of(interrupted)["method"], result_of(interrupted)["passes"]) == ("free", PASSES)


def test_the_default_folder_is_resumed_without_a_name(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    named = tmp_path / "runs" / "free-digits-resnet18-m2-eps32-seed0"
    shutil.copytree(finished, named)
    status, said = resume(capsys, "--m", "2")
    assert status == 0
    assert f"runs/{named.name} is finished" in said


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["nowhere"], "--resume nowhere: nothing to continue there, for it has no config.yaml"),
        (["a", "--output-dir", "b"], "--resume a: --output-dir names b; leave one of them out"),
    ],
)
def test_a_folder_that_is_none_is_refused(capsys, flags, line):
    assert resume(capsys, *flags) == (2, f"error: {line}\n")


@pytest.mark.parametrize(
    ("flags", "was"),
    [("--lr 0.5", "--lr 0.1"), ("--batch-size 12", "--batch-size 24"), ("--seed 7", "--seed 0"),
     ("--optimizer sgd-foreach", "--optimizer sgd")],
)  # fmt: skip
def test_what_may_not_change_is_named(finished, capsys, flags, was):
    """Of a finished run as well: no typed flag is dropped without a word."""
    status, said = resume(capsys, finished, *flags.split())
    assert status == 2
    assert f"error: {flags}: the run in {finished} was made with {was}; resume it with" in said


def test_a_finished_run_goes_on_with_more_epochs(finished, capsys):
    """Its result keeps another name; what it logged stays; the last weights are trained further."""
    before, log = result_of(finished), (finished / "log.jsonl").read_text()
    later = ("audit.json", "evaluation-last-pgd-50-n8.json", "robustness-last-x-n8.json")
    for name in later:
        (finished / name).write_text("{}")
    status, said = resume(capsys, finished, "--epochs", "6", "--workers", "1")
    assert status == 0, said
    assert "changed: --workers 1 (was 0), --epochs 6 (was 4); the learning rate follows" in said
    assert f"the result so far is kept as {finished / 'result-1.json'}" in said
    assert json.loads((finished / "result-1.json").read_text()) == before
    assert f"evaluations of the weights so far are kept in {finished / 'before-1'}" in said
    assert not any((finished / name).exists() for name in later)
    assert sorted(path.name for path in (finished / "before-1").iterdir()) == list(later)
    assert result_of(finished)["passes"] == PASSES * 3 // 2
    assert (finished / "log.jsonl").read_text().startswith(log)
    assert load_config(finished / "config.yaml").epochs == 6
    assert "is finished" in resume(capsys, finished)[1]


def test_a_finished_run_is_evaluated_anew(finished, capsys):
    """Its weights stay, and so does what was measured of them."""
    (finished / "audit.json").write_text("{}")
    status, said = resume(capsys, finished, "--eval-attacks", "pgd-3")
    assert status == 0
    assert "changed: --eval-attacks pgd-3 (was pgd-2)" in said
    assert (finished / "audit.json").exists()
    assert list(result_of(finished)["robust_accuracy"]) == ["pgd-3"]
    assert result_of(finished)["passes"] == PASSES


def test_what_changes_nothing_of_a_finished_run_is_said(finished, capsys):
    before = (finished / "result.json").stat().st_mtime_ns
    status, said = resume(capsys, finished, "--workers", "3")
    assert status == 0
    assert "is finished; its result is in" in said
    assert "--workers 3 (was 0) would change nothing" in said
    assert (finished / "result.json").stat().st_mtime_ns == before


def test_a_budget_that_is_spent_already_is_refused(finished, capsys):
    status, said = resume(capsys, finished, "--epochs", "2")
    assert status == 2
    assert "error: --epochs 2: the run has made 2 passes over the data" in said
    status, said = resume(capsys, finished, "--max-passes", "100")
    assert status == 2
    assert f"error: --max-passes 100: the run has made 2 passes over the data and {PASSES}" in said
    assert (finished / "result.json").exists()


def test_a_finished_run_without_checkpoints_cannot_go_on(finished, capsys):
    shutil.rmtree(finished / "checkpoints")
    status, said = resume(capsys, finished, "--epochs", "9")
    assert (status, "its checkpoints are gone" in said) == (2, True)
    assert (finished / "result.json").exists()


def test_the_data_may_have_moved(interrupted, small_images, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(small_images, moved)
    status, said = resume(capsys, interrupted, "--data", moved)
    assert status == 0, said
    assert f"changed: --data {moved} (was {small_images})" in said


def test_python_compares_every_field(interrupted, capsys):
    """``precision="auto"`` asks for none."""
    config = dataclasses.replace(
        load_config(interrupted / "config.yaml"), output_dir=str(interrupted), resume=True
    )
    with pytest.raises(UserError, match="--lr 0.3: the run in .* was made with --lr 0.1"):
        training.train(dataclasses.replace(config, lr=0.3))
    result = training.train(dataclasses.replace(config, precision="auto"))
    assert result.passes == PASSES


def test_a_shell_leaves_the_home_of_a_value_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    command, _ = training_command("--output-dir=~/x", "--init-from=~/w.pt")
    assert (command.run.run_folder, command.run.init_from) == (f"{tmp_path}/x", f"{tmp_path}/w.pt")


def training_command(*flags):
    return parse(list(flags), "free", "imagenet")


@pytest.mark.slow
def test_a_run_goes_on_with_other_ranks(repository, tmp_path, capsys):
    """Two ranks, then one, one again, then two: always the same global minibatches."""
    folder, script = tmp_path / "run", repository / "launch" / "imagenet_free.py"

    def on_two_ranks(name, *flags):
        done = run_ranks(2, script, *flags, output=tmp_path / name)
        assert done.returncode == 0, done.stderr
        return done.stdout

    flags = [*FLAGS, "--batch-size", "12", "--output-dir", folder]
    on_two_ranks("first", *flags, "--max-passes", "96")
    status, said = resume(capsys, folder, "--max-passes", "240")
    assert status == 0, said
    assert "ranks: 1 (was 2); the global minibatches stay the same" in said
    assert "24 = 1 rank x 24" in said
    assert result_of(folder)["passes"] == 264
    delta = load_checkpoint(folder / "checkpoints" / "last.pt")["ranks"][0]["method"]["delta"]
    assert delta.shape[0] == 24
    assert load_config(folder / "config.yaml").batch_size == 12
    # What was typed at first may be typed again.
    status, said = resume(capsys, folder, "--batch-size", "12", "--max-passes", "300")
    assert (status, "ranks: 1 (was" in said) == (0, False), said
    said = on_two_ranks("last", "--resume", folder, "--max-passes", "None")
    assert "ranks: 2 (was 1)" in said
    assert "24 = 2 ranks x 12" in said
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["passes"] for line in lines] == sorted(line["passes"] for line in lines)
    assert result_of(folder)["passes"] == PASSES


def test_shares_of_other_ranks():
    """A divisible global minibatch is dealt anew, with its phases; others are named."""
    config, _ = training_command("--epochs", "30", "--phases", "0-2:16:36,2-30:32:24")
    shared = for_ranks(config.run, 2, 4)
    assert str(shared.phases) == "0-2:16:18,2-30:32:12"
    assert shared.batch_size == 12
    assert changes_for_ranks(config.run, config.run, 2, 4) == []
    assert changes_for_ranks(config.run, shared, 2, 4) == []
    assert differences(config.run, shared) == ["batch_size", "phases"]
    with pytest.raises(UserError, match="--nproc-per-node 5: minibatches of 48 images cannot be"):
        for_ranks(config.run, 2, 5)
    advprop, _ = training_command("--method", "fast-advprop")
    with pytest.raises(UserError, match="--nproc-per-node 1: a run of fast-advprop made with 2 "):
        for_ranks(advprop.run, 2, 1)


def test_an_interruption_while_going_on_keeps_the_results(finished, capsys, monkeypatch):
    """Killed within the new epochs: the old result under its name, and the run goes on."""

    def leave(run, stop):
        raise Interrupted(15)

    with monkeypatch.context() as patch:
        patch.setattr(training, "obey_requests", leave)
        status, _ = resume(capsys, finished, "--epochs", "6")
    assert status == 128 + 15
    assert (finished / "result-1.json").exists()
    assert not (finished / "result.json").exists()
    status, said = resume(capsys, finished)
    assert status == 0, said
    assert result_of(finished)["passes"] == PASSES * 3 // 2
