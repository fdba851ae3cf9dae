"""The decision on each request's rows, from what `verify_seeded_triton` made of the blocks of the vocabulary.

`decide_kernel`, one program per request, merges the blocks of all of the request's rows at once and finds the first
rejection without a loop over them. The rule is in `vllm_aasd.kernels.verify`.
"""

import triton
import triton.language as tl

from vllm_aasd.kernels.common.rows_triton import first_argmax
from vllm_aasd.kernels.verify.random_triton import row_uniform
from vllm_aasd.kernels.verify.relaxation_triton import FLY, passes_guards, relax, runners_up, state_of

# 16 rows by 64 or 128 blocks of partial results of four kinds: 2 to 4 words of each a thread. With 8 warps
# gfx942 runs out of the scalar registers that hold its masks.
DECIDE = {"num_warps": 16}


@triton.jit(
    do_not_specialize=["num_logits", "num_states"],
    do_not_specialize_on_alignment=["draft_sampled_ptr", "cu_num_logits_ptr", "pos_ptr", "idx_mapping_ptr"],
)
def decide_kernel(
    sampled_ptr,  # [num_reqs, num_speculative_steps + 1]
    num_sampled_ptr,  # [num_reqs]
    relaxed_ptr,  # [num_logits]
    regret_ptr,  # [num_logits]
    events_ptr,  # [2, num_reqs]: whether the budget ran out, whether the collapse guard engaged
    race_row_ptr,  # [num_reqs]
    logits_ptr,  # [num_logits, vocab_size]
    logits_stride,
    argmax_ptr,  # [num_logits, num_blocks]
    sums_ptr,  # [5, num_logits, num_blocks]
    num_logits,
    num_blocks,
    draft_sampled_ptr,  # [num_logits]
    cu_num_logits_ptr,  # [num_reqs + 1]
    pos_ptr,  # [num_logits]
    idx_mapping_ptr,  # [num_reqs]
    temperature_ptr,  # [max_num_reqs]
    seed_ptr,  # [max_num_reqs]
    rule_ptr,  # [max_num_reqs]
    parameters_ptr,  # [max_num_reqs, NUM_PARAMETERS]
    state_rows_ptr,  # [max_num_reqs]
    state_ptr,  # [num_states, NUM_STATES]
    num_states,
    stop_token_ids_ptr,  # [max_num_reqs, max_stop]
    max_stop,
    vocab_size,
    num_speculative_steps,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Decide one request: its accepted prefix, and what follows it unless that is drawn in a race.

    Numbers of rows and of states change as requests come and go, and so does where a part of a batch begins:
    specialized, they would have the kernel compiled again.
    """
    req = tl.program_id(0).to(tl.int64)
    slot = tl.load(idx_mapping_ptr + req).to(tl.int64)
    start = tl.load(cu_num_logits_ptr + req).to(tl.int64)
    end = tl.load(cu_num_logits_ptr + req + 1).to(tl.int64)
    end = tl.minimum(tl.minimum(end, start + num_speculative_steps + 1), num_logits)
    num_drafts = (end - start - 1).to(tl.int32)
    is_greedy = tl.load(temperature_ptr + slot) == 0.0

    i = tl.arange(0, ROWS)
    row = start + i
    is_draft_row = i < num_drafts
    draft = tl.load(draft_sampled_ptr + row + 1, mask=is_draft_row, other=-1)
    known = (draft >= 0) & (draft < vocab_size)
    z = tl.load(logits_ptr + row * logits_stride + draft, mask=known, other=float("-inf")).to(tl.float32)

    # Merge the blocks. Rows and blocks that don't exist are read as the last that does, which costs less than
    # a mask; for their maxima it changes nothing, and their sums count for 0. What was not written for a row,
    # because it isn't needed, is not used below.
    block = tl.arange(0, BLOCKS)
    near = tl.minimum(block, num_blocks - 1)
    offset = tl.minimum(row, num_logits - 1)[:, None] * num_blocks + near[None, :]
    plane = num_logits.to(tl.int64) * num_blocks
    maxima = tl.load(sums_ptr + offset)
    argmaxima = tl.load(argmax_ptr + offset)
    sums = tl.load(sums_ptr + plane + offset)
    weighted_sums = tl.load(sums_ptr + 2 * plane + offset)
    exists = (block < num_blocks)[None, :]
    row_max, row_argmax = first_argmax(maxima, argmaxima, 1)
    distance = maxima - row_max
    shrink = tl.where(exists & (maxima > float("-inf")), tl.exp(distance), 0.0)
    s = tl.sum(sums * shrink, axis=1)
    moved = shrink * (weighted_sums + distance * sums)
    t = tl.sum(tl.where(shrink > 0.0, moved, 0.0), axis=1)
    second = tl.zeros((ROWS,), tl.float32)
    third = tl.zeros((ROWS,), tl.float32)
    if tl.load(rule_ptr + slot) == FLY:
        second, third = runners_up(maxima, row_argmax // BLOCK, offset, plane, num_blocks, sums_ptr, BLOCKS)
    maximum = tl.reshape(row_max, (ROWS,))
    argmax = tl.reshape(row_argmax, (ROWS,))
    has_softmax = known & (maximum > float("-inf")) & (maximum < float("inf"))

    # Strict.
    if is_greedy:
        accepted = draft == argmax
        fallback = argmax
        uniform = tl.zeros((ROWS,), tl.float32)
    else:
        # The race overwrites it.
        fallback = tl.full((ROWS,), -1, tl.int32)
        uniform = row_uniform(tl.load(seed_ptr + slot), tl.load(pos_ptr + row, mask=is_draft_row, other=0))
        accepted = has_softmax & (z - (maximum + tl.log(s)) > tl.log(uniform))
    accepted = accepted & known

    rule, own_ptr, relaxes = state_of(slot, rule_ptr, state_rows_ptr, state_ptr, num_states)
    by_rule = tl.zeros((ROWS,), tl.int1)
    exhausted = False
    guarded = False
    if relaxes & (num_drafts >= 0):
        weight = tl.exp(z - maximum)
        eligible = passes_guards(
            row,
            draft,
            weight / s,
            weight,
            maximum,
            has_softmax,
            slot,
            logits_ptr,
            logits_stride,
            parameters_ptr,
            stop_token_ids_ptr,
            max_stop,
            vocab_size,
        )
        by_rule, exhausted, guarded = relax(
            i,
            num_drafts,
            is_greedy,
            accepted,
            eligible,
            draft,
            argmax,
            z,
            uniform,
            maximum,
            s,
            t,
            rule,
            own_ptr,
            slot,
            parameters_ptr,
            second,
            third,
            ROWS,
        )
    tl.store(events_ptr + req, exhausted)
    tl.store(events_ptr + tl.num_programs(0) + req, guarded)
    accepted = accepted | by_rule
    num_accepted = tl.min(tl.where(is_draft_row & (accepted == 0), i, num_drafts), axis=0)
    is_prefix = i < num_accepted
    is_owned = (i <= num_drafts) & (row < end)
    by_rule = by_rule & is_prefix
    tl.store(relaxed_ptr + row, by_rule, mask=is_owned)
    tl.store(regret_ptr + row, tl.where(by_rule, maximum - z, 0.0), mask=is_owned)
    tokens = tl.where(is_prefix, draft, tl.where((i == num_accepted) & is_owned, fallback, -1))
    out = sampled_ptr + req * (num_speculative_steps + 1) + i
    tl.store(out, tokens.to(tl.int64), mask=i <= num_speculative_steps)
    tl.store(num_sampled_ptr + req, tl.maximum(num_accepted + 1, 0))
    has_race = (is_greedy == 0) & (num_drafts >= 0)
    tl.store(race_row_ptr + req, tl.where(has_race, start + num_accepted, -1))
