"""Triton path of the align shard ops; the partial entry and its merge are in `vllm_aasd.kernels.align.shard`.

A shard of the vocabulary is to the merge what a block of it is, so the kernels are those of
`vllm_aasd.kernels.align.triton`: a rank merges its blocks into one partial entry per row, and one more merge,
over the ranks, writes the table.
"""

import torch

from vllm_aasd.kernels.align.triton import block_partials, merge_partials


def align_shard(logits: torch.Tensor, slot_mapping: torch.Tensor, first_token_id: int, top_k: int) -> torch.Tensor:
    """See `vllm_aasd.kernels.align.shard.align_shard`."""
    partials = block_partials(logits, slot_mapping, first_token_id, top_k)
    merged = torch.empty_like(partials[0])
    merge_partials(partials, None, slot_mapping, merged)
    return merged


def align_merge(
    partials: torch.Tensor, token_ids: torch.Tensor, slot_mapping: torch.Tensor, table: torch.Tensor
) -> None:
    """See `vllm_aasd.kernels.align.shard.align_merge`."""
    merge_partials(partials.contiguous(), token_ids, slot_mapping, table)
