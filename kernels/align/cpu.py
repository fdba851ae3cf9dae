"""Compiled CPU path of the align op; the entry's layout is in `vllm_aasd.kernels.align`.

One sweep over each row in blocks that stay in the L1 cache: the block's largest key shows whether any of its
elements can enter the top k, which is rare after the first few blocks, and the online softmax of
`vllm_aasd.kernels.common.rows_cpu` adds its sums.
"""

import numpy as np
import torch

from vllm_aasd.kernels.common.compiled import compiled
from vllm_aasd.kernels.common.rows_cpu import (
    BLOCK,
    LOWEST_KEY,
    absorb,
    exp_nonpositive,
    flat_view,
    key_value,
    max_key,
    order_key,
    to_float32,
)

# Elements that are searched one by one if one of them enters the top k; only a few pieces of a block are.
_PIECE = 128


@compiled
def _insert(keys, ids, key, token_id):
    """Insert a token into the descending top k, after its equals, dropping the last."""
    j = keys.size - 1
    while j > 0 and keys[j - 1] < key:
        keys[j] = keys[j - 1]
        ids[j] = ids[j - 1]
        j -= 1
    keys[j] = key
    ids[j] = token_id


@compiled
def _collect(piece, start, keys, ids):
    """Insert those elements of a piece, whose first id is `start`, that belong to the top k."""
    if max_key(piece) > keys[keys.size - 1]:
        for j in range(piece.size):
            key = order_key(to_float32(piece[j]))
            if key > keys[keys.size - 1]:
                _insert(keys, ids, key, start + j)


@compiled
def _align_kernel(logits, stride, vocab_size, token_ids, slot_mapping, table):
    """Write the table; return the position of the first slot that does not exist, or -1."""
    top_k = (table.shape[1] - 1) // 2
    keys = np.empty(top_k, dtype=np.int32)
    ids = np.empty(top_k, dtype=np.int32)
    values = table.view(np.float32)
    for i in range(slot_mapping.size):
        slot = slot_mapping[i]
        if slot >= table.shape[0]:
            return i
        if slot < 0:
            continue
        row = logits[i * stride : i * stride + vocab_size]
        keys[:] = LOWEST_KEY
        ids[:] = 0
        maximum = np.float32(-np.inf)
        s = 0.0
        for start in range(0, vocab_size, BLOCK):
            block = row[start : start + BLOCK]
            largest = max_key(block)
            if largest > keys[top_k - 1]:
                for first in range(0, block.size, _PIECE):
                    _collect(block[first : first + _PIECE], start + first, keys, ids)
            maximum, s, _ = absorb(block, largest, maximum, s, 0.0)
        usable = np.isfinite(maximum)
        table[slot, 0] = token_ids[i]
        for j in range(top_k):
            table[slot, 1 + j] = ids[j] if usable else 0
            weight = np.float64(exp_nonpositive(key_value(keys[j]) - maximum)) if usable else 0.0
            values[slot, 1 + top_k + j] = weight / s if usable else 0.0
    return -1


def align(logits: torch.Tensor, token_ids: torch.Tensor, slot_mapping: torch.Tensor, table: torch.Tensor) -> None:
    """See `vllm_aasd.kernels.align.align`."""
    flat, stride = flat_view(logits)
    bad = _align_kernel(
        flat,
        stride,
        logits.shape[1],
        token_ids.contiguous().numpy(),
        slot_mapping.contiguous().numpy(),
        table.numpy(),
    )
    if bad >= 0:
        raise ValueError(f"slot_mapping[{bad}] is {int(slot_mapping[bad])}, table has {table.shape[0]} slots")


@compiled
def aligned_slot(tokens, position, table, block_table, block_size):
    """Where the entry of a context position lies; -1 if there is none, -2 if it is a stale one."""
    if table.shape[0] == 0:
        return np.int64(-1)
    slot = np.int64(block_table[position // block_size]) * block_size + position % block_size
    if table[slot, 0] == tokens[position]:
        return slot
    return np.int64(-1) if table[slot, 0] < 0 else np.int64(-2)
