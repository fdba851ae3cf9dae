"""The suffix index of a context on the CPU (numba). Its structure is in `vllm_aasd.kernels.draft`."""

import numpy as np

from vllm_aasd.kernels.common.compiled import compiled
from vllm_aasd.kernels.common.ngram_hash_cpu import hash_with

MOST_PROBES = 48
"""Slots of a table that are tried for one n-gram: the bound on a lookup.

If all are taken, the n-gram takes the first of them, and what stood there is forgotten. In tables that are at most half
full this takes hashes that collide on purpose: of 650,000 random n-grams the farthest stood 37 slots from its place, of
text 24.
"""


@compiled
def find(tokens, head, size, end, hashed):
    """Where ``head[size - 1]`` holds, or may hold, the n-gram of ``size`` tokens ending at ``end``.

    Returns:
        The slot, and the most recent position that ends this n-gram there; -1 if it isn't held.
    """
    mask = np.uint64(head.shape[1] - 1)
    # The high half is the well-mixed one.
    first = (hashed >> np.uint64(32)) & mask
    slot = first
    for _ in range(MOST_PROBES):
        other = head[size - 1, slot]
        if other < 0:
            return slot, np.int32(-1)
        same = True
        for back in range(size):
            if tokens[other - back] != tokens[end - back]:
                same = False
                break
        if same:
            return slot, other
        slot = (slot + np.uint64(1)) & mask
    return first, np.int32(-1)


@compiled
def extend_index(tokens, prev, head, indexed, length):
    """Enter the positions whose next token has become known.

    Args:
        tokens: ``[capacity]`` int32, the context; the first ``length`` are valid.
        prev: ``[M, capacity]`` int32, written in place: the previous position with the same m-gram, -1 if none.
        head: ``[M, table_size]`` int32, a power of two of at least twice ``length`` slots per n-gram size, -1 where
            free, written in place: the most recent position of an m-gram.
        indexed: how many positions are entered already.
        length: tokens in the context now.

    Returns:
        How many positions are entered now.
    """
    max_ngram_size = head.shape[0]
    last = max(length - 1, indexed)
    for end in range(indexed, last):
        hashed = np.uint64(0)
        for size in range(1, min(max_ngram_size, end + 1) + 1):
            hashed = hash_with(hashed, tokens[end - size + 1])
            slot, before = find(tokens, head, size, end, hashed)
            prev[size - 1, end] = before
            head[size - 1, slot] = end
    return last
