"""What verification does beyond strict, as Triton device functions: one request's rows at once, without a loop.

The rules are in `vllm_aasd.kernels.verify`; `relaxation_reference` walks through them token by token. Here is what
lets all rows be decided together: only rows up to the first rejection count, and before that one every candidate was
accepted. So what a row must know of those before it are sums over them, taken as if nothing had been rejected:

    relaxed tokens        n_i = sum_{j<i} c_j,  c_j = 1 for a candidate
    level of the guard    L_i = d^i L_0 + sum_{j<i} d^(i-1-j) c_j
    nats paid             S_i = S_0 + sum_{j<=i} cost_j

and fly's window is a sum over rows that the strict rule accepts. ROWS is small, so each is a masked ROWS x ROWS sum.
"""

import triton
import triton.language as tl

from vllm_aasd.kernels.verify import policies

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
def state_of(
    slot,
    rule_ptr,  # [max_num_reqs]
    state_rows_ptr,  # [max_num_reqs]
    state_ptr,  # [num_states, NUM_STATES]
    num_states,
):
    """Return (the request's rule, where its state is, whether it relaxes at all)."""
    rule = tl.load(rule_ptr + slot)
    own = tl.load(state_rows_ptr + slot).to(tl.int64)
    relaxes = (rule >= _CONDITIONAL) & (rule <= _BUDGET) & (own >= 0) & (own < num_states)
    own_ptr = state_ptr + own * _NUM_STATES
    return rule, own_ptr, relaxes & (tl.load(own_ptr + _EXHAUSTED, mask=relaxes, other=1.0) == 0.0)


@triton.jit
def passes_guards(
    row,  # [ROWS]
    draft,  # [ROWS]
    p,  # [ROWS]
    weight,  # [ROWS]
    maximum,  # [ROWS]
    has_softmax,  # [ROWS]
    slot,
    logits_ptr,  # [num_logits, vocab_size]
    logits_stride,
    parameters_ptr,  # [max_num_reqs, NUM_PARAMETERS]
    stop_token_ids_ptr,  # [max_num_reqs, max_stop]
    max_stop,
    vocab_size,
):
    """Return where the draft has a probability of at least the floor, and more than stopping has."""
    stop_token_ids_ptr += slot * max_stop
    stop_weight = tl.zeros_like(weight)
    first = 0
    # A few at a time and up to the padding, for almost all requests have no more: the table's width costs nothing.
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
        # A draft that is a stop token itself exceeds nothing.
        stop_weight += tl.sum(tl.where(draft[:, None] == stops[None, :], float("inf"), weights), axis=1)
        first += _STOPS
    is_likely = p >= tl.load(parameters_ptr + slot * _NUM_PARAMETERS + _FLOOR)
    # The stop tokens' weight is at least 0, so that to exceed it implies p > 0.
    return has_softmax & is_likely & (weight > stop_weight)


@triton.jit
def _surprise(z, maximum, log_s):
    """Return -p log p of a token by its logit."""
    log_p = z - maximum - log_s
    return tl.where(z > float("-inf"), -tl.exp(log_p) * log_p, 0.0)


@triton.jit
def runners_up(
    maxima,  # [ROWS, BLOCKS], those of blocks that don't exist anything
    winner,  # [ROWS, 1]: the block of the row's maximum
    offset,  # [ROWS, BLOCKS]
    plane,
    num_blocks,
    sums_ptr,  # [5, num_logits, num_blocks]
    BLOCKS: tl.constexpr,
):
    """Return ([ROWS], [ROWS]): the second and the third largest logit of each row, from the three of each block."""
    block = tl.arange(0, BLOCKS)[None, :]
    first = tl.where(block < num_blocks, maxima, float("-inf"))
    second = tl.load(sums_ptr + 3 * plane + offset)
    # The block of the maximum goes on with what it has besides.
    first = tl.where(block == winner, second, first)
    second = tl.where(block == winner, tl.load(sums_ptr + 4 * plane + offset), second)
    best = tl.max(first, axis=1, keep_dims=True)
    is_best = first == best
    # Where two blocks share it, it is the third too.
    is_shared = tl.sum(is_best.to(tl.int32), axis=1) > 1
    next_best = tl.max(tl.where(is_best, second, first), axis=1)
    best = tl.max(first, axis=1)
    return best, tl.where(is_shared, best, next_best)


@triton.jit
def relax(
    i,  # [ROWS]
    num_drafts,
    is_greedy,
    strict,  # [ROWS]: whether the strict rule accepts
    eligible,  # [ROWS]: whether the guards let pass
    draft,  # [ROWS]
    argmax,  # [ROWS]
    z,  # [ROWS]: the draft's logit
    uniform,  # [ROWS]
    maximum,  # [ROWS]
    s,  # [ROWS]
    t,  # [ROWS]
    rule,
    own_ptr,  # [NUM_STATES], updated
    slot,
    parameters_ptr,  # [max_num_reqs, NUM_PARAMETERS]
    second,  # [ROWS], for fly: the second and the third largest logit
    third,  # [ROWS]
    ROWS: tl.constexpr,
):
    """Return ([ROWS], where a draft is accepted by relaxation; whether the budget ran out; whether the guard engaged).

    What is returned of rows after the first rejection means nothing.
    """
    parameters_ptr += slot * _NUM_PARAMETERS
    log_s = tl.log(s)
    p = tl.exp(z - maximum) / s
    # Rounding can leave the entropy of a certain row a little below 0.
    entropy = tl.maximum(log_s - t / s, 0.0)
    is_draft_row = i < num_drafts
    later = i[None, :]
    here = i[:, None]

    clears = tl.zeros((ROWS,), tl.int1)
    cost = tl.zeros((ROWS,), tl.float32)
    is_few = i >= 0
    if rule == _CONDITIONAL:
        bar = tl.load(parameters_ptr + _BETA) - tl.load(parameters_ptr + _ALPHA) * entropy
        clears = (p >= bar) | (draft == argmax)
    elif rule == FLY:
        window = tl.load(parameters_ptr + _WINDOW).to(tl.int32)
        in_window = (later > here) & (later <= here + window)
        agreeing = tl.sum((in_window & strict[None, :]).to(tl.int32), axis=1)
        undecided = _surprise(maximum, maximum, log_s) + _surprise(second, maximum, log_s)
        undecided += _surprise(third, maximum, log_s)
        clears = (undecided >= tl.load(parameters_ptr + _THRESHOLD)) & (agreeing == window)
    elif is_greedy:
        cost = maximum - z
        clears = cost <= tl.load(parameters_ptr + _CAP)
    else:
        kappa = tl.load(parameters_ptr + _KAPPA)
        cost = tl.minimum(kappa, tl.maximum(maximum + log_s - z, 0.0))
        tails = (1.0 - uniform) * tl.log((1.0 - uniform) / (1.0 - p))
        clears = uniform * tl.log(uniform / p) + tails <= tl.where(kappa > 0.0, kappa, -1.0)
    candidate = eligible & clears & (strict == 0) & is_draft_row
    counted = tl.where(candidate, 1.0, 0.0)[None, :]

    decay = tl.load(parameters_ptr + _DECAY)
    # 0 to the power of 0 is 1.
    age = (here - 1 - later).to(tl.float32)
    faded = tl.where(age == 0.0, 1.0, tl.exp2(age * tl.log2(decay)))
    age_of_all = i.to(tl.float32)
    level = tl.load(own_ptr + _LEVEL) * tl.where(i == 0, 1.0, tl.exp2(age_of_all * tl.log2(decay)))
    level += tl.sum(tl.where(later < here, faded * counted, 0.0), axis=1)
    is_level = level * decay + 1.0 <= tl.load(parameters_ptr + _LIMIT)
    strict_left = tl.load(own_ptr + _STRICT_LEFT)
    is_free = age_of_all >= strict_left

    spends = candidate
    paid = i >= 0
    spent = tl.load(own_ptr + _SPENT)
    if rule == _BUDGET:
        if is_greedy:
            is_few = tl.sum(tl.where(later < here, counted, 0.0), axis=1) < tl.load(parameters_ptr + _PER_STEP)
        else:
            spends = eligible & is_draft_row
        spends = spends & is_free & is_few & is_level
        nats = tl.load(parameters_ptr + _NATS)
        # Nothing is paid of no budget, not even what costs nothing.
        nats = tl.where(nats > 0.0, nats, -1.0)
        costs = tl.where(spends, cost, 0.0)[None, :]
        paid = spent + tl.sum(tl.where(later <= here, costs, 0.0), axis=1) <= nats

    may = candidate & is_free & is_few
    relaxed = may & is_level & paid
    rejected = is_draft_row & ((strict | relaxed) == 0)
    num_accepted = tl.min(tl.where(rejected, i, num_drafts), axis=0)
    reached = is_draft_row & (i <= num_accepted)
    # What the budget can't pay ends it, also if something smaller could still be paid.
    exhausted = tl.max((reached & spends & (paid == 0)).to(tl.int32), axis=0) > 0
    guarded = (tl.max((reached & may & (is_level == 0)).to(tl.int32), axis=0) > 0) & (exhausted == 0)
    if rule == _BUDGET:
        spent += tl.sum(tl.where(reached & spends & paid, cost, 0.0), axis=0)
        tl.store(own_ptr + _SPENT, spent)
        tl.store(own_ptr + _EXHAUSTED, tl.where(exhausted, 1.0, 0.0))
    # The token that ends the step is emitted too; if the guard engaged, it is the first of the strict ones.
    tl.store(own_ptr + _LEVEL, tl.sum(tl.where(i == num_accepted, level, 0.0), axis=0) * decay)
    strict_left = tl.maximum(strict_left - (num_accepted + 1).to(tl.float32), 0.0)
    tl.store(own_ptr + _STRICT_LEFT, tl.where(guarded, tl.load(parameters_ptr + _COOLDOWN), strict_left))
    return relaxed, exhausted, guarded
