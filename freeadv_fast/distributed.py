"""Processes, devices and the few words they exchange: torchrun's ranks as one `World`.

One process drives one device. Tensors of the training step travel over NCCL (GPUs) or gloo
(CPUs); decisions of the host (stop, save, who failed) travel over a gloo group of their own, so
that agreeing on them never waits for the GPU.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from freeadv_fast.errors import UserError

T = TypeVar("T")

# After so long a silence a peer is gone. Rank 0's evaluation of a slow network is not silence yet.
PATIENCE = datetime.timedelta(hours=1)


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
            dist.all_reduce(tensor)
        return tensor

    def max_on_host(self, values: list[int]) -> list[int]:
        """Element-wise maximum over the ranks of small host integers; no GPU is waited for."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.host_group)
        return [int(value) for value in tensor.tolist()]

    def gather_on_host(self, value: object) -> list[object]:
        """Every rank's `value` on rank 0, in rank order; an empty list on the other ranks."""
        if self.size == 1:
            return [value]
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
        dist.broadcast_object_list(box, src=0, group=self.host_group)
        if failure is not None:
            raise failure
        if isinstance(box[0], UserError):
            raise box[0]
        return box[0]  # type: ignore[return-value]

    def barrier(self) -> None:
        """Waits on the host until every rank is here."""
        if self.size > 1:
            dist.barrier(group=self.host_group)


def join_world() -> World:
    """Joins the process group that torchrun describes, or stands alone without it.

    Raises:
        UserError: more ranks on this machine than GPUs.
    """
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
    return World(rank, size, device, dist.new_group(backend="gloo", timeout=PATIENCE))


def leave_world() -> None:
    """Destroys the process group, if one was joined."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
