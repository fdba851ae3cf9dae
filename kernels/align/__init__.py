"""Align: the target's top-k next-token ids and probabilities of each row, written into a paged table.

The entry
    Each slot of the table holds 1 + 2k int32: the id of the token at the slot's own position, which tells a
    reader that the entry is of a rejected draft token; then the ids of the k most probable next tokens, descending, the
    lowest id first among equals; then their probabilities as the bits of float32. A probability is e^(z - m) / s over
    the full vocabulary, with m the row's maximum and s = sum e^(z - m), at temperature 1. A row without a softmax (NaN,
    +inf, or nothing but -inf) is written with ids 0 and probabilities 0.

Shards
    Under tensor parallelism each rank holds the logits of a part of the vocabulary. Rank r's partial entry of a row is
    its k best (id, z) and s_r = sum e^(z - m_r) with m_r its own maximum, which is its first z. The row's k best are
    among the ranks' k best, and s = sum s_r e^(m_r - m) with m = max m_r. A masked token's z is the lowest finite
    float32 in a partial entry, so that there are always k tokens. NaN or +inf on one rank gives s_r = NaN and so
    s = NaN. Blocks of a row are merged in the same way.
"""

from types import ModuleType

import torch

from vllm_aasd.kernels.align import reference
from vllm_aasd.kernels.common.backends import runs_triton
from vllm_aasd.kernels.common.checks import check_dtype, check_logits, check_tensor

__all__ = ["MAX_TOP_K", "align", "align_merge", "align_shard", "warm_up"]

MAX_TOP_K = 8
"""Most predictions stored per position."""


def check_table(name: str, table: torch.Tensor, vocab_size: int) -> None:
    """Raise ValueError unless a tensor can hold alignment entries over this vocabulary."""
    check_dtype(name, table, torch.int32)
    top_k, odd = divmod(table.shape[-1] - 1, 2)
    if table.ndim != 2 or odd or not 1 <= top_k <= min(MAX_TOP_K, vocab_size):
        raise ValueError(
            f"{name} has shape {tuple(table.shape)}, expected (num_slots, 1 + 2k) with k from 1 to "
            f"min({MAX_TOP_K}, vocab_size {vocab_size})"
        )
    if not table.is_contiguous():
        raise ValueError(f"{name} has strides {table.stride()}, expected a contiguous tensor")


def align(logits: torch.Tensor, token_ids: torch.Tensor, slot_mapping: torch.Tensor, table: torch.Tensor) -> None:
    """Write the alignment entry of each row to its slot; the module's docstring has the layout.

    Args:
        logits: [num_rows, vocab_size] float32, bfloat16 or float16, any row stride. Not modified.
        token_ids: [num_rows] int32, the input token at each row's own position.
        slot_mapping: [num_rows] int64, the slot of each row. Negative skips the row. Of rows with the same slot
            the last one stays on a CPU; a GPU writes rows in any order, so there slots must differ.
        table: [num_slots, 1 + 2k] int32 with 1 <= k <= 8 and k <= vocab_size; modified in place.

    Raises:
        ValueError: an argument has a wrong shape or dtype, or, on a CPU, a slot does not exist; rows before it
            have been written then. A GPU skips such rows.
    """
    num_rows = slot_mapping.shape[0]
    check_logits("logits", logits, num_rows)
    check_tensor("token_ids", token_ids, (num_rows,), torch.int32)
    check_tensor("slot_mapping", slot_mapping, (num_rows,), torch.int64)
    check_table("table", table, logits.shape[1])
    _implementation(logits.device.type).align(logits, token_ids, slot_mapping, table)


def align_shard(logits: torch.Tensor, slot_mapping: torch.Tensor, first_token_id: int, top_k: int) -> torch.Tensor:
    """Reduce one rank's shard of the logits to partial entries; the module's docstring has their meaning.

    Args:
        logits: [num_rows, shard_size] float32, bfloat16 or float16, any row stride: the logits of token ids
            from first_token_id on, without the padding of the vocabulary. Not modified.
        slot_mapping: [num_rows] int64. Rows with a negative slot are skipped.
        first_token_id: the id of the shard's first token.
        top_k: k of the table, from 1 to 8, and at most shard_size.

    Returns:
        [num_rows, 1 + 2k] int32: k ids, descending by logit, the lowest id first among equals; the bits of
        their float32 logits; the bits of the float32 sum. Undefined for rows that are skipped.

    Raises:
        ValueError: an argument has a wrong shape or dtype, or top_k or first_token_id is out of range.
    """
    num_rows = slot_mapping.shape[0]
    check_logits("logits", logits, num_rows)
    check_tensor("slot_mapping", slot_mapping, (num_rows,), torch.int64)
    most = min(MAX_TOP_K, logits.shape[1])
    if not 1 <= top_k <= most:
        raise ValueError(f"top_k is {top_k}, expected 1 to {most}")
    if not 0 <= first_token_id < 2**30:
        raise ValueError(f"first_token_id is {first_token_id}, expected 0 to 2**30 - 1")
    return _shard_implementation(logits.device.type).align_shard(logits, slot_mapping, first_token_id, top_k)


def align_merge(
    partials: torch.Tensor, token_ids: torch.Tensor, slot_mapping: torch.Tensor, table: torch.Tensor
) -> None:
    """Merge the partial entries of all ranks and write the alignment entry of each row to its slot.

    Args:
        partials: [num_ranks, num_rows, 1 + 2k] int32, what `align_shard` gave on every rank, in any order.
        token_ids: [num_rows] int32, the input token at each row's own position.
        slot_mapping: [num_rows] int64, as for `align_shard`.
        table: [num_slots, 1 + 2k] int32; modified in place.

    Raises:
        ValueError: an argument has a wrong shape or dtype.
    """
    num_rows = slot_mapping.shape[0]
    check_table("table", table, MAX_TOP_K)
    check_tensor("partials", partials, (partials.shape[0], num_rows, table.shape[1]), torch.int32)
    check_tensor("token_ids", token_ids, (num_rows,), torch.int32)
    check_tensor("slot_mapping", slot_mapping, (num_rows,), torch.int64)
    _shard_implementation(table.device.type).align_merge(partials, token_ids, slot_mapping, table)


def _implementation(device_type: str) -> ModuleType:
    if device_type == "cpu" and not runs_triton(device_type):
        from vllm_aasd.kernels.align import cpu

        return cpu
    return _shard_implementation(device_type)


def _shard_implementation(device_type: str) -> ModuleType:
    if runs_triton(device_type):
        from vllm_aasd.kernels.align import triton

        return triton
    return reference


def warm_up(device: torch.device, dtype: torch.dtype) -> None:
    """Compile what `align` needs for logits of a dtype, or load it from the cache on disk.

    To be called when a worker starts, so that no request waits for the compiler (seconds without a cache).

    Args:
        device: where the logits will be.
        dtype: float32, bfloat16 or float16.
    """
    logits = torch.tensor([[0.0, 1.0]], dtype=dtype, device=device)
    slot = torch.zeros(1, dtype=torch.int64, device=device)
    align(logits, slot.int(), slot, torch.zeros(1, 3, dtype=torch.int32, device=device))
