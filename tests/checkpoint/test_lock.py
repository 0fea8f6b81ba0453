"""One process at a time in a run's folder; a lock dies with its owner."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from freeadv_fast import training
from freeadv_fast.cli import run_training
from freeadv_fast.errors import UserError
from freeadv_fast.runs import lock
from freeadv_fast.runs.lock import NAME, FolderLock, started_at, whoami

HOLD = """
import sys, time
from pathlib import Path
from freeadv_fast.runs.lock import FolderLock
FolderLock(Path(sys.argv[1])).take()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def quick(monkeypatch):
    """Hearts that beat fast, and little patience."""
    monkeypatch.setattr(lock, "SECONDS_BETWEEN_BEATS", 0.05)
    monkeypatch.setattr(lock, "SECONDS_OF_PATIENCE", 0.5)


def elsewhere(folder, **changes):
    """Writes the lock of a process on another machine."""
    owner = whoami() | {"host": "n12", "pid": 4711, "place": ["another boot", "pid:[1]"]} | changes
    (folder / NAME).write_text(json.dumps(owner))


def test_a_second_process_is_refused_by_name(tmp_path, holder):
    with pytest.raises(UserError) as caught:
        FolderLock(tmp_path).take()
    line = str(caught.value)
    assert line.startswith(f"--output-dir {tmp_path}: in use by process {holder.pid} on ")
    assert "since 20" in line
    assert "\n" not in line
    assert json.loads((tmp_path / NAME).read_text())["pid"] == holder.pid


def test_a_lock_dies_with_its_owner(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    own = FolderLock(tmp_path)
    assert f"the lock of process {holder.pid} on " in own.take()
    assert own.take() is None
    own.release()
    assert list(tmp_path.iterdir()) == []


def test_another_process_with_the_same_number_is_not_the_owner(tmp_path):
    """Numbers come again; the start tells."""
    (tmp_path / NAME).write_text(json.dumps(whoami() | {"started": started_at(os.getpid()) - 1}))
    assert "that process is gone" in FolderLock(tmp_path).take()


def test_a_lock_of_another_machine_is_alive_while_its_heart_beats(tmp_path, quick, capsys):
    elsewhere(tmp_path)
    done = threading.Event()

    def beat():
        while not done.wait(0.05):
            os.utime(tmp_path / NAME)

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        with pytest.raises(UserError, match="in use by process 4711 on n12"):
            FolderLock(tmp_path).take()
    finally:
        done.set()
        heart.join()
    assert "waiting up to " in capsys.readouterr().out
    assert "process 4711 on n12" in FolderLock(tmp_path).take()


def test_a_long_dead_lock_of_another_machine_is_not_waited_for(tmp_path, capsys):
    elsewhere(tmp_path)
    os.utime(tmp_path / NAME, (time.time() - 3600,) * 2)
    started = time.monotonic()
    assert FolderLock(tmp_path).take()
    assert time.monotonic() - started < 1
    assert capsys.readouterr().out == ""


def test_the_heart_beats_while_a_lock_is_held(tmp_path, quick):
    own = FolderLock(tmp_path)
    own.take()
    os.utime(tmp_path / NAME, (0, 0))
    deadline = time.monotonic() + 5
    while (tmp_path / NAME).stat().st_mtime == 0:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    own.release()


@pytest.mark.parametrize("text", ["", "not JSON", "[]"])
def test_a_damaged_lock_is_one_of_nobody(tmp_path, quick, text):
    (tmp_path / NAME).write_text(text)
    assert "process unknown on unknown" in FolderLock(tmp_path).take()


def test_a_process_that_stood_still_writes_nothing_more(tmp_path):
    """Stopped for longer than the patience, and replaced meanwhile."""
    own = FolderLock(tmp_path)
    own.take()
    own.refuse_if_lost()
    elsewhere(tmp_path)
    with pytest.raises(UserError, match="taken over by process 4711 on n12"):
        own.refuse_if_lost()
    own.release()
    assert json.loads((tmp_path / NAME).read_text())["pid"] == 4711


def test_many_at_once_take_it_once(tmp_path):
    """Each replaces the same dead owner."""
    (tmp_path / NAME).write_text(json.dumps(whoami() | {"pid": 2**22 + 1}))
    code = HOLD.replace("time.sleep(600)", "sys.stdin.read()")
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(command, **pipes, text=True) for _ in range(4)]
    lines = [process.stdout.readline() for process in processes]
    for process in processes:
        process.communicate()
    assert lines.count("held\n") == 1


def test_an_unwritable_folder_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="--output-dir .*nowhere: No such file or directory"):
        FolderLock(tmp_path / "nowhere").take()


FLAGS = [
    "--workers", "0", "--augment", "random-resized-crop", "--arch", "test_resnet", "--m", "2",
    "--image-size", "16", "--batch-size", "24", "--epochs", "4", "--eps", "8/255",
    "--holdout-images", "6", "--eval-images", "8", "--eval-attacks", "pgd-2",
]  # fmt: skip


def test_a_requeued_run_does_not_train_beside_the_first(
    small_images, tmp_path, capsys, monkeypatch
):
    """It is refused before it touches a file; the first one's lock goes with its end."""
    folder = tmp_path / "run"
    command = [*FLAGS, "--data", str(small_images), "--output-dir", str(folder)]
    second, real = [], training.train_epochs

    def train_epochs(run, stop):
        assert (folder / NAME).exists()
        before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
        second.append(run_training("free", "imagenet", ["--resume", str(folder)]))
        assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before
        real(run, stop)

    monkeypatch.setattr(training, "train_epochs", train_epochs)
    torch.set_num_threads(1)
    assert run_training("free", "imagenet", command) == 0
    assert second == [2]
    assert f"in use by process {os.getpid()} on " in capsys.readouterr().err
    assert not (folder / NAME).exists()
    shutil.copy(folder / "config.yaml", folder / NAME)  # a finished run needs no lock
    assert run_training("free", "imagenet", ["--resume", str(folder)]) == 0
    assert "is finished" in capsys.readouterr().out


def test_a_run_that_fails_gives_its_folder_back(small_images, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    command = [*FLAGS, "--data", str(small_images), "--output-dir", str(folder), "--lr", "1e30"]
    assert run_training("free", "imagenet", command) == 2
    assert (folder / "log.jsonl").exists()
    assert not list(folder.glob(f"*{NAME}*"))
