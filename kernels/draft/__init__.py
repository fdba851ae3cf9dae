"""Draft: from a request's context to draft tokens, by suffix matches mixed with the target's own predictions.

Index
    For each n-gram size ``m = 1 .. M`` a hash table maps an m-gram to the most recent position that ends it, and
    ``prev[m - 1, j]`` leads from position ``j`` to the one before it with the same m-gram. Only positions whose next
    token is known are entered.

Mixture
    Let ``C_m`` be the (at most ``max_matches`` most recent) positions whose last ``m`` tokens are the last ``m`` tokens
    of context plus draft, ``n = |C_m|``, and ``L`` the largest size with a match. From the smallest of the last four
    sizes up to ``L``::

        P_m = (1 - w_m) P_{m-1} + w_m / n * sum_{j in C_m} [(1 - x_mj) delta(token j+1) + x_mj p_j]
        w_m = n / (n + theta_m (1 + (no_alignment_discount - 1) u_m))

    with ``P_0`` the prior, ``p_j`` the target's stored top-k distribution at position ``j``, ``x_mj = x_m`` where a
    fresh one is stored, else 0, and ``u_m`` the share of ``C_m`` without one. The draft token is the argmax of ``P_L``.
    Ties go to the longest match, then to the most recent position. The *survival* of a draft is the product of these
    maxima; drafting stops before the token that would take it below ``min_survival``. The sum is evaluated from ``L``
    downwards with the mass that remains.

Memory
    Predictions after n-grams of 2 and 3 tokens, in a direct-mapped table ``[S, 2 + 2k]`` int32: a tag, how many
    distributions were averaged, k ids, and k probabilities as float32 bits. An n-gram that loses its row to another is
    forgotten. It is mixed in between prior and context: first 2 tokens, then 3, with ``w_m = memory_m c / (c + 1)`` for
    c averaged distributions. The n-grams of a prior (`vllm_aasd.drafting.own_text`) are such a table, read in the
    memory's place and never written, or copied as its beginning.

docs/design.md explains the mixture, bounds its work, and names the sources. `vllm_aasd.kernels.draft.reference` is the
specification. On CPUs, `index_cpu` holds the index, `cpu` the mixture and `memory_cpu` the memory. On GPUs,
`vllm_aasd.kernels.draft.batch` drafts for a whole batch without an index.
"""

from typing import NamedTuple

import numpy as np

from vllm_aasd.kernels.align import MAX_TOP_K

__all__ = [
    "HASH_MULTIPLIER",
    "HIT",
    "MAX_MEMORY_NGRAM",
    "MAX_OBSERVATIONS",
    "MAX_TOP_K",
    "MIN_MEMORY_NGRAM",
    "MISS",
    "NGRAM_SIZES_USED",
    "STALE",
    "MixtureWeights",
    "Prior",
    "max_candidates",
    "no_memory",
    "no_prior",
]

NGRAM_SIZES_USED = 4
"""How many of the largest matching n-gram sizes are used; smaller ones hardly count once four larger ones match."""

HASH_MULTIPLIER = 0x9E3779B97F4A7C15
"""An odd multiplier with well-mixed high bits (Knuth, TAOCP 6.4: 2^64 / golden ratio)."""

MIN_MEMORY_NGRAM, MAX_MEMORY_NGRAM = 2, 3
"""Sizes of the n-grams that a memory holds; of one token the prior knows more."""

MAX_OBSERVATIONS = 5
"""How many distributions an n-gram's row averages; from then on the newest has this fraction's weight."""

HIT, MISS, STALE = range(3)
"""What a lookup in the alignment store finds: the position's predictions; nothing; what a rejected draft left."""


class MixtureWeights(NamedTuple):
    """The constants of the mixture; arrays have one entry per n-gram size, ``[M]`` float32.

    Attributes:
        theta: pseudo-count of each size, > 0; larger trusts its matches less.
        alignment: the share ``x_m`` that the stored distribution gets, and the next token in the context doesn't, in
            [0, 1].
        no_alignment_discount: float32 scalar, the factor on theta where no match has a stored distribution, >= 1.
        memory: ``[4]`` float32, by the size of the n-gram, the weight of what the memory holds in the limit of
            many observations, in [0, 1].
    """

    theta: np.ndarray
    alignment: np.ndarray
    no_alignment_discount: np.float32
    memory: np.ndarray


def no_memory() -> np.ndarray:
    """A memory that holds nothing and learns nothing."""
    return np.empty((0, 2), np.int32)


class Prior(NamedTuple):
    """What the target says outside of any request's context.

    Attributes:
        ids: ``[vocab_size, k]`` int32, the likeliest next tokens of each token; -1 where there are fewer than k.
        probs: ``[vocab_size, k]`` float32.
        ngrams: ``[S, 2 + 2k]`` int32, the same of n-grams, in the format of a memory; `no_memory` for none.
    """

    ids: np.ndarray
    probs: np.ndarray
    ngrams: np.ndarray = no_memory()


def no_prior() -> Prior:
    """An empty prior: the mixture then starts from nothing."""
    return Prior(np.empty((0, 0), np.int32), np.empty((0, 0), np.float32))


def max_candidates(max_matches: int, top_k: int, ngram_top_k: int, num_successors: int) -> int:
    """How many candidates a draft token can have: what the scratch of `draft` must hold for none to be ignored.

    Args:
        max_matches: of an n-gram size.
        top_k: predictions stored per context position.
        ngram_top_k: predictions of a row of the memory.
        num_successors: of a token in the prior.
    """
    ngrams = MAX_MEMORY_NGRAM - MIN_MEMORY_NGRAM + 1
    return NGRAM_SIZES_USED * max_matches * (1 + top_k) + ngrams * ngram_top_k + num_successors
