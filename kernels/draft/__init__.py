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

Known text
    What other text says (`vllm_aasd.kernels.text`) takes the place of the mixture's token where it has been more
    reliable.

docs/design.md explains the mixture, bounds its work, and names the sources. `vllm_aasd.kernels.draft.reference` is the
specification. On CPUs, `index_cpu` holds the index and `cpu` the mixture. On GPUs,
`vllm_aasd.kernels.draft.batch` drafts for a whole batch without an index.
"""

from typing import NamedTuple

import numpy as np

from vllm_aasd.kernels.align import MAX_TOP_K

__all__ = [
    "HIT",
    "MAX_TOP_K",
    "MISS",
    "NGRAM_SIZES_USED",
    "STALE",
    "MixtureWeights",
    "Prior",
    "max_candidates",
    "no_prior",
]

NGRAM_SIZES_USED = 4
"""How many of the largest matching n-gram sizes are used; smaller ones hardly count once four larger ones match."""

HIT, MISS, STALE = range(3)
"""What a lookup in the alignment store finds: the position's predictions; nothing; what a rejected draft left."""


class MixtureWeights(NamedTuple):
    """The constants of the mixture; arrays have one entry per n-gram size, ``[M]`` float32.

    Attributes:
        theta: pseudo-count of each size, > 0; larger trusts its matches less.
        alignment: the share ``x_m`` that the stored distribution gets, and the next token in the context doesn't, in
            [0, 1].
        no_alignment_discount: float32 scalar, the factor on theta where no match has a stored distribution, >= 1.
    """

    theta: np.ndarray
    alignment: np.ndarray
    no_alignment_discount: np.float32


class Prior(NamedTuple):
    """What the target says outside of any request's context.

    Attributes:
        ids: ``[vocab_size, k]`` int32, the likeliest next tokens of each token; -1 where there are fewer than k.
        probs: ``[vocab_size, k]`` float32.
    """

    ids: np.ndarray
    probs: np.ndarray


def no_prior() -> Prior:
    """An empty prior: the mixture then starts from nothing."""
    return Prior(np.empty((0, 0), np.int32), np.empty((0, 0), np.float32))


def max_candidates(max_matches: int, top_k: int, num_successors: int) -> int:
    """How many candidates a draft token can have: what the scratch of `draft` must hold for none to be ignored.

    Args:
        max_matches: of an n-gram size.
        top_k: predictions stored per context position.
        num_successors: of a token in the prior.
    """
    return NGRAM_SIZES_USED * max_matches * (1 + top_k) + num_successors
