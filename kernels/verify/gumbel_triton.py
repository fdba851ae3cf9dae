"""Recovered and bonus tokens of sampled requests: one token drawn from one row each, with vLLM's Gumbel variables.

Why the largest score is a draw from p is in `vllm_aasd.kernels.verify.seeded`. `_race_kernel` finds the best token of
each block of a request's row, `_finish_kernel` the best of the blocks. Programs of other requests return at once.
"""

import torch
import triton
import triton.language as tl

from vllm_aasd.kernels.common.rows_triton import first_argmax, load_block
from vllm_aasd.kernels.verify.random_triton import token_gumbel
from vllm_aasd.kernels.verify.seeded import SeededBatch

# A race spends some 40 operations on a logit, and only one row per request runs it: blocks of 1024 spread it
# over the GPU. Two warps, because 8 logits a thread are the least for 16-byte loads of bfloat16 on AMD.
RACE = {"BLOCK": 1024, "num_warps": 2}
FINISH = {"num_warps": 1}


# A part of a batch begins anywhere, and that must not ask for another compilation.
@triton.jit(do_not_specialize_on_alignment=["draft_sampled_ptr", "cu_num_logits_ptr", "pos_ptr", "idx_mapping_ptr"])
def _race_kernel(
    winner_ptr,  # [num_reqs, num_blocks]
    score_ptr,  # [num_reqs, num_blocks]
    race_row_ptr,  # [num_reqs]
    logits_ptr,  # [num_logits, vocab_size]
    logits_stride,
    draft_sampled_ptr,  # [num_logits]
    cu_num_logits_ptr,  # [num_reqs + 1]
    pos_ptr,  # [num_logits]
    idx_mapping_ptr,  # [num_reqs]
    seed_ptr,  # [max_num_reqs]
    vocab_size,
    BLOCK: tl.constexpr,
):
    """Run one block of the Gumbel race over the row from which a sampled request draws."""
    req = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    row = tl.load(race_row_ptr + req)
    if row < 0:
        return
    slot = tl.load(idx_mapping_ptr + req).to(tl.int64)
    is_bonus = row + 1 >= tl.load(cu_num_logits_ptr + req + 1)
    draft = tl.load(draft_sampled_ptr + row + 1, mask=is_bonus == 0, other=-1)
    z, ids = load_block(logits_ptr + row * logits_stride, block * BLOCK, vocab_size, BLOCK)
    z = tl.where(ids == draft, float("-inf"), z)
    gumbel = token_gumbel(tl.load(seed_ptr + slot), tl.load(pos_ptr + row), ids)
    score, winner = first_argmax(z + gumbel, ids, 0)
    out = req * tl.num_programs(1) + block + tl.arange(0, 1)
    tl.store(winner_ptr + out, winner)
    tl.store(score_ptr + out, score)


@triton.jit
def _finish_kernel(
    sampled_ptr,  # [num_reqs, num_speculative_steps + 1]
    num_sampled_ptr,  # [num_reqs]
    race_row_ptr,  # [num_reqs]
    winner_ptr,  # [num_reqs, num_blocks]
    score_ptr,  # [num_reqs, num_blocks]
    num_blocks,
    num_speculative_steps,
    BLOCKS: tl.constexpr,
):
    """Put the winner of a request's race after its accepted prefix."""
    req = tl.program_id(0).to(tl.int64)
    if tl.load(race_row_ptr + req) < 0:
        return
    block = tl.arange(0, BLOCKS)
    exists = block < num_blocks
    scores = tl.load(score_ptr + req * num_blocks + block, mask=exists, other=float("-inf"))
    winners = tl.load(winner_ptr + req * num_blocks + block, mask=exists, other=0)
    _, winner = first_argmax(scores, winners, 0)
    place = tl.load(num_sampled_ptr + req) - 1 + tl.arange(0, 1)
    tl.store(sampled_ptr + req * (num_speculative_steps + 1) + place, winner.to(tl.int64))


def race(sampled: torch.Tensor, num_sampled: torch.Tensor, race_row: torch.Tensor, batch: SeededBatch) -> None:
    """Draw the last token of each request whose `race_row` is not -1, into its place in `sampled`.

    Args:
        sampled, num_sampled: of `vllm_aasd.kernels.verify.VerifyOutput`.
        race_row: [num_reqs] int64.
        batch: as for `vllm_aasd.kernels.verify.seeded.verify_seeded`.
    """
    num_reqs, vocab_size = race_row.shape[0], batch.target_logits.shape[1]
    num_blocks = triton.cdiv(vocab_size, RACE["BLOCK"])
    winner = batch.target_logits.new_empty(num_reqs, num_blocks, dtype=torch.int32)
    score = batch.target_logits.new_empty(num_reqs, num_blocks, dtype=torch.float32)
    _race_kernel[(num_reqs, num_blocks)](
        winner,
        score,
        race_row,
        batch.target_logits,
        batch.target_logits.stride(0),
        batch.draft_sampled,
        batch.cu_num_logits,
        batch.pos,
        batch.idx_mapping,
        batch.seed,
        vocab_size,
        **RACE,
    )
    _finish_kernel[(num_reqs,)](
        sampled,
        num_sampled,
        race_row,
        winner,
        score,
        num_blocks,
        sampled.shape[1] - 1,
        BLOCKS=triton.next_power_of_2(num_blocks),
        **FINISH,
    )
