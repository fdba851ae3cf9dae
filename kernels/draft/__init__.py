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
        w_m = n / (n + theta_m (1 + (doubt - 1) u_m))

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
    "LONGEST_REMEMBERED",
    "MAX_TOP_K",
    "MISS",
    "MOST_REMEMBERED",
    "ORDERS_USED",
    "SHORTEST_REMEMBERED",
    "STALE",
    "MixtureWeights",
    "Prior",
    "max_candidates",
    "no_memory",
    "no_prior",
]

ORDERS_USED = 4
"""How many of the longest matching orders vote; lower ones hardly count once four higher ones match."""

HASH_MULTIPLIER = 0x9E3779B97F4A7C15
"""An odd multiplier with well-mixed high bits (Knuth, TAOCP 6.4: 2^64 / golden ratio)."""

SHORTEST_REMEMBERED, LONGEST_REMEMBERED = 2, 3
"""Runs of tokens that a memory is asked for; of one token the prior knows more."""

MOST_REMEMBERED = 5
"""How many distributions a run's entry averages; from then on the newest has this fraction's weight."""

HIT, MISS, STALE = range(3)
"""What a look-up in the alignment store finds: the position's predictions; nothing; what a rejected draft left."""


class MixtureWeights(NamedTuple):
    """The constants of the mixture; arrays have one entry per order, ``[M]`` float32.

    Attributes:
        theta: pseudo-count of each order, > 0; larger trusts its matches less.
        alignment: the share ``x_m`` that the stored distribution gets beside the retrieved token, in [0, 1].
        doubt: float32 scalar, the factor on theta where no match has a stored distribution, >= 1.
        memory: ``[4]`` float32, by the length of the run, the weight of what the memory holds in the limit of
            many observations, in [0, 1].
    """

    theta: np.ndarray
    alignment: np.ndarray
    doubt: np.float32
    memory: np.ndarray


def no_memory() -> np.ndarray:
    """A memory that holds nothing and learns nothing."""
    return np.empty((0, 2), np.int32)


class Prior(NamedTuple):
    """What the target says outside of any request's context.

    Attributes:
        ids: ``[vocab_size, k]`` int32, the likeliest successors of each token; -1 where there are fewer than k.
        probs: ``[vocab_size, k]`` float32.
        runs: ``[S, 2 + 2k]`` int32, the same of runs of tokens, in the format of a memory (`vllm_aasd.kernels.draft`);
            `no_memory` for none.
    """

    ids: np.ndarray
    probs: np.ndarray
    runs: np.ndarray = no_memory()


def no_prior() -> Prior:
    """An empty prior: the mixture then starts from nothing."""
    return Prior(np.empty((0, 0), np.int32), np.empty((0, 0), np.float32))


def max_candidates(max_matches: int, top_k: int, num_remembered: int, num_successors: int) -> int:
    """How many candidates a draft token can have: what the scratch of `draft` must hold for none to be ignored.

    Args:
        max_matches: of an order.
        top_k: predictions stored per context position.
        num_remembered: predictions of a row of the memory.
        num_successors: of a token in the prior.
    """
    runs = LONGEST_REMEMBERED - SHORTEST_REMEMBERED + 1
    return ORDERS_USED * max_matches * (1 + top_k) + runs * num_remembered + num_successors
