"""What the mixture of `vllm_aasd.kernels.draft` is made with, apart from a request: its constants and the prior."""

from typing import NamedTuple

import numpy as np

MAX_TOP_K = 8
"""Most predictions stored per context position, all of which vote."""

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
