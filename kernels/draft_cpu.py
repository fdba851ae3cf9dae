"""The compiled CPU path of `draft` (numba). The maths is in `vllm_aasd.kernels.draft`."""

import numpy as np

from vllm_aasd.kernels.compiled import compiled
from vllm_aasd.kernels.mixture import HIT, MISS, STALE

ORDERS_USED = 4
"""How many of the longest matching orders vote; lower ones hardly count once four higher ones match."""

SHORTEST_REMEMBERED, LONGEST_REMEMBERED = 2, 3
"""Runs of tokens that the memory is asked for; of one token the prior knows more."""

MOST_PROBES = 48
"""Slots of a table that are tried for one run of tokens: the bound on a look-up.

Where all are taken, the run whose place is the first of them takes it, and what stood there is forgotten. In tables that
are at most half full that is no accident: of 650 000 random runs one stood 37 slots from its place, of text 24. Tokens
can be chosen so that their hashes collide, and then they cost this much and find nothing.
"""

MOST_REMEMBERED = 5
"""How many distributions a run's entry averages; from then on the newest has this fraction's weight."""

# An odd multiplier with well-mixed high bits (Knuth, TAOCP 6.4: 2^64 / golden ratio).
MULTIPLIER = 0x9E3779B97F4A7C15
_MULTIPLIER = np.uint64(MULTIPLIER)


@compiled
def _find(tokens, head, order, end, hashed):
    """Where ``head[order - 1]`` holds, or may take in, the ``order``-gram ending at ``end``.

    Returns:
        The slot, and the most recent position that ends this gram there; -1 if it isn't held.
    """
    mask = np.uint64(head.shape[1] - 1)
    # The high half is the well-mixed one.
    first = (hashed >> np.uint64(32)) & mask
    slot = first
    for _ in range(MOST_PROBES):
        other = head[order - 1, slot]
        if other < 0:
            return slot, np.int32(-1)
        same = True
        for back in range(order):
            if tokens[other - back] != tokens[end - back]:
                same = False
                break
        if same:
            return slot, other
        slot = (slot + np.uint64(1)) & mask
    return first, np.int32(-1)


@compiled
def _hash(hashed, token):
    return (hashed ^ np.uint64(np.uint32(token))) * _MULTIPLIER


@compiled
def extend_index(tokens, prev, head, indexed, length):
    """Enter the positions whose successor has become known.

    Args:
        tokens: ``[capacity]`` int32, the context; the first ``length`` are valid.
        prev: ``[M, capacity]`` int32, written in place: the previous position with the same m-gram, -1 if none.
        head: ``[M, table_size]`` int32, a power of two of at least twice ``length`` slots per order, -1 where
            free, written in place: the most recent position of an m-gram.
        indexed: how many positions are entered already.
        length: tokens in the context now.

    Returns:
        How many positions are entered now.
    """
    num_orders = head.shape[0]
    last = max(length - 1, indexed)
    for end in range(indexed, last):
        hashed = np.uint64(0)
        for order in range(1, min(num_orders, end + 1) + 1):
            hashed = _hash(hashed, tokens[end - order + 1])
            slot, before = _find(tokens, head, order, end, hashed)
            prev[order - 1, end] = before
            head[order - 1, slot] = end
    return last


@compiled
def _slot(tokens, position, table, block_table, block_size):
    """Where the stored distribution of a position lies; -1 if there is none, -2 if it is a stale one."""
    if table.shape[0] == 0:
        return np.int64(-1)
    slot = np.int64(block_table[position // block_size]) * block_size + position % block_size
    if table[slot, 0] == tokens[position]:
        return slot
    return np.int64(-1) if table[slot, 0] < 0 else np.int64(-2)


@compiled
def _memory_slot(tokens, order, end, memory):
    """Where the memory holds, or would hold, the run of ``order`` tokens ending at ``end``; and its tag there."""
    hashed = np.uint64(order)
    for back in range(order):
        hashed = _hash(hashed, tokens[end - back])
    # The low half tells runs apart that share a slot; the two halves of a product are nearly independent.
    tag = np.int32(hashed & np.uint64(0x7FFFFFFF))
    return np.int64((hashed >> np.uint64(32)) & np.uint64(memory.shape[0] - 1)), tag


@compiled
def remember(tokens, first, last, table, block_table, block_size, memory):
    """Mix the target's stored distributions at positions ``first`` to ``last`` into the memory.

    Args:
        tokens: ``[>= last + 1]`` int32, the context.
        first, last: positions, both included; those without a fresh stored distribution are passed over.
        table, block_table, block_size: the alignment store, as for `draft`.
        memory: ``[S, 2 + 2k]`` int32 with S a power of two or 0, written in place; see `vllm_aasd.kernels.draft`.
    """
    if memory.shape[0] == 0:
        return
    top_k = (memory.shape[1] - 2) // 2
    stored = (table.shape[1] - 1) // 2
    probs = table.view(np.float32)
    memory_probs = memory.view(np.float32)
    for position in range(first, last + 1):
        slot = _slot(tokens, position, table, block_table, block_size)
        if slot < 0:
            continue
        for order in range(SHORTEST_REMEMBERED, min(LONGEST_REMEMBERED, position + 1) + 1):
            row, tag = _memory_slot(tokens, order, position, memory)
            if memory[row, 0] != tag:
                memory[row, 0] = tag
                memory[row, 1] = 0
                for k in range(top_k):
                    memory[row, 2 + k] = -1
                    memory_probs[row, 2 + top_k + k] = 0.0
            count = min(memory[row, 1] + 1, MOST_REMEMBERED)
            memory[row, 1] = count
            new_share = np.float32(1.0) / np.float32(count)
            for k in range(top_k):
                memory_probs[row, 2 + top_k + k] *= np.float32(1.0) - new_share
            for j in range(stored):
                token = table[slot, 1 + j]
                share = new_share * probs[slot, 1 + stored + j]
                target = -1
                weakest = 0
                for k in range(top_k):
                    if memory[row, 2 + k] == token:
                        target = k
                        break
                    if memory_probs[row, 2 + top_k + k] < memory_probs[row, 2 + top_k + weakest]:
                        weakest = k
                if target >= 0:
                    memory_probs[row, 2 + top_k + target] += share
                elif memory_probs[row, 2 + top_k + weakest] < share:
                    memory[row, 2 + weakest] = token
                    memory_probs[row, 2 + top_k + weakest] = share


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
        memory: ``[S, 2 + 2k]`` int32, as `remember` fills it; ``[0, 4]`` for none.
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
    # The matches of one order, whose number is to be known before they vote: walking there twice takes a third longer.
    positions = np.empty(max_matches, np.int32)
    slots = np.empty(max_matches, np.int64)
    alive = np.float32(1.0)
    for step in range(draft_token_ids.shape[0]):
        end = length + step - 1
        hashed = np.uint64(0)
        longest = 0
        for order in range(1, min(num_orders, end + 1) + 1):
            hashed = _hash(hashed, tokens[end - order + 1])
            _, start = _find(tokens, head, order, end, hashed)
            if start < 0:
                break
            starts[order - 1] = start
            longest = order
        num_seen = 0
        left = np.float32(1.0)
        for order in range(longest, max(longest - ORDERS_USED, 0), -1):
            count = 0
            num_aligned = 0
            num_stale = 0
            position = starts[order - 1]
            while position >= 0 and count < max_matches:
                slot = _slot(tokens, position, table, block_table, block_size)
                if slot >= 0:
                    num_aligned += 1
                elif slot == -2:
                    num_stale += 1
                positions[count] = position
                slots[count] = slot
                count += 1
                position = prev[order - 1, position]
            if table.shape[0] > 0:
                lookups[HIT] += num_aligned
                lookups[STALE] += num_stale
                lookups[MISS] += count - num_aligned - num_stale
            share_unaligned = np.float32(count - num_aligned) / np.float32(count)
            escape = theta[order - 1] * (np.float32(1.0) + (doubt - np.float32(1.0)) * share_unaligned)
            weight = np.float32(count) / (np.float32(count) + escape)
            share = left * weight / np.float32(count)
            for match in range(count):
                slot = slots[match]
                aligned = alignment[order - 1] if slot >= 0 else np.float32(0.0)
                token = tokens[positions[match] + 1]
                num_seen = _vote(scores, seen, num_seen, token, share * (np.float32(1.0) - aligned))
                if slot >= 0:
                    for k in range(1, top_k + 1):
                        num_seen = _vote(
                            scores, seen, num_seen, table[slot, k], share * aligned * probs[slot, top_k + k]
                        )
            left *= np.float32(1.0) - weight
        if memory.shape[0] > 0:
            remembered = (memory.shape[1] - 2) // 2
            memory_probs = memory.view(np.float32)
            for order in range(min(LONGEST_REMEMBERED, end + 1), SHORTEST_REMEMBERED - 1, -1):
                row, tag = _memory_slot(tokens, order, end, memory)
                if memory[row, 0] != tag or memory[row, 1] == 0:
                    continue
                count = np.float32(memory[row, 1])
                weight = memory_weights[order] * count / (count + np.float32(1.0))
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
