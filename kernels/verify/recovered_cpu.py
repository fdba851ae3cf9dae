"""Compiled CPU path of the recovered tokens; see `vllm_aasd.kernels.verify.recovered`.

A first sweep over a row finds its maximum and brings it into the cache. With noise a second one takes the best score.
By a uniform number, it sums the weights of each block, and the block in which the drawn token lies is then gone through
one token at a time.
"""

from typing import Any

import numpy as np
import torch

from vllm_aasd.kernels.common.compiled import compiled
from vllm_aasd.kernels.common.rows_cpu import (
    BLOCK,
    block_sums,
    exp_nonpositive,
    first_with_key,
    flat_view,
    max_key,
    order_key,
    row_max,
    to_float32,
)


@compiled
def _score(raw, inv_q, maximum):
    """Return a token's score in the race: e**(z - maximum) inv_q, or -1 for a token of probability 0."""
    weight = exp_nonpositive(to_float32(raw) - maximum)
    return weight * inv_q if weight > np.float32(0.0) else np.float32(-1.0)


@compiled
def _race(row, inv_q, draft):
    """Return the winner of the exponential race over one row without its draft token."""
    maximum, argmax = row_max(row)
    if not np.isfinite(maximum):
        return argmax
    none = order_key(np.float32(-1.0))
    best = none
    winner = argmax
    scores = np.empty(BLOCK, dtype=np.float32)
    for start in range(0, row.size, BLOCK):
        block = row[start : start + BLOCK]
        block_inv_q = inv_q[start : start + BLOCK]
        for i in range(block.size):
            scores[i] = _score(block[i], block_inv_q[i], maximum)
        if start <= draft < start + block.size:
            scores[draft - start] = np.float32(-1.0)
        key = max_key(scores[: block.size])
        if key > best:
            best = key
            winner = start + first_with_key(scores[: block.size], key)
    return winner


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
def _draw(row, draft, uniform):
    """Return the token at which the running sum of weights, the draft's left out, exceeds its share of the total."""
    maximum, argmax = row_max(row)
    num_blocks = (row.size + BLOCK - 1) // BLOCK
    sums = np.empty(num_blocks, np.float64)
    total = 0.0
    for b in range(num_blocks):
        start = b * BLOCK
        end = min(start + BLOCK, row.size)
        if start <= draft < end:
            # In two parts: what is subtracted from a sum leaves its rounding behind.
            sums[b] = np.float64(block_sums(row[start:draft], maximum)[0])
            sums[b] += np.float64(block_sums(row[draft + 1 : end], maximum)[0])
        else:
            sums[b] = np.float64(block_sums(row[start:end], maximum)[0])
        total += sums[b]
    # Nothing but the draft has a weight; or the row has no softmax, and then nothing has one.
    if total <= 0.0:
        return argmax
    remaining = uniform * total
    block, within = 0, remaining
    for b in range(num_blocks):
        if sums[b] > 0.0:
            # The last one that has a weight, where rounding takes the bar past them all.
            block, within = b, remaining
            if remaining < sums[b]:
                break
            remaining -= sums[b]
    return _token_in(row, block * BLOCK, min((block + 1) * BLOCK, row.size), draft, maximum, within)


@compiled
def _noise_kernel(logits, stride, vocab_size, rows, draft_token_ids, inv_q, inv_q_stride, token_ids):
    """Fill the drawn tokens; the rows exist."""
    for i in range(rows.size):
        row = logits[rows[i] * stride : rows[i] * stride + vocab_size]
        noise = inv_q[i * inv_q_stride : i * inv_q_stride + vocab_size]
        token_ids[i] = _race(row, noise, np.int64(draft_token_ids[i]))


@compiled
def _uniform_kernel(logits, stride, vocab_size, rows, draft_token_ids, uniform, token_ids):
    """Fill the drawn tokens; the rows exist."""
    for i in range(rows.size):
        row = logits[rows[i] * stride : rows[i] * stride + vocab_size]
        token_ids[i] = _draw(row, np.int64(draft_token_ids[i]), uniform[i])


def sample_recovered_tokens(
    target_logits: torch.Tensor, rows: torch.Tensor, draft_token_ids: torch.Tensor, inv_q: torch.Tensor
) -> torch.Tensor:
    """See `vllm_aasd.kernels.verify.recovered.sample_recovered_tokens`."""
    return _sample(_noise_kernel, target_logits, rows, draft_token_ids, *flat_view(inv_q))


def sample_recovered_tokens_by_uniform(
    target_logits: torch.Tensor, rows: torch.Tensor, draft_token_ids: torch.Tensor, uniform: torch.Tensor
) -> torch.Tensor:
    """See `vllm_aasd.kernels.verify.recovered.sample_recovered_tokens_by_uniform`."""
    return _sample(_uniform_kernel, target_logits, rows, draft_token_ids, uniform.contiguous().numpy())


def _sample(
    kernel: Any, target_logits: torch.Tensor, rows: torch.Tensor, draft_token_ids: torch.Tensor, *numbers: Any
) -> torch.Tensor:
    token_ids = torch.empty(rows.shape[0], dtype=torch.int32)
    logits, stride = flat_view(target_logits)
    each_row = rows.contiguous().numpy(), draft_token_ids.contiguous().numpy()
    kernel(logits, stride, target_logits.shape[1], *each_row, *numbers, token_ids.numpy())
    return token_ids
