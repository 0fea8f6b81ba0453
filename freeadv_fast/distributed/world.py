"""Processes, devices and the few words they exchange: torchrun's ranks as one `World`.

One process drives one device. Tensors of the training step travel over NCCL (GPUs) or gloo
(CPUs); decisions of the host (stop, save, who failed) travel over a gloo group of their own, so
that agreeing on them never waits for the GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from freeadv_fast.distributed.heartbeat import (
    arrive,
    begin_heartbeat,
    end_heartbeat,
    naming_a_lost_rank,
)
from freeadv_fast.distributed.shuffle import (
    PEER_PATIENCE,
    Exchange,
    Route,
    exchange,
    exchange_in_order,
)
from freeadv_fast.errors import UserError

T = TypeVar("T")

# After so long a silence a peer is gone. Rank 0's evaluation of a slow network is not silence yet.
PATIENCE = datetime.timedelta(hours=1)


@dataclasses.dataclass(frozen=True)
class MachineGroups:
    """Two levels of groups, for tensors on the device: within a machine, and between machines.

    Attributes:
        local_size: Ranks of each machine; rank m * local_size + l is at place l of machine m.
        own: The ranks of this machine.
        peers: The ranks at this one's place of all machines, in the machines' order.
    """

    local_size: int
    own: dist.ProcessGroup
    peers: dist.ProcessGroup


@dataclasses.dataclass(frozen=True)
class World:
    """This process among the others.

    Attributes:
        rank: Index of this process, 0..size-1.
        size: Number of processes; 1 without torchrun.
        device: The device this process trains on.
        host_group: gloo group for host decisions; None when size is 1.
    """

    rank: int
    size: int
    device: torch.device
    host_group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process prints, logs and writes files."""
        return self.rank == 0

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over the ranks, in place, on the training device's group."""
        if self.size > 1:
            arrive()
            dist.all_reduce(tensor)
        return tensor

    def max_on_host(self, values: list[int]) -> list[int]:
        """Element-wise maximum over the ranks of small host integers; no GPU is waited for."""
        if self.size == 1:
            return values
        arrive()
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.host_group)
        return [int(value) for value in tensor.tolist()]

    def first_objection(self, objection: str) -> str:
        """On every rank the objection of the lowest rank that has one; empty where none has."""
        if self.size == 1:
            return objection
        arrive()
        objections = [""] * self.size
        dist.all_gather_object(objections, objection, group=self.host_group)
        return next(filter(None, objections), "")

    def gather_on_host(self, value: object) -> list[object]:
        """Every rank's `value` on rank 0, in rank order; an empty list on the other ranks."""
        if self.size == 1:
            return [value]
        arrive()
        values: list[object] = [None] * self.size
        dist.gather_object(value, values if self.is_main else None, group=self.host_group)
        return values if self.is_main else []

    def together(self, work: Callable[[], T]) -> T:
        """Runs `work` on every rank; if it fails on one, no other waits for it.

        Raises:
            UserError: on every rank, the one of the lowest rank that raised one.
        """
        if self.size == 1:
            return work()
        value, own_error = None, None
        try:
            value = work()
        except UserError as error:
            own_error = error
        if self.max_on_host([int(own_error is not None)])[0]:
            errors: list[UserError | None] = [None] * self.size
            dist.all_gather_object(errors, own_error, group=self.host_group)
            raise next(error for error in errors if error is not None)
        return value  # type: ignore[return-value]

    def on_main(self, work: Callable[[], T]) -> T:
        """Runs `work` on rank 0 and returns its value on every rank.

        Raises:
            UserError: on every rank, when rank 0's work raised one; so all of them leave. Any
                other exception is rank 0's own; the others leave with a UserError.
        """
        if self.size == 1:
            return work()
        box: list[object] = [None]
        failure: Exception | None = None
        if self.is_main:
            try:
                box = [work()]
            except UserError as error:
                box = [error]
            except Exception as error:
                box, failure = [UserError(f"rank 0 failed: {error}")], error
        arrive()
        dist.broadcast_object_list(box, src=0, group=self.host_group)
        if failure is not None:
            raise failure
        if isinstance(box[0], UserError):
            raise box[0]
        return box[0]  # type: ignore[return-value]

    def shuffle(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        seed: int,
        step: int,
        counts: Sequence[int] | None = None,
        timeout: datetime.timedelta = PEER_PATIENCE,
    ) -> Exchange:
        """Exchanges rows with the other ranks in random order, so that batch statistics mix.

        Returns at once, every rank must call it, and `wait` hands over the rows that arrived. On
        a GPU the exchange runs beside the current stream: what is computed between here and
        `wait` hides it. On one rank the rows are permuted where they are. Differentiable: where
        `images` require a gradient, the backward of the result is the way back.

        Args:
            images: (n, ...) uint8, float16, bfloat16, float32 or float64, contiguous; unchanged
                until `wait`.
            labels: (n,) int64, or a detector's targets (n, ...) float32; on the same device. They
                travel with their images, and arrive bit for bit.
            seed: 0..2^63-1, the same on all ranks.
            step: 0..2^63-1, likewise, such as the number of the update: another step is another
                permutation, and the same numbers are always the same.
            counts: Rows of every rank, where they differ; by default all have n.
            timeout: How long to wait for the others' rows, over gloo; NCCL has the group's.

        Returns:
            The exchange; ``images, labels = exchange.wait()`` have the shapes that were given.
            `exchange.bytes_sent` counts the bytes that leave this rank.

        Raises:
            ValueError: shapes, dtypes, layouts or counts disagree, or seed or step is negative.
            PeerLost: from here or from `wait`, a rank died or was silent for the time-out.

        Source: Mei et al. 2022, "Fast AdvProp", section 4.2; He et al. 2020, "Momentum Contrast",
        section 3.3, whose gather-everything this replaces.
        """
        route = self._route(len(images), seed, step, counts)
        return self._exchange(images, labels, route, timeout)

    def shuffle_order(self, count: int, *, seed: int, step: int) -> torch.Tensor:
        """The permutations of one `shuffle` of as many rows on every rank, for `shuffle_in_order`.

        Args:
            count: Rows of each rank. seed: That of the shuffle. step: Likewise.

        Returns:
            (2, count) int64 on the device; the host waits for nothing.
        """
        return self._route(count, seed, step, None).order().to(self.device, non_blocking=True)

    def shuffle_in_order(
        self, images: torch.Tensor, labels: torch.Tensor, order: torch.Tensor
    ) -> Exchange:
        """`shuffle`, and nothing in it is the host's: a CUDA graph can hold it, over NCCL.

        Args:
            images: As `shuffle` takes them, as many on every rank. labels: Likewise.
            order: Of `shuffle_order`.
        """
        if self.size > 1:
            arrive()
        route = self._route(len(images), 0, 0, None)
        return exchange_in_order(images, labels, route, order, self._device_group)

    def unshuffle(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        seed: int,
        step: int,
        counts: Sequence[int] | None = None,
        timeout: datetime.timedelta = PEER_PATIENCE,
    ) -> Exchange:
        """Brings rows back to where `shuffle` took them from: MoCo's features of shuffled keys.

        Args:
            images: (n, ...) as `shuffle` takes them; any rows in the order of its result.
            labels: Likewise.
            seed: That of `shuffle`.
            step: That of `shuffle`.
            counts: Those of `shuffle`.
            timeout: How long to wait for the others' rows, over gloo.

        Returns:
            The exchange, as `shuffle` does.

        Raises:
            ValueError: as `shuffle`.
            PeerLost: as `shuffle`.
        """
        route = self._route(len(images), seed, step, counts).inverted()
        return self._exchange(images, labels, route, timeout)

    def _exchange(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        route: Route,
        timeout: datetime.timedelta,
    ) -> Exchange:
        """Begins an exchange; a rank that waits in it has come further than one that is late."""
        if self.size > 1:
            arrive()
        return exchange(images, labels, route, self._device_group, timeout)

    def _route(self, count: int, seed: int, step: int, counts: Sequence[int] | None) -> Route:
        """Where rows go; `counts` of another number of ranks are refused."""
        counts = [count] * self.size if counts is None else counts
        if len(counts) != self.size:
            raise ValueError(f"counts {list(counts)}: expected one for each of {self.size} ranks")
        return Route(self.rank, tuple(counts), seed, step)

    @property
    def _device_group(self) -> dist.ProcessGroup | None:
        """The group over which tensors of the training step travel."""
        return dist.group.WORLD if self.size > 1 else None

    def new_group(self) -> dist.ProcessGroup:
        """All ranks once more, for tensors on the device that shall not wait for the others."""
        group: dist.ProcessGroup = dist.new_group(timeout=PATIENCE)
        return group

    def new_machine_groups(self) -> MachineGroups | None:
        """The ranks machine by machine, for tensors as in `new_group`; every rank must call it.

        Returns:
            None where two levels are no use or not known: see `ranks_of_a_machine`.
        """
        arrive()
        # torchrun's GROUP_RANK is the machine's number.
        place = int(os.environ.get("GROUP_RANK", "-1")), int(os.environ.get("LOCAL_RANK", "-1"))
        places = [place] * self.size
        dist.all_gather_object(places, place, group=self.host_group)
        local_size = ranks_of_a_machine(places)
        if local_size == 1:
            return None
        machines = [
            list(range(first, first + local_size)) for first in range(0, self.size, local_size)
        ]
        # Every rank makes every group, in this order, and keeps the two that it is in.
        own, _ = dist.new_subgroups_by_enumeration(machines, timeout=PATIENCE)
        peers, _ = dist.new_subgroups_by_enumeration(
            [list(ranks) for ranks in zip(*machines, strict=True)], timeout=PATIENCE
        )
        return MachineGroups(local_size, own, peers)

    def barrier(self) -> None:
        """Waits on the host until every rank is here."""
        if self.size > 1:
            arrive()
            dist.barrier(group=self.host_group)


def ranks_of_a_machine(places: Sequence[tuple[int, int]]) -> int:
    """How many ranks each machine has, where that makes two levels.

    Args:
        places: Each rank's machine and its place there, both from 0; -1 where it is not known.

    Returns:
        1 where all are on one machine, or machines have different numbers of ranks, or ranks are
        not numbered machine by machine.
    """
    last_machine, last_place = places[-1]
    by_machine = list(itertools.product(range(last_machine + 1), range(last_place + 1)))
    return last_place + 1 if list(places) == by_machine and last_machine > 0 else 1


@contextlib.contextmanager
def joined_world() -> Iterator[World]:
    """The world within the block, and what `join_world` and `leave_world` do around it.

    Raises:
        UserError: as `join_world`.
        PeerLost: another rank died or hangs.
    """
    world = join_world()
    try:
        with naming_a_lost_rank():
            yield world
    finally:
        leave_world()


def is_main_rank() -> bool:
    """Whether this process speaks for all; known before the ranks have met."""
    return os.environ.get("RANK", "0") == "0"


def refuse_half_a_world() -> None:
    """Refuses a process that is told of others and not where to meet them.

    Raises:
        UserError: WORLD_SIZE is set, by a cluster or in an earlier shell, and torchrun did not.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if size != "1" and missing and not dist.is_initialized():
        raise UserError(
            f"WORLD_SIZE {size}: set, but not {', '.join(missing)}; start the ranks with torchrun "
            "--nproc-per-node N, or unset WORLD_SIZE for one"
        )


def join_world() -> World:
    """Joins the process group that torchrun describes, or stands alone without it.

    Raises:
        UserError: more ranks on this machine than GPUs, or half of what torchrun sets.
    """
    refuse_half_a_world()
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        num_gpus = torch.cuda.device_count()
        if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > num_gpus:
            raise UserError(
                f"--nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}: more ranks than GPUs; "
                f"this machine has {num_gpus}"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if size == 1:
        return World(0, 1, device)
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=PATIENCE,
            device_id=device if device.type == "cuda" else None,
        )
    host_group = dist.new_group(backend="gloo", timeout=PATIENCE)
    begin_heartbeat(rank, size, host_group)
    return World(rank, size, device, host_group)


def leave_world() -> None:
    """Says goodbye and destroys the process group, if one was joined."""
    end_heartbeat()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
