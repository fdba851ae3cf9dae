"""Blocks of one row of logits: what the Triton kernels share.

Layout. One program holds one block of one row in registers, so each logit is loaded once, and there is no
loop that a rescaling would run through: blocks meet only in their partial results, a few words each. A block
that lies wholly inside the vocabulary is loaded without a mask. That is what keeps the loads 16 bytes wide
for vocabularies that are no multiple of 16; rows whose stride is none are read in narrower pieces.

Ordering. `first_argmax` is `torch.argmax`: the first NaN if there is one, else the lowest index among equal
maxima. It is built of plain reductions, because what `tl.max` makes of NaN differs between backends.
"""

import triton
import triton.language as tl

# A program of 4 warps holds 4096 logits, 32 a thread: 64 to 128 bytes in flight from each, and with the
# weights about 100 registers, so that four or five programs share an SM and cover each other's reductions.
WIDE = {"BLOCK": 4096, "num_warps": 4}
# For few rows: twice the programs, of 16 logits a thread (8 on AMD, which is the least for 16-byte loads of
# bfloat16).
NARROW = {"BLOCK": 2048, "num_warps": 4}
# Four for each of the 132 to 148 SMs of an H100 or B200, two for each of the 304 CUs of an MI300X.
ENOUGH_PROGRAMS = 608

# Above every token id and index, and below int32's end even when an offset is added.
BEYOND = tl.constexpr(2**30)
LOWEST = tl.constexpr(-3.4028234663852886e38)


def launch_shape(num_rows: int, vocab_size: int) -> tuple[dict[str, int], int]:
    """Return (block size and warps, blocks a row) for a number of rows: wide blocks unless they are few.

    One request's handful of rows is cut into narrow blocks, so that it still fills a GPU: 5 rows of 152k
    logits make 375 of them. Both are functions of shapes alone, so a captured graph replays them.
    """
    num_blocks = triton.cdiv(vocab_size, WIDE["BLOCK"])
    if num_rows * num_blocks >= ENOUGH_PROGRAMS:
        return WIDE, num_blocks
    return NARROW, triton.cdiv(vocab_size, NARROW["BLOCK"])


@triton.jit
def load_block(
    row_ptr,  # [vocab_size]
    start,
    vocab_size,
    BLOCK: tl.constexpr,
):
    """Return (logits as float32, indices) of a block; logits past the vocabulary are -inf."""
    ids = start + tl.arange(0, BLOCK)
    if start + BLOCK <= vocab_size:
        z = tl.load(row_ptr + ids).to(tl.float32)
    else:
        z = tl.load(row_ptr + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
    return z, ids


@triton.jit
def first_argmax(z, ids, axis: tl.constexpr):
    """Return (maximum, its id) along an axis; (NaN, id of the first NaN) if there is one."""
    is_nan = z != z
    maximum = tl.max(tl.where(is_nan, float("-inf"), z), axis=axis, keep_dims=True)
    hits = tl.where(is_nan, ids - BEYOND, tl.where(z == maximum, ids, BEYOND))
    best = tl.min(hits, axis=axis, keep_dims=True)
    maximum = tl.where(best < 0, float("nan"), maximum)
    # Ids are below 2**30, so what is negative is a NaN's.
    return maximum, tl.where(best < 0, best + BEYOND, best)


@triton.jit
def store_top_k(
    z,
    ids,
    vocab_size,
    first_id,
    partial_ptr,  # [1 + 2 TOP_K]
    TOP_K: tl.constexpr,
):
    """Write a block's partial alignment entry: its top k ids, their logits, and sum e^(z - top logit).

    A masked token's logit becomes the lowest finite one, so that -inf is left for what isn't there: places
    past the vocabulary, and what was taken already. The sum is NaN if the block has no softmax because of
    NaN or +inf, and 0 if it has nothing but -inf.
    """
    candidates = tl.where(z > LOWEST, z, LOWEST)
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
def merge_partials_kernel(
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
