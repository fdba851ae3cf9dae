"""One step of the draft kernel between its matches and its token; the method is in `vllm_aasd.kernels.draft.batch`."""

import triton
import triton.language as tl


@triton.jit
def _put_votes(votes_ptr, places, ids, weights, vocab_size, mask):
    """Write votes; one that does not count becomes a vote of weight 0 for no token."""
    counts = (weights > 0) & (ids >= 0) & (ids < vocab_size)
    bits = tl.where(counts, weights, 0.0).to(tl.int32, bitcast=True)
    tl.store(votes_ptr + 2 * places, tl.where(counts, ids, -1), mask=mask)
    tl.store(votes_ptr + 2 * places + 1, bits, mask=mask)


@triton.jit
def _hashed(suffix, ORDER: tl.constexpr, MULTIPLIER: tl.constexpr):
    """The hash of the run of the last tokens: as the memory's on the CPU."""
    hashed = tl.full([], ORDER, tl.uint64)
    for back in tl.static_range(ORDER):
        hashed = (hashed ^ suffix[back].to(tl.uint32, bitcast=True).to(tl.uint64)) * MULTIPLIER
    return hashed


@triton.jit
def cast_votes(
    tokens_ptr,  # [length] of all_token_ids
    suffix,  # at least LONGEST_REMEMBERED tokens, the last of context plus draft first
    num_tokens,  # of context plus draft
    counts,  # [orders, padded to a power of two]
    matches_ptr,  # [NUM_ORDERS, MAX_MATCHES]
    table_ptr,  # [num_slots, 1 + 2 TOP_K]
    num_slots,
    blocks_ptr,  # [max_blocks] of block_tables
    block_size,
    theta_ptr,  # [NUM_ORDERS]
    alignment_ptr,  # [NUM_ORDERS]
    doubt_ptr,  # [1]
    memory_weights_ptr,  # [LONGEST_REMEMBERED + 1]
    prior_ids_ptr,  # [prior_vocab_size, PRIOR_TOP_K]
    prior_probs_ptr,  # [prior_vocab_size, PRIOR_TOP_K]
    prior_vocab_size,
    runs_ptr,  # [num_rows, 2 + 2 REMEMBERED]
    num_rows,
    vocab_size,
    votes_ptr,  # [max_votes, 2]: token id, bits of the weight
    ORDERS_USED: tl.constexpr,
    MAX_MATCHES: tl.constexpr,
    TOP_K: tl.constexpr,
    PRIOR_TOP_K: tl.constexpr,
    REMEMBERED: tl.constexpr,
    SHORTEST_REMEMBERED: tl.constexpr,
    LONGEST_REMEMBERED: tl.constexpr,
    MULTIPLIER: tl.constexpr,
):
    """Write the votes of a step in the order in which the twin adds them.

    Returns how many; and of the positions that voted, how many had fresh predictions, how many stale ones; and how
    many voted.
    """
    LANES: tl.constexpr = triton.next_power_of_2(ORDERS_USED * MAX_MATCHES)
    orders = 1 + tl.arange(0, counts.shape[0])
    longest = tl.max(tl.where(counts > 0, orders, 0), axis=0)
    # One lane for each position that may vote: the orders used, longest first, times the rank in its list.
    lanes = tl.arange(0, LANES)
    ranks = lanes % MAX_MATCHES
    lane_orders = longest - lanes // MAX_MATCHES
    lane_counts = tl.sum(tl.where(lane_orders[:, None] == orders[None, :], counts[None, :], 0), axis=1)
    present = (lanes < ORDERS_USED * MAX_MATCHES) & (ranks < lane_counts)
    positions = tl.load(matches_ptr + (lane_orders - 1) * MAX_MATCHES + ranks, mask=present, other=0)
    successors = tl.load(tokens_ptr + positions + 1, mask=present, other=-1)
    fresh = lanes < 0
    num_fresh = 0
    num_stale = 0
    slots = tl.zeros([LANES], tl.int64)
    if TOP_K > 0:
        blocks = tl.load(blocks_ptr + positions // block_size, mask=present, other=-1).to(tl.int64)
        slots = blocks * block_size + positions % block_size
        in_table = present & (slots >= 0) & (slots < num_slots)
        tags = tl.load(table_ptr + slots * (1 + 2 * TOP_K), mask=in_table, other=-1)
        fresh = in_table & (tags == tl.load(tokens_ptr + positions, mask=present, other=-1))
        num_fresh = tl.sum(fresh.to(tl.int32), axis=0)
        num_stale = tl.sum((in_table & (tags >= 0)).to(tl.int32), axis=0) - num_fresh

    doubt = tl.load(doubt_ptr)
    lane_shares = tl.zeros([LANES], tl.float32)
    aligned = tl.zeros([LANES], tl.float32)
    places = tl.zeros([LANES], tl.int32)
    left = 1.0
    num_votes = 0
    for drop in tl.static_range(ORDERS_USED):
        order = longest - drop
        mine = lanes // MAX_MATCHES == drop
        num_matches = tl.sum(tl.where(orders == order, counts, 0), axis=0)
        num_unaligned = tl.sum((mine & present & (fresh == 0)).to(tl.int32), axis=0)
        count = num_matches.to(tl.float32)
        theta = tl.load(theta_ptr + order - 1, mask=order > 0, other=1.0)
        share_unaligned = tl.div_rn(num_unaligned.to(tl.float32), tl.maximum(count, 1.0))
        escape = theta * (1.0 + (doubt - 1.0) * share_unaligned)
        weight = tl.div_rn(count, count + escape)
        lane_shares = tl.where(mine, tl.div_rn(left * weight, tl.maximum(count, 1.0)), lane_shares)
        alignment = tl.load(alignment_ptr + order - 1, mask=order > 0, other=0.0)
        aligned = tl.where(mine & fresh, alignment, aligned)
        places = tl.where(mine, num_votes + ranks * (1 + TOP_K), places)
        # An order below 1 has count 0, so weight 0.
        left = left * (1.0 - weight)
        num_votes += num_matches * (1 + TOP_K)

    if TOP_K > 0:
        ks = tl.arange(0, triton.next_power_of_2(TOP_K))[None, :]
        stored = fresh[:, None] & (ks < TOP_K)
        entry_ptrs = table_ptr + slots[:, None] * (1 + 2 * TOP_K) + 1 + ks
        ids = tl.load(entry_ptrs, mask=stored, other=-1)
        probs = tl.load(entry_ptrs + TOP_K, mask=stored, other=0).to(tl.float32, bitcast=True)
        _put_votes(
            votes_ptr,
            places[:, None] + 1 + ks,
            ids,
            (lane_shares * aligned)[:, None] * probs,
            vocab_size,
            present[:, None] & (ks < TOP_K),
        )
    _put_votes(votes_ptr, places, successors, lane_shares * (1.0 - aligned), vocab_size, present)

    if REMEMBERED > 0:
        run_ks = tl.arange(0, triton.next_power_of_2(REMEMBERED))
        for drop in tl.static_range(LONGEST_REMEMBERED - SHORTEST_REMEMBERED + 1):
            hashed = _hashed(suffix, LONGEST_REMEMBERED - drop, MULTIPLIER)
            place = (hashed >> 32).to(tl.int64) & (num_rows - 1)
            run_ptr = runs_ptr + place * (2 + 2 * REMEMBERED)
            is_run = num_tokens >= LONGEST_REMEMBERED - drop
            # The low half tells runs apart that share a place.
            tag = (hashed & 0x7FFFFFFF).to(tl.int32)
            is_held = is_run & (tl.load(run_ptr, mask=is_run, other=-1) == tag)
            observed = tl.load(run_ptr + 1, mask=is_held, other=0).to(tl.float32)
            weight = tl.load(memory_weights_ptr + LONGEST_REMEMBERED - drop) * observed
            weight = tl.div_rn(weight, observed + 1.0)
            num_held = tl.where(observed > 0, REMEMBERED, 0)
            held = run_ks < num_held
            run_ids = tl.load(run_ptr + 2 + run_ks, mask=held, other=-1)
            run_probs = tl.load(run_ptr + 2 + REMEMBERED + run_ks, mask=held, other=0).to(tl.float32, bitcast=True)
            _put_votes(votes_ptr, num_votes + run_ks, run_ids, left * weight * run_probs, vocab_size, held)
            left = left * (1.0 - weight)
            num_votes += num_held
    if PRIOR_TOP_K > 0:
        last_token = suffix[0]
        num_known = tl.where((last_token >= 0) & (last_token < prior_vocab_size), PRIOR_TOP_K, 0)
        prior_ks = tl.arange(0, triton.next_power_of_2(PRIOR_TOP_K))
        known = prior_ks < num_known
        successor_ks = last_token.to(tl.int64) * PRIOR_TOP_K + prior_ks
        prior_ids = tl.load(prior_ids_ptr + successor_ks, mask=known, other=-1)
        prior_weights = left * tl.load(prior_probs_ptr + successor_ks, mask=known, other=0.0)
        _put_votes(votes_ptr, num_votes + prior_ks, prior_ids, prior_weights, vocab_size, known)
        num_votes += num_known
    return num_votes, num_fresh, num_stale, tl.sum(present.to(tl.int32), axis=0)


@triton.jit
def elect(
    votes_ptr,  # [max_votes, 2]: token id, bits of the weight
    num_votes,
    CHUNK: tl.constexpr,
):
    """Return the token with the most votes, of equals the one voted for first, and its score; -1 for none."""
    best_token = -1
    best_score = 0.0
    for start in range(0, num_votes, CHUNK):
        candidates = start + tl.arange(0, CHUNK)
        ids = tl.load(votes_ptr + 2 * candidates, mask=candidates < num_votes, other=-1)
        scores = tl.zeros([CHUNK], tl.float32)
        # Every candidate adds up its votes in the order in which they were cast: the twin's sum to the bit.
        for vote in range(num_votes):
            weight = tl.load(votes_ptr + 2 * vote + 1).to(tl.float32, bitcast=True)
            scores += tl.where(ids == tl.load(votes_ptr + 2 * vote), weight, 0.0)
        score = tl.max(scores, axis=0)
        if score > best_score:
            best_score = score
            first = tl.min(tl.where(scores == score, candidates, num_votes), axis=0)
            best_token = tl.load(votes_ptr + 2 * first)
    return best_token, best_score
