"""The compiled CPU path of `draft` (numba). The maths is in `vllm_aasd.kernels.draft`."""

import numpy as np

from vllm_aasd.kernels.align.cpu import aligned_slot
from vllm_aasd.kernels.common.compiled import compiled
from vllm_aasd.kernels.draft import (
    HIT,
    LONGEST_REMEMBERED,
    MISS,
    ORDERS_USED,
    SHORTEST_REMEMBERED,
    STALE,
    MixtureWeights,
    no_memory,
    no_prior,
)
from vllm_aasd.kernels.draft.index_cpu import extend_index, find, hash_with
from vllm_aasd.kernels.draft.memory_cpu import memory_slot, remember


@compiled
def _vote(scores, seen, num_seen, token, weight):
    if weight <= 0 or token < 0 or token >= scores.shape[0]:
        return num_seen
    if scores[token] == 0:
        if num_seen == seen.shape[0]:
            return num_seen
        seen[num_seen] = token
        num_seen += 1
    scores[token] += weight
    return num_seen


@compiled
def _walk(prev, start, positions, num_positions, longer, num_longer, own):
    """Walk to the latest matches of an order, and number those that the next longer order has not numbered.

    All that it walked to match here too, and between them lie only matches of this order: so one look ahead tells which
    are known.

    Args:
        prev: ``[capacity]`` int32, the order's.
        start: its latest match.
        positions: ``[>= num_positions + max_matches]`` int32, by number; written in place behind ``num_positions``.
        num_positions: how many have a number already.
        longer: int32, in its first ``num_longer`` the numbers of the longer order's matches, the latest first.
        own: ``[max_matches]`` int32, written in place: the numbers of those walked to, the latest first.

    Returns:
        How many were walked to, and how many have a number now.
    """
    count = 0
    rank = 0
    position = start
    while position >= 0 and count < own.size:
        if rank < num_longer and positions[longer[rank]] == position:
            own[count] = longer[rank]
            rank += 1
        else:
            positions[num_positions] = position
            own[count] = num_positions
            num_positions += 1
        count += 1
        position = prev[position]
    return count, num_positions


@compiled
def draft(
    tokens,
    prev,
    head,
    length,
    table,
    block_table,
    block_size,
    theta,
    alignment,
    doubt,
    memory_weights,
    prior_ids,
    prior_probs,
    memory,
    max_matches,
    min_survival,
    scores,
    seen,
    starts,
    draft_token_ids,
    survival,
    lookups,
):
    """Draft the likeliest continuation of one request's context.

    Args:
        tokens: ``[capacity]`` int32, the context in its first ``length``; needs ``K`` free places behind them,
            which serve as scratch for the draft.
        prev, head: the index of `extend_index`, entered up to ``length``.
        length: tokens in the context.
        table: ``[num_slots, 1 + 2k]`` int32, the alignment store (token id; k ids; k probabilities as float32
            bits); ``[0, 1]`` for none.
        block_table: ``[>= ceil(length / block_size)]`` int32, the request's KV blocks.
        block_size: slots per KV block.
        theta, alignment: ``[M]`` float32, see `MixtureWeights`.
        doubt: float32, see `MixtureWeights`.
        memory_weights: ``[LONGEST_REMEMBERED + 1]`` float32, see `MixtureWeights`.
        prior_ids, prior_probs: ``[vocab_size, k]`` int32 and float32, see `Prior`; ``[0, 0]`` for none.
        memory: ``[S, 2 + 2k]`` int32, as `remember` fills it; ``[0, 2]`` for none.
        max_matches: how many of the most recent matches of each order vote.
        min_survival: stop before a token whose survival (a probability) would be lower.
        scores: ``[vocab_size]`` float32 scratch, all zero, left all zero.
        seen: ``[>= 1]`` int32 scratch: the candidates of a step; those beyond its size are ignored.
        starts: ``[M]`` int32 scratch.
        draft_token_ids: ``[K]`` int32, written in place.
        survival: ``[K]`` float32, written in place.
        lookups: ``[3]`` int64, added to: how often the store held the predictions of a matching position (`HIT`),
            nothing (`MISS`), or those of another token (`STALE`); untouched without a store.

    Returns:
        How many draft tokens were written, 0 to K.
    """
    num_orders = head.shape[0]
    top_k = (table.shape[1] - 1) // 2
    probs = table.view(np.float32)
    # A position that matches in several orders votes once, with what it has from each: votes are most of the work.
    most = ORDERS_USED * max_matches
    positions = np.empty(most, np.int32)
    slots = np.empty(most, np.int64)
    retrieved = np.empty(most, np.float32)
    aligned = np.empty(most, np.float32)
    own = np.empty(max_matches, np.int32)
    longer = np.empty(max_matches, np.int32)
    alive = np.float32(1.0)
    for step in range(draft_token_ids.shape[0]):
        end = length + step - 1
        hashed = np.uint64(0)
        longest = 0
        for order in range(1, min(num_orders, end + 1) + 1):
            hashed = hash_with(hashed, tokens[end - order + 1])
            _, start = find(tokens, head, order, end, hashed)
            if start < 0:
                break
            starts[order - 1] = start
            longest = order
        left = np.float32(1.0)
        num_positions = 0
        count = 0
        for order in range(longest, max(longest - ORDERS_USED, 0), -1):
            num_known = num_positions
            own, longer = longer, own
            count, num_positions = _walk(prev[order - 1], starts[order - 1], positions, num_known, longer, count, own)
            for match in range(num_known, num_positions):
                slots[match] = aligned_slot(tokens, positions[match], table, block_table, block_size)
                retrieved[match] = np.float32(0.0)
                aligned[match] = np.float32(0.0)
            num_aligned = 0
            num_stale = 0
            for match in own[:count]:
                if slots[match] >= 0:
                    num_aligned += 1
                elif slots[match] == -2:
                    num_stale += 1
            if table.shape[0] > 0:
                lookups[HIT] += num_aligned
                lookups[STALE] += num_stale
                lookups[MISS] += count - num_aligned - num_stale
            share_unaligned = np.float32(count - num_aligned) / np.float32(count)
            escape = theta[order - 1] * (np.float32(1.0) + (doubt - np.float32(1.0)) * share_unaligned)
            weight = np.float32(count) / (np.float32(count) + escape)
            share = left * weight / np.float32(count)
            share_aligned = share * alignment[order - 1]
            for match in own[:count]:
                if slots[match] >= 0:
                    retrieved[match] += share - share_aligned
                    aligned[match] += share_aligned
                else:
                    retrieved[match] += share
            left *= np.float32(1.0) - weight
        num_seen = 0
        for match in range(num_positions):
            num_seen = _vote(scores, seen, num_seen, tokens[positions[match] + 1], retrieved[match])
            slot = slots[match]
            if slot >= 0:
                for k in range(1, top_k + 1):
                    vote = aligned[match] * probs[slot, top_k + k]
                    num_seen = _vote(scores, seen, num_seen, table[slot, k], vote)
        if memory.shape[0] > 0:
            remembered = (memory.shape[1] - 2) // 2
            memory_probs = memory.view(np.float32)
            for order in range(min(LONGEST_REMEMBERED, end + 1), SHORTEST_REMEMBERED - 1, -1):
                row, tag = memory_slot(tokens, order, end, memory)
                if memory[row, 0] != tag or memory[row, 1] == 0:
                    continue
                observed = np.float32(memory[row, 1])
                weight = memory_weights[order] * observed / (observed + np.float32(1.0))
                for k in range(2, 2 + remembered):
                    vote = left * weight * memory_probs[row, remembered + k]
                    num_seen = _vote(scores, seen, num_seen, memory[row, k], vote)
                left *= np.float32(1.0) - weight
        last = tokens[end] if end >= 0 else -1
        if 0 <= last < prior_ids.shape[0]:
            for k in range(prior_ids.shape[1]):
                num_seen = _vote(scores, seen, num_seen, prior_ids[last, k], left * prior_probs[last, k])
        best = np.int32(-1)
        best_score = np.float32(0.0)
        for i in range(num_seen):
            token = seen[i]
            if scores[token] > best_score:
                best_score = scores[token]
                best = token
            scores[token] = np.float32(0.0)
        alive *= best_score
        if best < 0 or alive < min_survival:
            return step
        tokens[length + step] = best
        draft_token_ids[step] = best
        survival[step] = alive
    return draft_token_ids.shape[0]


def warm_up(num_orders: int, top_k: int) -> None:
    """Compile the path that serves, on one small request, so that no request pays for it.

    Args:
        num_orders: how many orders the index has.
        top_k: entries per position of the alignment table.
    """
    capacity = 16
    tokens = np.array([1, 2, 3, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], np.int32)
    prev = np.empty((num_orders, capacity), np.int32)
    head = np.full((num_orders, 2 * capacity), -1, np.int32)
    extend_index(tokens, prev, head, 0, 5)
    weights = MixtureWeights(
        np.ones(num_orders, np.float32), np.full(num_orders, 0.5, np.float32), np.float32(2), np.ones(4, np.float32)
    )
    out = np.empty(2, np.int32), np.empty(2, np.float32), np.zeros(3, np.int64)
    scratch = np.zeros(8, np.float32), np.empty(8, np.int32), np.empty(num_orders, np.int32)
    store = np.full((capacity, 1 + 2 * top_k), -1, np.int32), np.zeros(1, np.int32), capacity
    draft(tokens, prev, head, 5, *store, *weights, *no_prior(), 4, 0.1, *scratch, *out)
    remember(tokens, 3, 3, *store, no_memory())
