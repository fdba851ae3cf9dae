"""Triton path of the align op; the entry's layout and the sources are in `vllm_aasd.kernels.align`.

One program reads one block of one row and writes its partial entry; a second kernel merges a row's partial
entries. A block of a row and a shard of the vocabulary are the same thing to that merge, so tensor
parallelism needs no kernel of its own (`vllm_aasd.kernels.align.shard_triton`).
"""

import torch
import triton
import triton.language as tl

from vllm_aasd.kernels.common.rows_triton import launch_shape, load_block, merge_partials_kernel, store_top_k


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
    store_top_k(z, ids, vocab_size, first_id, partials_ptr + partial * (1 + 2 * TOP_K), TOP_K)


def block_partials(logits: torch.Tensor, slot_mapping: torch.Tensor, first_token_id: int, top_k: int) -> torch.Tensor:
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


def merge_partials(
    partials: torch.Tensor,
    token_ids: torch.Tensor | None,
    slot_mapping: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Merge [num_parts, num_rows, 1 + 2k] partial entries into the table, or row by row without token ids."""
    num_parts, num_rows, width = partials.shape
    if num_rows:
        to_table = token_ids is not None
        merge_partials_kernel[(num_rows,)](
            partials,
            num_parts,
            token_ids.contiguous() if to_table else slot_mapping,
            slot_mapping.contiguous(),
            out,
            out.shape[0] if to_table else 2**62,
            TOP_K=width // 2,
            PARTS=triton.next_power_of_2(num_parts),
            PLACES=triton.next_power_of_2(width // 2),
            TO_TABLE=to_table,
            num_warps=1,
        )


def align(logits: torch.Tensor, token_ids: torch.Tensor, slot_mapping: torch.Tensor, table: torch.Tensor) -> None:
    """See `vllm_aasd.kernels.align.align`."""
    partials = block_partials(logits, slot_mapping, 0, table.shape[1] // 2)
    merge_partials(partials, token_ids, slot_mapping, table)
