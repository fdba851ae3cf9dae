"""Draft: from a request's context to draft tokens, by suffix matches mixed with the target's own predictions.

The op has two halves over one data structure, the *suffix index* of a request.

Index
    For each order ``m = 1 .. M`` a hash table maps an m-gram to the most recent position that ends it, and
    ``prev[m - 1, j]`` leads from position ``j`` to the one before it with the same m-gram. Only positions whose
    successor is known are entered. Appending a token costs ``M`` insertions, whatever the length of the
    context; tables grow a share with every token (`vllm_aasd.drafting.suffix_index`).

Mixture
    Let ``C_m`` be the (at most ``max_matches`` most recent) positions whose last ``m`` tokens are the last
    ``m`` tokens of context plus draft, ``n = |C_m|``, and ``L`` the longest order with a match. From the lowest
    of the last four orders up to ``L``::

        P_m = (1 - w_m) P_{m-1} + w_m / n * sum_{j in C_m} [(1 - x_mj) delta(token j+1) + x_mj p_j]
        w_m = n / (n + theta_m (1 + (doubt - 1) u_m))

    with ``P_0`` the prior (nothing, if there is none), ``p_j`` the target's stored top-k distribution at position
    ``j`` (the *alignment* of that position), ``x_mj = x_m`` where a fresh one is stored, else 0, and ``u_m`` the
    share of ``C_m`` without one: a retrieved token that the target's own view does not temper is right less
    often than its count says, so its order escapes more. The draft token is the argmax of ``P_L``, ties going to the longest match and then to the most recent position; the
    *survival* of a draft is the product of these maxima, the estimate that all of it is accepted. Drafting
    stops before the token that would take it under ``min_survival``.

    This is prediction by partial matching (Cleary and Witten, 1984) with escape weights ``theta_m / (n +
    theta_m)``, over the candidates of alignment sampling (Wang et al., *Alignment-Augmented Speculative
    Decoding with Alignment Sampling and Conditional Verification*, EMNLP 2025, arXiv 2505.13204). It deviates
    from that paper, where the stored predictions join the retrieved token as separate candidates: vLLM
    verifies one chain, so they are mixed into one choice instead. See README, "How it works".

Work
    Bounded by constants, whatever the context's length and tokens. A look-up or an insertion tries at most
    ``MOST_PROBES`` slots, where tokens were chosen so that their hashes collide too; a token that is appended costs ``M`` of
    them, and where tables grow 16 positions more. A draft token takes ``M`` look-ups, walks to ``max_matches`` positions of
    four orders, and gets ``1 + k`` votes from each, besides those of memory and prior. `benchmarks.worst_case` measures
    contexts made for it; ``tests/test_bounded_work.py`` counts the work.

Memory
    What the target predicted behind runs of 2 and 3 tokens in earlier requests: a direct-mapped table
    ``[S, 2 + 2k]`` int32 with, per run, a tag, how many distributions were averaged (at most 5: from then on
    the newest has a fifth of the weight), k ids and k probabilities as float32 bits. It stands between the
    request's own matches and the prior: ``P_0`` is the prior mixed with the memory of 2 tokens, then of 3, with
    ``w_m = memory_m c / (c + 1)`` for c averaged distributions. A run that loses its row to another is
    forgotten, so its size is fixed. The runs of a prior (`vllm_aasd.drafting.own_text`) are such a table too: it is read in the
    memory's place and never written, or a memory begins as its copy.

The sum is evaluated from ``L`` downwards with the weight that is left. The twin is
`vllm_aasd.kernels.draft.reference`; the compiled path is `vllm_aasd.kernels.draft.suffixes_cpu` for the index, `draft_cpu` for
the mixture and `memory_cpu` for the memory.
"""

import numpy as np

from vllm_aasd.kernels.common.mixture import (
    LONGEST_REMEMBERED,
    SHORTEST_REMEMBERED,
    MixtureWeights,
    no_memory,
    no_prior,
)
from vllm_aasd.kernels.draft import cpu as draft_cpu
from vllm_aasd.kernels.draft import memory_cpu, suffixes_cpu

extend_index = suffixes_cpu.extend_index
draft = draft_cpu.draft
remember = memory_cpu.remember


def max_candidates(max_matches: int, top_k: int, num_remembered: int, num_successors: int) -> int:
    """How many candidates a draft token can have: what the scratch of `draft` must hold for none to be ignored.

    Args:
        max_matches: of an order.
        top_k: predictions stored per context position.
        num_remembered: predictions of a row of the memory.
        num_successors: of a token in the prior.
    """
    runs = LONGEST_REMEMBERED - SHORTEST_REMEMBERED + 1
    return draft_cpu.ORDERS_USED * max_matches * (1 + top_k) + runs * num_remembered + num_successors


def warm_up(num_orders: int, top_k: int) -> None:
    """Compile the path that serves, on one small request, so that no request pays for it.

    Args:
        num_orders: how many orders the index has.
        top_k: entries per position of the alignment table.
    """
    capacity = 16
    tokens = np.array([1, 2, 3, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], np.int32)
    prev = np.empty((num_orders, capacity), np.int32)
    head = np.full((num_orders, 2 * capacity), -1, np.int32)
    extend_index(tokens, prev, head, 0, 5)
    weights = MixtureWeights(
        np.ones(num_orders, np.float32), np.full(num_orders, 0.5, np.float32), np.float32(2), np.ones(4, np.float32)
    )
    out = np.empty(2, np.int32), np.empty(2, np.float32), np.zeros(3, np.int64)
    scratch = np.zeros(8, np.float32), np.empty(8, np.int32), np.empty(num_orders, np.int32)
    store = np.full((capacity, 1 + 2 * top_k), -1, np.int32), np.zeros(1, np.int32), capacity
    draft(tokens, prev, head, 5, *store, *weights, *no_prior(), 4, 0.1, *scratch, *out)
    remember(tokens, 3, 3, *store, no_memory())
