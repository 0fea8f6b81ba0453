"""Run by torchrun: every exchange of a list of cases, compiled and eager; results go to a file."""

import datetime
import os
import sys
import time
from pathlib import Path

import torch

from freeadv_fast import ops
from freeadv_fast.distributed import shuffle
from freeadv_fast.distributed.world import join_world, leave_world

SEED = 11
IMAGE = torch.arange(48, dtype=torch.int64)

# name: rows of every rank as a function of their number, shape of a row, dtype.
CASES = {
    "uint8": (lambda size: [16] * size, (4, 4, 3), torch.uint8),
    "float16": (lambda size: [16] * size, (4, 4, 3), torch.float16),
    "float32": (lambda size: [16] * size, (3, 5), torch.float32),
    "odd row bytes": (lambda size: [12] * size, (3, 3, 3), torch.uint8),
    "indivisible": (lambda size: [13] * size, (7,), torch.uint8),
    "ragged": (lambda size: [9 + 2 * rank for rank in range(size)], (5, 3), torch.float16),
    "fewer rows than ranks": (lambda size: [size - 1] * size, (2, 2), torch.uint8),
    "an empty rank": (lambda size: [5] * (size - 1) + [0], (2, 2), torch.uint8),
    "scalars": (lambda size: [8] * size, (), torch.float64),
}


def make_rows(counts, rank, shape, dtype):
    """Row g of all ranks' rows has label g and values that g decides."""
    labels = sum(counts[:rank]) + torch.arange(counts[rank])
    values = labels.unsqueeze(1) * 31 + IMAGE[: torch.Size(shape).numel()]
    return (values % 251).to(dtype).reshape(-1, *shape), labels


def exchange_all(world):
    """What arrived at this rank in every case, from both implementations, and what came back."""
    found = {}
    for name, (count_rows, shape, dtype) in CASES.items():
        counts = count_rows(world.size)
        rows = make_rows(counts, world.rank, shape, dtype)
        for step in (0, 1):
            exchange = world.shuffle(*rows, seed=SEED, step=step, counts=counts)
            arrived = exchange.wait()
            back = world.unshuffle(*arrived, seed=SEED, step=step, counts=counts).wait()
            route = shuffle.Route(world.rank, tuple(counts), SEED, step)
            transport = shuffle.Transport(
                shuffle.start_eagerly, world._device_group, shuffle.PEER_PATIENCE
            )
            eager = shuffle.Exchange(*rows, route, transport).wait()
            eager_back = shuffle.Exchange(*arrived, route.inverted(), transport).wait()
            found[name, step] = {
                "rows": rows, "arrived": arrived, "back": back, "eager": eager,
                "eager_back": eager_back, "bytes_sent": exchange.bytes_sent,
            }  # fmt: skip
            if len(set(counts)) == 1:
                order = world.shuffle_order(counts[0], seed=SEED, step=step)
                found[name, step]["in_order"] = world.shuffle_in_order(*rows, order).wait()
    return found


def make_targets(counts, rank):
    """A detector's, (n, 3, 5): any bits, so NaN, infinities and denormals too."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(
        -(2**31), 2**31, (counts[rank], 3, 5), generator=generator, dtype=torch.int32
    ).view(torch.float32)


def exchange_targets(world):
    """What arrived of images with targets, as bits, and what came back."""
    found = {}
    for name in ("uint8", "float16", "odd row bytes", "ragged", "an empty rank"):
        count_rows, shape, dtype = CASES[name]
        counts = count_rows(world.size)
        images, _ = make_rows(counts, world.rank, shape, dtype)
        rows = images, make_targets(counts, world.rank)
        exchange = world.shuffle(*rows, seed=SEED, step=3, counts=counts)
        arrived = exchange.wait()
        back = world.unshuffle(*arrived, seed=SEED, step=3, counts=counts).wait()
        found[name] = {
            "rows": rows, "arrived": arrived, "back": back, "bytes_sent": exchange.bytes_sent
        }  # fmt: skip
        if len(set(counts)) == 1:
            order = world.shuffle_order(counts[0], seed=SEED, step=3)
            found[name]["in_order"] = world.shuffle_in_order(*rows, order).wait()
    return found


def exchange_with_gradient(world):
    """Gradients and second-order gradients of a weighted sum of what arrived."""
    counts = [6 + rank for rank in range(world.size)]
    images, labels = make_rows(counts, world.rank, (5,), torch.float64)
    images.requires_grad_()
    arrived, arrived_labels = world.shuffle(images, labels, seed=SEED, step=5, counts=counts).wait()
    weights = 1.0 + arrived_labels.unsqueeze(1)
    (gradient,) = torch.autograd.grad((weights * arrived**3).sum(), images, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), images)
    return {"images": images.detach(), "labels": labels, "gradient": gradient.detach(),
            "second": second}  # fmt: skip


def lose_a_peer(world, how):
    """The last rank leaves or sleeps instead of exchanging; what the others are told, and when."""
    rows = make_rows([8] * world.size, world.rank, (4,), torch.uint8)
    world.shuffle(*rows, seed=SEED, step=41).wait()
    if world.rank == world.size - 1:
        if how == "dies":
            os._exit(0)
        time.sleep(4)
        os._exit(0)
    start, told = time.monotonic(), ""
    try:
        world.shuffle(*rows, seed=SEED, step=42, timeout=datetime.timedelta(seconds=2)).wait()
    except shuffle.PeerLost as error:
        told = str(error)
    return {"told": told, "seconds": time.monotonic() - start}


def main(task, output):
    """Runs one of the tasks above and saves what it found."""
    torch.set_num_threads(1)
    world = join_world()
    if task == "cases":
        found = {"cases": exchange_all(world), "targets": exchange_targets(world),
                 "gradient": exchange_with_gradient(world),
                 "backend": ops.exchange_backend("cpu")}  # fmt: skip
    else:
        found = lose_a_peer(world, task)
    torch.save(found, Path(output) / f"rank{world.rank}.pt")
    leave_world()


if __name__ == "__main__":
    main(*sys.argv[1:])
