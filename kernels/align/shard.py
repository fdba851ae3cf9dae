"""Align shards: the alignment entries of `vllm_aasd.kernels.align`, from logits split over the vocabulary.

The merge
    Under tensor parallelism each rank holds the logits of a part of the vocabulary, and no rank needs the
    others' logits. Rank r's partial entry of a row is its k best (id, z) and s_r = sum e^(z - m_r) with m_r
    its own maximum, which is its first z. The row's k best are among the ranks' k best, and with m = max m_r
    its normaliser is s = sum s_r e^(m_r - m), so probabilities are e^(z - m) / s over the full vocabulary, as
    in one piece. A masked token's z is the lowest finite float32 in a partial entry, so that k tokens are
    always there. A row that has no softmax on one rank, NaN or +inf, has s_r = NaN and so s = NaN.

Memory
    One read of the rank's logits. 1 + 2k words per row and rank cross the wire (36 bytes at k = 4), where
    gathering the logits would move a whole row. One collective is enough: an entry is one row of int32.

Sources
    Those of `vllm_aasd.kernels.align`; merging normalisers: Milakov and Gimelshein, *Online normalizer
    calculation for softmax*, arXiv 1805.02867.
"""

import torch

from vllm_aasd.kernels.align import MAX_TOP_K, check_table
from vllm_aasd.kernels.common.backends import backend
from vllm_aasd.kernels.common.checks import check_dtype, check_logits, check_shape

__all__ = ["align_merge", "align_shard"]


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
    check_logits("logits", logits)
    check_shape("logits", logits, (num_rows, logits.shape[1]))
    check_shape("slot_mapping", slot_mapping, (num_rows,))
    check_dtype("slot_mapping", slot_mapping, torch.int64)
    most = min(MAX_TOP_K, logits.shape[1])
    if not 1 <= top_k <= most:
        raise ValueError(f"top_k is {top_k}, expected 1 to {most}")
    if not 0 <= first_token_id < 2**30:
        raise ValueError(f"first_token_id is {first_token_id}, expected 0 to 2**30 - 1")
    module = backend("align_shard", logits.device.type)
    return module.align_shard(logits, slot_mapping, first_token_id, top_k)


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
    check_shape("partials", partials, (partials.shape[0], num_rows, table.shape[1]))
    check_dtype("partials", partials, torch.int32)
    check_shape("token_ids", token_ids, (num_rows,))
    check_dtype("token_ids", token_ids, torch.int32)
    check_shape("slot_mapping", slot_mapping, (num_rows,))
    check_dtype("slot_mapping", slot_mapping, torch.int64)
    backend("align_shard", table.device.type).align_merge(partials, token_ids, slot_mapping, table)
