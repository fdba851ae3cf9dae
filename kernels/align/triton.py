"""Triton path of the align ops; the entry's layout and the sources are in `vllm_aasd.kernels.align`.

One program reads one block of one row and writes its partial entry; a second kernel merges a row's partial entries.
Shards of the vocabulary are merged as blocks are: with tensor parallelism, a rank merges its blocks into one partial
entry per row, and one more merge, over the ranks, writes the table.
"""

import torch
import triton
import triton.language as tl

from vllm_aasd.kernels.common.rows_triton import BEYOND, launch_shape, load_block

_LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _store_top_k(
    z,
    ids,
    vocab_size,
    first_id,
    partial_ptr,  # [1 + 2 TOP_K]
    TOP_K: tl.constexpr,
):
    """Write a block's partial alignment entry: its top k ids, their logits, and sum e^(z - top logit).

    A masked token's logit becomes the lowest finite float32, so that -inf marks what must not be chosen: ids after
    the vocabulary, and ids chosen before. The sum is NaN if the block has NaN or +inf, and 0 if it has only -inf.
    """
    candidates = tl.where(z > _LOWEST, z, _LOWEST)
    candidates = tl.where(ids < vocab_size, candidates, float("-inf"))
    maximum = tl.max(candidates, axis=0)
    total = tl.sum(tl.exp(z - maximum), axis=0)
    for j in tl.static_range(TOP_K):
        best = tl.max(candidates, axis=0)
        best_id = tl.min(tl.where(candidates == best, ids, BEYOND), axis=0)
        candidates = tl.where(ids == best_id, float("-inf"), candidates)
        tl.store(partial_ptr + j, first_id + best_id)
        tl.store(partial_ptr + TOP_K + j, best.to(tl.int32, bitcast=True))
    tl.store(partial_ptr + 2 * TOP_K, total.to(tl.int32, bitcast=True))


# A request's rows begin anywhere in a batch, and that must not ask for another compilation.
@triton.jit(do_not_specialize_on_alignment=["token_ids_ptr", "slot_mapping_ptr"])
def _merge_partials_kernel(
    partials_ptr,  # [num_parts, num_rows, 1 + 2 TOP_K]
    num_parts,
    token_ids_ptr,  # [num_rows]
    slot_mapping_ptr,  # [num_rows]
    out_ptr,  # [num_slots, 1 + 2 TOP_K] table, or [num_rows, 1 + 2 TOP_K] partials
    num_slots,
    TOP_K: tl.constexpr,
    PARTS: tl.constexpr,
    PLACES: tl.constexpr,
    TO_TABLE: tl.constexpr,
):
    """Merge the partial entries of one row, into its slot of the table or into one partial entry."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + row)
    if (slot < 0) | (slot >= num_slots):
        return
    width: tl.constexpr = 1 + 2 * TOP_K
    part_stride = tl.num_programs(0).to(tl.int64) * width
    entry_ptr = partials_ptr + row * width

    part = tl.arange(0, PARTS)
    exists = part < num_parts
    part_ptr = entry_ptr + part * part_stride
    maxima = tl.load(part_ptr + TOP_K, mask=exists, other=0).to(tl.float32, bitcast=True)
    maxima = tl.where(exists, maxima, float("-inf"))
    sums = tl.load(part_ptr + 2 * TOP_K, mask=exists, other=0).to(tl.float32, bitcast=True)
    maximum = tl.max(maxima, axis=0)
    total = tl.sum(sums * tl.exp(maxima - maximum), axis=0)

    # Place j of part i is element i PLACES + j; parts and places are padded to powers of two.
    element = tl.arange(0, PARTS * PLACES)
    place = element % PLACES
    there = (element // PLACES < num_parts) & (place < TOP_K)
    element_ptr = entry_ptr + (element // PLACES) * part_stride + place
    ids = tl.load(element_ptr, mask=there, other=0)
    candidates = tl.load(element_ptr + TOP_K, mask=there, other=0).to(tl.float32, bitcast=True)
    candidates = tl.where(there, candidates, float("-inf"))

    if TO_TABLE:
        out_ptr += slot * width
        tl.store(out_ptr, tl.load(token_ids_ptr + row))
        out_ptr += 1
    else:
        out_ptr += row * width
        tl.store(out_ptr + 2 * TOP_K, total.to(tl.int32, bitcast=True))
    # Neither 0 (nothing but -inf) nor NaN.
    has_softmax = total > 0.0
    for j in tl.static_range(TOP_K):
        best = tl.max(candidates, axis=0)
        best_id = tl.min(tl.where(candidates == best, ids, BEYOND), axis=0)
        candidates = tl.where((ids == best_id) & (candidates == best), float("-inf"), candidates)
        value = best
        if TO_TABLE:
            best_id = tl.where(has_softmax, best_id, 0)
            value = tl.where(has_softmax, tl.exp(best - maximum) / total, 0.0)
        tl.store(out_ptr + j, best_id)
        tl.store(out_ptr + TOP_K + j, value.to(tl.int32, bitcast=True))


# A request's rows begin anywhere in a batch, and that must not ask for another compilation.
@triton.jit(do_not_specialize_on_alignment=["slot_mapping_ptr"])
def _partials_kernel(
    logits_ptr,  # [num_rows, vocab_size]
    logits_stride,
    slot_mapping_ptr,  # [num_rows]
    partials_ptr,  # [num_blocks, num_rows, 1 + 2 TOP_K]
    vocab_size,
    first_id,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # int64: rows times stride passes 2**31.
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    if tl.load(slot_mapping_ptr + row) < 0:
        return
    z, ids = load_block(logits_ptr + row * logits_stride, block * BLOCK, vocab_size, BLOCK)
    partial = block.to(tl.int64) * tl.num_programs(0) + row
    _store_top_k(z, ids, vocab_size, first_id, partials_ptr + partial * (1 + 2 * TOP_K), TOP_K)


def _block_partials(logits: torch.Tensor, slot_mapping: torch.Tensor, first_token_id: int, top_k: int) -> torch.Tensor:
    """Reduce logits to the partial entries of their blocks, [num_blocks, num_rows, 1 + 2k] int32."""
    num_rows, vocab_size = logits.shape
    shape, num_blocks = launch_shape(num_rows, vocab_size)
    partials = torch.empty(num_blocks, num_rows, 1 + 2 * top_k, dtype=torch.int32, device=logits.device)
    if num_rows:
        _partials_kernel[(num_rows, num_blocks)](
            logits,
            logits.stride(0),
            slot_mapping.contiguous(),
            partials,
            vocab_size,
            first_token_id,
            TOP_K=top_k,
            **shape,
        )
    return partials


def _merge_partials(
    partials: torch.Tensor,
    token_ids: torch.Tensor | None,
    slot_mapping: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Merge [num_parts, num_rows, 1 + 2k] partial entries into the table, or row by row without token ids."""
    num_parts, num_rows, width = partials.shape
    if num_rows:
        _merge_partials_kernel[(num_rows,)](
            partials,
            num_parts,
            slot_mapping if token_ids is None else token_ids.contiguous(),
            slot_mapping.contiguous(),
            out,
            2**62 if token_ids is None else out.shape[0],
            TOP_K=width // 2,
            PARTS=triton.next_power_of_2(num_parts),
            PLACES=triton.next_power_of_2(width // 2),
            TO_TABLE=token_ids is not None,
            num_warps=1,
        )


def align(logits: torch.Tensor, token_ids: torch.Tensor, slot_mapping: torch.Tensor, table: torch.Tensor) -> None:
    """See `vllm_aasd.kernels.align.align`."""
    partials = _block_partials(logits, slot_mapping, 0, table.shape[1] // 2)
    _merge_partials(partials, token_ids, slot_mapping, table)


def align_shard(logits: torch.Tensor, slot_mapping: torch.Tensor, first_token_id: int, top_k: int) -> torch.Tensor:
    """See `vllm_aasd.kernels.align.align_shard`."""
    partials = _block_partials(logits, slot_mapping, first_token_id, top_k)
    merged = torch.empty_like(partials[0])
    _merge_partials(partials, None, slot_mapping, merged)
    return merged


def align_merge(
    partials: torch.Tensor, token_ids: torch.Tensor, slot_mapping: torch.Tensor, table: torch.Tensor
) -> None:
    """See `vllm_aasd.kernels.align.align_merge`."""
    _merge_partials(partials.contiguous(), token_ids, slot_mapping, table)
