"""Order and crops as pure functions of position."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from freeadv_fast.data.split import balanced_rows, evenly_spaced_rows, stratified_rows
from freeadv_fast.data.stream import (
    Stream,
    random_bits,
    random_flips,
    random_offsets,
    random_resized_windows,
    random_uniform,
)
from freeadv_fast.errors import UserError


def streams(num_images: int, batch: int, ranks: int, seed: int | None = 3) -> list[Stream]:
    rows = 10 * np.arange(num_images)
    return [Stream(rows, batch, rank, ranks, seed) for rank in range(ranks)]


def test_bits_are_splitmix64_of_the_draw() -> None:
    """The last stage is the published generator: seed 1234567 gives these numbers."""
    state = 1234567
    expected = []
    for _ in range(3):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        mixed = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) % 2**64
        expected.append(mixed ^ (mixed >> 31))
    assert expected[0] == 6457827717110365317  # the reference implementation's first output

    def stage(value: int, counter: int) -> int:
        value = (value + 0x9E3779B97F4A7C15 * counter) % 2**64
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % 2**64
        return value ^ (value >> 31)

    seed, epoch, index, draw = 5, 2, 77, 4
    by_hand = stage(stage(stage(stage(seed, 1), epoch + 1), index + 1), draw + 1)
    assert int(random_bits(seed, epoch, np.array([index]), range(draw, draw + 1))[0, 0]) == by_hand


def test_draws_depend_on_every_coordinate_and_nothing_else() -> None:
    index = np.arange(50)
    base = random_uniform(1, 2, index, range(4))
    assert base.min() >= 0
    assert base.max() < 1
    assert len(np.unique(base)) == base.size
    for other in (random_uniform(2, 2, index, range(4)), random_uniform(1, 3, index, range(4))):
        assert not np.isin(other, base).any()
    shuffled = index[::-1]
    np.testing.assert_array_equal(random_uniform(1, 2, shuffled, range(4)), base[::-1])
    np.testing.assert_array_equal(random_uniform(1, 2, index[7:9], range(2, 3)), base[7:9, 2:3])


def test_each_epoch_and_seed_has_its_own_permutation() -> None:
    (stream,) = streams(200, 10, 1)
    first, second = stream.order(0), stream.order(1)
    np.testing.assert_array_equal(np.sort(first), stream.rows)
    np.testing.assert_array_equal(np.sort(second), stream.rows)
    assert (first != second).mean() > 0.9
    assert (first != streams(200, 10, 1, seed=4)[0].order(0)).mean() > 0.9
    assert abs(np.corrcoef(first, stream.rows)[0, 1]) < 0.25
    np.testing.assert_array_equal(first, streams(200, 40, 1)[0].order(0))


@pytest.mark.parametrize(("num_images", "batch", "ranks"), [(53, 5, 1), (53, 4, 3), (64, 8, 2)])
def test_ranks_partition_each_global_minibatch(num_images: int, batch: int, ranks: int) -> None:
    shares = [list(stream.shares(1)) for stream in streams(num_images, batch, ranks)]
    order = streams(num_images, batch, ranks)[0].order(1)
    assert len({len(each) for each in shares}) == 1
    seen = 0
    for number, together in enumerate(zip(*shares, strict=True)):
        expected = order[number * batch * ranks : (number + 1) * batch * ranks]
        for rank, share in enumerate(together):
            np.testing.assert_array_equal(share.rows, expected[rank::ranks])
            assert share.global_size == len(expected)
        seen += len(expected)
    assert num_images - seen < 2 * ranks


@pytest.mark.parametrize(
    ("num_images", "ranks", "num_batches"),
    [(40, 2, 5), (43, 2, 5), (44, 2, 6), (41, 1, 10), (42, 1, 11), (45, 3, 4), (41, 3, 3)],
)
def test_a_last_minibatch_of_less_than_two_a_rank_is_left_out(
    num_images: int, ranks: int, num_batches: int
) -> None:
    for stream in streams(num_images, 4, ranks):
        shares = list(stream.shares(0))
        assert stream.num_batches == len(shares) == num_batches
        assert min(len(share.rows) for share in shares) >= 2


def test_an_epoch_entered_in_the_middle_goes_on_as_it_was() -> None:
    (stream,) = streams(53, 5, 1)
    whole = list(stream.shares(2))
    for start in (0, 4, 10, 11):
        entered = list(stream.shares(2, start))
        assert len(entered) == len(whole) - start
        for left, right in zip(entered, whole[start:], strict=True):
            np.testing.assert_array_equal(left.rows, right.rows)


def test_a_removed_image_changes_nothing_of_the_others() -> None:
    """Order, flips and crops hang on keys: the rows behind the gap are all others."""
    random = np.random.default_rng(0)
    keys = random.integers(0, 2**64, 60, np.uint64)
    sizes = random.integers(40, 90, (60, 2))
    gone = 17
    kept = np.delete(np.arange(60), gone)
    whole = Stream(np.arange(60), 6, 0, 1, 3, names=keys)
    less = Stream(np.arange(59), 6, 0, 1, 3, names=keys[kept])
    for epoch in range(3):
        order = whole.order(epoch)
        np.testing.assert_array_equal(kept[less.order(epoch)], order[order != gone])
        shares = list(less.shares(epoch))
        rows, names = (np.concatenate([getattr(s, f) for s in shares]) for f in ("rows", "keys"))
        np.testing.assert_array_equal(names, keys[kept][rows])
        before = random_resized_windows(3, epoch, keys, sizes)[kept][rows]
        after = random_resized_windows(3, epoch, names, sizes[kept][rows])
        np.testing.assert_array_equal(before, after)
        np.testing.assert_array_equal(
            random_flips(3, epoch, keys)[kept][rows], random_flips(3, epoch, names)
        )


def test_a_row_is_its_own_key_where_there_are_no_names() -> None:
    rows = np.arange(5, 60)
    unnamed = Stream(rows, 6, 0, 1, 3)
    named = Stream(rows, 6, 0, 1, 3, names=rows.astype(np.uint64))
    np.testing.assert_array_equal(unnamed.order(2), named.order(2))
    np.testing.assert_array_equal(next(unnamed.shares(2)).keys, named.order(2)[:6])


def test_evaluation_shards_are_exact() -> None:
    all_ranks = streams(10, 3, 4, seed=None)
    rows = [[r for share in s.shares(0) for r in share.rows.tolist()] for s in all_ranks]
    assert rows == [list(range(0, 100, 10))[rank::4] for rank in range(4)]
    assert [share.global_size for share in all_ranks[0].shares(0)] == [10]
    two = streams(9, 2, 4, seed=None)
    assert [len(list(stream.shares(0))) for stream in two] == [2, 1, 1, 1]
    assert two[3].num_batches == 2


def test_a_batch_larger_than_a_share_is_refused() -> None:
    streams(32, 8, 4)
    with pytest.raises(UserError, match=r"--batch-size 9: .* 8 \(32 images over 4 ranks\)"):
        streams(32, 9, 4)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (64, 64), (400, 90)])
def test_windows_are_distributed_as_torchvisions(height: int, width: int) -> None:
    count = 4000
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    )
    sizes = np.tile([[height, width]], (count, 1))
    ours = random_resized_windows(5, 1, np.arange(count), sizes)
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 2:] >= 1).all()
    assert (ours[:, :2] + ours[:, 2:] <= [height, width]).all()
    for mine, other in zip(_features(ours, sizes), _features(theirs, sizes), strict=True):
        # Two-sample Kolmogorov-Smirnov; 1.95 sqrt(2 / n) is passed by chance once in 1,000.
        grid = np.concatenate([mine, other])
        gaps = np.searchsorted(np.sort(mine), grid, "right") - np.searchsorted(
            np.sort(other), grid, "right"
        )
        assert np.abs(gaps).max() / count < 1.95 * np.sqrt(2 / count)


def _features(windows: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    """Top, left, height, width, area and aspect."""
    height, width = windows[:, 2], windows[:, 3]
    return [*windows.T, height * width / sizes.prod(1), width / height]


def test_windows_fall_back_to_the_central_crop_of_torchvision() -> None:
    for height, width in ((2000, 20), (20, 2000)):
        torch.manual_seed(0)
        theirs = {
            RandomResizedCrop.get_params(torch.empty(3, height, width), [0.9, 1.0], [0.75, 4 / 3])
            for _ in range(5)
        }
        assert len(theirs) == 1  # such a strip never succeeds
        sizes = np.tile([[height, width]], (64, 1))
        windows = {tuple(w) for w in random_resized_windows(0, 0, np.arange(64), sizes).tolist()}
        assert theirs <= windows


def test_flips_and_offsets_are_fair() -> None:
    index = np.arange(20_000)
    assert abs(random_flips(1, 0, index).mean() - 0.5) < 4 * 0.5 / np.sqrt(20_000)
    offsets = random_offsets(1, 0, index, 9)
    for axis in (0, 1):
        counts = np.bincount(offsets[:, axis], minlength=9)
        assert len(counts) == 9
        chi_square = ((counts - 20_000 / 9) ** 2 / (20_000 / 9)).sum()
        assert chi_square < 26.1  # 8 degrees of freedom, one in 1,000


def test_balanced_slices_take_equally_many_a_class() -> None:
    labels = np.repeat(np.arange(5), [40, 60, 50, 4, 46])
    keys = np.arange(len(labels))
    rows = balanced_rows(labels, 42, keys)
    assert len(np.unique(rows)) == 42
    counts = np.bincount(labels[rows], minlength=5)
    assert counts[3] == 2  # half of a small class
    assert counts[[0, 1, 2, 4]].tolist() == [10, 10, 10, 10]
    counts = np.bincount(labels[balanced_rows(labels, 3, keys)], minlength=5)
    assert sorted(counts.tolist()) == [0, 0, 1, 1, 1]


def test_a_removed_image_gives_its_place_in_a_balanced_slice_to_one_other() -> None:
    labels = np.repeat(np.arange(3), [20, 30, 25])
    keys = np.random.default_rng(1).integers(0, 2**64, 75, np.uint64)
    before = set(keys[balanced_rows(labels, 9, keys)].tolist())
    for gone in range(75):
        now = balanced_rows(np.delete(labels, gone), 9, np.delete(keys, gone))
        after = set(np.delete(keys, gone)[now].tolist())
        assert before - after == before & {int(keys[gone])}
        assert len(after) == 9


def test_stratified_slices_keep_each_class_share() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(3), [100, 30, 57]))
    counts = np.bincount(labels[stratified_rows(labels, 50)])
    assert counts.sum() == 50
    assert np.abs(counts - np.array([100, 30, 57]) * 50 / 187).max() < 1


def test_evenly_spaced_rows() -> None:
    assert evenly_spaced_rows(10, None).tolist() == list(range(10))
    assert evenly_spaced_rows(10, 20).tolist() == list(range(10))
    assert evenly_spaced_rows(10, 4).tolist() == [0, 2, 5, 7]
