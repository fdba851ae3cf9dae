"""Blocks of one row of logits, for the Triton kernels.

Layout. One program holds one block of one row in registers, so each logit is loaded once, and no loop has to
rescale sums: blocks are merged by their partial results, a few words each. A block inside the vocabulary is
loaded without a mask, which keeps the loads 16 bytes wide for vocabularies that are no multiple of 16; rows
whose stride is no multiple of 16 bytes are read in narrower pieces.

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


def launch_shape(num_rows: int, vocab_size: int) -> tuple[dict[str, int], int]:
    """Return (block size and warps, blocks a row) for a number of rows: wide blocks unless they are few.

    One request's handful of rows is cut into narrow blocks, so that it still fills a GPU: 5 rows of 152k
    logits make 375 of them. Both are functions of shapes alone, so a captured graph replays them.
    """
    num_blocks = triton.cdiv(vocab_size, WIDE["BLOCK"])
    if num_rows * num_blocks >= ENOUGH_PROGRAMS:
        return WIDE, num_blocks
    return NARROW, triton.cdiv(vocab_size, NARROW["BLOCK"])


def rows_of_shapes(vocab_size: int) -> tuple[int, ...]:
    """A number of rows for each shape that `launch_shape` gives."""
    wide = triton.cdiv(ENOUGH_PROGRAMS, triton.cdiv(vocab_size, WIDE["BLOCK"]))
    return (1, wide) if wide > 1 else (1,)


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
