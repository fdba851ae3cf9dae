"""The index of a context's suffixes on the CPU: hash tables of m-grams (numba). The structure is in `vllm_aasd.kernels.draft`."""

import numpy as np

from vllm_aasd.kernels.common.compiled import compiled
from vllm_aasd.kernels.draft import HASH_MULTIPLIER

MOST_PROBES = 48
"""Slots of a table that are tried for one run of tokens: the bound on a look-up.

Where all are taken, the run whose place is the first of them takes it, and what stood there is forgotten. In tables that
are at most half full that is no accident: of 650 000 random runs one stood 37 slots from its place, of text 24. Tokens
can be chosen so that their hashes collide, and then they cost this much and find nothing.
"""

_MULTIPLIER = np.uint64(HASH_MULTIPLIER)


@compiled
def hash_with(hashed, token):
    """A run's hash, lengthened by a token."""
    return (hashed ^ np.uint64(np.uint32(token))) * _MULTIPLIER


@compiled
def find(tokens, head, order, end, hashed):
    """Where ``head[order - 1]`` holds, or may take in, the ``order``-gram ending at ``end``.

    Returns:
        The slot, and the most recent position that ends this gram there; -1 if it isn't held.
    """
    mask = np.uint64(head.shape[1] - 1)
    # The high half is the well-mixed one.
    first = (hashed >> np.uint64(32)) & mask
    slot = first
    for _ in range(MOST_PROBES):
        other = head[order - 1, slot]
        if other < 0:
            return slot, np.int32(-1)
        same = True
        for back in range(order):
            if tokens[other - back] != tokens[end - back]:
                same = False
                break
        if same:
            return slot, other
        slot = (slot + np.uint64(1)) & mask
    return first, np.int32(-1)


@compiled
def extend_index(tokens, prev, head, indexed, length):
    """Enter the positions whose successor has become known.

    Args:
        tokens: ``[capacity]`` int32, the context; the first ``length`` are valid.
        prev: ``[M, capacity]`` int32, written in place: the previous position with the same m-gram, -1 if none.
        head: ``[M, table_size]`` int32, a power of two of at least twice ``length`` slots per order, -1 where
            free, written in place: the most recent position of an m-gram.
        indexed: how many positions are entered already.
        length: tokens in the context now.

    Returns:
        How many positions are entered now.
    """
    num_orders = head.shape[0]
    last = max(length - 1, indexed)
    for end in range(indexed, last):
        hashed = np.uint64(0)
        for order in range(1, min(num_orders, end + 1) + 1):
            hashed = hash_with(hashed, tokens[end - order + 1])
            slot, before = find(tokens, head, order, end, hashed)
            prev[order - 1, end] = before
            head[order - 1, slot] = end
    return last
