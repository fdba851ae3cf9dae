"""Recovered tokens of the compiled CPU path; the two ways to draw one are in `vllm_aasd.kernels.verify`.

A first sweep over the row finds its maximum and brings it into the cache. With noise a second one takes the best score.
With a uniform number it sums the weights of each block, and only the block that holds the token is searched.
"""

import numpy as np

from vllm_aasd.kernels.common.compiled import compiled
from vllm_aasd.kernels.common.rows_cpu import (
    BLOCK,
    block_sums,
    exp_nonpositive,
    first_with_key,
    max_key,
    order_key,
    row_max,
    to_float32,
)


@compiled
def _score(raw, inv_q, maximum):
    """Return a token's score: e**(z - maximum) inv_q, or -1 for a token of probability 0."""
    weight = exp_nonpositive(to_float32(raw) - maximum)
    return weight * inv_q if weight > np.float32(0.0) else np.float32(-1.0)


@compiled
def by_noise(row, draft, inv_q):
    """Return the token of the best score in one row, its draft token excluded."""
    maximum, argmax = row_max(row)
    if not np.isfinite(maximum):
        return argmax
    best = order_key(np.float32(-1.0))
    recovered = argmax
    scores = np.empty(BLOCK, dtype=np.float32)
    for start in range(0, row.size, BLOCK):
        block = row[start : start + BLOCK]
        for i in range(block.size):
            scores[i] = _score(block[i], inv_q[start + i], maximum)
        if start <= draft < start + block.size:
            scores[draft - start] = np.float32(-1.0)
        key = max_key(scores[: block.size])
        if key > best:
            best = key
            recovered = start + first_with_key(scores[: block.size], key)
    return recovered


@compiled
def _token_in(row, start, end, draft, maximum, remaining):
    """Return the token of a block at which the running sum exceeds `remaining`; its last with a weight if none does."""
    running = 0.0
    last = start
    for i in range(start, end):
        weight = exp_nonpositive(to_float32(row[i]) - maximum)
        if i == draft or weight <= np.float32(0.0):
            continue
        last = i
        running += np.float64(weight)
        if running > remaining:
            break
    return last


@compiled
def by_uniform(row, draft, uniform):
    """Return the token at which the running sum of weights, without the draft token's, exceeds `uniform` of it."""
    maximum, argmax = row_max(row)
    num_blocks = (row.size + BLOCK - 1) // BLOCK
    sums = np.empty(num_blocks, np.float64)
    total = 0.0
    for b in range(num_blocks):
        start = b * BLOCK
        end = min(start + BLOCK, row.size)
        if start <= draft < end:
            # In two parts: subtracting the draft's weight from a sum would leave its rounding error.
            sums[b] = np.float64(block_sums(row[start:draft], maximum)[0])
            sums[b] += np.float64(block_sums(row[draft + 1 : end], maximum)[0])
        else:
            sums[b] = np.float64(block_sums(row[start:end], maximum)[0])
        total += sums[b]
    # No token but the draft has a weight, or the row has no softmax.
    if total <= 0.0:
        return argmax
    remaining = uniform * total
    block, within = 0, remaining
    for b in range(num_blocks):
        if sums[b] > 0.0:
            # Rounding can leave the bar above all sums: then the last block with a weight holds the token.
            block, within = b, remaining
            if remaining < sums[b]:
                break
            remaining -= sums[b]
    return _token_in(row, block * BLOCK, min((block + 1) * BLOCK, row.size), draft, maximum, within)
