"""Whatever a decoding process dies of ends the run with a line, and soon."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import queue
import re
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from freeadv_fast.data import waiting, workers
from freeadv_fast.data.build import build_loaders
from freeadv_fast.data.folder_torchvision import TorchvisionDecoder
from freeadv_fast.data.waiting import next_item
from freeadv_fast.errors import UserError

SOON = 20.0


@pytest.fixture
def train(use_backend, build_tree, config, world_of):
    """The training images through two worker processes."""
    use_backend("torchvision")
    return build_loaders(config(build_tree(), workers=2), world_of()).train


@pytest.fixture
def at_the_fifth_image(monkeypatch):
    """Lets a worker do something in place of decoding its fifth image."""

    def do(deed):
        decode = TorchvisionDecoder._square
        seen = []

        def decode_or_not(decoder, path, plan, slot):
            seen.append(path)
            return deed() if len(seen) == 5 else decode(decoder, path, plan, slot)

        monkeypatch.setattr(TorchvisionDecoder, "_square", decode_or_not)

    return do


def die_of(signum):
    def die():
        faulthandler.disable()  # pytest's, which would print what we expect
        os.kill(os.getpid(), signum)

    return die


def raise_memory_error():
    raise MemoryError


def raise_unpicklable():
    raise RuntimeError("held open", open(os.devnull)) from None


DEEDS = {
    "killed for want of memory": (
        die_of(signal.SIGKILL),
        r"--workers: a process .* was killed by SIGKILL at .*/\d+\.JPEG; .*--resume",
    ),
    "crashed in a decoder": (
        die_of(signal.SIGSEGV),
        r"--workers: a process .* was killed by SIGSEGV at .*\.JPEG",
    ),
    "wrote to memory that is not there": (
        die_of(signal.SIGBUS),
        r"--workers: a process .* was killed by SIGBUS at",
    ),
    "ended": (lambda: os._exit(7), r"--workers: a process .* ended with status 7 at"),
    "ended politely": (lambda: sys.exit(3), r"--workers: a process .* ended with status 3 at"),
    "out of memory": (raise_memory_error, r"\.JPEG cannot be decoded \(MemoryError\)"),
    "failed at what cannot be sent": (raise_unpicklable, r"\.JPEG cannot be decoded \("),
}


@pytest.mark.parametrize("name", DEEDS)
def test_what_a_worker_dies_of_is_one_line(name, train, at_the_fifth_image):
    deed, line = DEEDS[name]
    at_the_fifth_image(deed)
    started = time.monotonic()
    with pytest.raises(UserError, match=line) as error:
        list(train.epoch(0))
    assert time.monotonic() - started < SOON
    assert "\n" not in str(error.value)
    assert not multiprocessing.active_children()


def test_a_worker_killed_while_idle_is_noticed(train):
    batches = train.epoch(0)
    next(batches)
    victim = multiprocessing.active_children()[0]
    os.kill(victim.pid, signal.SIGKILL)
    with pytest.raises(UserError, match="was killed by SIGKILL"):
        list(batches)


def test_no_worker_outlives_its_epoch(train):
    assert len(list(train.epoch(0))) == 7
    assert not multiprocessing.active_children()
    begun = train.epoch(0)
    next(begun)
    assert len(multiprocessing.active_children()) == 2
    del begun
    gc.collect()
    assert not multiprocessing.active_children()


def test_without_a_further_process_one_line_says_so(train, monkeypatch):
    def refuse(process):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(multiprocessing.context.ForkProcess, "start", refuse)
    with pytest.raises(UserError, match=r"--workers 2: .*temporarily unavailable.*or 0 for none"):
        list(train.epoch(0))


def test_without_a_further_open_file_one_line_says_so(train):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 2, hard))
    try:
        with pytest.raises(UserError, match=r"--workers 2: .*Too many open files"):
            list(train.epoch(0))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


ON_LITTLE_SHARED_MEMORY = """
import sys, torch
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.data import build
from freeadv_fast.distributed.world import World
build.available_backend = lambda: "torchvision"
config = TrainConfig(data=sys.argv[1], image_size=32, batch_size=5, workers=2, holdout_images=0)
train = build.build_loaders(config, World(0, 1, torch.device("cpu"))).train
print(sum(len(batch.images) for batch in train.epoch(0)))
"""


def test_a_full_dev_shm_does_not_matter(build_tree):
    """Docker's has 64 MB; here it has 4 kB: in a mount namespace of its own."""
    script = 'mount -t tmpfs -o size=4k tmpfs /dev/shm && exec "$@"'
    within = ["unshare", "-m", "sh", "-c", script, "sh"]
    if subprocess.run([*within, "true"], capture_output=True).returncode:
        pytest.skip("no right to mount")
    command = [*within, sys.executable, "-c", ON_LITTLE_SHARED_MEMORY, build_tree()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.split()[-1:] == ["35"], done.stderr


WAITING = """
import os, signal, sys, torch
from freeadv_fast.cli.run import guard
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.data import build, prefetch, waiting
from freeadv_fast.data.folder_torchvision import TorchvisionDecoder
from freeadv_fast.distributed.world import World
from freeadv_fast.session.signals import StopRequests

def stop_for_ever(decoder, path, plan, slot):
    print("stopped", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)

build.available_backend = lambda: "torchvision"
waiting.GRACE_SECONDS, prefetch.JOIN_SECONDS = 1.0, 0.1
TorchvisionDecoder._square = stop_for_ever
config = TrainConfig(data=sys.argv[1], image_size=32, batch_size=5, workers=1, holdout_images=0)
train = build.build_loaders(config, World(0, 1, torch.device("cpu"))).train

def work():
    with StopRequests():
        next(train.epoch(0))

raise SystemExit(guard(work))
"""


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_waits_for_ever_hears_signals(asked, build_tree):
    """A worker that is stopped is like a file server that does not answer."""
    command = [sys.executable, "-c", WAITING, build_tree()]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            while process.stdout.readline() != "stopped\n":
                assert process.poll() is None
            process.send_signal(asked)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 2
    assert f"error: {asked.name} came, and no minibatch in 1 s" in errors.splitlines()[-1]


def test_a_second_ctrl_c_leaves_at_once(monkeypatch):
    """The handlers that were there go on working."""
    heard = []

    def leave_at_the_second(signum, frame):
        heard.append(signum)
        if len(heard) == 2:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, leave_at_the_second)
    try:
        for delay in (0.3, 0.6):
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            next_item(queue.SimpleQueue())
        assert signal.getsignal(signal.SIGINT) is leave_at_the_second
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_leaves_time_for_the_minibatch(monkeypatch):
    """It is then obeyed at the minibatch's end, where everything can be saved."""
    before = signal.signal(signal.SIGTERM, lambda signum, frame: None)
    items = queue.SimpleQueue()
    try:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        threading.Timer(1.0, items.put, ("a minibatch",)).start()
        assert next_item(items) == "a minibatch"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_silence_ends_as_well(monkeypatch):
    monkeypatch.setattr(waiting, "SILENT_SECONDS", 0.6)
    with pytest.raises(UserError, match="--data: no minibatch for .* minutes; .*--resume"):
        next_item(queue.SimpleQueue())


def test_a_worker_ends_when_its_trainer_is_gone(build_tree, tmp_path):
    """kill -9 of the trainer leaves nothing behind."""
    code = ON_LITTLE_SHARED_MEMORY.replace(
        "print(sum(",
        "import multiprocessing, os\n"
        "next(train.epoch(0)); begun = train.epoch(0); next(begun)\n"
        "print(*[child.pid for child in multiprocessing.active_children()], flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
        "print(sum(",
    )
    done = subprocess.run(
        [sys.executable, "-c", code, build_tree()], capture_output=True, text=True, timeout=120
    )
    children = [int(pid) for pid in done.stdout.split()[-2:]]
    assert len(children) == 2, done.stderr
    deadline = time.monotonic() + SOON
    while any(os.path.exists(f"/proc/{pid}") and alive(pid) for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def alive(pid):
    """Whether a process is more than an entry that nobody has asked for."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_minibatches_are_not_overwritten(train):
    """Four minibatches share two pieces of memory a worker; what is handed out is a copy."""
    kept = list(train.epoch(0))
    for batch, again in zip(kept, train.epoch(0), strict=True):
        assert torch.equal(batch.images, again.images)
    assert workers.DEPTH * 2 < len(kept)


@pytest.fixture
def stopped_at_the_fifth_image(at_the_fifth_image, monkeypatch):
    """Workers that are alive and silent, and little patience with them."""
    at_the_fifth_image(lambda: os.kill(os.getpid(), signal.SIGSTOP))
    monkeypatch.setattr(workers, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(workers, "SLOW_SECONDS", 0.5)
    monkeypatch.setattr(workers, "SILENT_SECONDS", 2.0)


@pytest.mark.usefixtures("stopped_at_the_fifth_image")
def test_a_silent_worker_is_named_with_its_file_and_ends_the_run_later(train, capsys):
    with pytest.raises(UserError) as error:
        list(train.epoch(0))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "has been at" in line]
    said = re.fullmatch(r"process (\d+) has been at (\S+\.JPEG) for \d s: .*", line)
    assert said, line
    assert str(error.value).startswith(f"--data: {said[2]} was not read in ")
    assert f"process {said[1]}, which decodes it" in str(error.value)


def test_a_slow_worker_that_goes_on_is_waited_for(train, monkeypatch, capsys):
    """Its minibatch takes longer than the silence that ends a run, its files do not."""
    decode = TorchvisionDecoder._square

    def decode_slowly(decoder, path, plan, slot):
        time.sleep(0.5)
        return decode(decoder, path, plan, slot)

    monkeypatch.setattr(TorchvisionDecoder, "_square", decode_slowly)
    monkeypatch.setattr(workers, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(workers, "SILENT_SECONDS", 2.0)
    assert len(next(train.epoch(0)).images) == 5
    assert "has been at" not in capsys.readouterr().out


def test_a_long_wait_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr(waiting, "SLOW_SECONDS", 0.1)
    monkeypatch.setattr(waiting, "SILENT_SECONDS", 1.2)
    with pytest.raises(UserError):
        next_item(queue.SimpleQueue())
    assert capsys.readouterr().out.count("no minibatch for 0 s: waiting for its disk") == 1
