"""Compressed averages over ranks: the formula on every rank, whatever data parallelism does."""

import gc
import re
import subprocess
import sys
import threading
from pathlib import Path

import compress_worker as worker
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from forked import run_ranks, start_ranks
from freeadv_fast import ops
from freeadv_fast.distributed import codec
from freeadv_fast.distributed.codec import Piece, RandomStream, Stage
from freeadv_fast.distributed.compress import BucketAverage, GradientCompression, SideThread
from freeadv_fast.distributed.world import ranks_of_a_machine
from freeadv_fast.errors import UserError

WORKER = Path(worker.__file__)
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[1, 2, 4], ids="{} ranks".format)
def ranks(request, tmp_path_factory):
    """All cases on 1, 2 and 4 ranks, one launch each."""
    folder = tmp_path_factory.mktemp("compress")
    done = run_ranks(request.param, WORKER, "cases", folder, output=folder / "output")
    assert done.returncode == 0, done.stderr
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob("rank*.pt"))]


@pytest.fixture
def two_ranks(ranks):
    """The run that trained."""
    if len(ranks) != 2:
        pytest.skip("one number of ranks is enough")
    return ranks


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """Cases on 4 ranks that are told of 2 machines, in the order of ranks."""
    folder = tmp_path_factory.mktemp("machines")
    done = run_ranks(4, WORKER, "machines", folder, output=folder / "output")
    assert done.returncode == 0, done.stderr
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob("rank*.pt"))]


def average_of(gradients, kind, pieces, update, local_size=1):
    """The formula, all ranks in one process: (n,) from every rank's (n,)."""
    size, update = len(gradients), torch.tensor([update])
    num_machines = size // local_size
    layouts = [
        codec.lay_out(
            pieces, codec=kind, rank=rank, num_ranks=size, local_size=local_size, device=CPU
        )
        for rank in range(size)
    ]
    sent = torch.zeros(size, num_machines, layouts[0].num_bytes, dtype=torch.uint8)  # from, to
    means = torch.zeros(size, layouts[0].num_bytes, dtype=torch.uint8)
    for rank, layout in enumerate(layouts):
        first = rank // local_size * local_size
        own = sum(gradients[first : first + local_size]) * (1 / local_size)
        stream = RandomStream(worker.SEED, update, rank, Stage.GRADIENTS)
        codec.encode_gradients_ref(own, layout.share, stream, sent[rank].view(-1))
    for rank, layout in enumerate(layouts):
        machine, place = divmod(rank, local_size)
        stream = RandomStream(worker.SEED, update, rank, Stage.MEAN)
        received = sent[place::local_size, machine].contiguous()
        codec.encode_mean_ref(received, layout.own, stream, means[rank])
    found = torch.empty_like(gradients[0])
    codec.decode_gradients_ref(means.view(-1), layouts[0].blocks, found)
    return found


class Operations(TorchDispatchMode):
    """Notes the operations that the host calls."""

    def __init__(self):
        """Starts with none."""
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Passes every operation on."""
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def are_same_bits(first, second):
    return torch.equal(first.view(torch.int32), second.view(torch.int32))


@pytest.mark.parametrize("kind", worker.CODECS)
def test_every_rank_gets_what_the_formula_says(ranks, kind):
    gradients = [worker.make_gradients(rank) for rank in range(len(ranks))]
    expected = average_of(gradients, kind, worker.pieces(), worker.UPDATE)
    for state in ranks:
        assert are_same_bits(state["average", kind]["finite"], expected)
    exact = torch.stack(gradients).mean(0)
    assert 0 < (expected - exact).norm() < exact.norm()


@pytest.mark.parametrize("kind", worker.CODECS)
def test_what_is_not_finite_on_one_rank_is_nan_on_all(ranks, kind):
    """So the scaler of fp16 skips the update everywhere; other segments are as they were."""
    lost = ranks[0]["average", kind]["NaN"].isnan()
    assert lost[100]
    assert not lost.all()
    for state in ranks:
        found = state["average", kind]
        assert torch.equal(found["NaN"].isnan(), lost)
        assert torch.equal(found["NaN"][~lost], found["finite"][~lost])


@pytest.mark.parametrize("kind", worker.CODECS)
def test_bytes_that_leave_a_rank_are_counted(ranks, kind):
    """2 (n - 1) messages, which the blocks of the fullest owner decide."""
    size, longest = len(ranks), 0
    numbers = codec.number_blocks(worker.SIZES)
    for owner in range(size):
        num_bytes = 0
        for first, count in zip(numbers, worker.SIZES, strict=True):
            lengths = [min(512, count - 512 * block) for block in range(-(-count // 512))]
            own = [n for block, n in enumerate(lengths, first) if block % size == owner]
            num_scales = len(own) if kind == "bucket" else int(bool(own))
            num_bytes += sum(-(-n // 4) * 4 for n in own) + 4 * num_scales
        longest = max(longest, num_bytes)
    for state in ranks:
        assert state["average", kind]["bytes_sent"] == 2 * (size - 1) * longest


@pytest.mark.parametrize("kind", worker.CODECS)
def test_data_parallelism_trains_with_the_average_of_the_formula(two_ranks, kind):
    runs = [state["train", kind] for state in two_ranks]
    sizes = [len(gradient) for gradient in runs[0]["own"][0]]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    pieces = list(map(Piece, codec.number_blocks(sizes), starts, sizes))
    for update in range(worker.NUM_UPDATES):
        own = [torch.cat(run["own"][update]) for run in runs]
        assert not torch.equal(*own)
        expected = average_of(own, kind, pieces, update).split(sizes)
        for run in runs:
            for gradient, values in zip(run["gradients"][update], expected, strict=True):
                if gradient.dim() == 4:  # channels_last, as its memory is
                    gradient = gradient.permute(0, 2, 3, 1)
                assert are_same_bits(gradient.reshape(-1), values)


@pytest.mark.parametrize("kind", worker.CODECS)
@pytest.mark.parametrize("other", ["small buckets", "restarted"])
def test_buckets_and_restarts_change_no_bit(two_ranks, kind, other):
    """DDP sorts its buckets anew after a process's first update, and a resumed run's is another."""
    for state in two_ranks:
        plain, found = state["train", kind], state[other, kind]
        first, then, *_ = found["num_buckets"]
        assert 1 == plain["num_buckets"][1] < then != first
        assert found["num_buckets"][2] == (first if other == "restarted" else then)
        for update in range(worker.NUM_UPDATES):
            pairs = zip(plain["gradients"][update], found["gradients"][update], strict=True)
            assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("kind", worker.CODECS)
def test_ranks_end_with_the_same_weights(two_ranks, kind):
    first, second = (state["train", kind]["weights"] for state in two_ranks)
    names = [name for name in first if "running" not in name]
    assert all(torch.equal(first[name], second[name]) for name in names)


@pytest.mark.parametrize("kind", worker.CODECS)
def test_bytes_of_all_updates_are_counted(two_ranks, kind):
    run = two_ranks[0]["train", kind]
    sizes = [len(gradient) for gradient in run["own"][0]]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    layout = codec.lay_out(
        list(map(Piece, codec.number_blocks(sizes), starts, sizes)),
        codec=kind, rank=0, num_ranks=2, device=CPU,
    )  # fmt: skip
    assert run["bytes_sent"] == worker.NUM_UPDATES * 2 * layout.num_bytes


@pytest.mark.parametrize("kind", worker.CODECS)
def test_machines_exchange_the_means_of_their_ranks(machines, kind):
    """The formula on two levels, in one process; every rank has its bits."""
    gradients = [worker.make_gradients(rank) for rank in range(4)]
    request = gradients, kind, worker.pieces(), worker.UPDATE
    expected = average_of(*request, worker.LOCAL_SIZE)
    for state in machines:
        assert are_same_bits(state["average", kind]["finite"], expected)
    exact = torch.stack(gradients).mean(0)
    assert 0 < (expected - exact).norm() < exact.norm()
    assert not torch.equal(expected, average_of(*request))


@pytest.mark.parametrize("kind", worker.CODECS)
def test_what_is_not_finite_on_one_rank_is_nan_on_all_machines(machines, kind):
    lost = machines[0]["average", kind]["NaN"].isnan()
    assert lost[100]
    assert not lost.all()
    for state in machines:
        found = state["average", kind]
        assert torch.equal(found["NaN"].isnan(), lost)
        assert torch.equal(found["NaN"][~lost], found["finite"][~lost])


@pytest.mark.parametrize("kind", worker.CODECS)
def test_a_run_on_two_machines_trains_with_their_average(machines, kind):
    """As `over_ranks` builds it; 1 message to the peer and 3 to everybody are counted."""
    runs = [state["train", kind] for state in machines]
    sizes = [len(gradient) for gradient in runs[0]["own"]]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    pieces = list(map(Piece, codec.number_blocks(sizes), starts, sizes))
    own = [torch.cat(run["own"]) for run in runs]
    expected = average_of(own, kind, pieces, worker.UPDATE, worker.LOCAL_SIZE).split(sizes)
    layout = codec.lay_out(pieces, codec=kind, rank=0, num_ranks=4, local_size=2, device=CPU)
    for run in runs:
        for gradient, values in zip(run["gradients"], expected, strict=True):
            if gradient.dim() == 4:  # channels_last, as its memory is
                gradient = gradient.permute(0, 2, 3, 1)
            assert are_same_bits(gradient.reshape(-1), values)
        assert run["bytes_sent"] == (1 + 3) * layout.num_bytes


@pytest.mark.parametrize("kind", worker.CODECS)
def test_bytes_that_leave_a_rank_of_a_machine_are_counted(machines, kind):
    """Blocks 0, 4, 8, ... belong to rank 0; 1, 5, ... to 1; 2, 6, ... to 2, of machine 1."""
    longest = 0
    numbers = codec.number_blocks(worker.SIZES)
    for residue in range(4):
        num_bytes = 0
        for first, count in zip(numbers, worker.SIZES, strict=True):
            lengths = [min(512, count - 512 * block) for block in range(-(-count // 512))]
            own = [n for block, n in enumerate(lengths, first) if block % 4 == residue]
            num_scales = len(own) if kind == "bucket" else int(bool(own))
            num_bytes += sum(-(-n // 4) * 4 for n in own) + 4 * num_scales
        longest = max(longest, num_bytes)
    for state in machines:
        assert state["average", kind]["bytes_sent"] == (1 + 3) * longest


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([(0, 0), (0, 1), (1, 0), (1, 1)], 2),
        ([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)], 3),
        ([(0, 0), (0, 1), (0, 2), (0, 3)], 1),  # one machine
        ([(0, 0), (1, 0), (2, 0)], 1),  # one rank on each
        ([(0, 0), (0, 1), (0, 2), (1, 0)], 1),  # more on one than on the other
        ([(0, 0), (1, 0), (1, 1)], 1),
        ([(0, 0), (1, 0), (0, 1), (1, 1)], 1),  # not machine by machine
        ([(1, 0), (1, 1), (0, 0), (0, 1)], 1),
        ([(0, 1), (0, 0), (1, 1), (1, 0)], 1),
        ([(-1, 0), (-1, 1), (-1, 0), (-1, 1)], 1),  # torchrun did not start them
        ([(-1, -1), (-1, -1)], 1),
        ([(0, 0), (0, 1), (-1, 0), (-1, 1)], 1),
    ],
)
def test_machines_are_levels_where_all_have_as_many_ranks_in_a_row(places, expected):
    assert ranks_of_a_machine(places) == expected


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_lost_rank_is_named(how, tmp_path):
    """In the thread that carries the messages, or by the heartbeat while that thread waits."""
    ranks, _store = start_ranks(2, WORKER, how, tmp_path, output=tmp_path / "output")
    ranks[0].join(120)
    for rank in ranks:
        rank.kill()
        rank.join()
    told = [path.read_text() for path in tmp_path.iterdir() if path.is_file()]
    line = r"rank 1 is lost \(.*\); restart all ranks with --resume"
    assert re.search(line, "\n".join(told)), told


def test_gradients_of_another_type_are_refused(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
        compression = GradientCompression("bucket", rank=0, size=1, seed=0, device=CPU, group=None)
        with pytest.raises(UserError, match="--compress bucket: .* 1.weight are float64; leave"):
            compression.attach(DistributedDataParallel(net))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(
    ops.codec_backend("cpu") != "compiled", reason="freeadv_fast._C was not built here"
)
@pytest.mark.parametrize("kind", worker.CODECS)
def test_the_host_reads_nothing(kind):
    """So it never waits for a GPU, and an update can be recorded."""
    average = BucketAverage(
        worker.pieces(), kind, rank=0, size=1, seed=0, update=torch.tensor([1]), group=None
    )
    with Operations() as operations:
        average.average_(worker.make_gradients(0))
    assert "freeadv_fast.encode_mean.default" in operations.names
    assert "aten._local_scalar_dense.default" not in operations.names


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", worker.CODECS)
def test_on_a_gpu_the_hook_gives_what_the_formula_says(kind, tmp_path):
    """On its stream, from the buckets of data parallelism."""
    device = torch.device("cuda", 0)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        net = nn.Linear(700, 30).to(device)
        inputs = torch.randn(8, 700, device=device)
        own = torch.autograd.grad(net(inputs).square().mean(), list(net.parameters()))
        ddp = DistributedDataParallel(net, gradient_as_bucket_view=True)
        compression = GradientCompression(
            kind, rank=0, size=1, seed=worker.SEED, device=device, group=None
        )
        compression.attach(ddp)
        compression.begin_update(worker.UPDATE)
        ddp(inputs).square().mean().backward()
        found = torch.cat([p.grad.flatten() for p in net.parameters()]).cpu()
    finally:
        torch.distributed.destroy_process_group()
    sizes = [len(gradient.flatten()) for gradient in own]
    pieces = list(map(Piece, codec.number_blocks(sizes), (0, sizes[0]), sizes))
    gradients = torch.cat([gradient.flatten() for gradient in own]).cpu()
    assert are_same_bits(found, average_of([gradients], kind, pieces, worker.UPDATE))


def test_a_side_thread_lets_the_caller_go_on_and_keeps_the_order():
    side, go, ran = SideThread(), threading.Event(), []

    def job(number):
        go.wait(60)
        ran.append((number, threading.current_thread().name))
        return torch.tensor(number)

    futures = [side.run(lambda number=number: job(number)) for number in range(5)]
    assert not any(future.done() for future in futures)
    go.set()
    assert [int(future.wait()) for future in futures] == list(range(5))
    assert ran == [(number, "gradients") for number in range(5)]


def test_a_failure_reaches_who_waits_and_ends_the_thread_s_work():
    side, ran = SideThread(), []

    def fail():
        raise RuntimeError("gloo/transport: gone")

    failed, later = side.run(fail), side.run(lambda: ran.append(1))
    for future in (failed, later):
        with pytest.raises(RuntimeError, match="gloo/transport: gone"):
            future.wait()
    assert not ran


def test_a_side_thread_ends_with_its_object():
    side, threads = SideThread(), []
    side.run(lambda: threads.append(threading.current_thread())).wait()
    (thread,) = threads
    del side
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()


def test_a_process_ends_while_its_thread_waits_for_good():
    """As for a lost rank: after a few seconds the process leaves."""
    script = (
        "import threading\n"
        "from freeadv_fast.distributed import compress\n"
        "compress.LAST_PATIENCE = 0.2\n"
        "side = compress.SideThread()\n"
        "future = side.run(threading.Event().wait)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], timeout=120, capture_output=True)
    assert done.returncode == 0, done.stderr
