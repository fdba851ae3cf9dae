"""Plain numpy reference of vLLM's counter-based random numbers; what they are is in `kernels.verify.random_triton`.

Numbers are float32 as on the GPU, and every operation stands in the same order.
"""

import numpy as np

_SMALLEST_UNIFORM = np.float32(4.6566127342e-10)
_MASK = 0xFFFFFFFF


def row_uniform(seed: int, position: int) -> np.float32:
    """Return the uniform in (0, 1) that decides on a row's draft token: the first word of Philox4x32-10."""
    counter = [position & _MASK, position >> 32 & _MASK, 0, 0]
    key = [seed & _MASK, seed >> 32 & _MASK]
    for _ in range(10):
        product_a, product_b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            product_b >> 32 ^ counter[1] ^ key[0],
            product_b & _MASK,
            product_a >> 32 ^ counter[3] ^ key[1],
            product_a & _MASK,
        ]
        key = [(key[0] + 0x9E3779B9) & _MASK, (key[1] + 0xBB67AE85) & _MASK]
    # The word is read as a signed number; a negative one is complemented.
    magnitude = counter[0] ^ _MASK if counter[0] >> 31 else counter[0]
    return max(np.float32(magnitude) * np.float32(4.6566127342e-10), _SMALLEST_UNIFORM)


def _mix(h: np.ndarray, word: np.ndarray) -> np.ndarray:
    word = word * np.uint32(0xCC9E2D51)
    word = (word << np.uint32(15)) | (word >> np.uint32(17))
    h = h ^ word * np.uint32(0x1B873593)
    h = (h << np.uint32(13)) | (h >> np.uint32(19))
    return h * np.uint32(5) + np.uint32(0xE6546B64)


def token_gumbel(seed: int, position: int, vocab_size: int) -> np.ndarray:
    """Return the Gumbel variables of every token of a vocabulary at a position, float32."""
    h = np.zeros(1, dtype=np.uint32)
    for word in (seed & _MASK, seed >> 32 & _MASK, position & _MASK):
        h = _mix(h, np.array([word], dtype=np.uint32))
    h = _mix(h, np.arange(vocab_size, dtype=np.uint32)) ^ np.uint32(16)
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    h = h ^ (h >> np.uint32(16))
    one = np.float32(1.0)
    high = (h >> np.uint32(16)).astype(np.float32)
    low = (h & np.uint32(0xFFFF)).astype(np.float32)
    u = high * np.float32(2.0**-16) + (low + np.float32(0.5)) * np.float32(2.0**-32)
    series: np.ndarray = np.full_like(u, one / np.float32(8))
    for k in range(7, 0, -1):
        series = one / np.float32(k) + u * series
    series = -u * series
    direct = np.log(np.maximum(one - u, np.float32(2.0**-24)))
    return -np.log(-np.where(u < np.float32(0.25), series, direct))
