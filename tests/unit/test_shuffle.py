"""The formula of the exchange, and what it refuses."""

import numpy as np
import pytest
import torch

from freeadv_fast.distributed import shuffle
from freeadv_fast.distributed.shuffle import (
    Route,
    Side,
    global_permutation,
    philox,
    places,
    rows_sent,
)


@pytest.mark.parametrize(
    ("counter", "seed", "expected"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            0xFFFFFFFFFFFFFFFF,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, seed, expected):
    found = philox(np.array([counter], np.uint64), seed)
    assert tuple(map(int, found[0])) == expected


@pytest.mark.parametrize("counts", [[16, 16, 16, 16], [7, 7], [3, 9, 5], [2, 2, 2, 2], [5, 0]])
def test_every_rank_ends_with_as_many_rows_as_it_began_with(counts):
    ranks = range(len(counts))
    matrix = np.array([[rows_sent(counts, sender, peer) for peer in ranks] for sender in ranks])
    assert matrix.sum(axis=0).tolist() == counts
    assert matrix.sum(axis=1).tolist() == counts
    assert (matrix >= 0).all()
    for rank in ranks:
        route = Route(rank, tuple(counts), 0, 0)
        assert route.send == matrix[rank].tolist() == route.inverted().receive
        assert route.receive == matrix[:, rank].tolist() == route.inverted().send


def test_what_does_not_divide_goes_to_the_next_ranks():
    ranks = range(4)
    found = [[rows_sent([6, 6, 6, 9], sender, peer) for peer in ranks] for sender in ranks]
    assert found == [[2, 2, 1, 1], [1, 2, 2, 1], [1, 1, 2, 2], [2, 1, 1, 5]]


def test_the_order_of_an_exchange_never_changes():
    """A run that one version began is resumed by another."""
    found = global_permutation([8, 8], seed=3, step=4)
    assert found.tolist() == [4, 7, 12, 11, 9, 3, 5, 10, 2, 8, 0, 15, 14, 13, 6, 1]


def test_ranks_sides_steps_and_seeds_have_orders_of_their_own():
    base = {"seed": 1, "step": 2, "rank": 3, "side": Side.BEFORE}
    others = [{"seed": 2}, {"seed": 1 + 2**32}, {"step": 3}, {"step": 2 + 2**32}, {"rank": 2},
              {"side": Side.AFTER}]  # fmt: skip
    orders = {tuple(places(64, **(base | change))) for change in [{}, *others]}
    assert len(orders) == 1 + len(others)
    assert all(sorted(order) == list(range(64)) for order in orders)


def test_every_row_is_as_likely_at_every_place():
    """Chi-squared over 4,000 steps of 2 ranks with 4 rows: 63 - 14 = 49 degrees of freedom."""
    table = np.zeros((8, 8))
    for step in range(4000):
        table[np.arange(8), global_permutation([4, 4], seed=5, step=step)] += 1
    assert ((table - 500) ** 2 / 500).sum() < 85.4  # the 99.9 % point of 49 degrees


def test_one_rank_permutes_where_it_is(world):
    images, labels = torch.arange(60.0).view(20, 3), torch.arange(20)
    exchange = world.shuffle(images, labels, seed=7, step=8)
    arrived, arrived_labels = exchange.wait()
    assert exchange.bytes_sent == 0
    assert arrived_labels.tolist() == global_permutation([20], seed=7, step=8).tolist()
    assert torch.equal(arrived, images[arrived_labels])
    assert exchange.wait()[0] is arrived
    back, back_labels = world.unshuffle(arrived, arrived_labels, seed=7, step=8).wait()
    assert torch.equal(back, images)
    assert torch.equal(back_labels, labels)


def test_targets_are_permuted_with_their_images(world):
    """On one rank; float16 images, as Fast AdvProp sends them."""
    images = torch.arange(60).view(20, 3).half()
    targets = torch.arange(20.0 * 3 * 5).view(20, 3, 5) + 1 / 3
    arrived, arrived_targets = world.shuffle(images, targets, seed=7, step=8).wait()
    sources = torch.from_numpy(global_permutation([20], seed=7, step=8))
    assert torch.equal(arrived, images[sources])
    assert torch.equal(arrived_targets, targets[sources])
    order = world.shuffle_order(20, seed=7, step=8)
    in_order = world.shuffle_in_order(images, targets, order).wait()
    assert torch.equal(in_order[0], arrived)
    assert torch.equal(in_order[1], arrived_targets)


def test_no_rows_at_all(world):
    images, labels = torch.empty(0, 4, 4, 3, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
    arrived, arrived_labels = world.shuffle(images, labels, seed=0, step=0).wait()
    assert arrived.shape == images.shape
    assert arrived_labels.shape == labels.shape


IMAGES = torch.zeros(6, 2, 2, 3, dtype=torch.uint8)
LABELS = torch.arange(6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": IMAGES.int()}, "images: expected .* uint8, .* got torch.int32"),
        ({"images": IMAGES.permute(0, 3, 1, 2)}, "images: expected contiguous rows"),
        ({"labels": LABELS[:5]}, r"labels: expected int64 \(6,\) .* got torch.int64 \(5,\)"),
        ({"labels": LABELS.int()}, r"labels: expected int64 \(6,\) .* got torch.int32 \(6,\)"),
        (
            {"labels": torch.zeros(5, 3, 5)},
            r"or float32 \(6, ...\) .* got torch.float32 \(5, 3, 5\)",
        ),
        (
            {"labels": torch.zeros(6, 3, 5).half()},
            r"labels: expected .* got torch.float16 \(6, 3, 5\)",
        ),
        ({"labels": torch.zeros(6)}, r"labels: expected .* got torch.float32 \(6,\)"),
        ({"labels": torch.arange(12)[::2]}, "labels: expected contiguous"),
        ({"counts": [7]}, r"counts \[7\]: rank 0 has 6 rows"),
        ({"counts": [6, 6]}, r"counts \[6, 6\]: expected one for each of 1 ranks"),
        ({"counts": [-1]}, "counts .*: expected every rank's number of rows"),
        ({"seed": -1}, "seed -1: expected a whole number"),
        ({"step": 2**63}, "step 9223372036854775808: expected a whole number"),
    ],
)
def test_what_is_refused(world, change, message):
    request = {"images": IMAGES, "labels": LABELS, "seed": 0, "step": 0} | change
    with pytest.raises(ValueError, match=message):
        world.shuffle(request.pop("images"), request.pop("labels"), **request)


def test_a_route_needs_a_rank_and_ranks_need_a_group():
    with pytest.raises(ValueError, match="rank 2: not one of 2 ranks"):
        Route(2, (4, 4), 0, 0)
    transport = shuffle.Transport(shuffle.start_eagerly, None, shuffle.PEER_PATIENCE)
    with pytest.raises(ValueError, match="2 ranks exchange rows over a process group"):
        shuffle.Exchange(IMAGES, LABELS, Route(0, (6, 6), 0, 0), transport)
