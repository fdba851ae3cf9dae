"""One step of the draft kernel between its matches and its token; the method is in `vllm_aasd.kernels.draft.batch`."""

import triton
import triton.language as tl

from vllm_aasd.kernels import draft

NGRAM_SIZES_USED = tl.constexpr(draft.NGRAM_SIZES_USED)
UNROLLED = tl.constexpr(8)
"""Candidates whose weights are added in one go."""


@triton.jit
def _put_candidates(candidates_ptr, places, ids, weights, vocab_size, mask):
    """Write candidates; one that does not count becomes no token, of weight 0."""
    counts = (weights > 0) & (ids >= 0) & (ids < vocab_size)
    bits = tl.where(counts, weights, 0.0).to(tl.int32, bitcast=True)
    tl.store(candidates_ptr + 2 * places, tl.where(counts, ids, -1), mask=mask)
    tl.store(candidates_ptr + 2 * places + 1, bits, mask=mask)


@triton.jit
def gather_candidates(
    tokens_ptr,  # [length] of all_token_ids
    suffix,  # the tokens of context plus draft, the last first
    counts_ptr,  # [MAX_NGRAM_SIZE]
    matches_ptr,  # [MAX_NGRAM_SIZE, MAX_MATCHES]
    table_ptr,  # [num_slots, 1 + 2 TOP_K]
    num_slots,
    blocks_ptr,  # [max_blocks] of block_tables
    block_size,
    theta_ptr,  # [MAX_NGRAM_SIZE]
    alignment_ptr,  # [MAX_NGRAM_SIZE]
    no_alignment_discount_ptr,  # [1]
    prior_ids_ptr,  # [prior_vocab_size, PRIOR_TOP_K]
    prior_probs_ptr,  # [prior_vocab_size, PRIOR_TOP_K]
    prior_vocab_size,
    vocab_size,
    candidates_ptr,  # [max_candidates, 2]: token id, bits of the weight
    MAX_NGRAM_SIZE: tl.constexpr,
    MAX_MATCHES: tl.constexpr,
    TOP_K: tl.constexpr,
    PRIOR_TOP_K: tl.constexpr,
):
    """Write the candidates of a step in the order in which the reference adds them.

    Returns how many candidates; and of the matching positions, how many had fresh predictions, how many had stale
    ones, and how many there were.
    """
    LANES: tl.constexpr = triton.next_power_of_2(NGRAM_SIZES_USED * MAX_MATCHES)
    sizes = 1 + tl.arange(0, triton.next_power_of_2(MAX_NGRAM_SIZE))
    counts = tl.load(counts_ptr + sizes - 1, mask=sizes <= MAX_NGRAM_SIZE, other=0)
    longest = tl.max(tl.where(counts > 0, sizes, 0), axis=0)
    # One lane for each position that may be used: the n-gram sizes, longest first, times the rank in its list.
    lanes = tl.arange(0, LANES)
    ranks = lanes % MAX_MATCHES
    lane_sizes = longest - lanes // MAX_MATCHES
    lane_counts = tl.load(counts_ptr + lane_sizes - 1, mask=lane_sizes > 0, other=0)
    present = (lanes < NGRAM_SIZES_USED * MAX_MATCHES) & (ranks < lane_counts)
    positions = tl.load(matches_ptr + (lane_sizes - 1) * MAX_MATCHES + ranks, mask=present, other=0)
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

    no_alignment_discount = tl.load(no_alignment_discount_ptr)
    lane_shares = tl.zeros([LANES], tl.float32)
    aligned = tl.zeros([LANES], tl.float32)
    places = tl.zeros([LANES], tl.int32)
    remaining_mass = 1.0
    num_candidates = 0
    for drop in tl.static_range(NGRAM_SIZES_USED):
        size = longest - drop
        mine = lanes // MAX_MATCHES == drop
        num_matches = tl.sum(tl.where(sizes == size, counts, 0), axis=0)
        num_unaligned = tl.sum((mine & present & (fresh == 0)).to(tl.int32), axis=0)
        count = num_matches.to(tl.float32)
        theta = tl.load(theta_ptr + size - 1, mask=size > 0, other=1.0)
        share_unaligned = tl.div_rn(num_unaligned.to(tl.float32), tl.maximum(count, 1.0))
        escape = theta * (1.0 + (no_alignment_discount - 1.0) * share_unaligned)
        weight = tl.div_rn(count, count + escape)
        lane_shares = tl.where(mine, tl.div_rn(remaining_mass * weight, tl.maximum(count, 1.0)), lane_shares)
        alignment = tl.load(alignment_ptr + size - 1, mask=size > 0, other=0.0)
        aligned = tl.where(mine & fresh, alignment, aligned)
        places = tl.where(mine, num_candidates + ranks * (1 + TOP_K), places)
        # A size below 1 has count 0, so weight 0.
        remaining_mass = remaining_mass * (1.0 - weight)
        num_candidates += num_matches * (1 + TOP_K)

    if TOP_K > 0:
        ks = tl.arange(0, triton.next_power_of_2(TOP_K))[None, :]
        stored = fresh[:, None] & (ks < TOP_K)
        entry_ptrs = table_ptr + slots[:, None] * (1 + 2 * TOP_K) + 1 + ks
        ids = tl.load(entry_ptrs, mask=stored, other=-1)
        probs = tl.load(entry_ptrs + TOP_K, mask=stored, other=0).to(tl.float32, bitcast=True)
        _put_candidates(
            candidates_ptr,
            places[:, None] + 1 + ks,
            ids,
            (lane_shares * aligned)[:, None] * probs,
            vocab_size,
            present[:, None] & (ks < TOP_K),
        )
    _put_candidates(candidates_ptr, places, successors, lane_shares * (1.0 - aligned), vocab_size, present)

    if PRIOR_TOP_K > 0:
        last_token = suffix[0]
        num_known = tl.where((last_token >= 0) & (last_token < prior_vocab_size), PRIOR_TOP_K, 0)
        prior_ks = tl.arange(0, triton.next_power_of_2(PRIOR_TOP_K))
        known = prior_ks < num_known
        successor_ks = last_token.to(tl.int64) * PRIOR_TOP_K + prior_ks
        prior_ids = tl.load(prior_ids_ptr + successor_ks, mask=known, other=-1)
        prior_weights = remaining_mass * tl.load(prior_probs_ptr + successor_ks, mask=known, other=0.0)
        _put_candidates(candidates_ptr, num_candidates + prior_ks, prior_ids, prior_weights, vocab_size, known)
        num_candidates += num_known
    return num_candidates, num_fresh, num_stale, tl.sum(present.to(tl.int32), axis=0)


@triton.jit
def argmax_candidate(
    candidates_ptr,  # [max_candidates, 2]: token id, bits of the weight
    num_candidates,
    CHUNK: tl.constexpr,
):
    """Return the token of the largest score, of equals the first, and its score; -1 for none."""
    best_token = -1
    best_score = 0.0
    for start in range(0, num_candidates, CHUNK):
        indices = start + tl.arange(0, CHUNK)
        ids = tl.load(candidates_ptr + 2 * indices, mask=indices < num_candidates, other=-1)
        scores = tl.zeros([CHUNK], tl.float32)
        # Every token adds up its weights in the order in which they were written: the reference's sum to the bit.
        for others in range(0, num_candidates, UNROLLED):
            # Asked for together: one alone would wait for its loads.
            token_ids = ()
            weights = ()
            for at in tl.static_range(UNROLLED):
                other = others + at
                exists = other < num_candidates
                bits = tl.load(candidates_ptr + 2 * other + 1, mask=exists, other=0)
                token_ids = token_ids + (tl.load(candidates_ptr + 2 * other, mask=exists, other=-1),)  # type: ignore
                weights = weights + (bits.to(tl.float32, bitcast=True),)  # type: ignore
            for at in tl.static_range(UNROLLED):
                scores += tl.where(ids == token_ids[at], weights[at], 0.0)
        score = tl.max(scores, axis=0)
        if score > best_score:
            best_score = score
            first = tl.min(tl.where(scores == score, indices, num_candidates), axis=0)
            best_token = tl.load(candidates_ptr + 2 * first)
    return best_token, best_score
