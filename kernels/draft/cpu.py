"""The compiled CPU path of `draft` (numba). The maths is in `vllm_aasd.kernels.draft`."""

import numpy as np

from vllm_aasd.kernels.align.cpu import aligned_slot
from vllm_aasd.kernels.common.compiled import compiled
from vllm_aasd.kernels.common.ngram_hash_cpu import hash_with
from vllm_aasd.kernels.draft import (
    HIT,
    MISS,
    NGRAM_SIZES_USED,
    STALE,
)
from vllm_aasd.kernels.draft.index_cpu import find
from vllm_aasd.kernels.text.reliability_cpu import stack


@compiled
def _add_weight(scores, candidates, num_candidates, token, weight):
    if weight <= 0 or token < 0 or token >= scores.shape[0]:
        return num_candidates
    if scores[token] == 0:
        if num_candidates == candidates.shape[0]:
            return num_candidates
        candidates[num_candidates] = token
        num_candidates += 1
    scores[token] += weight
    return num_candidates


@compiled
def _walk(prev, match_head, positions, num_positions, longer, num_longer, own):
    """Walk to the latest matches of an n-gram size, and number those that the next larger size has not numbered.

    Matches of the larger size match here too, and come in the same sequence, so one look ahead tells which are known.

    Args:
        prev: ``[capacity]`` int32, the size's.
        match_head: its latest match.
        positions: ``[>= num_positions + max_matches]`` int32, by number; written in place from ``num_positions`` on.
        num_positions: how many have a number already.
        longer: int32, in its first ``num_longer`` the numbers of the larger size's matches, the latest first.
        own: ``[max_matches]`` int32, written in place: the numbers of those walked to, the latest first.

    Returns:
        How many were walked to, and how many have a number now.
    """
    count = 0
    rank = 0
    position = match_head
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
    no_alignment_discount,
    prior_ids,
    prior_probs,
    known,
    max_matches,
    min_survival,
    scores,
    candidates,
    match_heads,
    draft_token_ids,
    survival,
    lookups,
):
    """Draft the likeliest continuation of one request's context.

    Args:
        tokens: ``[capacity]`` int32, the context in its first ``length``; needs ``K`` free places after them,
            which serve as scratch for the draft.
        prev, head: the index of `extend_index`, entered up to ``length``.
        length: tokens in the context.
        table: ``[num_slots, 1 + 2k]`` int32, the alignment store (token id; k ids; k probabilities as float32
            bits); ``[0, 1]`` for none.
        block_table: ``[>= ceil(length / block_size)]`` int32, the request's KV blocks.
        block_size: slots per KV block.
        theta, alignment: ``[M]`` float32, see `MixtureWeights`.
        no_alignment_discount: float32, see `MixtureWeights`.
        prior_ids, prior_probs: ``[vocab_size, k]`` int32 and float32, see `Prior`; ``[0, 0]`` for none.
        known: a `vllm_aasd.kernels.text.KnownText`.
        max_matches: how many of the most recent matches of each n-gram size are used.
        min_survival: stop before a token whose survival (a probability) would be lower.
        scores: ``[vocab_size]`` float32 scratch, all zero, left all zero.
        candidates: ``[>= 1]`` int32 scratch: the tokens of a step; those beyond its size are ignored.
        match_heads: ``[M]`` int32 scratch.
        draft_token_ids: ``[K]`` int32, written in place.
        survival: ``[K]`` float32, written in place.
        lookups: ``[3]`` int64, added to: how often the store held the predictions of a matching position (`HIT`),
            nothing (`MISS`), or those of another token (`STALE`); untouched without a store.

    Returns:
        How many draft tokens were written, 0 to K.
    """
    max_ngram_size = head.shape[0]
    top_k = (table.shape[1] - 1) // 2
    probs = table.view(np.float32)
    # A position that matches in several sizes is added once, with what it has from each: adding is most of the work.
    most = NGRAM_SIZES_USED * max_matches
    positions = np.empty(most, np.int32)
    slots = np.empty(most, np.int64)
    retrieved = np.empty(most, np.float32)
    aligned = np.empty(most, np.float32)
    own = np.empty(max_matches, np.int32)
    longer = np.empty(max_matches, np.int32)
    draft_survival = np.float32(1.0)
    for step in range(draft_token_ids.shape[0]):
        end = length + step - 1
        hashed = np.uint64(0)
        longest = 0
        for size in range(1, min(max_ngram_size, end + 1) + 1):
            hashed = hash_with(hashed, tokens[end - size + 1])
            _, match_head = find(tokens, head, size, end, hashed)
            if match_head < 0:
                break
            match_heads[size - 1] = match_head
            longest = size
        remaining_mass = np.float32(1.0)
        num_positions = 0
        count = 0
        for size in range(longest, max(longest - NGRAM_SIZES_USED, 0), -1):
            num_known = num_positions
            own, longer = longer, own
            count, num_positions = _walk(
                prev[size - 1], match_heads[size - 1], positions, num_known, longer, count, own
            )
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
            escape = theta[size - 1] * (np.float32(1.0) + (no_alignment_discount - np.float32(1.0)) * share_unaligned)
            weight = np.float32(count) / (np.float32(count) + escape)
            share = remaining_mass * weight / np.float32(count)
            share_aligned = share * alignment[size - 1]
            for match in own[:count]:
                if slots[match] >= 0:
                    retrieved[match] += share - share_aligned
                    aligned[match] += share_aligned
                else:
                    retrieved[match] += share
            remaining_mass *= np.float32(1.0) - weight
        num_candidates = 0
        for match in range(num_positions):
            num_candidates = _add_weight(
                scores, candidates, num_candidates, tokens[positions[match] + 1], retrieved[match]
            )
            slot = slots[match]
            if slot >= 0:
                for k in range(1, top_k + 1):
                    candidate_weight = aligned[match] * probs[slot, top_k + k]
                    num_candidates = _add_weight(scores, candidates, num_candidates, table[slot, k], candidate_weight)
        last = tokens[end] if end >= 0 else -1
        if 0 <= last < prior_ids.shape[0]:
            for k in range(prior_ids.shape[1]):
                num_candidates = _add_weight(
                    scores, candidates, num_candidates, prior_ids[last, k], remaining_mass * prior_probs[last, k]
                )
        best = np.int32(-1)
        best_score = np.float32(0.0)
        for i in range(num_candidates):
            token = candidates[i]
            if scores[token] > best_score:
                best_score = scores[token]
                best = token
            scores[token] = np.float32(0.0)
        best, best_score = stack(known, step, tokens, end, best, best_score)
        draft_survival *= best_score
        # Known text may hold ids that the model can't be fed.
        if best < 0 or best >= scores.shape[0] or draft_survival < min_survival:
            return step
        tokens[length + step] = best
        draft_token_ids[step] = best
        survival[step] = draft_survival
    return draft_token_ids.shape[0]
