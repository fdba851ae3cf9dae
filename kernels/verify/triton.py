"""Triton path of the seeded verify op; the rule and the sources are in `vllm_aasd.kernels.verify.seeded`.

`_row_statistics_kernel`, one program per row and block of the vocabulary, reads the logits;
`vllm_aasd.kernels.verify.decide_triton` decides. Only sampled requests need two more launches, which draw their
recovered or bonus token: `_race_kernel` finds the best token of each block of a request's row, `_finish_kernel` the
best of the blocks. No launch depends on data: a program with nothing to do returns.
"""

import torch
import triton
import triton.language as tl

from vllm_aasd.kernels.common.backends import gpu_kind
from vllm_aasd.kernels.common.rows_triton import BEYOND, first_argmax, launch_shape, load_block
from vllm_aasd.kernels.verify import PLACEHOLDER_TOKEN_ID, VerifyOutput
from vllm_aasd.kernels.verify.decide_triton import (
    DECIDE,
    FLY,
    RACE_COLUMNS,
    RACE_POSITION,
    RACE_REJECTED,
    RACE_ROW,
    RACE_SEED,
    decide_kernel,
)
from vllm_aasd.kernels.verify.random_triton import token_gumbel
from vllm_aasd.kernels.verify.seeded import SeededBatch


# A part of a batch begins anywhere, and that must not ask for another compilation.
@triton.jit(
    do_not_specialize_on_alignment=[
        "draft_sampled_ptr",
        "expanded_idx_mapping_ptr",
        "expanded_local_pos_ptr",
    ]
)
def _row_statistics_kernel(
    logits_ptr,  # [num_logits, vocab_size]
    logits_stride,
    draft_sampled_ptr,  # [num_logits]
    expanded_idx_mapping_ptr,  # [num_logits]
    expanded_local_pos_ptr,  # [num_logits]
    num_drafts_ptr,  # [max_num_reqs]
    temperature_ptr,  # [max_num_reqs]
    rule_ptr,  # [max_num_reqs]
    argmax_ptr,  # [num_logits, num_blocks]
    # [5, num_logits, num_blocks]: max, sum e^(z - max), sum e^(z - max) (z - max); second and third for fly
    sums_ptr,
    vocab_size,
    BLOCK: tl.constexpr,
):
    """Reduce one block of one row to the partial results that `decide_kernel` may need."""
    # int64: rows times stride passes 2**31.
    row = tl.program_id(0).to(tl.int64)
    num_logits = tl.num_programs(0)
    block = tl.program_id(1)

    slot = tl.load(expanded_idx_mapping_ptr + row).to(tl.int64)
    is_padding = slot < 0
    slot = tl.maximum(slot, 0)
    is_greedy = tl.load(temperature_ptr + slot) == 0.0
    rule = tl.load(rule_ptr + slot)
    position = tl.load(expanded_local_pos_ptr + row)
    num_drafts = tl.load(num_drafts_ptr + slot)
    has_next = row + 1 < num_logits
    is_last = tl.load(expanded_local_pos_ptr + row + 1, mask=has_next, other=0) == 0
    draft = tl.load(draft_sampled_ptr + row + 1, mask=has_next, other=-1)
    has_draft = (draft >= 0) & (is_last == 0) & (position < num_drafts)
    # A placeholder or a filler before this row has ended the accepted prefix.
    is_reached = (position == 0) | ((tl.load(draft_sampled_ptr + row) >= 0) & (position <= num_drafts))
    is_wanted = is_reached & (is_padding == 0) & (is_greedy | has_draft)
    if is_wanted == 0:
        return

    z, ids = load_block(logits_ptr + row * logits_stride, block * BLOCK, vocab_size, BLOCK)
    out = row * tl.num_programs(1) + block
    plane = num_logits.to(tl.int64) * tl.num_programs(1)
    only = tl.arange(0, 1)
    maximum, argmax = first_argmax(z, ids, 0)
    tl.store(argmax_ptr + out + only, argmax)
    tl.store(sums_ptr + out + only, maximum)
    if has_draft & ((rule != 0) | (is_greedy == 0)):
        # A block of nothing but -inf would give NaN.
        distance = z - tl.where(maximum > float("-inf"), maximum, 0.0)
        weight = tl.exp(distance)
        # A weight of 0 may stand at a distance of -inf.
        weighted = tl.where(weight > 0.0, weight * distance, 0.0)
        tl.store(sums_ptr + plane + out, tl.sum(weight, axis=0))
        tl.store(sums_ptr + 2 * plane + out, tl.sum(weighted, axis=0))
    if has_draft & (rule == FLY):
        # Equal logits are excluded one at a time.
        rest = tl.where(ids == argmax, float("-inf"), z)
        second = tl.max(rest, axis=0)
        second_id = tl.min(tl.where(rest == second, ids, BEYOND), axis=0)
        tl.store(sums_ptr + 3 * plane + out, second)
        tl.store(sums_ptr + 4 * plane + out, tl.max(tl.where(ids == second_id, float("-inf"), rest), axis=0))


# A race spends some 40 operations on a logit, and only one row per request runs it: blocks of 1024 spread it
# over the GPU. Two warps, because 8 logits a thread are the least for 16-byte loads of bfloat16 on AMD.
RACE = {"BLOCK": 1024, "num_warps": 2}
FINISH = {"num_warps": 1}


@triton.jit
def _race_kernel(
    winner_ptr,  # [num_reqs, num_blocks]
    score_ptr,  # [num_reqs, num_blocks]
    races_ptr,  # [num_reqs, RACE_COLUMNS]
    logits_ptr,  # [num_logits, vocab_size]
    logits_stride,
    vocab_size,
    BLOCK: tl.constexpr,
):
    """Run one block of the Gumbel race over the row from which a sampled request draws."""
    req = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    race_ptr = races_ptr + req * RACE_COLUMNS
    row = tl.load(race_ptr + RACE_ROW)
    if row < 0:
        return
    z, ids = load_block(logits_ptr + row * logits_stride, block * BLOCK, vocab_size, BLOCK)
    z = tl.where(ids == tl.load(race_ptr + RACE_REJECTED), float("-inf"), z)
    gumbel = token_gumbel(tl.load(race_ptr + RACE_SEED), tl.load(race_ptr + RACE_POSITION), ids)
    score, winner = first_argmax(z + gumbel, ids, 0)
    out = req * tl.num_programs(1) + block + tl.arange(0, 1)
    tl.store(winner_ptr + out, winner)
    tl.store(score_ptr + out, score)


@triton.jit
def _finish_kernel(
    sampled_ptr,  # [num_reqs, num_speculative_steps + 1]
    num_sampled_ptr,  # [num_reqs]
    races_ptr,  # [num_reqs, RACE_COLUMNS]
    winner_ptr,  # [num_reqs, num_blocks]
    score_ptr,  # [num_reqs, num_blocks]
    num_blocks,
    num_speculative_steps,
    BLOCKS: tl.constexpr,
):
    """Put the winner of a request's race after its accepted prefix."""
    req = tl.program_id(0).to(tl.int64)
    if tl.load(races_ptr + req * RACE_COLUMNS + RACE_ROW) < 0:
        return
    block = tl.arange(0, BLOCKS)
    exists = block < num_blocks
    scores = tl.load(score_ptr + req * num_blocks + block, mask=exists, other=float("-inf"))
    winners = tl.load(winner_ptr + req * num_blocks + block, mask=exists, other=0)
    _, winner = first_argmax(scores, winners, 0)
    place = tl.load(num_sampled_ptr + req) - 1 + tl.arange(0, 1)
    tl.store(sampled_ptr + req * (num_speculative_steps + 1) + place, winner.to(tl.int64))


def _race(output: VerifyOutput, races: torch.Tensor, batch: SeededBatch) -> None:
    """Draw the last token of each request that has a race, into `output`."""
    num_reqs, vocab_size = races.shape[0], batch.target_logits.shape[1]
    num_blocks = triton.cdiv(vocab_size, RACE["BLOCK"])
    winner = batch.target_logits.new_empty(num_reqs, num_blocks, dtype=torch.int32)
    score = batch.target_logits.new_empty(num_reqs, num_blocks, dtype=torch.float32)
    _race_kernel[(num_reqs, num_blocks)](
        winner,
        score,
        races,
        batch.target_logits,
        batch.target_logits.stride(0),
        vocab_size,
        **RACE,
    )
    _finish_kernel[(num_reqs,)](
        output.sampled,
        output.num_sampled,
        races,
        winner,
        score,
        num_blocks,
        output.sampled.shape[1] - 1,
        BLOCKS=triton.next_power_of_2(num_blocks),
        **FINISH,
    )


def verify_seeded(batch: SeededBatch) -> VerifyOutput:
    """See `vllm_aasd.kernels.verify.seeded.verify_seeded`."""
    num_logits, vocab_size = batch.target_logits.shape
    num_reqs = batch.cu_num_logits.shape[0] - 1
    empty = batch.target_logits.new_empty
    events = empty(2, num_reqs, dtype=torch.bool)
    output = VerifyOutput(
        empty(num_reqs, batch.num_speculative_steps + 1, dtype=torch.int64),
        empty(num_reqs, dtype=torch.int32),
        empty(num_logits, dtype=torch.bool),
        empty(num_logits, dtype=torch.float32),
        *events,
    )
    if not num_reqs or not num_logits:
        output.sampled.fill_(PLACEHOLDER_TOKEN_ID)
        output.num_sampled.zero_()
        events.zero_()
        return output

    shape, num_blocks = launch_shape(num_logits, vocab_size)
    argmax = empty(num_logits, num_blocks, dtype=torch.int32)
    sums = empty(5, num_logits, num_blocks, dtype=torch.float32)
    races = empty(num_reqs, RACE_COLUMNS.value, dtype=torch.int64)
    _row_statistics_kernel[(num_logits, num_blocks)](
        batch.target_logits,
        batch.target_logits.stride(0),
        batch.draft_sampled,
        batch.expanded_idx_mapping,
        batch.expanded_local_pos,
        batch.num_drafts,
        batch.temperature,
        batch.policies.rule,
        argmax,
        sums,
        vocab_size,
        **shape,
    )
    decide_kernel[(num_reqs,)](
        *output[:4],
        events,
        races,
        batch.target_logits,
        batch.target_logits.stride(0),
        argmax,
        sums,
        num_logits,
        num_blocks,
        batch.draft_sampled,
        batch.num_drafts,
        batch.cu_num_logits,
        batch.pos,
        batch.idx_mapping,
        batch.temperature,
        batch.seed,
        *batch.policies,
        batch.policies.state.shape[0],
        batch.stop_token_ids,
        batch.stop_token_ids.shape[1],
        vocab_size,
        batch.num_speculative_steps,
        batch.survival,
        batch.survival.shape[1],
        batch.totals,
        BLOCK=shape["BLOCK"],
        ROWS=triton.next_power_of_2(batch.num_speculative_steps + 1),
        BLOCKS=triton.next_power_of_2(num_blocks),
        **DECIDE[gpu_kind()],
    )
    if not batch.all_greedy:
        _race(output, races, batch)
    return output
