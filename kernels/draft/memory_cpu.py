"""The memory of earlier requests on the CPU (numba). What it holds is in `vllm_aasd.kernels.draft`."""

import numpy as np

from vllm_aasd.kernels.align.cpu import aligned_slot
from vllm_aasd.kernels.common.compiled import compiled
from vllm_aasd.kernels.draft import MAX_MEMORY_NGRAM, MAX_OBSERVATIONS, MIN_MEMORY_NGRAM
from vllm_aasd.kernels.draft.index_cpu import hash_with


@compiled
def memory_slot(tokens, size, end, memory):
    """Where the memory holds, or would hold, the n-gram of ``size`` tokens ending at ``end``; and its tag there."""
    hashed = np.uint64(size)
    for back in range(size):
        hashed = hash_with(hashed, tokens[end - back])
    # The low half tells n-grams apart that share a slot; the two halves of a product are nearly independent.
    tag = np.int32(hashed & np.uint64(0x7FFFFFFF))
    return np.int64((hashed >> np.uint64(32)) & np.uint64(memory.shape[0] - 1)), tag


@compiled
def remember(tokens, first, last, table, block_table, block_size, memory):
    """Mix the target's stored distributions at positions ``first`` to ``last`` into the memory.

    Args:
        tokens: ``[>= last + 1]`` int32, the context.
        first, last: positions, both included; those without a fresh stored distribution are ignored.
        table, block_table, block_size: the alignment store, as for `draft`.
        memory: ``[S, 2 + 2k]`` int32 with S a power of two or 0, written in place; see `vllm_aasd.kernels.draft`.
    """
    if memory.shape[0] == 0:
        return
    top_k = (memory.shape[1] - 2) // 2
    stored = (table.shape[1] - 1) // 2
    probs = table.view(np.float32)
    memory_probs = memory.view(np.float32)
    for position in range(first, last + 1):
        slot = aligned_slot(tokens, position, table, block_table, block_size)
        if slot < 0:
            continue
        for size in range(MIN_MEMORY_NGRAM, min(MAX_MEMORY_NGRAM, position + 1) + 1):
            row, tag = memory_slot(tokens, size, position, memory)
            if memory[row, 0] != tag:
                memory[row, 0] = tag
                memory[row, 1] = 0
                for k in range(top_k):
                    memory[row, 2 + k] = -1
                    memory_probs[row, 2 + top_k + k] = 0.0
            count = min(memory[row, 1] + 1, MAX_OBSERVATIONS)
            memory[row, 1] = count
            new_share = np.float32(1.0) / np.float32(count)
            for k in range(top_k):
                memory_probs[row, 2 + top_k + k] *= np.float32(1.0) - new_share
            for j in range(stored):
                token = table[slot, 1 + j]
                share = new_share * probs[slot, 1 + stored + j]
                target = -1
                weakest = 0
                for k in range(top_k):
                    if memory[row, 2 + k] == token:
                        target = k
                        break
                    if memory_probs[row, 2 + top_k + k] < memory_probs[row, 2 + top_k + weakest]:
                        weakest = k
                if target >= 0:
                    memory_probs[row, 2 + top_k + target] += share
                elif memory_probs[row, 2 + top_k + weakest] < share:
                    memory[row, 2 + weakest] = token
                    memory_probs[row, 2 + top_k + weakest] = share
