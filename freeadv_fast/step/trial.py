"""A recording beside eager updates, before it is trusted.

Over several ranks a recording also holds what no test on one GPU proves: all-reduces of gradients
that data parallelism issues between the kernels of the backward pass. So an update that is to be
recorded is first made three times from the same state, twice as it is and once by the recording.
Where the recording comes to another state, updates stay eager.

What counts as another state. Atomic additions round in a new order each time, and an attack's sign
turns a rounded zero into a step, so that two eager updates differ by what is rounding; the
recording may differ from one by `SLACK` times as much, and by a `FLOOR` of the update itself,
because inside a recording cuDNN and cuBLAS may take other algorithms. A bug is of the update's own
size: other images, a bucket that is not reduced, momentum that is dropped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from freeadv_fast.distributed.heartbeat import end_process
from freeadv_fast.distributed.world import World
from freeadv_fast.step.graphs import CudaRecorder, Recording, Step

SLACK, FLOOR = 4.0, 0.02

# A launch takes milliseconds, and seconds where NCCL still connects ranks. One that has not ended
# by then hangs, with every rank alive: nothing else would ever end the process.
PATIENCE = 120.0

State: TypeAlias = dict[str, list[Tensor]]

# A kind that is put back but not compared: copies follow the weights, and rounding makes a whole
# unit of a small difference. That they are the weights rounded is for the optimizer's tests.
ROUNDED = "rounded weights"


class Trial:
    """Makes recordings, and hands out those that do what the eager update does, on every rank.

    Args:
        state: All tensors that an update changes and a later one reads, by kind.
        world: The ranks; each must try the same updates in the same order.
        recorder: On whose stream updates run.
    """

    def __init__(self, state: Callable[[], State], world: World, recorder: CudaRecorder) -> None:
        """Nothing is on trial yet."""
        self._state, self._world, self._recorder = state, world, recorder

    def __call__(
        self, step: Step, inputs: tuple[Any, ...], record: Callable[[], Recording | str]
    ) -> Recording | str:
        """A recording of ``step(*inputs)`` that has stood its trial; no update was made.

        Weights, momentum, running statistics, perturbation, sums, generators and inputs are as
        they were, whatever comes of it.

        Args:
            step: What is recorded. It must be warm.
            inputs: Its tensors and numbers.
            record: Makes the recording, or says why there is none.

        Returns:
            The recording; or, on every rank, why one of them has none that can be trusted.
        """
        state, tensors = self._state(), [value for value in inputs if isinstance(value, Tensor)]
        before, before_inputs = _copies(state), [tensor.detach().clone() for tensor in tensors]

        def made_by(update: Callable[..., None]) -> State:
            """The state after an update from the state before."""
            with self._from_here():
                update(*inputs)
            after = _copies(state)
            _restore(state, before)
            with torch.no_grad():  # counted as a change, so that a recording copies them again
                torch._foreach_copy_(tensors, before_inputs)
            return after

        def eagerly(*values: Any) -> None:
            with self._recorder.warming_up():
                step(*values)

        def launched(*values: Any) -> None:
            assert isinstance(found, Recording)
            found(*values)
            self._end_where_it_hangs()

        eager, again = made_by(eagerly), made_by(eagerly)
        found = record()
        objection = found if isinstance(found, str) else ""
        # After this no rank is late: each launches at once.
        objection = self._world.first_objection(objection)
        if not objection:
            objection = difference(before, eager, again, made_by(launched))
            objection = self._world.first_objection(objection)
        return objection or found

    @contextlib.contextmanager
    def _from_here(self) -> Iterator[None]:
        """Draws what the generators would draw next, and puts them back."""
        device = self._world.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield

    def _end_where_it_hangs(self) -> None:
        """Waits for a launch; where it hangs, ends this rank's process as every rank does."""
        if not self._recorder.has_ended(PATIENCE):
            end_process(
                f"--graphs: an update that was recorded over {self._world.size} ranks did not end "
                f"within {PATIENCE:g} s; use --graphs off"
            )


def difference(before: State, eager: State, again: State, recorded: State) -> str:
    """In which kind of tensors a recorded update differs from eager ones by more than rounding.

    Args:
        before: The state that all of them started from.
        eager: After an eager update. again: After a second one.
        recorded: After the recording's.

    Returns:
        The first such kind and how far off it is; empty where there is none.
    """
    for kind in (kind for kind in before if kind != ROUNDED):
        change = distance(eager[kind], before[kind])
        spread = distance(eager[kind], again[kind])
        off = distance(recorded[kind], eager[kind])
        if not off <= SLACK * spread + FLOOR * change:  # a distance may be NaN
            return (
                f"its {kind} end {off:.2g} from those of an eager update, which moves them by "
                f"{change:.2g}; two eager ones end {spread:.2g} apart"
            )
    return ""


def distance(those: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """How far two lists of tensors are from each other; equal infinities are no distance.

    Euclidean for floats. Of whole numbers those that differ are counted: where a sign flips, an
    int8 perturbation jumps by two steps, however small the difference that flipped it.

    Waits for the device.
    """
    pairs = list(zip(those, others, strict=True))
    squares = [
        torch.where(a == b, 0.0, a.float() - b.float()).double().square().sum()
        for a, b in pairs
        if a.is_floating_point()
    ]
    counts = [(a != b).sum() for a, b in pairs if not a.is_floating_point()]
    length = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
    return length + (int(torch.stack(counts).sum()) if counts else 0)


def _copies(state: State) -> State:
    """The state's values in memory of their own."""
    return {kind: [t.detach().clone() for t in tensors] for kind, tensors in state.items()}


def _restore(state: State, values: State) -> None:
    """Writes values into the state's tensors.

    Not counted as a change: half-precision copies of weights are in the state themselves, and need
    not be made anew.
    """
    for kind, tensors in state.items():
        for tensor, value in zip(tensors, values[kind], strict=True):
            tensor.data.copy_(value)
