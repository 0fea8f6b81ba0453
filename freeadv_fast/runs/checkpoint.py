"""Checkpoints: step-exact, atomic, and never the reason that something is lost.

A checkpoint is one file written beside the old one and renamed over it; the old one stays as
``previous.pt`` until the next save. Training goes on while it is written. It holds tensors and
plain Python values only, so that ``torch.load(weights_only=True)`` reads it, here and elsewhere.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from freeadv_fast.distributed.world import World
from freeadv_fast.errors import UserError, remedy
from freeadv_fast.models.batch_norm import branch_parameters, without_auxiliary
from freeadv_fast.models.normalize import plain_network
from freeadv_fast.runs.foreign import (
    find_weights,
    first_misfit,
    named_as,
    other_head,
    printable,
    read_file,
    without_spare,
)

LAST, PREVIOUS, BEST, DAMAGED = "last.pt", "previous.pt", "best.pt", "damaged.pt"


def save_checkpoint(state: dict[str, Any], folder: Path, name: str = LAST) -> None:
    """Writes ``folder/name`` atomically; a replaced `LAST` stays as `PREVIOUS`.

    Raises:
        UserError: the file cannot be written, for want of space or else; the old one stays.
    """
    write_checkpoint(as_bytes(state), folder, name)


def as_bytes(state: dict[str, Any]) -> memoryview:
    """The file that `torch.save` would write."""
    buffer = io.BytesIO()  # torch.save to a full disk dies inside its zip writer, without an errno
    torch.save(state, buffer)
    return buffer.getbuffer()


def write_checkpoint(content: memoryview, folder: Path, name: str) -> None:
    """What `save_checkpoint` does with a state's bytes."""
    path, partial = folder / name, folder / f".{name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if name == LAST and path.exists():
            os.replace(path, folder / PREVIOUS)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(
            f"--output-dir: cannot save {path}: {error.strerror or error}; the one before it is "
            f"kept, {remedy(error) or 'mend that'} and add --resume"
        ) from None


class Saver:
    """Saves checkpoints one after the other, and writes them while training goes on.

    Only their bytes are made at once, from tensors that the next update will change. Of 205 MB, a
    ResNet-50 with momentum, that took a virtual machine of two cores 0.23 s, writing them 0.4 s and
    waiting for its disk 0.4 s more. Once one cannot be written, none of those behind it is.
    """

    def __init__(self) -> None:
        """Nothing is being written."""
        self._writes: dict[str, _Write] = {}  # the latest of each name, in order

    def save(self, state: dict[str, Any], folder: Path, name: str = LAST) -> None:
        """Begins what `save_checkpoint` does, once the last one of that name is on the disk.

        Raises:
            UserError: an earlier one could not be written.
        """
        self._settle([w for own, w in self._writes.items() if own == name or not w.is_alive()])
        self._writes.pop(name, None)
        before = next(reversed(self._writes.values()), None)
        self._writes[name] = _Write(before, as_bytes(state), folder, name)
        self._writes[name].start()

    def finish(self) -> None:
        """Waits until everything is on the disk.

        Raises:
            UserError: something could not be written.
        """
        self._settle(list(self._writes.values()))
        self._writes.clear()

    def _settle(self, writes: list[_Write]) -> None:
        """Waits for some; the first failure is told, once."""
        for write in writes:
            write.join()
        failures = [write.failure for write in writes if write.failure is not None]
        if failures:
            self._writes.clear()
            raise failures[0]


class _Write(threading.Thread):
    """A checkpoint on its way to the disk, behind the one before it."""

    def __init__(self, before: _Write | None, content: memoryview, folder: Path, name: str) -> None:
        """As `write_checkpoint`. A process that leaves at once does not wait for it."""
        super().__init__(name="freeadv-checkpoint", daemon=True)
        self.failure: Exception | None = None
        self._before, self._arguments = before, (content, folder, name)

    def run(self) -> None:
        """Writes, unless the one before it could not be written."""
        try:
            if self._before is not None:
                self._before.join()
                self.failure = self._before.failure
            if self.failure is None:
                write_checkpoint(*self._arguments)
        except Exception as error:  # for the saver to raise
            self.failure = error
        finally:
            del self._before, self._arguments  # their memory


def is_intact(path: Path) -> bool:
    """Whether a checkpoint's bytes are what was written (the zip file's checksums) and load."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None and bool(load_checkpoint(path))
    except Exception:  # zipfile raises a handful of unrelated types for a damaged file
        return False


def newest_intact(folder: Path) -> Path | None:
    """The newest checkpoint that can be read, or None when the folder holds none at all.

    A damaged `LAST` is set aside as `DAMAGED`: the next save would push it over the intact one.

    Raises:
        UserError: checkpoints are there, and every one of them is damaged.
    """
    candidates = [folder / LAST, folder / PREVIOUS]
    present = [path for path in candidates if path.exists()]
    for path in present:
        if is_intact(path):
            if path != present[0]:
                os.replace(present[0], folder / DAMAGED)
            return path
    if present:
        raise UserError(
            f"--resume: {present[0]} is damaged and there is no older one; "
            "start again with another --output-dir"
        )
    return None


def load_checkpoint(path: Path, flag: str = "--resume") -> dict[str, Any]:
    """Reads a checkpoint or a bare state dict onto the CPU.

    Raises:
        UserError: missing, damaged, or holding what only running its code can load.
    """
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file")
    return read_file(path, f"{flag} {path}")


def load_weights(
    model: nn.Module,
    state: dict[str, Any],
    arch: str,
    origin: str,
    *,
    is_fine_tuned: bool = False,
) -> list[str]:
    """Loads the weights of a checkpoint, ours or another's, into a network.

    Args:
        model: The network, not wrapped.
        state: What `load_checkpoint` returned.
        arch: The network's name, for the message.
        origin: Flag and path to name when the weights do not fit.
        is_fine_tuned: Whether a classifier for other classes is left as it is, with fresh weights.

    Returns:
        What the user should know, a line or none.

    Raises:
        UserError: the weights belong to another architecture.
    """
    found = find_weights(state)
    if not found:
        raise UserError(f"{origin}: holds no weights")
    model = plain_network(model)  # stock keys, without a per-image standardiser's prefix
    own = model.state_dict()
    weights = without_spare(own, named_as(own.keys(), found))
    if not branch_parameters(model)[1]:  # inference and other methods use the main branch
        weights = without_auxiliary(weights)
    head = other_head(own, weights) if is_fine_tuned else []
    remarks = []
    if head:
        there, here = len(weights[head[0]]), len(own[head[0]])
        remarks.append(
            f"{origin}: is for {there:,} classes, here are {here:,}; {', '.join(head)} start afresh"
        )
    weights |= {key: own[key] for key in head}
    misfit = first_misfit(own, weights)
    if misfit:
        saved = state.get("arch")
        belongs = "belongs to another network"
        if isinstance(saved, str):
            belongs = f"holds {printable(saved)}"
        raise UserError(f"{origin}: {belongs}, not --arch {arch} with these classes ({misfit})")
    model.load_state_dict(weights)
    return remarks


def batch_norm_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The floating-point buffers of a network: batch norm's running statistics."""
    return {name: b for name, b in model.named_buffers() if b.is_floating_point()}


def average_buffers_(model: nn.Module, world: World) -> None:
    """Replaces running statistics by their mean over the ranks."""
    if world.size > 1:
        for buffer in batch_norm_buffers(model).values():
            world.sum_(buffer).div_(world.size)


@contextlib.contextmanager
def averaged_buffers(model: nn.Module, world: World) -> Iterator[None]:
    """Within the block, running statistics are their mean over the ranks; afterwards each its own.

    Every rank sees other images, so each has statistics of its own (DDP runs with
    ``broadcast_buffers=False``). What is evaluated and saved is the mean. Training goes on from
    each rank's own, so that a save in between changes nothing.
    """
    if world.size == 1:
        yield
        return
    buffers = list(batch_norm_buffers(model).values())
    own = [buffer.clone() for buffer in buffers]
    average_buffers_(model, world)
    try:
        yield
    finally:
        for buffer, value in zip(buffers, own, strict=True):
            buffer.copy_(value)


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """State of torch's random generators, for networks that draw (dropout, stochastic depth)."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Continues torch's random generators from a saved state."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
