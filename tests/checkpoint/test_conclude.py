"""A finished run has its result whatever fails beside it; the result is the last weights'."""

import dataclasses
import json
import shutil

import pytest
import torch

import freeadv_fast as ff
from freeadv_fast import training
from freeadv_fast.cli import run_training
from freeadv_fast.evaluation import page, report
from freeadv_fast.evaluation.evaluate import Evaluation
from freeadv_fast.runs import environment, log
from freeadv_fast.runs.checkpoint import load_checkpoint
from freeadv_fast.session import conclude, outputs, selection
from freeadv_fast.session.guard import Count
from freeadv_fast.session.selection import exceeds_chance

FLAGS = [
    "--data", "(small_images)", "--workers", "0", "--augment", "random-resized-crop",
    "--arch", "test_resnet", "--image-size", "16", "--batch-size", "24", "--epochs", "4",
    "--m", "2", "--eps", "8/255", "--holdout-images", "6", "--eval-images", "8",
    "--eval-attacks", "pgd-2", "--log-every", "2",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _images(small_images):
    """FLAGS train on the small image folder."""
    FLAGS[1] = str(small_images)


@pytest.fixture
def run(tmp_path, capsys):
    """Trains; returns the folder, result.json and what was said."""

    def call(*flags):
        folder = tmp_path / "run"
        status = run_training("free", "imagenet", [*FLAGS, "--output-dir", str(folder), *flags])
        said = capsys.readouterr()
        assert status == 0, said.err
        return folder, json.loads((folder / "result.json").read_text()), said.out

    return call


@pytest.fixture
def preferring(monkeypatch):
    """Makes the held-out accuracies those of a list, one for each measurement."""

    def prefer(*scores):
        left = list(scores)
        monkeypatch.setattr(training, "score", lambda measured: left.pop(0))
        monkeypatch.setattr(conclude, "score", lambda measured: left.pop(0))

    return prefer


def breaks(*_, **__):
    raise RuntimeError("Expected end of text, found '$'\n  (at char 0)")


def same(weights, others):
    return all(torch.equal(weights[name], value) for name, value in others.items())


def test_what_draws_fails_no_run(pictures, report_page, run, monkeypatch):
    for name in ("plot_training", "plot_perturbations"):
        monkeypatch.setattr(report, name, breaks)
    real = page.write_page

    def write_and_break(folder):
        real(folder)
        breaks()

    monkeypatch.setattr(page, "write_page", write_and_break)
    folder, result, said = run("--max-passes", "48")
    reason = "RuntimeError: Expected end of text, found '$' (at char 0)\n"
    for name in ("training.png", "perturbations.png"):
        assert f"not drawn: {folder}/plots/{name}: {reason}" in said
    assert f"not written: {folder}/report.html: {reason}" in said
    assert "after 48 image passes" in (folder / "report.html").read_text()
    assert result["passes"] == 48
    assert (folder / "export" / "config.json").exists()


def test_the_result_is_written_before_anything_is_drawn(run, monkeypatch):
    """And what AutoAttack found is forgotten after it, of the run's own evaluations alone."""
    seen, real = [], conclude.measure

    def measure(run, label):
        paths = [run.folder.root / f"autoattack-{name}-rank0.jsonl" for name in ("own", "other")]
        for path in paths:
            path.touch()
        return dataclasses.replace(real(run, label), ledgers=(paths[0],))

    def look(run, _):
        seen.append((run.folder.result.exists(), (run.folder.export / "config.json").exists()))

    monkeypatch.setattr(outputs, "draw", look)
    monkeypatch.setattr(conclude, "measure", measure)
    folder, result, _ = run("--max-passes", "48")
    assert seen == [(True, True)]
    assert [path.name for path in folder.glob("autoattack-*")] == ["autoattack-other-rank0.jsonl"]
    assert result["attack_log"] is None


def test_averaged_and_best_weights_say_what_stood_each_part():
    measured = Evaluation(
        0.9, None, {"autoattack": 0.4}, 8, 8, 1.0, {"autoattack": {"square": 0.4}}, log="a.log"
    )
    record = conclude.findings(measured)
    assert (record["attack_parts"], record["attack_log"]) == (
        {"autoattack": {"square": 0.4}},
        "a.log",
    )


def test_an_export_that_fails_does_not_take_the_result_with_it(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(outputs, "export_trained", breaks)
        folder, result, said = run("--max-passes", "48")
    assert result["passes"] == 48
    assert f"not exported, python launch/export.py {folder} does it later: RuntimeError" in said


def test_class_folders_may_be_called_anything(pictures, run, small_images, tmp_path):
    """matplotlib reads what stands between dollar signs as mathematics."""
    images = shutil.copytree(small_images, tmp_path / "images")
    for split in ("train", "val"):
        (images / split / "class1").rename(images / split / "$1_$5")
    folder, _, said = run("--data", str(images), "--max-passes", "48")
    assert "not drawn" not in said
    assert (folder / "plots" / "perturbations.png").exists()


def test_tensorboard_fails_no_run(run, monkeypatch):
    """Neither where it cannot be opened nor where its thread dies of a full disk."""

    class Full(log.SummaryWriter):
        def add_scalar(self, *_):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(log, "SummaryWriter", Full)
    _, result, said = run("--max-passes", "240")
    assert said.count("TensorBoard: off, OSError: [Errno 28] No space left on device") == 1
    assert result["passes"] == 264


def test_a_tensorboard_that_cannot_be_opened(run, monkeypatch):
    monkeypatch.setattr(log, "SummaryWriter", breaks)
    assert "TensorBoard: off, RuntimeError" in run("--max-passes", "48")[2]


def test_a_machine_that_says_nothing_of_itself_fails_no_run(run, monkeypatch):
    for name in ("git_state", "build_info"):
        monkeypatch.setattr(environment, name, breaks)
    monkeypatch.setattr(environment.importlib.metadata, "version", breaks)
    folder, result, _ = run("--max-passes", "48")
    record = json.loads((folder / "env.json").read_text())
    assert (record["git"], record["build"], record["versions"]["timm"]) == (None, None, None)
    assert result["versions"]["torch"] == torch.__version__


def test_tensorboard_keeps_the_last_held_out_point(run, capsys):
    """Of a run that was killed after a checkpoint: flushed before it, and not hidden after it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _, _ = run("--max-passes", "216")
    (folder / "result.json").unlink()
    assert run_training("free", "imagenet", ["--resume", str(folder), "--max-passes", "432"]) == 0
    board = EventAccumulator(str(folder)).Reload()
    held_out = [line for line in log.read_log(folder / "log.jsonl") if len(line) > 8]
    steps = [line["passes"] for line in held_out if "holdout_robust_accuracy" in line]
    assert steps == [216, 432]
    assert [event.step for event in board.Scalars("holdout_robust_accuracy")] == steps


def test_a_checkpoint_is_written_after_what_it_counts(run, monkeypatch):
    flushed, real = [], log.SummaryWriter.flush

    def flush(self):
        flushed.append("flush")
        real(self)

    def save(self, state, folder, name):
        flushed.append(name)
        return real_save(self, state, folder, name)

    real_save = training.checkpoint.Saver.save
    monkeypatch.setattr(log.SummaryWriter, "flush", flush)
    monkeypatch.setattr(training.checkpoint.Saver, "save", save)
    run("--max-passes", "48", "--guard-every", "0")
    assert flushed[: flushed.index("last.pt") + 1] == ["best.pt", "flush", "last.pt"]


def test_the_result_is_that_of_the_last_weights(run, preferring):
    """With the chosen ones beside it: 4 of 6 images against 3 are chance."""
    preferring(4 / 6, 3 / 6, 3 / 6)
    folder, result, said = run()
    assert (result["best_epoch"], result["best"]["epoch"]) == (0, 0)
    assert not result["best"]["is_last"]
    assert not result["best"]["is_better"]
    assert result["exported"] == "last"
    last, best = (load_checkpoint(folder / "checkpoints" / f"{n}.pt") for n in ("last", "best"))
    assert not same(last["model"], best["model"])
    assert same(ff.load_export(folder / "export").model.state_dict(), last["model"])
    measured = ff.evaluate(folder, checkpoint="last")
    assert measured.clean_accuracy == result["clean_accuracy"]
    assert measured.robust_accuracy == result["robust_accuracy"]
    measured = ff.evaluate(folder, checkpoint="best")
    assert measured.clean_accuracy == result["best"]["clean_accuracy"]
    assert measured.robust_accuracy == result["best"]["robust_accuracy"]
    assert "the best are no better than chance explains, on 6 held-out images" in said
    assert "exported: the last weights (--export last or best)" in said
    table = said.splitlines()
    (title,) = (number for number, line in enumerate(table) if "best, of epoch 0" in line)
    assert table[title].split()[:5] == ["attack", "steps", "step", "restarts", "last"]
    attacked = [result["robust_accuracy"]["pgd-2"], result["best"]["robust_accuracy"]["pgd-2"]]
    step = result["attack_step"]
    shown = ["pgd-2", "2", step, "1", *(f"{accuracy:.1%}" for accuracy in attacked)]
    assert table[title + 3].split() == shown
    assert same(ff.load_run(folder).model.state_dict(), last["model"])


def test_the_chosen_weights_are_exported_where_asked(run, preferring):
    """The result stays the last weights'."""
    preferring(6 / 6, 0 / 6, 0 / 6)
    folder, result, said = run("--export", "best")
    assert result["best"]["is_better"]
    assert "the best are better than the last by more than chance explains" in said
    assert "exported: the best weights (--export last or best)" in said
    best = load_checkpoint(folder / "checkpoints" / "best.pt")
    assert same(ff.load_export(folder / "export").model.state_dict(), best["model"])
    assert ff.evaluate(folder, checkpoint="last").clean_accuracy == result["clean_accuracy"]


def test_the_same_weights_are_not_evaluated_twice(run, preferring, monkeypatch):
    calls, real = [], conclude.evaluate

    def evaluate(*arguments, **options):
        calls.append(options["label"])
        return real(*arguments, **options)

    monkeypatch.setattr(conclude, "evaluate", evaluate)
    preferring(3 / 6, 4 / 6)
    _, result, said = run()
    assert calls == ["validation"]
    assert (result["best_epoch"], result["best"]["is_last"]) == (1, True)
    assert result["best"]["robust_accuracy"] == result["robust_accuracy"]
    assert "the best are" not in said


def test_without_held_out_images_nothing_is_chosen(run, capsys):
    _, result, _ = run("--holdout-images", "0", "--max-passes", "48")
    assert (result["best_epoch"], result["best"]) == (-1, None)
    flags = [*FLAGS, "--holdout-images", "0", "--export", "best"]
    assert run_training("free", "imagenet", flags) == 2
    assert "--export best: no images are held out to choose them" in capsys.readouterr().err


def test_damaged_chosen_weights_do_not_take_the_result_with_them(run, monkeypatch):
    real = training.train_epochs

    def damage(run, stop):
        real(run, stop)
        (run.folder.checkpoints / "best.pt").write_bytes(b"")

    monkeypatch.setattr(training, "train_epochs", damage)
    _, result, said = run("--max-passes", "48")
    assert result["best"] is None
    assert "left out: --export best" in said


@pytest.mark.parametrize(
    ("best", "last", "num_images", "verdict"),
    [(122, 119, 400, False), (122, 85, 400, False), (122, 80, 400, True), (0, 0, 400, False)],
)
def test_better_means_beyond_chance(best, last, num_images, verdict):
    """30.5 against 29.8 % of 400 images is one image in a hundred; three errors are 9.5 points."""
    assert exceeds_chance(Count(best, num_images), Count(last, num_images)) == verdict


def test_a_finished_run_keeps_what_going_on_takes(run):
    """Neither the checkpoint before the last nor a copy of its state to rewind to."""
    folder, _, _ = run()
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["best.pt", "last.pt"]
    assert load_checkpoint(folder / "checkpoints" / "last.pt")["good"] is None
    assert run_training("free", "imagenet", ["--resume", str(folder), "--epochs", "6"]) == 0
    assert not list(folder.glob("run.lock*"))


def test_selection_measures_what_the_method_seeks():
    assert selection.score(accuracies({"pgd-10": 0.25})) == 0.25
    assert selection.score(accuracies({})) == 0.75


def accuracies(robust):
    return Evaluation(0.75, None, robust, 8, 8, 0.0)
