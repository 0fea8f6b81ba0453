"""The thread that runs ahead."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from freeadv_fast.data.loader import Batch
from freeadv_fast.data.prefetch import DEPTH, prefetched

CPU = torch.device("cpu")


def batches(number, produced, closed=None, fail_at=None):
    try:
        for position in range(number):
            if position == fail_at:
                raise ValueError("at three")
            produced.append(position)
            yield Batch(torch.zeros(1), torch.zeros(1), position, torch.zeros(1))
    finally:
        if closed is not None:
            closed.append(threading.current_thread().name)


def test_order_is_kept():
    taken = [batch.global_size for batch in prefetched(batches(20, []), CPU)]
    assert taken == list(range(20))


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_it_runs_ahead_but_not_far():
    produced = []
    ahead = prefetched(batches(20, produced), CPU)
    for position in range(5):
        next(ahead)
        wait_until(lambda ready=position + 1 + DEPTH: len(produced) == ready)
        time.sleep(0.02)
        assert len(produced) == position + 1 + DEPTH
    ahead.close()


def test_an_error_arrives_where_it_happened():
    ahead = prefetched(batches(9, [], fail_at=3), CPU)
    assert [next(ahead).global_size for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="at three"):
        next(ahead)


def test_closing_early_stops_the_thread_and_the_producer():
    threads = threading.active_count()
    produced, closed = [], []
    ahead = prefetched(batches(1000, produced, closed), CPU)
    next(ahead)
    assert threading.active_count() == threads + 1
    ahead.close()
    assert threading.active_count() == threads
    assert closed == ["freeadv-prefetch"]
    assert len(produced) <= 1 + DEPTH + 1
