"""The hash of n-grams on the CPU (numba)."""

import numpy as np

from vllm_aasd.kernels.common.compiled import compiled
from vllm_aasd.kernels.common.ngram_hash import HASH_MULTIPLIER

_MULTIPLIER = np.uint64(HASH_MULTIPLIER)


@compiled
def hash_with(hashed, token):
    """An n-gram's hash, lengthened by a token."""
    return (hashed ^ np.uint64(np.uint32(token))) * _MULTIPLIER
