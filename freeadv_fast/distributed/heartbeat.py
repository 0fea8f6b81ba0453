"""Who is still there: each rank tells the others every second that it lives, and where it is.

A rank that dies or is stopped leaves the others in a collective, in which they would wait for the
process group's time-out, an hour. So a thread of each rank writes a beat to a store that rank 0
keeps, beside the process groups, and reads the others'. Another one judges them. It names

- a rank that is lost: its process is gone from this machine, or its beat has stood still for
  `PATIENCE`. The main thread learns of it in `verdict` where its collective failed (gloo closes the
  connection); where it still waits (NCCL, a stopped peer), the thread ends the process.
- a rank that is late: it lives, but others have waited for it for `LATE`. That is said, no more.

A rank's place is the number of things that all ranks do in the same order (minibatches, agreements
on the host), so that of two ranks the one with fewer of them is the one that is waited for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore

from freeadv_fast.errors import UserError

# A beat is a few bytes a rank and second; a rank whose processor is taken beats late, not never.
SECONDS_BETWEEN_BEATS = 1.0
PATIENCE = 20.0
LATE = 45.0
# So long the main thread may take to end the process in its own way, once a rank is lost.
GRACE = 5.0


class PeerLost(UserError):
    """A rank died or hangs while the others wait for it; each of these raises one.

    Nothing can be sent over the process group afterwards: leave, and start all ranks again.
    """


@dataclasses.dataclass(frozen=True)
class Beat:
    """What a rank says of itself.

    Attributes:
        host: Where its process can be seen, `process_space`. pid: Its process there.
        count: Beats so far. arrivals: Places that it has come to.
        place: The newest of them, for users. has_left: Whether it left in good order.
    """

    host: str
    pid: int
    count: int
    arrivals: int
    place: str
    has_left: bool

    def encode(self) -> str:
        """As the store keeps it."""
        numbers = self.pid, self.count, self.arrivals, int(self.has_left)
        return "\0".join([self.host, *map(str, numbers), self.place])

    @classmethod
    def decode(cls, text: str) -> Beat:
        """Reads what `encode` wrote."""
        host, pid, count, arrivals, has_left, place = text.split("\0")
        return cls(host, int(pid), int(count), int(arrivals), place, has_left == "1")


class Heartbeat:
    """One rank's beat, and its watch over the others.

    Args:
        rank: This rank. size: Number of ranks.
        store: That of all ranks; used by the thread of this object alone once it is started.
    """

    def __init__(self, rank: int, size: int, store: Store) -> None:
        """Beats once, so that every rank's beat is there before anybody looks for it."""
        self._rank, self._size, self._store = rank, size, store
        self._host, self._pid = process_space(), os.getpid()
        self._count = 0
        # Written by the main thread alone, so that none of its arrivals is lost to a beat.
        self._arrivals, self._place = 0, "the start"
        self._is_leaving = threading.Event()
        self._is_known = threading.Event()
        self._is_taken = threading.Event()
        self._lost = ""
        # Each rank's newest count and when it came; this rank's arrivals and when they grew.
        self._seen: dict[int, tuple[int, float]] = {}
        self._moved = 0, time.monotonic()
        self._said_late = -1
        self._beats: list[Beat] = []
        self._read_at = 0.0
        # When a rank's process was first seen to have ended.
        self._ended: dict[int, float] = {}
        self._write()
        self._threads = [
            threading.Thread(target=work, name="heartbeat", daemon=True)
            for work in (self._exchange, self._watch)
        ]

    def start(self) -> None:
        """Begins to watch; every rank must have made its heartbeat."""
        self._beats, self._read_at = self._read(), time.monotonic()
        for thread in self._threads:
            thread.start()

    def arrive(self, place: str | None) -> None:
        """Notes that this rank has come to a place; see the function of that name."""
        self._place = place or self._place
        self._arrivals += 1

    def leave(self) -> None:
        """Says goodbye, so that the others do not take this rank for lost."""
        self._is_leaving.set()
        for thread in self._threads:
            thread.join(GRACE)

    def verdict(self) -> str:
        """Waits until a lost rank is known.

        Returns:
            A line that names it; empty where all others live, and what failed is something else.
        """
        self._is_taken.set()
        self._is_known.wait(PATIENCE + 2 * SECONDS_BETWEEN_BEATS)
        return self._lost

    def _write(self, has_left: bool = False) -> None:
        self._count += 1
        place = self._count, self._arrivals, self._place
        beat = Beat(self._host, self._pid, *place, has_left)
        self._store.set(f"beat{self._rank}", beat.encode())

    def _exchange(self) -> None:
        """One thread: writes this rank's beat and reads the others', until this rank leaves.

        A read of a store whose process is stopped never returns, whatever the store's time-out;
        the other thread sees that no beats come any more.
        """
        with contextlib.suppress(RuntimeError):  # the store lives in rank 0's process
            while not self._is_leaving.wait(SECONDS_BETWEEN_BEATS):
                self._write()
                began = time.monotonic()
                self._beats, self._read_at = self._read(), began
            self._say_goodbye()

    def _watch(self) -> None:
        """The other thread: judges the beats, and ends the process where a rank is lost."""
        looked_at = time.monotonic()
        while not self._is_leaving.wait(SECONDS_BETWEEN_BEATS):
            now = time.monotonic()
            if now - looked_at > PATIENCE / 2:  # this process itself was stopped, not the others
                self._read_at, self._seen, self._moved = now, {}, (self._arrivals, now)
            looked_at = now
            if now - self._read_at >= PATIENCE:
                if self._beats[0].has_left:
                    return
                self._lost = lost_line(0, f"its process has not answered for {PATIENCE:g} s")
            else:
                self._look(self._beats, now)
            if self._lost:
                self._is_known.set()
                if not self._is_taken.wait(GRACE):
                    end_process(self._lost)
                return

    def _say_goodbye(self) -> None:
        """The last beat. Rank 0 keeps the store until the others have left or know that it will."""
        self._write(has_left=True)
        deadline = time.monotonic() + 2 * SECONDS_BETWEEN_BEATS
        while self._rank == 0 and time.monotonic() < deadline:
            if all(beat.has_left for beat in self._read()):
                return
            time.sleep(SECONDS_BETWEEN_BEATS / 20)

    def _look(self, beats: Sequence[Beat], now: float) -> None:
        """Judges the newest beats: who is lost, and who is late."""
        for rank, beat in enumerate(beats):
            if self._seen.get(rank, (-1, 0.0))[0] != beat.count:
                self._seen[rank] = beat.count, now
        silence = {rank: now - at for rank, (_, at) in self._seen.items()}
        self._lost = self._find_lost(beats, silence)
        if self._arrivals != self._moved[0]:
            self._moved = self._arrivals, now
        if now - self._moved[1] >= LATE:
            self._say_late(beats, now - self._moved[1])

    def _read(self) -> list[Beat]:
        keys = [f"beat{rank}" for rank in range(self._size)]
        return [Beat.decode(value.decode()) for value in self._store.multi_get(keys)]

    def _find_lost(self, beats: Sequence[Beat], silence: dict[int, float]) -> str:
        """A line about the first rank that is lost; empty where there is none."""
        for rank, beat in enumerate(beats):
            if rank == self._rank or beat.has_left:
                continue
            if self._has_ended(rank, beat):
                return lost_line(rank, f"its process ended at {beat.place}")
            if silence[rank] >= PATIENCE:
                return lost_line(
                    rank, f"not heard from for {silence[rank]:.0f} s, last at {beat.place}"
                )
        return ""

    def _has_ended(self, rank: int, beat: Beat) -> bool:
        """Whether a rank's process ended on this machine, and without a goodbye.

        Its last beat may be newer than the one at hand: what is read afterwards decides. Rank 0's
        is, because it stays until its own has been read; later the store is gone with it.
        """
        if beat.host != self._host or is_alive(beat.pid):
            return False
        ended_at = self._ended.setdefault(rank, time.monotonic())
        return rank == 0 or self._read_at > ended_at

    def _say_late(self, beats: Sequence[Beat], seconds: float) -> None:
        """Names a rank that is waited for, once a place, on the first rank that waits."""
        furthest = max(beat.arrivals for beat in beats)
        waiting = [rank for rank, beat in enumerate(beats) if beat.arrivals == furthest]
        late = [rank for rank, beat in enumerate(beats) if beat.arrivals < furthest]
        if not late or waiting[0] != self._rank or self._said_late == furthest:
            return
        self._said_late = furthest
        print(
            f"rank {late[0]} is late: at {beats[late[0]].place} while others have waited "
            f"{seconds:.0f} s for it at {self._place}",
            flush=True,
        )


def end_process(line: str) -> None:
    """Ends a process of which a collective hangs: nothing else would, and an exit waits for it."""
    print(f"error: {line}", file=sys.stderr, flush=True)
    os._exit(2)


def lost_line(rank: int, why: str) -> str:
    """The line that all other ranks say."""
    return f"rank {rank} is lost ({why}); restart all ranks with --resume"


def process_space() -> str:
    """What processes have in common that see each other: the boot, and the process namespace.

    Containers may share a host's name, and then a process id of one means another process, or none,
    in the other.
    """
    boot, namespace = socket.gethostname(), ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{boot} {namespace}"


def is_alive(pid: int) -> bool:
    """Whether a process that can be seen runs; one that ended unwaited for does not."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


# This process's heartbeat while it is one of several; as torch keeps its default process group.
_current: Heartbeat | None = None


def begin_heartbeat(rank: int, size: int, host_group: dist.ProcessGroup) -> None:
    """Opens the store on rank 0 and starts every rank's heartbeat; all ranks together."""
    global _current
    patience = datetime.timedelta(seconds=PATIENCE)
    address: list[Any] = [None]
    store = None
    if rank == 0:
        # torchrun names the machine of rank 0 so that every other machine can reach it.
        host = os.environ["MASTER_ADDR"]
        store = TCPStore(host, 0, size, True, patience, wait_for_workers=False)
        address = [(host, store.port)]
    dist.broadcast_object_list(address, src=0, group=host_group)
    if store is None:
        host, port = address[0]
        store = TCPStore(host, port, size, False, patience, wait_for_workers=False)
    _current = Heartbeat(rank, size, store)
    dist.barrier(group=host_group)
    _current.start()


def end_heartbeat() -> None:
    """Says goodbye to the other ranks, if there are any."""
    global _current
    if _current is not None:
        _current.leave()
        _current = None


def arrive(place: str | None = None) -> None:
    """Notes a place to which all ranks come in the same order.

    Args:
        place: What users are told, such as ``update 12``; None for a step on the way from there.
    """
    if _current is not None:
        _current.arrive(place)


@contextlib.contextmanager
def naming_a_lost_rank() -> Iterator[None]:
    """Turns the failure of a collective within the block into the line that names the lost rank.

    Raises:
        PeerLost: another rank died or hangs.
    """
    try:
        yield
    except RuntimeError as error:  # gloo's broken connections have no type of their own
        is_of_a_group = isinstance(error, dist.DistError) or "gloo/transport" in str(error)
        if _current is None or not is_of_a_group:
            raise
        line = _current.verdict()
        if not line:
            raise
        raise PeerLost(line) from error
