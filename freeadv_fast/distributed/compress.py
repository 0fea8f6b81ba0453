"""Averages gradients over the ranks at one byte an element, while the backward pass goes on.

    average within the machine -> encode own share -> all-to-all between machines
    -> average and encode own blocks -> all-gather -> decode

`codec` tells the formula. All ranks decode the same bytes, so their gradients agree bit for bit.

The ranks of a machine share one network card. Within it gradients are averaged as float32, over
links that are much faster; of W ranks on N machines each then sends (N - 1) / W bytes an element to
the ranks at its own place of the others. So (N - 1) / N bytes an element leave a machine, whatever
its ranks, where an all-to-all of all W would send almost one for each of them. The all-gather runs
along a ring, which crosses each card once: (W - 1) / W more. A float32 all-reduce sends four times
that both ways. Where each rank is alone on its machine, or all are on one, there is one level, and
a rank sends 2 (W - 1) / W.

Data parallelism hands over a bucket as soon as its gradients are there (`GradientCompression`). On
a GPU everything is issued at once on a stream of its own. On a CPU a thread of its own takes bucket
after bucket: gloo's threads call back in an order that differs between ranks, and ranks that begin
different collectives wait for each other for good.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from freeadv_fast.distributed.codec import (
    Codec,
    Piece,
    RandomStream,
    Stage,
    decode_gradients,
    encode_gradients,
    encode_mean,
    lay_out,
    number_blocks,
)
from freeadv_fast.distributed.world import MachineGroups
from freeadv_fast.errors import UserError

# So long the process waits at its end for a collective that a lost rank may never answer.
LAST_PATIENCE = 5.0


class BucketAverage:
    """The mean of one bucket's gradients over the ranks.

    Args:
        pieces: The bucket's gradients.
        codec: How they are scaled.
        rank: This rank. size: Number of ranks.
        seed: Of the run, the same on all ranks.
        update: One int64 on the device: the number of the update.
        group: The ranks; may be None where there is one.
        machines: Of them, those of this machine and this rank's peers; None for one level.

    Attributes:
        bytes_sent: Bytes of the messages that leave this rank each time. What is averaged within a
            machine, 4 bytes an element, is not among them.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        codec: Codec,
        *,
        rank: int,
        size: int,
        seed: int,
        update: Tensor,
        group: dist.ProcessGroup | None,
        machines: MachineGroups | None = None,
    ) -> None:
        """Allocates the messages, which every update uses again."""
        local_size = machines.local_size if machines is not None else 1
        self._layout = layout = lay_out(
            pieces,
            codec=codec,
            rank=rank,
            num_ranks=size,
            local_size=local_size,
            device=update.device,
        )
        self._gradients_stream = RandomStream(seed, update, rank, Stage.GRADIENTS)
        self._mean_stream = RandomStream(seed, update, rank, Stage.MEAN)
        self._group, self._size, self._machines = group, size, machines
        num_machines = size // local_size
        # Zeros, so that filling is the same bytes on every run.
        self._everybodys = torch.zeros(
            size * layout.num_bytes, dtype=torch.uint8, device=update.device
        )
        # In the same memory: the peers' messages have been read when everybody's come.
        self._received = self._everybodys[: num_machines * layout.num_bytes]
        self._sent = torch.zeros_like(self._received)
        self._mean = torch.zeros_like(self._received[: layout.num_bytes])
        self.bytes_sent = (num_machines - 1 + size - 1) * layout.num_bytes

    def average_(self, gradients: Tensor) -> Tensor:
        """Averages in place; every rank must call it.

        Args:
            gradients: (n,) float32, contiguous.

        Returns:
            `gradients`.

        Raises:
            RuntimeError: over gloo, a rank is gone.
        """
        if self._machines is not None:
            dist.all_reduce(gradients, group=self._machines.own)
            gradients.mul_(1 / self._machines.local_size)
        encode_gradients(gradients, self._layout.share, self._gradients_stream, self._sent)
        self._send_to_owners()
        messages = self._received.view(-1, self._layout.num_bytes)
        encode_mean(messages, self._layout.own, self._mean_stream, self._mean)
        self._send_to_all()
        decode_gradients(self._everybodys, self._layout.blocks, gradients)
        return gradients

    def _send_to_owners(self) -> None:
        """Message m of `_sent` becomes a message of `_received` on machine m's rank."""
        if self._size == 1:
            self._received.copy_(self._sent)
        else:
            peers = self._group if self._machines is None else self._machines.peers
            dist.all_to_all_single(self._received, self._sent, group=peers)

    def _send_to_all(self) -> None:
        """Every rank's `_mean` becomes a message of everybody's `_everybodys`."""
        if self._size == 1:
            self._everybodys.copy_(self._mean)
        else:
            dist.all_gather_into_tensor(self._everybodys, self._mean, group=self._group)


class GradientCompression:
    """Data parallelism's hook: gradients travel compressed, both ways.

    Args:
        codec: How they are scaled.
        rank: This rank. size: Number of ranks.
        seed: 0..2^63-1, the same on all ranks. With the number of the update it decides all random
            bits, so that a resumed run goes on as if it had not been interrupted.
        device: Of the network.
        group: The ranks. Over gloo nothing else may use it: its collectives run in a thread.
        machines: Groups within it, for which the same holds; None for one level.
    """

    def __init__(
        self,
        codec: Codec,
        *,
        rank: int,
        size: int,
        seed: int,
        device: torch.device,
        group: dist.ProcessGroup | None,
        machines: MachineGroups | None = None,
    ) -> None:
        """Ready to attach."""
        self._codec: Codec = codec
        self._rank, self._size, self._seed = rank, size, seed
        self._group, self._machines = group, machines
        self._update = torch.zeros(1, dtype=torch.int64, device=device)
        self._aside = SideStream(device) if device.type == "cuda" else SideThread()
        self._first_blocks: dict[int, int] = {}  # by the parameter's id
        # By the bucket's index, with the ids of the parameters in it: DDP sorts its buckets anew
        # after the first backward pass.
        self._averages: dict[int, tuple[list[int], BucketAverage]] = {}
        self._finished_bytes, self._has_begun = 0, False

    @property
    def num_machines(self) -> int:
        """Machines between which gradients travel compressed; 1 where ranks do it on one level."""
        return self._size // self._machines.local_size if self._machines else 1

    @property
    def bytes_sent(self) -> int:
        """Bytes of messages that left this rank in all updates so far, also in the one under way.

        What is averaged within a machine, 4 bytes an element, is not among them.
        """
        return self._finished_bytes + (self._bytes_of_an_update if self._has_begun else 0)

    def attach(self, net: DistributedDataParallel) -> None:
        """Makes a network's gradients travel this way; before its first backward pass.

        Raises:
            UserError: it has gradients that are not float32.
        """
        parameters: dict[str, nn.Parameter] = {
            name: p for name, p in net.module.named_parameters() if p.requires_grad
        }
        for name, parameter in parameters.items():
            if parameter.dtype is not torch.float32:
                raise UserError(
                    f"--compress {self._codec}: takes float32 gradients, and those of {name} are "
                    f"{str(parameter.dtype).removeprefix('torch.')}; leave --compress out"
                )
        first_blocks = number_blocks([p.numel() for p in parameters.values()])
        self._first_blocks = dict(zip(map(id, parameters.values()), first_blocks, strict=True))
        net.register_comm_hook(None, lambda state, bucket: self._average(bucket))

    def begin_update(self, update: int) -> None:
        """Says which update's gradients come next; waits for nothing.

        Outside of what a CUDA graph records: a replay reads the number that was set last.
        """
        self._finished_bytes = self.bytes_sent
        self._has_begun = True
        self._update.fill_(update)

    @property
    def _bytes_of_an_update(self) -> int:
        return sum(average.bytes_sent for _, average in self._averages.values())

    def _average(self, bucket: GradBucket) -> Future[Tensor]:
        """The hook: begins to average a bucket, whose turn is the same on all ranks."""
        index, gradients = bucket.index(), bucket.buffer()
        ids = [id(parameter) for parameter in bucket.parameters()]
        known_ids, average = self._averages.get(index, (None, None))
        if average is None or known_ids != ids:
            average = self._build_average(bucket, ids)
            self._averages[index] = ids, average
        if bucket.is_last():
            for gone in [other for other in self._averages if other > index]:
                del self._averages[gone]
        return self._aside.run(lambda: average.average_(gradients))

    def _build_average(self, bucket: GradBucket, ids: Sequence[int]) -> BucketAverage:
        start = bucket.buffer().storage_offset()
        pieces = [
            Piece(
                self._first_blocks[name], int(gradient.storage_offset() - start), gradient.numel()
            )
            for name, gradient in zip(ids, bucket.gradients(), strict=True)
        ]
        return BucketAverage(
            pieces,
            self._codec,
            rank=self._rank,
            size=self._size,
            seed=self._seed,
            update=self._update,
            group=self._group,
            machines=self._machines,
        )


Job = Callable[[], Tensor]


class SideStream:
    """Runs jobs on a CUDA stream of their own, in order; the host issues them and goes on."""

    def __init__(self, device: torch.device) -> None:
        """High priority, because the messages should leave before the backward pass ends."""
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=-1)

    def run(self, job: Job) -> Future[Tensor]:
        """Issues a job behind the current stream; who waits for the future waits on the device."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        done: Future[Tensor] = Future(devices=[self._device])
        with torch.cuda.stream(self._stream):
            done.set_result(job())
        return done


class SideThread:
    """Runs jobs in a thread of their own, in order.

    After one has failed none runs any more, and all get its exception: the connection is broken,
    and ranks that go on would wait for each other.
    """

    def __init__(self) -> None:
        """Starts the thread. It ends with this object, and at the latest with the process."""
        self._jobs: queue.SimpleQueue[tuple[Job, Future[Any]] | None] = queue.SimpleQueue()
        # A daemon, so that a process can end whose peer never answers.
        thread = threading.Thread(
            target=_run_jobs, args=(self._jobs,), name="gradients", daemon=True
        )
        thread.start()
        weakref.finalize(self, _end_thread, thread, self._jobs)

    def run(self, job: Job) -> Future[Tensor]:
        """Queues a job; the future has its result, or raises what it raised."""
        done: Future[Any] = Future()
        result = done.then(_result_of)
        self._jobs.put((job, done))
        return result


def _result_of(done: Future[Any]) -> Tensor:
    """A job's result. Raised in a callback an exception reaches C++, which has no other way."""
    outcome: Tensor | Exception = done.value()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _run_jobs(jobs: queue.SimpleQueue[tuple[Job, Future[Any]] | None]) -> None:
    """The thread's loop; it keeps nothing of a job that is done."""
    failure: Exception | None = None
    while (entry := jobs.get()) is not None:
        job, done = entry
        outcome: Tensor | Exception
        try:
            outcome = job() if failure is None else failure
        except Exception as error:  # it belongs to the thread that waits
            outcome = failure = error
        done.set_result(outcome)
        del entry, job, done, outcome


def _end_thread(
    thread: threading.Thread, jobs: queue.SimpleQueue[tuple[Job, Future[Any]] | None]
) -> None:
    jobs.put(None)
    if thread is not threading.current_thread():
        thread.join(LAST_PATIENCE)
