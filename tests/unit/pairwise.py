"""A cross product's cases, fewer of them, in which everything still meets everything."""

import itertools


def every_pair(first, second, third):
    """Cases in which any two values of two axes meet at least once: a half or a third of all.

    A case stays where its three places sum to a multiple of the modulus. Two of them leave one
    residue to the third, and no axis lacks a place of that residue.
    """
    axes = first, second, third
    modulus = min(3, *map(len, axes))
    return [
        tuple(value for _, value in case)
        for case in itertools.product(*map(enumerate, axes))
        if sum(place for place, _ in case) % modulus == 0
    ]
