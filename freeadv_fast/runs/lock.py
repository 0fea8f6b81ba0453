"""One process at a time in a folder: a lock that dies with its owner.

The lock is a file that names its owner: host, process id, start. Where the owner can be seen (the
same boot of the same machine, the same process namespace) it is alive if that process is; elsewhere
if its heartbeat, the file's time of change, goes on. Both times are stamped by the file system that
holds the folder, so that no two machines' clocks are compared. Locks of the operating system
(`flock`) are not used: on network file systems they may hold on one machine only.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from freeadv_fast.errors import UserError

NAME = "run.lock"

# An NFS client may show a file as it was up to a minute ago (acdirmax), so that a heartbeat is
# missed for certain only after several of them and that minute.
SECONDS_BETWEEN_BEATS = 15.0
SECONDS_OF_PATIENCE = 180.0


class FolderLock:
    """The lock of a folder; nothing is held until `take`.

    Args:
        folder: Exists when `take` is called.
        flag: The flag to name when the folder is held by another process.
    """

    def __init__(self, folder: Path, flag: str = "--output-dir") -> None:
        """Touches nothing."""
        self.folder, self.flag = folder, flag
        self.path = folder / NAME
        self._own: str | None = None
        self._released = threading.Event()

    def take(self) -> str | None:
        """Takes the lock; held already, it stays so.

        Returns:
            A line about a dead owner whose lock was taken over; None where there was none.

        Raises:
            UserError: another process holds it, or the folder cannot be written.
        """
        if self._own is not None:
            return None
        own = json.dumps(whoami())
        dead = None
        try:
            while not self._create(own):
                dead = self._remove_dead()
        except OSError as error:
            raise UserError(f"{self.flag} {self.folder}: {error.strerror or error}") from None
        self._own = own
        threading.Thread(target=self._beat, name="lock heartbeat", daemon=True).start()
        return dead and f"the lock of {dead} in {self.folder} is taken over: that process is gone"

    def renew(self) -> None:
        """Makes the file again where somebody has removed it; without effect when not held."""
        if self._own is not None:
            self._create(self._own)

    def release(self) -> None:
        """Gives the lock back, unless it has become another's; without effect when not held."""
        self._released.set()
        with contextlib.suppress(OSError):
            if self._own is not None and self._read() == self._own:
                self.path.unlink()
        self._own = None

    def refuse_if_lost(self) -> None:
        """Raises UserError where another process has taken over what this one held."""
        if self._own is None:
            return
        with contextlib.suppress(FileNotFoundError):  # removed by hand: nobody else is here
            if (now := self._read()) != self._own:
                raise UserError(
                    f"{self.flag} {self.folder}: taken over by {in_words(now)} while this process "
                    "stood still; nothing more is written"
                )

    def _create(self, own: str) -> bool:
        """Makes the file, whole and at once, unless it is there."""
        partial = self.path.with_name(f".{NAME}.{os.getpid()}.{socket.gethostname()}.partial")
        try:
            partial.write_text(own, encoding="utf-8")
            os.link(partial, self.path)
        except FileExistsError:
            return False
        finally:
            partial.unlink(missing_ok=True)
        return True

    def _remove_dead(self) -> str:
        """Removes the lock of an owner that is gone, and names it.

        Raises:
            UserError: the owner is alive.
        """
        try:
            found = self._read()
        except FileNotFoundError:  # given back meanwhile
            return "its last owner"
        if self._is_alive(found):
            raise UserError(
                f"{self.flag} {self.folder}: in use by {in_words(found)}; wait until it ends, stop "
                "it, or choose another folder"
            )
        aside = self.path.with_name(f".{NAME}.{os.getpid()}.stale")
        os.replace(self.path, aside)
        taken = aside.read_text(encoding="utf-8")
        if taken != found:  # another process was faster, and this is its lock
            with contextlib.suppress(FileExistsError):
                os.link(aside, self.path)
        aside.unlink()
        return in_words(found)

    def _is_alive(self, text: str) -> bool:
        """Whether the process that wrote a lock still runs; waits where that takes watching."""
        owner, here = parsed(text), whoami()
        if owner.get("place") == here["place"]:
            started = started_at(owner.get("pid"))
            return started is not None and started == owner.get("started")
        seen = self.path.stat().st_mtime
        deadline = time.monotonic() + SECONDS_OF_PATIENCE - (self._now() - seen)
        if time.monotonic() < deadline:
            print(
                f"{self.flag} {self.folder}: locked by {in_words(text)}; waiting up to "
                f"{deadline - time.monotonic():.0f} s for a sign of life",
                flush=True,
            )
        while time.monotonic() < deadline:
            time.sleep(min(1.0, SECONDS_BETWEEN_BEATS))
            with contextlib.suppress(FileNotFoundError):
                if self.path.stat().st_mtime != seen:
                    return True
        return False

    def _now(self) -> float:
        """The time as the folder's file system stamps it."""
        probe = self.path.with_name(f".{NAME}.{os.getpid()}.now")
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()

    def _read(self) -> str:
        return self.path.read_text(encoding="utf-8")

    def _beat(self) -> None:
        """Renews the file's time of change while the lock is held."""
        while not self._released.wait(SECONDS_BETWEEN_BEATS):
            with contextlib.suppress(OSError):  # a full or vanished disk: others say so
                if self._read() == self._own:
                    os.utime(self.path)


def whoami() -> dict[str, Any]:
    """This process as a lock names it."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "started": started_at(os.getpid()),
        "place": place(),
    }


def place() -> list[str]:
    """What processes have in common that see each other: the boot and the process namespace."""
    boot, namespace = "", ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = os.readlink("/proc/self/ns/pid")
    return [boot or socket.gethostname(), namespace]


def started_at(pid: object) -> int | None:
    """When a process started, in clock ticks since the boot; None where there is no such process.

    A process id alone may be another process's by now.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        state, *others = text.rpartition(")")[2].split()  # the name before may hold anything
        return None if state in "ZX" else int(others[18])
    except (OSError, ValueError, IndexError):
        return None


def parsed(text: str) -> dict[str, Any]:
    """What a lock says; nothing of a damaged one, whose heartbeat then decides."""
    try:
        owner = json.loads(text)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def in_words(text: str) -> str:
    """``process 4711 on n12 (since 2026-11-27T10:15:00+01:00)``."""
    owner = parsed(text)
    names = [owner.get(key, "unknown") for key in ("pid", "host", "since")]
    return "process {} on {} (since {})".format(*names)
