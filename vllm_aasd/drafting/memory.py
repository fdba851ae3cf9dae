"""What other requests taught: a bounded table in memory, and its file, which can carry no code."""

import os
import tempfile
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vllm_aasd.kernels.draft_cpu import MOST_REMEMBERED

NUM_ROWS = 1 << 18
"""Runs of tokens that are remembered at most: with `TOP_K` predictions each, 10 MiB."""

TOP_K = 4
"""Predictions kept of each run."""

_FORMAT = "vllm-aasd memory, version 1"
_ROUNDING = 1e-3


class MemoryFileError(ValueError):
    """A file can't be used as the memory of a model; the text says why."""


def empty_memory(num_rows: int = NUM_ROWS, top_k: int = TOP_K) -> np.ndarray:
    """A memory that has learnt nothing yet.

    Args:
        num_rows: runs of tokens that it can hold, a power of two.
        top_k: predictions of each.

    Returns:
        ``[num_rows, 2 + 2 * top_k]`` int32, see `vllm_aasd.kernels.draft`.
    """
    memory = np.full((num_rows, 2 + 2 * top_k), -1, np.int32)
    memory[:, 1] = 0
    memory[:, 2 + top_k :] = 0
    return memory
