"""Compiled CPU path of the redraw op: three sweeps over a row, of which the last looks into one block only.

The first finds the maximum and brings the row into the cache, the second sums the weights of each block, and the
block in which the drawn token lies is then gone through one token at a time.
"""

import numpy as np
import torch

from vllm_aasd.kernels.common.compiled import compiled
from vllm_aasd.kernels.common.rows_cpu import BLOCK, block_sums, exp_nonpositive, flat_view, row_max, to_float32


@compiled
def _token_in(row, start, end, draft, maximum, left):
    """Return the token of a block at which the running sum exceeds `left`; its last with a weight if none does."""
    running = 0.0
    last = start
    for i in range(start, end):
        weight = exp_nonpositive(to_float32(row[i]) - maximum)
        if i == draft or weight <= np.float32(0.0):
            continue
        last = i
        running += np.float64(weight)
        if running > left:
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
    left = uniform * total
    block, within = 0, left
    for b in range(num_blocks):
        if sums[b] > 0.0:
            # The last one that has a weight, where rounding takes the bar past them all.
            block, within = b, left
            if left < sums[b]:
                break
            left -= sums[b]
    return _token_in(row, block * BLOCK, min((block + 1) * BLOCK, row.size), draft, maximum, within)


@compiled
def _redraw_kernel(logits, stride, vocab_size, rows, draft_token_ids, uniform, token_ids):
    """Fill the drawn tokens; the rows exist."""
    for i in range(rows.size):
        row = logits[rows[i] * stride : rows[i] * stride + vocab_size]
        token_ids[i] = _draw(row, np.int64(draft_token_ids[i]), uniform[i])


def redraw(
    target_logits: torch.Tensor, rows: torch.Tensor, draft_token_ids: torch.Tensor, uniform: torch.Tensor
) -> torch.Tensor:
    """See `vllm_aasd.kernels.verify.recovered.redraw`."""
    token_ids = torch.empty(rows.shape[0], dtype=torch.int32)
    logits, stride = flat_view(target_logits)
    _redraw_kernel(
        logits,
        stride,
        target_logits.shape[1],
        rows.contiguous().numpy(),
        draft_token_ids.contiguous().numpy(),
        uniform.contiguous().numpy(),
        token_ids.numpy(),
    )
    return token_ids
