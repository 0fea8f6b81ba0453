"""The exchange between ranks: a permutation of all rows that anyone can reconstruct."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from forked import run_ranks
from freeadv_fast import ops
from freeadv_fast.distributed import shuffle
from freeadv_fast.distributed.world import World
from freeadv_fast.runs.environment import build_info

WORKER = Path(__file__).with_name("shuffle_worker.py")
spec = importlib.util.spec_from_file_location("shuffle_worker", WORKER)
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)


def call_worker(num_ranks, task, output):
    """What every rank saved; a rank that left saves nothing."""
    done = run_ranks(num_ranks, WORKER, task, output, output=output / "output")
    assert done.returncode == 0, done.stderr
    return [torch.load(path, weights_only=True) for path in sorted(output.glob("rank*.pt"))]


@pytest.fixture(scope="module", params=[1, 2, 4], ids="{} ranks".format)
def ranks(request, tmp_path_factory):
    """All cases on 1, 2 and 4 ranks, one launch each."""
    found = call_worker(request.param, "cases", tmp_path_factory.mktemp("shuffle"))
    assert len(found) == request.param
    return found


def gathered(ranks, case, step, key):
    """Images and labels of all ranks end to end."""
    parts = [state["cases"][case, step][key] for state in ranks]
    return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


@pytest.mark.parametrize("case", worker.CASES)
def test_the_rows_arrive_where_seed_and_step_say(ranks, case):
    """The op against a reconstruction in numpy that saw none of the data."""
    counts = worker.CASES[case][0](len(ranks))
    orders = []
    for step in (0, 1):
        images, labels = gathered(ranks, case, step, "rows")
        arrived, arrived_labels = gathered(ranks, case, step, "arrived")
        sources = shuffle.global_permutation(counts, seed=worker.SEED, step=step)
        assert sorted(arrived_labels.tolist()) == list(range(sum(counts)))
        assert arrived_labels.tolist() == sources.tolist()
        assert arrived.dtype is images.dtype
        assert torch.equal(arrived, images[arrived_labels])
        orders.append(arrived_labels.tolist())
    if sum(counts) >= 8:
        assert orders[0] != orders[1]


@pytest.mark.parametrize("case", worker.CASES)
def test_every_rank_keeps_its_number_of_rows_and_gets_them_back(ranks, case):
    for state in ranks:
        for step in (0, 1):
            found = state["cases"][case, step]
            for sent, arrived, back in zip(
                found["rows"], found["arrived"], found["back"], strict=True
            ):
                assert arrived.shape == sent.shape
                assert torch.equal(back, sent)


@pytest.mark.parametrize("case", worker.CASES)
def test_compiled_and_eager_agree_bit_for_bit(ranks, case):
    if ranks[0]["backend"] != "compiled":
        pytest.skip("freeadv_fast._C was not built here")
    for state in ranks:
        for step in (0, 1):
            found = state["cases"][case, step]
            for ours, eager in (("arrived", "eager"), ("back", "eager_back")):
                assert all(map(torch.equal, found[ours], found[eager]))


@pytest.mark.parametrize("case", ["uint8", "float16", "indivisible", "fewer rows than ranks"])
def test_an_exchange_in_an_order_drawn_before_is_the_same(ranks, case):
    """A recording's: the update is in a tensor, and nothing else of it differs."""
    for state in ranks:
        for step in (0, 1):
            found = state["cases"][case, step]
            assert all(map(torch.equal, found["in_order"], found["arrived"]))


@pytest.mark.parametrize("case", ["uint8", "float16", "odd row bytes", "ragged", "an empty rank"])
def test_targets_travel_with_their_images_bit_for_bit(ranks, case):
    """A detector's targets are float32 of any bits; equal as int32, for NaN equals nothing."""
    found = [state["targets"][case] for state in ranks]
    counts = worker.CASES[case][0](len(ranks))
    sources = torch.from_numpy(shuffle.global_permutation(counts, seed=worker.SEED, step=3))
    for part, bits in ((0, lambda images: images), (1, lambda targets: targets.view(torch.int32))):
        sent = torch.cat([state["rows"][part] for state in found])
        for name, expected in (("arrived", sent[sources]), ("in_order", sent[sources]),
                               ("back", sent)):  # fmt: skip
            if name in found[0]:
                arrived = torch.cat([state[name][part] for state in found])
                assert arrived.dtype is sent.dtype
                assert torch.equal(bits(arrived), bits(expected))
    for rank, (state, count) in enumerate(zip(found, counts, strict=True)):
        assert state["arrived"][1].shape == (count, 3, 5)
        leaving = count - shuffle.rows_sent(counts, rank, rank)
        image_bytes = state["rows"][0][0].nbytes if count else 0
        assert state["bytes_sent"] == leaving * (image_bytes + 60)


def test_a_quarter_of_the_rows_come_from_each_of_four_ranks(ranks):
    if len(ranks) != 4:
        pytest.skip("one number of ranks is enough")
    for state in ranks:
        _, labels = state["cases"]["uint8", 0]["arrived"]
        assert torch.bincount(labels // 16).tolist() == [4, 4, 4, 4]


@pytest.mark.parametrize("case", ["uint8", "float16", "odd row bytes"])
def test_no_more_bytes_leave_a_rank_than_its_share(ranks, case):
    """(W-1)/W of its images and labels."""
    for state in ranks:
        found = state["cases"][case, 0]
        total = sum(part.numel() * part.element_size() for part in found["rows"])
        assert found["bytes_sent"] == total * (len(ranks) - 1) // len(ranks)


def test_the_gradient_is_that_of_the_permutation_matrix(ranks):
    """First and second order, on ranks of different sizes."""
    counts = [6 + rank for rank in range(len(ranks))]
    images = torch.cat([state["gradient"]["images"] for state in ranks]).requires_grad_()
    sources = shuffle.global_permutation(counts, seed=worker.SEED, step=5)
    matrix = torch.eye(sum(counts), dtype=torch.float64)[torch.from_numpy(sources)]
    weights = 1.0 + torch.from_numpy(sources).unsqueeze(1)
    loss = (weights * (matrix @ images) ** 3).sum()
    (gradient,) = torch.autograd.grad(loss, images, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), images)
    for name, expected in (("gradient", gradient), ("second", second)):
        found = torch.cat([state["gradient"][name] for state in ranks])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("how", ["dies", "sleeps"])
def test_a_lost_peer_is_named_in_seconds(tmp_path, how):
    """The ranks that are left say where they stand, within the 2 s that the worker allows."""
    left = call_worker(2, how, tmp_path)
    assert len(left) == 1
    assert left[0]["told"].startswith("rank 0, step 42: ")
    assert "within 2 s" in left[0]["told"]
    assert "--resume" in left[0]["told"]
    assert "\n" not in left[0]["told"]
    assert left[0]["seconds"] < 5


def test_the_compiled_exchange_covers_the_devices_it_was_built_for():
    """CUDA sources compiled and linked: the op has a kernel for the device."""
    if ops.exchange_backend("cpu") != "compiled":
        pytest.skip("freeadv_fast._C was not built here")
    has_cuda = build_info()["cuda"] is not None
    assert ops.exchange_backend("cuda") == ("compiled" if has_cuda else "eager")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["none", "nccl", "gloo"])
@pytest.mark.parametrize("shape", [(224, 224, 3), (31, 31, 3)], ids=["words", "bytes"])
def test_a_gpu_gives_the_reference_result(backend, shape, tmp_path):
    """Pack, all-to-all and unpack kernels on the exchange's stream, 300 rows."""
    device = torch.device("cuda", 0)
    if backend != "none" and ops.exchange_backend("cuda") != "compiled":
        pytest.skip("freeadv_fast._C was not built with CUDA here")
    images = torch.randint(0, 256, (300, *shape), dtype=torch.uint8)
    labels = torch.arange(300)
    sources = torch.from_numpy(shuffle.global_permutation([300], seed=1, step=2))
    try:
        if backend == "none":
            found = World(0, 1, device).shuffle(images.cuda(), labels.cuda(), seed=1, step=2)
        else:
            store = dist.FileStore(str(tmp_path / "store"), 1)
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
            # On one rank nothing would be sent: the op itself is called, as ops does on several.
            found = torch.ops.freeadv_fast.shuffle_exchange(
                images.cuda(), labels.cuda(), dist.group.WORLD.group_name, [300], [300],
                0, 1, 2, False, 60_000,
            )  # fmt: skip
        arrived, arrived_labels = found.wait()
        assert torch.equal(arrived.cpu(), images[sources])
        assert torch.equal(arrived_labels.cpu(), sources)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
