"""vLLM's counter-based random numbers as Triton device functions, bit for bit.

A row's numbers are functions of the request's seed and the row's position, so they don't depend on the kernel
or the batch. There are two streams: one uniform per row by Philox (Triton's own `tl.rand`), for accepting a draft
token; one Gumbel variable per row and token by MurmurHash3 over (seed, position, token id), for drawing a token.

Sources: vLLM 0.32, `v1/worker/gpu/sample/gumbel.py`, whose numbers these are; Salmon et al., *Parallel random
numbers: as easy as 1, 2, 3*, SC 2011 (Philox); MurmurHash3_x86_32 by Austin Appleby, public domain.
The order of floating-point operations is part of the contract. The reference is
`vllm_aasd.kernels.verify.random_reference`.
"""

import triton
import triton.language as tl

# The smallest positive value of `tl.rand`: log u stays finite.
_SMALLEST_UNIFORM = tl.constexpr(4.6566127342e-10)


@triton.jit
def row_uniform(seed, position):
    """Return the uniform in (0, 1) that decides on a row's draft token."""
    return tl.maximum(tl.rand(seed, position), _SMALLEST_UNIFORM)


@triton.jit
def _murmur_mix(h, word):
    word *= 0xCC9E2D51
    word = (word << 15) | (word >> 17)
    h ^= word * 0x1B873593
    h = (h << 13) | (h >> 19)
    return h * 5 + 0xE6546B64


@triton.jit
def _murmur(seed, position, ids):
    """Hash the 16 bytes (seed, low word of the position, id), which need one finalization."""
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    h = _murmur_mix(tl.zeros_like(low), low)
    h = _murmur_mix(h, ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32))
    h = _murmur_mix(h, (position & 0xFFFFFFFF).to(tl.uint32))
    h = _murmur_mix(h, ids.to(tl.uint32)) ^ 16
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def token_gumbel(seed, position, ids):
    """Return the Gumbel variables of tokens at a position: -log(-log(1 - u)).

    The noise that decides a race is that of small u, where float32 is fine; log(1 - u) is a series there.
    """
    bits = _murmur(seed, position, ids)
    high = (bits >> 16).to(tl.int32).to(tl.float32)
    low = (bits & 0xFFFF).to(tl.int32).to(tl.float32)
    u = high * 1.52587890625e-05 + (low + 0.5) * 2.3283064365386963e-10
    series = 1.0 / 7.0 + u * (1.0 / 8.0)
    series = 1.0 / 6.0 + u * series
    series = 1.0 / 5.0 + u * series
    series = 1.0 / 4.0 + u * series
    series = 1.0 / 3.0 + u * series
    series = 1.0 / 2.0 + u * series
    series = -u * (1.0 + u * series)
    direct = tl.log(tl.maximum(1.0 - u, 5.960464477539063e-08))
    return -tl.log(-tl.where(u < 0.25, series, direct))
