"""What other requests taught: a bounded table, for the process."""

import numpy as np

from vllm_aasd.kernels.draft import Prior

NUM_ROWS = 1 << 18
"""N-grams that are held at most: with `TOP_K` predictions each, 10 MiB."""

TOP_K = 4
"""Predictions kept of each n-gram."""


def empty_memory(num_rows: int = NUM_ROWS, top_k: int = TOP_K) -> np.ndarray:
    """A memory that has learned nothing yet.

    Args:
        num_rows: n-grams that it can hold, a power of two.
        top_k: predictions of each.

    Returns:
        ``[num_rows, 2 + 2 * top_k]`` int32, see `vllm_aasd.kernels.draft`.
    """
    memory = np.full((num_rows, 2 + 2 * top_k), -1, np.int32)
    memory[:, 1] = 0
    memory[:, 2 + top_k :] = 0
    return memory


def new_memory(prior: Prior | None) -> np.ndarray:
    """A memory that no request has taught: a copy of the prior's n-grams, or empty where there are none."""
    return prior.ngrams.copy() if prior is not None and len(prior.ngrams) else empty_memory()
