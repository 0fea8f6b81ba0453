"""A run that was stopped, killed or short of disk space goes on as if nothing had happened."""

import json
import os
import resource
import signal
import time
import zipfile

import pytest
import torch

from forked import run_script, start
from freeadv_fast import training
from freeadv_fast.cli import run_training
from freeadv_fast.errors import UserError
from freeadv_fast.runs.checkpoint import is_intact, load_checkpoint, newest_intact, save_checkpoint

# timm's test_resnet is a real ResNet of 0.5 M parameters: four data epochs of five minibatches, the
# last one smaller, take seconds.
FLAGS = [
    "--data", "(small_images)", "--workers", "1", "--augment", "random-resized-crop",
    "--arch", "test_resnet", "--image-size", "16", "--batch-size", "24",
    "--epochs", "8", "--m", "2", "--eps", "8/255", "--holdout-images", "6", "--eval-images", "8",
    "--eval-attacks", "pgd-2", "--log-every", "2", "--bn-group", "16",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _images(small_images):
    """FLAGS train on the small image folder."""
    FLAGS[1] = str(small_images)


def run(folder, *flags):
    """Trains in this process and returns the exit status."""
    return run_training("free", "imagenet", [*FLAGS, "--output-dir", str(folder), *flags])


def final_state(folder):
    """What a run ended with."""
    return load_checkpoint(folder / "checkpoints" / "last.pt")


def assert_same_run(resumed, straight):
    """Weights, statistics, optimizer, delta and log are bit for bit the same."""
    ours, theirs = final_state(resumed), final_state(straight)
    assert ours["model"].keys() == theirs["model"].keys()
    for name, value in theirs["model"].items():
        assert torch.equal(ours["model"][name], value), name
    for a, b in zip(
        ours["learner"]["optimizer"]["state"].values(),
        theirs["learner"]["optimizer"]["state"].values(),
        strict=True,
    ):
        assert torch.equal(a["momentum_buffer"], b["momentum_buffer"])
    assert torch.equal(ours["ranks"][0]["method"]["delta"], theirs["ranks"][0]["method"]["delta"])
    assert ours["ranks"][0]["method"]["delta"].any()

    def lines(folder):
        text = (folder / "log.jsonl").read_text()
        return [
            {k: v for k, v in json.loads(line).items() if k != "passes_per_second"}
            for line in text.splitlines()
        ]

    assert lines(resumed) == lines(straight)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    torch.set_num_threads(1)
    assert run(folder) == 0
    return folder


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_stopped_run_resumes_bit_for_bit(straight, tmp_path, monkeypatch, capsys, signum):
    """Stopped at every seventh minibatch, in either epoch, and continued until it is done."""
    real = training.obey_requests
    calls = []

    def interrupt(run, stop):
        calls.append(None)
        if len(calls) % 7 == 0:
            os.kill(os.getpid(), signum)
        real(run, stop)

    monkeypatch.setattr(training, "obey_requests", interrupt)
    folder = tmp_path / "run"
    status, sessions = run(folder), 1
    while status != 0:
        assert status == 128 + signum
        assert not (folder / "result.json").exists()
        status, sessions = run(folder, "--resume"), sessions + 1
    assert sessions == 3  # twenty minibatches
    assert "everything is saved, continue with --resume" in capsys.readouterr().err
    assert_same_run(folder, straight)
    ours = json.loads((folder / "result.json").read_text())
    theirs = json.loads((straight / "result.json").read_text())
    for key in ("passes", "clean_accuracy", "robust_accuracy"):
        assert ours[key] == theirs[key]


@pytest.mark.slow
def test_a_run_killed_at_several_points_resumes_bit_for_bit(straight, repository, tmp_path):
    """kill -9, twice, wherever it happens to be; seconds of all sessions add up."""
    folder, script = tmp_path / "run", repository / "launch" / "imagenet_free.py"
    words = [script, *FLAGS, "--output-dir", folder, "--checkpoint-every", "0", "--resume"]
    log, seconds = folder / "log.jsonl", []
    for lines_before_kill in (2, 5):
        process = start(*words, output=tmp_path / "output")
        deadline = time.monotonic() + 120
        while not (log.exists() and log.read_bytes().count(b"\n") >= lines_before_kill):
            assert process.exitcode is None, "finished before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.join()
        path = newest_intact(folder / "checkpoints")
        seconds.append(load_checkpoint(path)["progress"]["train_seconds"])
    assert run_script(*words, output=tmp_path / "output").returncode == 0
    seconds.append(json.loads((folder / "result.json").read_text())["train_seconds"])
    assert 0 < seconds[0] < seconds[1] < seconds[2]
    assert_same_run(folder, straight)


def test_a_finished_run_is_left_alone(straight, capsys):
    """--resume on a finished run says so and exits 0."""
    before = (straight / "checkpoints" / "last.pt").stat().st_mtime_ns
    assert run(straight, "--resume") == 0
    assert "is finished" in capsys.readouterr().out
    assert (straight / "checkpoints" / "last.pt").stat().st_mtime_ns == before


def test_a_used_folder_is_refused(straight, capsys):
    """Another run is never written over."""
    assert run(straight) == 2
    assert "holds another run; add --resume" in capsys.readouterr().err


def test_a_resumed_run_must_be_the_same_run(straight, tmp_path, capsys):
    """Another architecture, another eps: the line names the flag and both values."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    save_checkpoint(final_state(straight), folder / "checkpoints")
    assert run(folder, "--resume", "--arch", "resnet18") == 2
    error = capsys.readouterr().err
    assert "--arch resnet18" in error
    assert "--arch test_resnet" in error
    assert run(folder, "--resume", "--eps", "4/255") == 2
    assert "--eps 8/255" in capsys.readouterr().err


def test_a_resume_on_another_machine_warns(tmp_path, capsys):
    """Bit-identical means the same versions and threads; env.json knows those of before."""
    folder = tmp_path / "run"
    assert run(folder, "--max-passes", "96") == 0
    (folder / "result.json").unlink()
    environment = json.loads((folder / "env.json").read_text())
    environment["threads"] += 7
    (folder / "env.json").write_text(json.dumps(environment))
    capsys.readouterr()
    assert run(folder, "--resume", "--max-passes", "144") == 0
    assert "warning: threads changed since the checkpoint" in capsys.readouterr().out


def test_a_damaged_checkpoint_falls_back_to_the_one_before(straight, tmp_path, capsys):
    """A flipped byte is noticed; previous.pt takes over; with both damaged one line says so."""
    folder = tmp_path / "run"
    checkpoints = folder / "checkpoints"
    state = final_state(straight)
    save_checkpoint(state, checkpoints)
    save_checkpoint(state, checkpoints)
    damaged = bytearray((checkpoints / "last.pt").read_bytes())
    with zipfile.ZipFile(checkpoints / "last.pt") as archive:  # between its entries lies padding
        entry = archive.read(max(archive.infolist(), key=lambda info: info.file_size))
    damaged[damaged.index(entry) + len(entry) // 2] ^= 0xFF
    (checkpoints / "last.pt").write_bytes(damaged)
    assert not is_intact(checkpoints / "last.pt")
    assert newest_intact(checkpoints) == checkpoints / "previous.pt"
    assert run(folder, "--resume") == 0
    assert "the damaged last.pt is kept as damaged.pt" in capsys.readouterr().out
    assert (checkpoints / "damaged.pt").read_bytes() == damaged

    other = tmp_path / "other"
    (other / "checkpoints").mkdir(parents=True)
    (other / "checkpoints" / "last.pt").write_bytes(damaged[: len(damaged) // 3])
    assert run(other, "--resume") == 2
    assert "is damaged and there is no older one" in capsys.readouterr().err


def test_resume_without_a_checkpoint_starts_from_the_beginning(tmp_path, capsys):
    """With a line saying so."""
    assert run(tmp_path / "run", "--resume", "--max-passes", "48") == 0
    assert "no checkpoint in" in capsys.readouterr().out


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path):
    """A file-size limit in a child process stands for the full disk."""
    folder = tmp_path / "run"
    assert run(folder, "--max-passes", "240") == 0
    (folder / "result.json").unlink()
    before = (folder / "checkpoints" / "last.pt").read_bytes()
    limit = len(before) // 2
    script = tmp_path / "limited.py"
    script.write_text(
        "import resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {resource.RLIM_INFINITY}))\n"
        "from freeadv_fast.cli import run_training\n"
        "sys.exit(run_training('free', 'imagenet', sys.argv[1:]))"
    )
    more = ["--resume", str(folder), "--max-passes", "480"]
    done = run_script(script, *more, output=tmp_path / "output")
    assert done.returncode == 2, done.stderr
    assert "cannot save" in done.stderr
    assert "Traceback" not in done.stderr
    assert (folder / "checkpoints" / "last.pt").read_bytes() == before
    assert run_training("free", "imagenet", more) == 0  # space again


def test_a_nonfinite_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path, capsys):
    """A learning rate of 1e30: one clear line, and no checkpoint of broken weights."""
    folder = tmp_path / "run"
    assert run(folder, "--lr", "1e30", "--checkpoint-every", "0") == 2
    error = capsys.readouterr().err
    assert "non-finite" in error
    assert "lower --lr" in error
    path = newest_intact(folder / "checkpoints")
    if path is not None:
        weights = load_checkpoint(path)["model"].values()
        assert all(torch.isfinite(w).all() for w in weights)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_weights_to_start_from_must_be_weights(tmp_path, content, capsys):
    """--init-from with a damaged file, or weights of another network."""
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    assert run(tmp_path / "run", "--init-from", str(path)) == 2
    assert f"--init-from {path}: damaged or not a checkpoint" in capsys.readouterr().err
    torch.save({"conv1.weight": torch.zeros(1)}, path)
    assert run(tmp_path / "run", "--init-from", str(path)) == 2
    assert "belongs to another network" in capsys.readouterr().err
    torch.save({"model": 7}, path)
    assert run(tmp_path / "run", "--init-from", str(path)) == 2
    assert "holds no weights" in capsys.readouterr().err


def test_unwritable_state_is_a_user_error(tmp_path):
    """The message names the flag; nothing half-written stays."""
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(UserError, match="--output-dir"):
        save_checkpoint({"model": {}}, blocked / "checkpoints")
