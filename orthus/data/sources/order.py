"""In which order items are read: permutations that need no memory per item, and the slots of a mixture."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from orthus.data.sources.files import Recent

CYCLE = 10_000  # slots over which a mixture holds its weights exactly


def shuffled(index: int, length: int, key: tuple[int, ...]) -> int:
    """Where `index` goes in a permutation of `range(length)` drawn by `key`, in constant time and memory.

    A four-round Feistel network on the next even number of bits, repeated until it lands inside.
    """
    half = (max(length - 1, 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    prefix = repr(key)
    while True:
        left, right = index >> half, index & mask
        for feistel_round in range(4):
            digest = hashlib.blake2b(f"({prefix}, {feistel_round}, {right})".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        index = left << half | right
        if index < length:
            return index


def slots_of(weights: Sequence[float]) -> tuple[int, ...]:
    """How many slots of a cycle each weight gets, by largest remainder. ValueError for one too small for a slot."""
    total = sum(weights)
    if not weights or min(weights) <= 0 or not np.isfinite(total):
        raise ValueError(f"weights={list(weights)}; give one finite number above 0 for each source")
    exact = [weight / total * CYCLE for weight in weights]
    slots = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda number: slots[number] - exact[number])
    for number in by_remainder[: CYCLE - sum(slots)]:
        slots[number] += 1
    if min(slots) == 0:
        number = slots.index(0)
        raise ValueError(f"weight {weights[number]} of source {number} is less than 1/{CYCLE} of all {total}; "
                         "raise it or leave the source out")  # fmt: skip
    return tuple(slots)


@lru_cache(maxsize=32)
def cycle_order(slots: tuple[int, ...], seed: int, cycle: int) -> tuple[list[int], list[int]]:
    """For each slot of a cycle, whose it is and how many slots of the same source come before it in the cycle.

    Each source has one slot at random within each of its equal parts of the cycle: evenly spread, but in step with no number
    of readers. Drawn anew for each cycle.
    """
    rng = np.random.default_rng([seed, 17, cycle])
    owners = np.repeat(np.arange(len(slots)), slots)
    ranks = np.concatenate([np.arange(count) for count in slots])
    order = np.argsort((ranks + rng.random(len(owners))) / np.asarray(slots)[owners], kind="stable")
    return owners[order].tolist(), ranks[order].tolist()


class EpochOrder:
    """A fresh permutation of a source for each epoch: blocks (shards, row groups) in random order, and items at random within
    `mixed` blocks at a time, so that few files are open at once. Memory is that of the number of blocks.
    """

    def __init__(self, sizes: Sequence[int], mixed: int, key: tuple[int, ...]) -> None:
        self.sizes = np.asarray(sizes, np.int64)
        self.length = int(self.sizes.sum())
        self.mixed, self.key = mixed, key
        self._plans: Recent[int, tuple[list[int], list[int], list[int]]] = Recent(4)

    def __call__(self, epoch: int, place: int) -> int:
        """The item that is number `place` of epoch `epoch`."""
        if len(self.sizes) <= self.mixed:
            return shuffled(place, self.length, (*self.key, epoch))
        bounds, firsts, groups = self._plans.get(epoch, lambda: self._plan(epoch))
        group = bisect_right(groups, place) - 1
        start, stop = groups[group], groups[group + 1]
        there = start + shuffled(place - start, stop - start, (*self.key, epoch, group))
        block = bisect_right(bounds, there) - 1
        return firsts[block] + there - bounds[block]

    def _plan(self, epoch: int) -> tuple[list[int], list[int], list[int]]:
        """Of the permuted blocks: where each begins in the epoch, where in the source; and where groups of blocks begin."""
        order = np.random.default_rng([*self.key, 19, epoch]).permutation(len(self.sizes))
        starts = np.cumsum(self.sizes) - self.sizes
        bounds = np.concatenate([[0], np.cumsum(self.sizes[order])])
        groups = [*bounds[: -1 : self.mixed].tolist(), self.length]
        return bounds.tolist(), starts[order].tolist(), groups
