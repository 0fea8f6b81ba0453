"""One launch for one update: a step recorded as a CUDA graph and replayed.

A step is a function of tensors and numbers that does all its work on the device: forward pass,
backward pass, perturbation, optimizer. Its first calls run as they are. Then it is recorded once
for these shapes, and from there on a call copies new inputs into the recording's own and launches.
The host issues one launch where it issued hundreds, and never falls behind the device.

What a step may not do is read the device, and what the host does in it happens at the recording
only. The host's half of an update (learning rate, counting) is therefore `Learner.update`'s.

Source: https://docs.nvidia.com/dl-cuda-graph and torch's notes on CUDA graphs (warm-up on a side
stream, gradients set to None before the recording so that they are born in the graph's memory).
"""

from __future__ import annotations

import collections
import contextlib
import functools
import time
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from freeadv_fast.errors import UserError

Step: TypeAlias = Callable[..., None]

# Calls that run as they are before a recording: cuDNN times its algorithms in the first, the
# gradient scaler makes its tensors in it, Triton compiles. Torch's examples take 3, and 11 under
# data parallelism, which rebuilds its buckets and times its collectives in the first ones.
WARM_UP = 3
WARM_UP_OF_RANKS = 11


class GraphRunner:
    """Runs steps, each as a recording once it is warm.

    NCCL asks that all ranks record a collective or none does. They do in the same update, for they
    are given the same numbers: the size of the global minibatch is one of them.

    Args:
        say: Tells the user in one line why steps run eagerly after all.
        recorder: Makes recordings.
        warm_up: Calls that run as they are before a recording.
        trial: Decides which recordings can be trusted; see `step.trial`. None trusts all.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        recorder: CudaRecorder,
        warm_up: int = WARM_UP,
        trial: Judge | None = None,
    ) -> None:
        """Nothing is recorded yet."""
        self._say = say
        self._recorder = recorder
        self._warm_up = warm_up
        self._trial = trial
        self._is_off = False
        self.forget()

    @property
    def is_warm(self) -> bool:
        """Whether there is a recording, or will be none."""
        return self._is_off or bool(self._recordings)

    def forget(self) -> None:
        """Drops all recordings: tensors that they write to were replaced, or steps changed."""
        self._num_calls: collections.Counter[Hashable] = collections.Counter()
        self._recordings: dict[Hashable, Recording] = {}
        self._recorder.begin_anew()

    def __call__(self, step: Step, *inputs: Any) -> None:
        """Runs ``step(*inputs)``, or launches its recording.

        Args:
            step: What to run. A recording belongs to it and to what `inputs` look like.
            *inputs: Tensors and numbers. A step may change its tensors in place: the change stays
                with the recording as long as the caller passes the same tensor, untouched.

        Raises:
            UserError: memory is short while recordings hold some; or a recording failed in a way
                after which torch cannot go on.
        """
        try:
            self._run(step, *inputs)
        except torch.OutOfMemoryError as error:
            if not self._recordings:
                raise
            raise UserError(
                f"--graphs: out of memory, of which recordings hold some ({first_line(error)}); "
                "use --graphs off or a smaller --batch-size"
            ) from error

    def _run(self, step: Step, *inputs: Any) -> None:
        """`__call__`, less its complaint."""
        key = None if self._is_off else _key(step, inputs)
        if key is None:
            step(*inputs)
            return
        if key not in self._recordings:
            self._num_calls[key] += 1
            if self._num_calls[key] <= self._warm_up:
                with self._recorder.warming_up():
                    step(*inputs)
                return
            record = functools.partial(self._record, step, inputs)
            found = record() if self._trial is None else self._trial(step, inputs, record)
            if isinstance(found, str):
                self._is_off = True
                self.forget()
                self._say(f"graphs: off, this step cannot be recorded ({found})")
                step(*inputs)
                return
            self._recordings[key] = found
        self._recordings[key](*inputs)

    def _record(self, step: Step, inputs: tuple[Any, ...]) -> Recording | str:
        """A recording, or why there is none."""
        try:
            return Recording(step, inputs, self._recorder)
        except RuntimeError as error:  # CUDA's errors are RuntimeErrors
            return first_line(error)


class Judge(Protocol):
    """Decides whether a recording can be trusted."""

    def __call__(
        self, step: Step, inputs: tuple[Any, ...], record: Callable[[], Recording | str]
    ) -> Recording | str:
        """A recording of ``step(*inputs)``, which was not made; or why there is none."""
        ...


class Recording:
    """A step as one launch, and the tensors that it reads its inputs from.

    Args:
        step: What is recorded; recording runs its Python once and nothing on the device.
        inputs: Tensors and numbers; numbers are part of the recording.
        recorder: Makes the launch.
    """

    def __init__(self, step: Step, inputs: tuple[Any, ...], recorder: CudaRecorder) -> None:
        """Records."""
        self._twins = [_twin(value) if isinstance(value, Tensor) else value for value in inputs]
        # What each twin was copied from. Weak: the recording keeps no minibatch alive.
        self._sources: list[tuple[weakref.ref[Tensor], int] | None] = [None] * len(inputs)
        self._launch = recorder.record(lambda: step(*self._twins))

    def __call__(self, *inputs: Any) -> None:
        """Copies the tensors that are new since the last call, and launches.

        A minibatch is copied once for all its replays: 256 bytes images at 224 px take 18
        microseconds of an H200's 4.3 TB/s.
        """
        for place, (value, twin) in enumerate(zip(inputs, self._twins, strict=True)):
            if not isinstance(value, Tensor):
                continue
            source = self._sources[place]
            if source is None or source[0]() is not value or source[1] != value._version:
                with torch.no_grad():
                    twin.copy_(value)
                self._sources[place] = (weakref.ref(value), value._version)
        self._launch()


class CudaRecorder:
    """Records on a stream and in a memory pool of its own."""

    def __init__(self) -> None:
        """Takes a stream of the current device.

        Of high priority: torch hands out 32 ordinary ones in turn, and each new prefetcher takes
        another, so that one of them would come to record its copies as well.
        """
        self.stream = torch.cuda.Stream(priority=-1)  # type: ignore[no-untyped-call]

    def begin_anew(self) -> None:
        """A new pool: an old one is gone with its last recording. None of a pool's overlap."""
        self._pool = torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def warming_up(self) -> Iterator[None]:
        """What runs in here runs on the stream on which it will be recorded."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)

    def has_ended(self, seconds: float) -> bool:
        """Whether what the current stream has to do ends within so many seconds."""
        end, deadline = torch.cuda.Event(), time.monotonic() + seconds
        end.record()
        while not end.query() and time.monotonic() < deadline:
            time.sleep(1e-3)
        return bool(end.query())

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """A function that launches on the current stream what `step` would do.

        Other threads, such as DALI's, may allocate meanwhile: hence ``thread_local``.

        Raises:
            RuntimeError: `step` raised it; nothing is recorded, and all is as before.
            UserError: CUDA broke the recording off. torch 2.11 then leaves its allocator, its
                generator and its current stream in the state of recording (pytorch #180395).
        """
        graph, cause = torch.cuda.CUDAGraph(), None
        try:
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                try:
                    step()
                except RuntimeError as error:  # kept from the context, whose own would hide it
                    cause = error
        except RuntimeError as error:
            raise UserError(
                "--graphs: an update or a check cannot be recorded "
                f"({first_line(cause or error)}); use --graphs off"
            ) from (cause or error)
        if cause is not None:
            raise cause
        launch: Callable[[], None] = graph.replay
        return launch


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    (line, *_) = str(error).splitlines() or [type(error).__name__]
    return line


def _key(step: Step, inputs: tuple[Any, ...]) -> Hashable | None:
    """What a recording is good for; None where inputs are neither tensors nor numbers."""
    kinds: list[Hashable] = []
    for value in inputs:
        if isinstance(value, Tensor):
            kinds.append((value.shape, value.stride(), value.dtype, value.requires_grad))
        elif isinstance(value, int | float):
            kinds.append(value)
        else:
            return None
    return step, *kinds


def _twin(tensor: Tensor) -> Tensor:
    """A tensor of the same shape, strides and kind, a leaf."""
    return torch.empty_like(tensor).requires_grad_(tensor.requires_grad)
