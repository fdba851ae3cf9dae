"""Triton path of the seeded verify op; the rule, the memory argument and the sources are in
`vllm_aasd.kernels.verify_seeded`.

`_row_statistics_kernel`, one program per row and block of the vocabulary, is the one that reads the logits.
`_decide_kernel`, one program per request, merges the blocks of all of the request's rows at once and finds
the first rejection without a loop over them. Sampled requests alone need the two launches of
`vllm_aasd.kernels.race_triton`. No launch depends on data: a program with nothing to do returns.
"""

import torch
import triton
import triton.language as tl

from vllm_aasd.kernels.align_triton import merge_partials
from vllm_aasd.kernels.noise_triton import row_uniform
from vllm_aasd.kernels.race_triton import race
from vllm_aasd.kernels.rows_triton import first_argmax, launch_shape, load_block, store_top_k
from vllm_aasd.kernels.verify_reference import PLACEHOLDER_TOKEN_ID, VerifyPolicies
from vllm_aasd.kernels.verify_seeded_reference import AlignmentRows, SeededVerifyOutput

# 16 rows by 64 or 128 blocks of partial results of four kinds: 2 to 4 words of each a thread. With 8 warps
# gfx942 runs out of the scalar registers that hold its masks.
DECIDE = {"num_warps": 16}


@triton.jit
def _row_statistics_kernel(
    logits_ptr,  # [num_logits, vocab_size]
    logits_stride,
    draft_sampled_ptr,  # [num_logits]
    expanded_idx_mapping_ptr,  # [num_logits]
    expanded_local_pos_ptr,  # [num_logits]
    temperature_ptr,  # [max_num_reqs]
    policy_relaxed_ptr,  # [max_num_reqs]
    argmax_ptr,  # [num_logits, num_blocks]
    sums_ptr,  # [3, num_logits, num_blocks]: max, sum e^(z - max), sum e^(z - max) (z - max)
    align_slot_mapping_ptr,  # [num_logits]
    align_partials_ptr,  # [num_blocks, num_logits, 1 + 2 TOP_K]
    vocab_size,
    BLOCK: tl.constexpr,
    TOP_K: tl.constexpr,
):
    """Reduce one block of one row to what the decision can need of it."""
    # int64: rows times stride passes 2**31.
    row = tl.program_id(0).to(tl.int64)
    num_logits = tl.num_programs(0)
    block = tl.program_id(1)

    slot = tl.load(expanded_idx_mapping_ptr + row).to(tl.int64)
    is_padding = slot < 0
    slot = tl.maximum(slot, 0)
    is_greedy = tl.load(temperature_ptr + slot) == 0.0
    is_relaxed = tl.load(policy_relaxed_ptr + slot) != 0
    is_first = tl.load(expanded_local_pos_ptr + row) == 0
    has_next = row + 1 < num_logits
    is_last = tl.load(expanded_local_pos_ptr + row + 1, mask=has_next, other=0) == 0
    draft = tl.load(draft_sampled_ptr + row + 1, mask=has_next, other=-1)
    has_draft = (draft >= 0) & (is_last == 0)
    # A placeholder before this row has ended the request's prefix.
    is_reached = is_first | (tl.load(draft_sampled_ptr + row) >= 0)
    is_wanted = is_reached & (is_padding == 0) & (is_greedy | has_draft)
    if TOP_K > 0:
        has_slot = tl.load(align_slot_mapping_ptr + row) >= 0
        if (is_wanted | has_slot) == 0:
            return
    else:
        if is_wanted == 0:
            return

    z, ids = load_block(logits_ptr + row * logits_stride, block * BLOCK, vocab_size, BLOCK)
    if is_wanted:
        out = row * tl.num_programs(1) + block
        plane = num_logits.to(tl.int64) * tl.num_programs(1)
        only = tl.arange(0, 1)
        maximum, argmax = first_argmax(z, ids, 0)
        tl.store(argmax_ptr + out + only, argmax)
        tl.store(sums_ptr + out + only, maximum)
        if has_draft & (is_relaxed | (is_greedy == 0)):
            # A block of nothing but -inf would give NaN.
            distance = z - tl.where(maximum > float("-inf"), maximum, 0.0)
            weight = tl.exp(distance)
            # A weight of 0 may stand at a distance of -inf.
            weighted = tl.where(weight > 0.0, weight * distance, 0.0)
            tl.store(sums_ptr + plane + out, tl.sum(weight, axis=0))
            tl.store(sums_ptr + 2 * plane + out, tl.sum(weighted, axis=0))
    if TOP_K > 0:
        if has_slot:
            partial = block.to(tl.int64) * num_logits + row
            store_top_k(z, ids, vocab_size, 0, align_partials_ptr + partial * (1 + 2 * TOP_K), TOP_K)


@triton.jit(do_not_specialize=["num_logits"])
def _decide_kernel(
    sampled_ptr,  # [num_reqs, num_speculative_steps + 1]
    num_sampled_ptr,  # [num_reqs]
    relaxed_ptr,  # [num_logits]
    regret_ptr,  # [num_logits]
    race_row_ptr,  # [num_reqs]
    logits_ptr,  # [num_logits, vocab_size]
    logits_stride,
    argmax_ptr,  # [num_logits, num_blocks]
    sums_ptr,  # [3, num_logits, num_blocks]
    num_logits,
    num_blocks,
    draft_sampled_ptr,  # [num_logits]
    cu_num_logits_ptr,  # [num_reqs + 1]
    pos_ptr,  # [num_logits]
    idx_mapping_ptr,  # [num_reqs]
    temperature_ptr,  # [max_num_reqs]
    seed_ptr,  # [max_num_reqs]
    policy_relaxed_ptr,  # [max_num_reqs]
    alpha_ptr,  # [max_num_reqs]
    beta_ptr,  # [max_num_reqs]
    floor_ptr,  # [max_num_reqs]
    stop_token_ids_ptr,  # [max_num_reqs, max_stop]
    max_stop,
    vocab_size,
    num_speculative_steps,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    STOPS: tl.constexpr,
):
    """Decide one request: its accepted prefix, and what follows it unless that is drawn in a race.

    The number of rows changes from step to step: specialised, it would have the kernel compiled again.
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
    # because nobody wants it, is not looked at below.
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
    maximum = tl.reshape(row_max, (ROWS,))
    argmax = tl.reshape(row_argmax, (ROWS,))
    has_softmax = known & (maximum > float("-inf")) & (maximum < float("inf"))

    # Strict.
    if is_greedy:
        accepted = draft == argmax
        fallback = argmax
    else:
        # The race overwrites it.
        fallback = tl.full((ROWS,), -1, tl.int32)
        u = row_uniform(tl.load(seed_ptr + slot), tl.load(pos_ptr + row, mask=is_draft_row, other=0))
        accepted = has_softmax & (z - (maximum + tl.log(s)) > tl.log(u))

    # Relaxed.
    by_bar = tl.zeros((ROWS,), tl.int1)
    if tl.load(policy_relaxed_ptr + slot) != 0:
        stop = tl.arange(0, STOPS)
        stops = tl.load(stop_token_ids_ptr + slot * max_stop + stop, mask=stop < max_stop, other=-1)
        is_token = (stops >= 0) & (stops < vocab_size)
        stop_z = tl.load(
            logits_ptr + row[:, None] * logits_stride + stops[None, :],
            mask=has_softmax[:, None] & is_token[None, :],
            other=float("-inf"),
        ).to(tl.float32)
        stop_weight = tl.sum(tl.where(stop_z > float("-inf"), tl.exp(stop_z - maximum[:, None]), 0.0), axis=1)
        is_stop = tl.max(((draft[:, None] == stops[None, :]) & is_token[None, :]).to(tl.int32), axis=1) > 0
        weight = tl.exp(z - maximum)
        p = weight / s
        # Rounding can leave the entropy of a certain row a little below 0.
        bar = tl.load(beta_ptr + slot) - tl.load(alpha_ptr + slot) * tl.maximum(tl.log(s) - t / s, 0.0)
        clears = (p >= tl.load(floor_ptr + slot)) & ((p >= bar) | (draft == argmax))
        # The stop tokens' weight is at least 0, so that to exceed it implies p > 0.
        by_bar = has_softmax & clears & (weight > stop_weight) & (is_stop == 0) & (accepted == 0)

    accepted = (accepted | by_bar) & known
    num_accepted = tl.min(tl.where(is_draft_row & (accepted == 0), i, num_drafts), axis=0)
    is_prefix = i < num_accepted
    is_owned = (i <= num_drafts) & (row < end)
    by_bar = by_bar & is_prefix
    tl.store(relaxed_ptr + row, by_bar, mask=is_owned)
    tl.store(regret_ptr + row, tl.where(by_bar, maximum - z, 0.0), mask=is_owned)
    tokens = tl.where(is_prefix, draft, tl.where((i == num_accepted) & is_owned, fallback, -1))
    out = sampled_ptr + req * (num_speculative_steps + 1) + i
    tl.store(out, tokens.to(tl.int64), mask=i <= num_speculative_steps)
    tl.store(num_sampled_ptr + req, tl.maximum(num_accepted + 1, 0))
    has_race = (is_greedy == 0) & (num_drafts >= 0)
    tl.store(race_row_ptr + req, tl.where(has_race, start + num_accepted, -1))


def verify_seeded(
    target_logits: torch.Tensor,
    draft_sampled: torch.Tensor,
    cu_num_logits: torch.Tensor,
    pos: torch.Tensor,
    idx_mapping: torch.Tensor,
    expanded_idx_mapping: torch.Tensor,
    expanded_local_pos: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    num_speculative_steps: int,
    policies: VerifyPolicies,
    stop_token_ids: torch.Tensor,
    alignment: AlignmentRows | None = None,
    all_greedy: bool = False,
) -> SeededVerifyOutput:
    """See `vllm_aasd.kernels.verify_seeded.verify_seeded`."""
    num_logits, vocab_size = target_logits.shape
    num_reqs = cu_num_logits.shape[0] - 1
    empty = target_logits.new_empty
    output = SeededVerifyOutput(
        empty(num_reqs, num_speculative_steps + 1, dtype=torch.int64),
        empty(num_reqs, dtype=torch.int32),
        empty(num_logits, dtype=torch.bool),
        empty(num_logits, dtype=torch.float32),
    )
    if not num_reqs or not num_logits:
        output.sampled.fill_(PLACEHOLDER_TOKEN_ID)
        output.num_sampled.zero_()
        return output

    shape, num_blocks = launch_shape(num_logits, vocab_size)
    argmax = empty(num_logits, num_blocks, dtype=torch.int32)
    sums = empty(3, num_logits, num_blocks, dtype=torch.float32)
    race_row = empty(num_reqs, dtype=torch.int64)
    top_k = 0 if alignment is None else alignment.table.shape[1] // 2
    partials = empty(num_blocks, num_logits, 1 + 2 * top_k, dtype=torch.int32) if top_k else argmax
    _row_statistics_kernel[(num_logits, num_blocks)](
        target_logits,
        target_logits.stride(0),
        draft_sampled,
        expanded_idx_mapping,
        expanded_local_pos,
        temperature,
        policies.relaxed,
        argmax,
        sums,
        alignment.slot_mapping if top_k else expanded_local_pos,
        partials,
        vocab_size,
        TOP_K=top_k,
        **shape,
    )
    _decide_kernel[(num_reqs,)](
        *output,
        race_row,
        target_logits,
        target_logits.stride(0),
        argmax,
        sums,
        num_logits,
        num_blocks,
        draft_sampled,
        cu_num_logits,
        pos,
        idx_mapping,
        temperature,
        seed,
        *policies,
        stop_token_ids,
        stop_token_ids.shape[1],
        vocab_size,
        num_speculative_steps,
        ROWS=triton.next_power_of_2(num_speculative_steps + 1),
        BLOCKS=triton.next_power_of_2(num_blocks),
        STOPS=triton.next_power_of_2(max(1, stop_token_ids.shape[1])),
        **DECIDE,
    )
    if top_k:
        merge_partials(partials, alignment.token_ids, alignment.slot_mapping, alignment.table)
    if not all_greedy:
        race(
            output.sampled,
            output.num_sampled,
            race_row,
            target_logits,
            draft_sampled,
            cu_num_logits,
            pos,
            idx_mapping,
            seed,
        )
    return output
