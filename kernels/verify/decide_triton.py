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

from vllm_aasd.kernels import count
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
_RELAXED, _REGRET = tl.constexpr(count.RELAXED), tl.constexpr(count.REGRET)
_EXHAUSTED_EVENTS, _GUARDED_EVENTS = tl.constexpr(count.EXHAUSTED), tl.constexpr(count.GUARDED)
_SURVIVAL_BINS, _SURVIVAL_TOKENS = tl.constexpr(count.SURVIVAL_BINS), tl.constexpr(count.SURVIVAL_TOKENS)

# The totals begin with four numbers; then come three by tenth of survival.
assert count.SURVIVAL_TOKENS == 4 and count.SURVIVAL_PROMISED - count.SURVIVAL_TOKENS == count.SURVIVAL_BINS
assert count.SURVIVAL_ACCEPTED - count.SURVIVAL_PROMISED == count.SURVIVAL_BINS

# What a sampled request's last token is drawn by: the row, -1 for none; the seed and the position of its random
# numbers; and the rejected draft token, -1 for none.
RACE_ROW, RACE_SEED, RACE_POSITION, RACE_REJECTED, RACE_COLUMNS = map(tl.constexpr, range(5))


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
# gfx942 runs out of the scalar registers that hold its masks. Left alone, ptxas spills a few registers to fit one more
# program on a multiprocessor.
DECIDE = {"cuda": {"num_warps": 16, "maxnreg": 128}, "hip": {"num_warps": 16}}


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
    races_ptr,  # [num_reqs, RACE_COLUMNS]
    logits_ptr,  # [num_logits, vocab_size]
    logits_stride,
    argmax_ptr,  # [num_logits, num_blocks]
    sums_ptr,  # [5, num_logits, num_blocks]
    num_logits,
    num_blocks,
    draft_sampled_ptr,  # [num_logits]
    num_drafts_ptr,  # [max_num_reqs]
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
    survival_ptr,  # [max_num_reqs, survival_columns]
    survival_columns,
    totals_ptr,  # [count.SIZE]
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Decide one request: its accepted tokens, and the token after them unless `race` draws it. Count its drafts.

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
    is_drafted = is_draft_row & (i < tl.load(num_drafts_ptr + slot))
    draft = tl.load(draft_sampled_ptr + row + 1, mask=is_drafted, other=-1)
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
        seed = tl.zeros((), tl.int64)
    else:
        # The race overwrites it.
        fallback = tl.full((ROWS,), -1, tl.int32)
        seed = tl.load(seed_ptr + slot)
        uniform = row_uniform(seed, tl.load(pos_ptr + row, mask=is_draft_row, other=0))
        accepted = has_softmax & (z - (maximum + tl.log(s)) > tl.log(uniform))
    accepted = accepted & known

    own = tl.load(state_rows_ptr + slot).to(tl.int64)
    relaxes = (rule >= _CONDITIONAL) & (rule <= _BUDGET) & (own >= 0) & (own < num_states) & (num_drafts >= 0)
    own_ptr = state_ptr + own * _NUM_STATES
    by_rule = tl.zeros((ROWS,), tl.int1)
    exhausted = tl.zeros((), tl.int1)
    guarded = tl.zeros((), tl.int1)
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
        # Every thread has read the old state.
        tl.debug_barrier()
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
    last_row = start + num_accepted
    race_ptr = races_ptr + req * RACE_COLUMNS
    tl.store(race_ptr + RACE_ROW, tl.where(has_race, last_row, -1))
    tl.store(race_ptr + RACE_SEED, seed)
    tl.store(race_ptr + RACE_POSITION, tl.load(pos_ptr + last_row, mask=has_race, other=0))
    tl.store(race_ptr + RACE_REJECTED, tl.max(tl.where(i == num_accepted, draft, -1), axis=0).to(tl.int64))

    # Count. Whole numbers are exact in any order.
    kind = tl.arange(0, 4)
    has_promise = i < survival_columns
    relaxed = tl.sum((by_rule & has_promise).to(tl.float64), axis=0)
    regret = tl.sum(tl.where(by_rule & has_promise, maximum - z, 0.0).to(tl.float64), axis=0)
    events = tl.where(kind == _RELAXED, relaxed, tl.where(kind == _REGRET, regret, 0.0))
    events = tl.where(kind == _EXHAUSTED_EVENTS, exhausted.to(tl.float64), events)
    events = tl.where(kind == _GUARDED_EVENTS, guarded.to(tl.float64), events)
    tl.atomic_add(totals_ptr + kind, events, mask=events > 0, sem="relaxed")
    first_none = tl.min(tl.where(draft >= 0, ROWS, i), axis=0)
    promised_ptr = survival_ptr + slot * survival_columns + i
    promised = tl.load(promised_ptr, mask=(i < first_none) & has_promise, other=-1.0)[None, :]
    tenths = tl.minimum((promised * _SURVIVAL_BINS).to(tl.int32), _SURVIVAL_BINS - 1)
    kind = kind[:, None]
    added = tl.where(kind == 0, 1.0, tl.where(kind == 1, promised, is_prefix[None, :].to(tl.float32)))
    counted = (promised >= 0) & (kind < 3) & (added > 0)
    of_kind_ptr = totals_ptr + _SURVIVAL_TOKENS + kind * _SURVIVAL_BINS
    tl.atomic_add(of_kind_ptr + tenths, added.to(tl.float64), mask=counted, sem="relaxed")
