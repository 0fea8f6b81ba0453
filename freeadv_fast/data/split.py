"""Fixed slices of a labelled set: no seed, no rank, the same images in every run."""

from __future__ import annotations

import numpy as np

from freeadv_fast.data.stream import Ints, Keys, random_bits


def _places(labels: Ints, keys: Keys | Ints) -> tuple[Ints, Ints]:
    """Each image's place in a fixed shuffle of its class, and the size of that class.

    Args:
        labels: (N,) class of each image. keys: (N,) of the images; equal keys share no place.

    Returns:
        Two (N,) int64: place in 0..size-1, and size.
    """
    draws = random_bits(0, 0, keys, range(1))[:, 0]
    order = np.lexsort((draws, labels))
    counts = np.bincount(labels)
    firsts = np.repeat(np.cumsum(counts) - counts, counts)
    places = np.empty(len(labels), np.int64)
    places[order] = np.arange(len(labels)) - firsts
    return places, counts[labels]


def _class_keys(labels: Ints) -> Ints:
    """A fixed random number for each image's class, so that no class name goes first."""
    keys = random_bits(1, 0, np.arange(labels.max(initial=0) + 1), range(1))[:, 0]
    return keys.argsort(kind="stable").argsort(kind="stable")[labels]


def balanced_rows(labels: Ints, num_images: int, keys: Keys | Ints) -> Ints:
    """A slice with equally many images of each class, as far as the classes are large enough.

    No class gives more than half of its images while another can still give. An image that is
    removed gives its place to one other at most: the rest is drawn as before.

    Args:
        labels: (N,) class of each image.
        num_images: Rows to take.
        keys: (N,) of the images.

    Returns:
        (num_images,) int64 rows, ascending.
    """
    places, sizes = _places(labels, keys)
    order = np.lexsort((_class_keys(labels), places, places >= sizes // 2))
    return np.sort(order[:num_images])


def stratified_rows(labels: Ints, num_images: int) -> Ints:
    """A slice in which every class keeps its share of the set, to within one image.

    A row's number is its image's name here: the digits are split by it.

    Args:
        labels: (N,) class of each image.
        num_images: Rows to take.

    Returns:
        (num_images,) int64 rows, ascending.
    """
    places, sizes = _places(labels, np.arange(len(labels)))
    order = np.lexsort((_class_keys(labels), (places + 0.5) / sizes))
    return np.sort(order[:num_images])


def evenly_spaced_rows(num_rows: int, num_images: int | None) -> Ints:
    """`num_images` of `num_rows` rows at equal distances; all of them for None or a larger number.

    Returns:
        (min(num_images, num_rows),) int64, ascending.
    """
    count = num_rows if num_images is None else min(num_images, num_rows)
    return np.arange(count) * num_rows // max(count, 1)
