"""Run by torchrun: ranks that meet in one kind of collective until one of them fails on purpose.

What each rank is told goes to OUTPUT/rankN.txt: the line, and the seconds until it came.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from freeadv_fast.distributed import heartbeat
from freeadv_fast.distributed.heartbeat import PeerLost, arrive
from freeadv_fast.distributed.world import joined_world

FAULTY_STEP = 3


def be_impatient():
    """Short times, so that a test takes seconds."""
    heartbeat.SECONDS_BETWEEN_BEATS, heartbeat.PATIENCE, heartbeat.LATE = 0.2, 4.0, 2.0
    heartbeat.GRACE = 1.0


def build_meetings(world):
    """What ranks do together while a run trains, evaluates and saves, by name."""
    net = DistributedDataParallel(nn.Linear(50, 50), broadcast_buffers=False)
    rows = torch.zeros(8, 4, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64)
    return {
        "gradients": lambda step: (arrive(), net(torch.ones(2, 50)).sum().backward()),
        "meters": lambda step: world.sum_(torch.ones(3)),
        "stop": lambda step: world.max_on_host([0, 1]),
        "checkpoint": lambda step: world.gather_on_host({"rank": world.rank}),
        "minibatch": lambda step: world.together(lambda: None),
        "writing": lambda step: world.on_main(lambda: None),
        "shuffle": lambda step: world.shuffle(*rows, seed=0, step=step).wait(),
        "barrier": lambda step: world.barrier(),
    }


def fail(how):
    """Dies, stands still for good, or comes late."""
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(heartbeat.LATE + 5)


def main(kind, how, faulty_rank, output, times="short"):
    torch.set_num_threads(1)
    if times == "short":
        be_impatient()
    signal.signal(signal.SIGTERM, lambda *_: None)  # as a run does: it obeys between minibatches
    started = time.monotonic()
    told = "nothing"
    try:
        with joined_world() as world:
            meet = build_meetings(world)[kind]
            for step in range(2 * FAULTY_STEP):
                arrive(f"step {step}")
                if step == FAULTY_STEP:
                    time.sleep(1.5 * heartbeat.SECONDS_BETWEEN_BEATS)  # the place has been told
                    started = time.monotonic()
                    if world.rank == int(faulty_rank):
                        Path(output, "began").touch()
                        fail(how)
                meet(step)
    except PeerLost as error:
        told = str(error)
    seconds = time.monotonic() - started
    Path(output, f"rank{os.environ['RANK']}.txt").write_text(f"{seconds:.1f}\n{told}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
