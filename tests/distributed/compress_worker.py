"""Run as ranks: gradients averaged at one byte an element; results go to a file."""

import os
import signal
import sys
from pathlib import Path

import faults_worker
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.distributed.codec import Piece, number_blocks
from freeadv_fast.distributed.compress import BucketAverage, GradientCompression
from freeadv_fast.distributed.heartbeat import PeerLost, arrive
from freeadv_fast.distributed.world import joined_world
from freeadv_fast.session.network import over_ranks

CODECS = ("paper", "bucket")
SEED, UPDATE = 2**40 + 7, 2**33 + 3
# Elements of a bucket's parameters, and their order in it.
SIZES, ORDER = (1300, 64, 10, 512, 5000, 1), (5, 3, 4, 0, 2, 1)
NUM_UPDATES = 4
# Of a machine, where there are several.
LOCAL_SIZE = 2
# Small enough that the first buckets differ from those that DDP makes after the first update.
BUCKET_MIB = 0.001


def pieces():
    """The bucket above, as data parallelism would keep it."""
    first_blocks, offset, found = number_blocks(SIZES), 0, []
    for parameter in ORDER:
        found.append(Piece(first_blocks[parameter], offset, SIZES[parameter]))
        offset += SIZES[parameter]
    return found


def make_gradients(rank):
    """A rank's gradients, of very different sizes; the 10 of one parameter are zeros."""
    generator = torch.Generator().manual_seed(rank)
    values = torch.randn(sum(SIZES), generator=generator)
    values *= torch.rand(len(values), generator=generator) ** 6
    zeros = pieces()[4]
    values[zeros.offset : zeros.offset + zeros.num_elements] = 0
    return values


def average_once(world, group, codec, machines=None):
    """What the two-sided exchange makes of `make_gradients`, and of a NaN on the last rank."""
    found = {}
    update = torch.tensor([UPDATE])
    average = BucketAverage(
        pieces(), codec, rank=world.rank, size=world.size, seed=SEED, update=update, group=group,
        machines=machines,
    )  # fmt: skip
    for name in ("finite", "NaN"):
        gradients = make_gradients(world.rank)
        if name == "NaN" and world.rank == world.size - 1:
            gradients[100] = torch.nan
        found[name] = average.average_(gradients)
    return found | {"bytes_sent": average.bytes_sent}


def build_network():
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2), nn.BatchNorm2d(24), nn.ReLU(), nn.Flatten(),
        nn.Linear(24 * 9, 10),
    ).to(memory_format=torch.channels_last)  # fmt: skip


def loss_of(net, rank, update):
    generator = torch.Generator().manual_seed(100 * update + rank)
    images = torch.randn(4, 3, 8, 8, generator=generator)
    return net(images).square().mean()


def own_gradients(net, rank, update):
    """This rank's gradients before they are averaged; running statistics stay."""
    buffers = {name: value.clone() for name, value in net.named_buffers()}
    found = torch.autograd.grad(loss_of(net, rank, update), list(net.parameters()))
    for name, value in net.named_buffers():
        value.copy_(buffers[name])
    # In the order of the parameters' memory, as a bucket holds them.
    return [
        gradient.permute(0, 2, 3, 1).reshape(-1) if gradient.dim() == 4 else gradient.reshape(-1)
        for gradient in found
    ]


def train(world, group, codec, *, bucket_mib=25.0, restart_at=None):
    """Weights, gradients of all updates and bytes sent of a short run of a small network."""
    net, state = build_network(), None
    found = {"own": [], "gradients": [], "num_buckets": []}
    for update in range(NUM_UPDATES):
        if update in (0, restart_at):
            if state is not None:  # as a new process does: another network, the old weights
                net = build_network()
                net.load_state_dict(state)
            compression = GradientCompression(
                codec, rank=world.rank, size=world.size, seed=SEED, device=world.device, group=group
            )
            ddp = DistributedDataParallel(
                net, broadcast_buffers=False, gradient_as_bucket_view=True, bucket_cap_mb=bucket_mib
            )
            compression.attach(ddp)
        found["own"].append(own_gradients(net, world.rank, update))
        compression.begin_update(update)
        net.zero_grad(set_to_none=True)
        loss_of(ddp, world.rank, update).backward()
        found["gradients"].append([p.grad.clone() for p in net.parameters()])
        found["num_buckets"].append(len(compression._averages))
        with torch.no_grad():
            for parameter in net.parameters():
                parameter -= 0.1 * parameter.grad
        state = {name: value.clone() for name, value in net.state_dict().items()}
    return found | {"weights": state, "bytes_sent": compression.bytes_sent}


def run_cases(world):
    group = dist.new_group(backend="gloo") if world.size > 1 else None
    found = {("average", codec): average_once(world, group, codec) for codec in CODECS}
    if world.size == 2:
        for codec in CODECS:
            found["train", codec] = train(world, group, codec)
            found["small buckets", codec] = train(world, group, codec, bucket_mib=BUCKET_MIB)
            found["restarted", codec] = train(
                world, group, codec, bucket_mib=BUCKET_MIB, restart_at=2
            )
    return found


def train_on_machines(world, codec):
    """Gradients of one update, as a training run averages them, and the bytes that it sent."""
    config = TrainConfig(data="unused", arch="preact_resnet18", compress=codec, seed=SEED)
    net = build_network()
    own = own_gradients(net, world.rank, UPDATE)
    ddp, compression = over_ranks(net, config, world)
    compression.begin_update(UPDATE)
    loss_of(ddp, world.rank, UPDATE).backward()
    gradients = [p.grad.clone() for p in net.parameters()]
    return {"own": own, "gradients": gradients, "bytes_sent": compression.bytes_sent}


def run_on_machines(world):
    group, machines = world.new_group(), world.new_machine_groups()
    found = {("average", codec): average_once(world, group, codec, machines) for codec in CODECS}
    return found | {("train", codec): train_on_machines(world, codec) for codec in CODECS}


def lose_a_peer(how, output):
    """The last rank dies or stands still; what the other is told."""
    faults_worker.be_impatient()
    signal.signal(signal.SIGTERM, lambda *_: None)  # as a run does
    try:
        with joined_world() as world:
            group = dist.new_group(backend="gloo")
            compression = GradientCompression(
                "bucket", rank=world.rank, size=world.size, seed=0, device=world.device, group=group
            )
            ddp = DistributedDataParallel(build_network(), bucket_cap_mb=BUCKET_MIB)
            compression.attach(ddp)
            for update in range(6):
                arrive(f"update {update}")
                compression.begin_update(update)
                if update == 3 and world.rank == world.size - 1:
                    faults_worker.fail(how)
                loss_of(ddp, world.rank, update).backward()
    except PeerLost as error:
        Path(output, "told.txt").write_text(str(error))


def main(task, output):
    torch.set_num_threads(1)
    if task not in ("cases", "machines"):
        lose_a_peer(task, output)
        return
    if task == "machines":  # as torchrun on each of them
        machine, place = divmod(int(os.environ["RANK"]), LOCAL_SIZE)
        os.environ |= {"GROUP_RANK": str(machine), "LOCAL_RANK": str(place)}
    with joined_world() as world:
        found = run_cases(world) if task == "cases" else run_on_machines(world)
        torch.save(found, Path(output) / f"rank{world.rank}.pt")
        world.barrier()  # a rank that is gone before the others have read its goodbye is a lost one


if __name__ == "__main__":
    main(*sys.argv[1:])
