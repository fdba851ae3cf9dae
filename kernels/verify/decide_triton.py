"""The decision on each request's rows, from the partial results of `row_statistics_kernel` (`verify.triton`).

`decide_kernel`, one program per request, merges the blocks of all of the request's rows and finds the first rejection
without a loop over the rows. The rule is in `vllm_aasd.kernels.verify`; the reference applies it token by token. All
rows can be decided together because only rows up to the first rejection count, and before that one every candidate was
accepted. So the state at a row is a sum over the rows before it, taken as if nothing had been rejected:

    relaxed tokens        n_i = sum_{j<i} c_j,  c_j = 1 for a candidate
    level of the guard    L_i = d^i L_0 + sum_{j<i} d^(i-1-j) c_j
    nats spent            S_i = S_0 + sum_{j<=i} cost_j

and fly's window is a sum over rows that the strict rule accepts. ROWS is small, so each is a masked ROWS x ROWS sum.
"""

import triton
import triton.language as tl

from vllm_aasd.kernels.common.rows_triton import first_argmax
from vllm_aasd.kernels.verify import policies
from vllm_aasd.kernels.verify.random_triton import row_uniform

_CONDITIONAL = tl.constexpr(policies.CONDITIONAL)
FLY = tl.constexpr(policies.FLY)
_BUDGET = tl.constexpr(policies.BUDGET)
_NUM_PARAMETERS = tl.constexpr(policies.NUM_PARAMETERS)
_ALPHA, _BETA = tl.constexpr(policies.ALPHA), tl.constexpr(policies.BETA)
_WINDOW, _THRESHOLD = tl.constexpr(policies.WINDOW), tl.constexpr(policies.THRESHOLD)
_CAP, _PER_STEP = tl.constexpr(policies.CAP), tl.constexpr(policies.PER_STEP)
_NATS, _KAPPA = tl.constexpr(policies.NATS), tl.constexpr(policies.KAPPA)
_FLOOR, _LIMIT = tl.constexpr(policies.FLOOR), tl.constexpr(policies.LIMIT)
_DECAY, _COOLDOWN = tl.constexpr(policies.DECAY), tl.constexpr(policies.COOLDOWN)
_NUM_STATES = tl.constexpr(policies.NUM_STATES)
_SPENT, _LEVEL = tl.constexpr(policies.SPENT), tl.constexpr(policies.LEVEL)
_STRICT_LEFT, _EXHAUSTED = tl.constexpr(policies.STRICT_LEFT), tl.constexpr(policies.EXHAUSTED)
_STOPS = tl.constexpr(4)


@triton.jit
def _surprise(z, maximum, log_s):
    """Return -p log p of a token by its logit."""
    log_p = z - maximum - log_s
    return tl.where(z > float("-inf"), -tl.exp(log_p) * log_p, 0.0)


@triton.jit
def _runners_up(
    maxima,  # [ROWS, BLOCKS], undefined for blocks that don't exist
    winner,  # [ROWS, 1]: the block of the row's maximum
    offset,  # [ROWS, BLOCKS]
    plane,
    num_blocks,
    sums_ptr,  # [5, num_logits, num_blocks]
    BLOCKS: tl.constexpr,
):
    """Return ([ROWS], [ROWS]): the second and third largest logit of each row, from the three largest of each block."""
    block = tl.arange(0, BLOCKS)[None, :]
    first = tl.where(block < num_blocks, maxima, float("-inf"))
    second = tl.load(sums_ptr + 3 * plane + offset)
    # The block of the maximum contributes its second and third.
    first = tl.where(block == winner, second, first)
    second = tl.where(block == winner, tl.load(sums_ptr + 4 * plane + offset), second)
    best = tl.max(first, axis=1, keep_dims=True)
    is_best = first == best
    # If two blocks share it, it is the third too.
    is_shared = tl.sum(is_best.to(tl.int32), axis=1) > 1
    next_best = tl.max(tl.where(is_best, second, first), axis=1)
    best = tl.max(first, axis=1)
    return best, tl.where(is_shared, best, next_best)


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
    """Decide one request: its accepted tokens, and the token after them unless `race` draws it.

    Numbers of rows and states change as requests come and go, and so does where a part of a batch begins. None of them
    is specialized, or the kernel would be compiled again.
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

    # Merge the blocks. Rows and blocks that don't exist are read as the last one, which costs less than a mask;
    # their maxima change nothing, and their sums count as 0. Values that were not written for a row aren't used.
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
    rule = tl.load(rule_ptr + slot)
    if rule == FLY:
        second, third = _runners_up(maxima, row_argmax // BLOCK, offset, plane, num_blocks, sums_ptr, BLOCKS)
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

    own = tl.load(state_rows_ptr + slot).to(tl.int64)
    relaxes = (rule >= _CONDITIONAL) & (rule <= _BUDGET) & (own >= 0) & (own < num_states) & (num_drafts >= 0)
    own_ptr = state_ptr + own * _NUM_STATES
    by_rule = tl.zeros((ROWS,), tl.int1)
    exhausted = False
    guarded = False
    if relaxes & (tl.load(own_ptr + _EXHAUSTED, mask=relaxes, other=1.0) == 0.0):
        parameters_ptr += slot * _NUM_PARAMETERS
        weight = tl.exp(z - maximum)
        p = weight / s
        log_s = tl.log(s)
        later = i[None, :]
        here = i[:, None]

        # The guards on p. Stop tokens are read a few at a time and up to the padding: almost all requests have no
        # more than a few, so the width of the table costs nothing.
        stop_token_ids_ptr += slot * max_stop
        stop_weight = tl.zeros_like(weight)
        first = 0
        while tl.load(stop_token_ids_ptr + first, mask=first < max_stop, other=-1) >= 0:
            stop = first + tl.arange(0, _STOPS)
            stops = tl.load(stop_token_ids_ptr + stop, mask=stop < max_stop, other=-1)
            is_token = (stops >= 0) & (stops < vocab_size)
            stop_z = tl.load(
                logits_ptr + row[:, None] * logits_stride + stops[None, :],
                mask=has_softmax[:, None] & is_token[None, :],
                other=float("-inf"),
            ).to(tl.float32)
            weights = tl.where(stop_z > float("-inf"), tl.exp(stop_z - maximum[:, None]), 0.0)
            # A draft token that is a stop token itself never exceeds this.
            stop_weight += tl.sum(tl.where(draft[:, None] == stops[None, :], float("inf"), weights), axis=1)
            first += _STOPS
        # The stop tokens' weight is at least 0, so exceeding it implies p > 0.
        eligible = has_softmax & (p >= tl.load(parameters_ptr + _FLOOR)) & (weight > stop_weight)

        # The rule, and what a row costs the budget.
        clears = tl.zeros((ROWS,), tl.int1)
        cost = tl.zeros((ROWS,), tl.float32)
        if rule == _CONDITIONAL:
            # Rounding can leave the entropy of a certain row a little below 0.
            entropy = tl.maximum(log_s - t / s, 0.0)
            bar = tl.load(parameters_ptr + _BETA) - tl.load(parameters_ptr + _ALPHA) * entropy
            clears = (p >= bar) | (draft == argmax)
        elif rule == FLY:
            window = tl.load(parameters_ptr + _WINDOW).to(tl.int32)
            in_window = (later > here) & (later <= here + window)
            agreeing = tl.sum((in_window & accepted[None, :]).to(tl.int32), axis=1)
            top_entropy = _surprise(maximum, maximum, log_s) + _surprise(second, maximum, log_s)
            top_entropy += _surprise(third, maximum, log_s)
            clears = (top_entropy >= tl.load(parameters_ptr + _THRESHOLD)) & (agreeing == window)
        elif is_greedy:
            cost = maximum - z
            clears = cost <= tl.load(parameters_ptr + _CAP)
        else:
            kappa = tl.load(parameters_ptr + _KAPPA)
            cost = tl.minimum(kappa, tl.maximum(maximum + log_s - z, 0.0))
            tails = (1.0 - uniform) * tl.log((1.0 - uniform) / (1.0 - p))
            clears = uniform * tl.log(uniform / p) + tails <= tl.where(kappa > 0.0, kappa, -1.0)
        candidate = eligible & clears & (accepted == 0) & is_draft_row
        counted = tl.where(candidate, 1.0, 0.0)[None, :]

        # The collapse guard. 0 to the power of 0 is 1.
        decay = tl.load(parameters_ptr + _DECAY)
        age = (here - 1 - later).to(tl.float32)
        faded = tl.where(age == 0.0, 1.0, tl.exp2(age * tl.log2(decay)))
        age_of_all = i.to(tl.float32)
        level = tl.load(own_ptr + _LEVEL) * tl.where(i == 0, 1.0, tl.exp2(age_of_all * tl.log2(decay)))
        level += tl.sum(tl.where(later < here, faded * counted, 0.0), axis=1)
        is_level = level * decay + 1.0 <= tl.load(parameters_ptr + _LIMIT)
        strict_left = tl.load(own_ptr + _STRICT_LEFT)
        may = candidate & (age_of_all >= strict_left)

        # The budget.
        spends = candidate
        paid = i >= 0
        spent = tl.load(own_ptr + _SPENT)
        if rule == _BUDGET:
            if is_greedy:
                num_before = tl.sum(tl.where(later < here, counted, 0.0), axis=1)
                may = may & (num_before < tl.load(parameters_ptr + _PER_STEP))
                spends = may & is_level
            else:
                spends = eligible & is_draft_row & (age_of_all >= strict_left) & is_level
            nats = tl.load(parameters_ptr + _NATS)
            # A budget of 0 pays nothing, not even what costs nothing.
            nats = tl.where(nats > 0.0, nats, -1.0)
            costs = tl.where(spends, cost, 0.0)[None, :]
            paid = spent + tl.sum(tl.where(later <= here, costs, 0.0), axis=1) <= nats

        # The new state. The token after the accepted ones is emitted too; it is the cooldown's first.
        by_rule = may & is_level & paid
        rejected = is_draft_row & ((accepted | by_rule) == 0)
        num_reached = tl.min(tl.where(rejected, i, num_drafts), axis=0)
        reached = is_draft_row & (i <= num_reached)
        # The first cost that doesn't fit ends the budget, even if a smaller one would still fit.
        exhausted = tl.max((reached & spends & (paid == 0)).to(tl.int32), axis=0) > 0
        guarded = (tl.max((reached & may & (is_level == 0)).to(tl.int32), axis=0) > 0) & (exhausted == 0)
        if rule == _BUDGET:
            spent += tl.sum(tl.where(reached & spends & paid, cost, 0.0), axis=0)
            tl.store(own_ptr + _SPENT, spent)
            tl.store(own_ptr + _EXHAUSTED, tl.where(exhausted, 1.0, 0.0))
        tl.store(own_ptr + _LEVEL, tl.sum(tl.where(i == num_reached, level, 0.0), axis=0) * decay)
        strict_left = tl.maximum(strict_left - (num_reached + 1).to(tl.float32), 0.0)
        tl.store(own_ptr + _STRICT_LEFT, tl.where(guarded, tl.load(parameters_ptr + _COOLDOWN), strict_left))
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
