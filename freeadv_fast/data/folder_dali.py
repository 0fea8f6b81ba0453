"""Decoding by NVIDIA DALI: on the GPU (hardware decoder where there is one) or on the CPU.

On a machine with a GPU only decoding moves: windows are resized on the GPU in either case, which
takes little of its time and would take the CPU most of what decoding does.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from freeadv_fast.data.decoding import QUEUE_DEPTH, Place
from freeadv_fast.data.index import ImageIndex
from freeadv_fast.data.plan import Plan
from freeadv_fast.data.verdict import name_undecodable


class DaliDecoder:
    """Executes plans with a DALI pipeline that is told every path and window.

    A pipeline is built on first use and used again; one that another is at work beside is let go
    of after its use, such as that of a timing.
    """

    def __init__(
        self,
        index: ImageIndex,
        *,
        image_size: int,
        batch_size: int,
        num_workers: int,
        device: torch.device,
        place: Place = "GPU",
    ) -> None:
        """Decodes the images of `index`.

        Args:
            index: The split.
            image_size: Side of the output in pixels.
            batch_size: Largest number of images in a plan.
            num_workers: CPU threads that read and decode.
            device: Where the output lives.
            place: What decodes, where that is a GPU.
        """
        self.index = index
        self.image_size = image_size
        self.batch_size = batch_size
        self.num_threads = max(num_workers, 1)
        self.device = device
        self.place: Place = place if device.type == "cuda" else "CPU"
        self._idle: _PlanPipeline | None = None
        self._at_work: set[_PlanPipeline] = set()

    def __str__(self) -> str:
        """What the user reads of it."""
        return f"NVIDIA DALI on the {self.place}, {self.num_threads} threads"

    def decode(self, plans: Iterator[Plan]) -> Generator[Tensor, None, None]:
        """Yields one (n, image_size, image_size, 3) uint8 tensor a plan, in order.

        On a GPU they are produced on the current stream.

        Raises:
            UserError: a file that DALI cannot decode; the message names it.
        """
        pipeline, self._idle = self._idle or _PlanPipeline(self), None
        self._at_work.add(pipeline)
        try:
            yield from pipeline.run(plans)
        finally:
            self._at_work.remove(pipeline)
            if pipeline.is_drained and not self._at_work:
                self._idle = pipeline


class _PlanPipeline:
    """One DALI pipeline, fed from an iterator of plans."""

    def __init__(self, decoder: DaliDecoder) -> None:
        """Builds the pipeline for a decoder's sizes and device."""
        self.decoder = decoder
        self.plans: Iterator[Plan] = iter(())
        self.in_flight: collections.deque[Plan] = collections.deque()
        self.is_drained = True
        self.pipeline = self._build()

    def run(self, plans: Iterator[Plan]) -> Generator[Tensor, None, None]:
        """Yields the decoded plans; afterwards, also when abandoned, the pipeline is reusable.

        Unless a file was damaged: then it is not `is_drained`.
        """
        self.plans, self.is_drained, failed = plans, False, False
        try:
            while True:
                try:
                    images = self._next_images()
                except RuntimeError as error:
                    failed = True
                    raise name_undecodable(self._paths_in_flight(), error) from None
                if images is None:
                    return
                self.in_flight.popleft()
                yield images
        finally:
            self.is_drained = not failed and self._drain()

    def _next_images(self) -> Tensor | None:
        """The oldest minibatch in flight; None at the end of the plans."""
        on_gpu = self.decoder.device.type == "cuda"
        stream = torch.cuda.current_stream(self.decoder.device) if on_gpu else None
        try:
            (images,) = self.pipeline.run(stream)
        except StopIteration:
            return None
        # DALI takes its buffer back in the order of this stream; the copy is ours.
        return from_dlpack(images.as_tensor()).clone()

    def _drain(self) -> bool:
        """Lets go of what is in flight; whether the pipeline is now ready for other plans."""
        self.plans = iter(())
        try:
            while self._next_images() is not None:
                pass
        except RuntimeError:  # a file that nobody asked for any more
            return False
        self.in_flight.clear()
        self.pipeline.reset()
        return True

    def _paths_in_flight(self) -> list[str]:
        """Files of the minibatches that are being decoded, the oldest first."""
        return [self.decoder.index.path(row) for plan in self.in_flight for row in plan.rows]

    def _feed(self) -> tuple[Any, ...]:
        """The next plan as DALI's inputs; StopIteration ends the epoch."""
        plan = next(self.plans)
        self.in_flight.append(plan)
        index, image_size = self.decoder.index, self.decoder.image_size
        paths = [np.frombuffer(os.fsencode(index.path(row)), np.uint8) for row in plan.rows]
        # The output square in pixels of the window; DALI mirrors where start exceeds end.
        scale = plan.windows[:, 2:] / plan.resized
        start = plan.corners * scale
        end = (plan.corners + image_size) * scale
        mirrored = np.column_stack([np.zeros_like(plan.flips), plan.flips])
        return (
            paths,
            np.ascontiguousarray(plan.windows[:, :2], np.int32),
            np.ascontiguousarray(plan.windows[:, 2:], np.int32),
            np.where(mirrored, end, start).astype(np.float32),
            np.where(mirrored, start, end).astype(np.float32),
        )

    def _build(self) -> Pipeline:
        """Path -> bytes -> window -> square; antialiased triangular filter as PIL's bilinear."""
        decoder = self.decoder
        on_gpu = decoder.device.type == "cuda"
        pipeline = Pipeline(
            batch_size=decoder.batch_size,
            num_threads=decoder.num_threads,
            device_id=decoder.device.index or 0 if on_gpu else None,
            prefetch_queue_depth=QUEUE_DEPTH,
            seed=0,  # nothing here is random
        )
        with pipeline:
            paths, anchors, shapes, starts, ends = fn.external_source(
                source=self._feed,
                num_outputs=5,
                dtype=[types.UINT8, types.INT32, types.INT32, types.FLOAT, types.FLOAT],
                ndim=1,
            )
            windows = fn.decoders.image_slice(
                fn.io.file.read(paths),
                start=anchors,
                shape=shapes,
                axis_names="HW",
                adjust_orientation=False,
                output_type=types.RGB,
                device="mixed" if decoder.place == "GPU" else "cpu",
            )
            if on_gpu and decoder.place == "CPU":
                windows = windows.gpu()
            images = fn.resize(
                windows,
                size=(decoder.image_size, decoder.image_size),
                roi_start=starts,
                roi_end=ends,
                interp_type=types.INTERP_LINEAR,
                antialias=True,
            )
            pipeline.set_outputs(images)
        pipeline.build()
        return pipeline
