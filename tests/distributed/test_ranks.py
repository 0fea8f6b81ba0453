"""Two ranks against one, in fp64 over gloo."""

import importlib.util
import signal
import time
from pathlib import Path

import pytest
import torch

from forked import finish, run_ranks, start_ranks
from freeadv_fast.distributed.world import join_world
from freeadv_fast.errors import UserError
from freeadv_fast.models.batch_norm import apply_bn_groups
from freeadv_fast.step.warm_start import WarmStart

WORKER = Path(__file__).with_name("free_worker.py")
RANK_BATCH = 4


def load_worker():
    """The worker's own builder, so that both sides build the same thing."""
    spec = importlib.util.spec_from_file_location("free_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def minibatches(sizes):
    """Fixed minibatches, extremes of the pixel range common in them."""
    generator = torch.Generator().manual_seed(5)
    for size in sizes:
        images = torch.randint(-60, 316, (size, 8, 8, 3), generator=generator)
        labels = torch.randint(0, 5, (size,), generator=generator)
        yield images.clamp(0, 255).to(torch.uint8), labels


def train_alone(network, batches):
    """One rank, twice the batch, batch-norm groups of one rank's batch.

    Delta is laid out as the two ranks' buffers end to end, so a smaller minibatch reads and writes
    the first rows of each half, as the two ranks do.
    """
    apply_bn_groups(network, RANK_BATCH)
    free = load_worker().build_free(network, 1, 2 * RANK_BATCH)
    for images, labels in batches:
        share = len(images) // 2
        rows = torch.cat([torch.arange(share), RANK_BATCH + torch.arange(share)])
        whole, free.carried = free.carried, WarmStart(free.delta[rows])
        free.train_minibatch(images, labels, len(images))
        whole.delta[rows] = free.delta
        free.carried = whole
    return free.delta


@pytest.mark.parametrize("sizes", [(8, 8), (8, 6, 8)], ids=["full", "smaller"])
def test_two_ranks_equal_one_rank_of_twice_the_batch(small_network, tmp_path, sizes):
    """Weights to 1e-9, delta exactly, also with a smaller minibatch in between."""
    batches = list(minibatches(sizes))
    network = small_network(torch.float64)
    fixture = tmp_path / "fixture.pt"
    torch.save({"network": network, "minibatches": batches, "rank_batch": RANK_BATCH}, fixture)
    done = run_ranks(2, WORKER, fixture, tmp_path, output=tmp_path / "output")
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1)]

    delta = train_alone(network, batches)
    assert torch.equal(torch.cat([ranks[0]["delta"], ranks[1]["delta"]]), delta)
    assert not torch.equal(ranks[0]["delta"], ranks[1]["delta"])
    for name, parameter in network.named_parameters():
        for state in ranks:
            torch.testing.assert_close(
                state["network"][name], parameter.detach(), rtol=0, atol=1e-9, msg=name
            )
    for name, buffer in network.named_buffers():
        if buffer.is_floating_point():  # statistics: the mean over the ranks
            mean = (ranks[0]["network"][name] + ranks[1]["network"][name]) / 2
            torch.testing.assert_close(mean, buffer, rtol=0, atol=1e-9, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["free", "fast_advprop"])
def test_two_ranks_stop_and_resume_bit_for_bit(small_images, repository, tmp_path, method):
    """SIGTERM, as torchrun hands it on (test_slurm.py): every rank saves, and the run goes on."""
    own_flags = {
        "free": ["--m", 2, "--batch-size", 8],
        "fast_advprop": ["--batch-size", 10, "--p-adv", 0.4, "--aux-bn-group", 2],
    }

    def words(folder, *flags):
        return [
            repository / "launch" / f"imagenet_{method}.py", "--data", small_images,
            "--arch", "test_resnet", "--image-size", 16, "--epochs", 6, *own_flags[method],
            "--eps", "8/255", "--holdout-images", 6, "--eval-images", 8, "--workers", 1,
            "--eval-attacks", "pgd-2", "--log-every", 2, "--ema", 0.9, "--output-dir", folder,
            *flags,
        ]  # fmt: skip

    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    done = run_ranks(2, *words(straight), output=tmp_path / "straight.log")
    assert done.returncode == 0, done.stderr
    ranks, _store = start_ranks(2, *words(stopped), output=tmp_path / "stopped.log")
    log, deadline = stopped / "log.jsonl", time.monotonic() + 120
    while not (log.exists() and log.read_bytes().count(b"\n") >= 4):
        assert ranks[0].exitcode is None, "finished before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for rank in ranks:
        rank.terminate()
    assert finish(ranks, tmp_path / "stopped.log").returncode == 128 + signal.SIGTERM
    assert not (stopped / "result.json").exists()
    done = run_ranks(2, *words(stopped, "--resume"), output=tmp_path / "resumed.log")
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout
    ours, theirs = (
        torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
        for folder in (stopped, straight)
    )
    assert len(ours["ranks"]) == 2
    for name, value in theirs["model"].items():
        assert torch.equal(ours["model"][name], value), name
        average = theirs["average"]["model"][name]
        assert torch.equal(ours["average"]["model"][name], average), name
    for mine, other in zip(ours["ranks"], theirs["ranks"], strict=True):
        assert mine["method"].keys() == other["method"].keys()
        for name, value in other["method"].items():
            assert torch.equal(mine["method"][name], value), name
        assert torch.equal(mine["random"]["cpu"], other["random"]["cpu"])
        for name, value in other["average"].items():
            assert torch.equal(mine["average"][name], value), name
    assert ours["progress"]["passes"] == theirs["progress"]["passes"]


def test_a_failure_on_one_rank_reaches_all(tmp_path):
    """A file that only rank 1 reads and cannot decode: rank 0, which prints, learns its name."""
    worker = WORKER.with_name("together_worker.py")
    done = run_ranks(2, worker, tmp_path, output=tmp_path / "output")
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert (tmp_path / f"told{rank}").read_text() == (
            "['', 'no', 'rank 0', 'image 7 cannot be decoded']"
        )


def test_more_ranks_than_gpus_is_a_user_error(monkeypatch):
    """One line that names torchrun's flag and what the machine has."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="--nproc-per-node 4: more ranks than GPUs"):
        join_world()
