"""Plain references of `vllm_aasd.kernels.draft` and `draft_batch`: the specification. They scan the context."""

import numpy as np
import torch

from vllm_aasd.kernels.draft import (
    HIT,
    MISS,
    NGRAM_SIZES_USED,
    STALE,
    MixtureWeights,
    Prior,
)
from vllm_aasd.kernels.draft import batch as batch_op
from vllm_aasd.kernels.text.batch_reference import known_of, note_lookups
from vllm_aasd.kernels.text.reference import stack


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
    excluded=(),
    parts=None,
):
    """Same arguments and result as `vllm_aasd.kernels.draft.cpu.draft`; a draft ends before ``excluded`` ids.
    With ``parts``, how many and of how many positions, only these are looked through; see `_matches`.

    ``known`` may be None. ``prev``, ``head`` and the scratch are not used: matches are found by comparing every
    position, and the candidates of a step are kept in a dictionary, in the order in which they are found. Sums are
    float32, by n-gram size; the compiled path first adds up what a position has from its sizes, so that token ids may
    differ where two tokens are within rounding of each other.
    """
    context = np.array(tokens[:length])
    vocab_size = len(scores)
    top_k = (table.shape[1] - 1) // 2
    draft_survival = np.float32(1)
    for step in range(len(draft_token_ids)):
        sequence = np.concatenate([context, draft_token_ids[:step]])
        matches = {size: _matches(context, sequence, size, max_matches, parts) for size in range(1, len(theta) + 1)}
        longest = max((size for size, positions in matches.items() if positions), default=0)
        weights: dict[int, np.float32] = {}

        def add(token, weight, weights=weights):
            if weight > 0 and 0 <= token < vocab_size:
                weights[token] = weights.get(token, np.float32(0)) + weight

        remaining_mass = np.float32(1)
        # Beyond the last part, a size may have none of the matches that a longer one has.
        for size in filter(matches.get, range(longest, max(longest - NGRAM_SIZES_USED, 0), -1)):
            entries = [_entry(table, block_table, block_size, position) for position in matches[size]]
            fresh = [
                entry is not None and entry[0] == context[position]
                for position, entry in zip(matches[size], entries, strict=True)
            ]
            if len(table):
                stale = [
                    not is_fresh and entry is not None and entry[0] >= 0
                    for entry, is_fresh in zip(entries, fresh, strict=True)
                ]
                lookups[HIT] += fresh.count(True)
                lookups[STALE] += stale.count(True)
                lookups[MISS] += len(entries) - fresh.count(True) - stale.count(True)
            count = np.float32(len(entries))
            share_unaligned = np.float32(fresh.count(False)) / count
            escape = theta[size - 1] * (np.float32(1) + (no_alignment_discount - np.float32(1)) * share_unaligned)
            weight = count / (count + escape)
            share = remaining_mass * weight / count
            for position, entry, is_fresh in zip(matches[size], entries, fresh, strict=True):
                aligned = alignment[size - 1] if is_fresh else np.float32(0)
                add(context[position + 1], share * (np.float32(1) - aligned))
                if is_fresh:
                    for token, prob in zip(entry[1 : top_k + 1], entry[top_k + 1 :].view(np.float32), strict=True):
                        add(int(token), share * aligned * prob)
            remaining_mass *= np.float32(1) - weight
        if length and 0 <= sequence[-1] < len(prior_ids):
            for token, prob in zip(prior_ids[sequence[-1]], prior_probs[sequence[-1]], strict=True):
                add(int(token), remaining_mass * prob)
        best = max(weights, key=lambda token: weights[token]) if weights else -1
        score = weights.get(best, np.float32(0))
        if known is not None:
            best, score = stack(known, step, sequence, len(sequence) - 1, best, score)
        draft_survival *= score
        if not 0 <= best < vocab_size or best in excluded or draft_survival < min_survival:
            return step
        draft_token_ids[step] = best
        survival[step] = draft_survival
    return len(draft_token_ids)


def _matches(context, sequence, size, max_matches, parts):
    """Positions of the context, latest first, that end the n-gram ending the sequence and have a next token.

    In parts other than the last, only those count that a draft has led to from the latest matches of the context's end.
    """
    num_positions, step = len(context) - 1, len(sequence) - len(context)
    if parts is None:
        return _ends(context, sequence, size, 0, num_positions)[:max_matches]
    num_parts, part = parts
    near = num_positions - part
    found = _ends(context, sequence, size, near, num_positions)[:max_matches]
    for end in range(near, num_positions - num_parts * part, -part):
        older = _ends(context, context, max(size - step, 1), end - part, end)[:max_matches]
        ends = [position + step for position in older if position + step < near]
        found += [at for at in ends if np.array_equal(context[at + 1 - step : at + 1], sequence[len(context) :])]
    return found[:max_matches]


def _ends(context, sequence, size, first, end):
    """Positions from ``first`` to before ``end``, latest first, that end the n-gram ending the sequence."""
    if size > len(sequence):
        return []
    positions = np.arange(max(first, size - 1), end)[::-1]
    for back in range(size):
        positions = positions[context[positions - back] == sequence[-1 - back]]
    return positions.tolist()


def _entry(table, block_table, block_size, position):
    if not len(table):
        return None
    return table[block_table[position // block_size] * block_size + position % block_size]


def draft_batch(batch):
    """See `vllm_aasd.kernels.draft.batch.draft_batch`; one `draft` after the other, without the workspace."""
    entries, num_blocks = batch.table.cpu().numpy(), batch.table.shape[0] // batch.block_size
    # One more block, never fresh (no context holds token -1), stands for those outside the table.
    nowhere = np.full((batch.block_size, batch.table.shape[1]), -1, np.int32)
    if num_blocks:
        entries = np.concatenate([entries, nowhere])
    prior = Prior(batch.prior_ids.cpu().numpy(), batch.prior_probs.cpu().numpy())
    found = np.zeros(3, np.int64)
    weights = MixtureWeights(
        batch.theta.cpu().numpy(),
        batch.alignment.cpu().numpy(),
        np.float32(batch.no_alignment_discount.item()),
    )
    width = batch.draft_token_ids.shape[1]
    for row, slot in enumerate(batch.idx_mapping.tolist()):
        length = int(batch.total_len[slot]) if slot >= 0 else 0
        context = batch.all_token_ids[slot, :length].cpu().numpy()
        blocks = batch.block_tables[slot].cpu().numpy()
        may_draft = length > 0 and int(batch.num_sampled[row]) > 0
        limit = max(min(int(batch.max_len[slot]) - length - 1, batch.longest), 0) if may_draft else 0
        ids, survival = np.zeros(limit, np.int32), np.zeros(limit, np.float32)
        known = known_of(batch.texts, slot, width)
        count = draft(
            context,
            None,
            None,
            length,
            entries,
            np.where((blocks >= 0) & (blocks < num_blocks), blocks, num_blocks),
            batch.block_size,
            *weights,
            prior.ids,
            prior.probs,
            known,
            batch.max_matches,
            np.float32(batch.min_survival),
            np.zeros(batch.vocab_size, np.float32),
            None,
            None,
            ids,
            survival,
            found,
            batch.excluded.tolist(),
            (batch_op.WINDOW // batch_op.PART, batch_op.PART),
        )
        batch.draft_token_ids[row] = int(context[-1]) if length else 0
        for step in range(count):
            batch.draft_token_ids[row, step] = int(ids[step])
        if slot < 0:
            continue
        batch.survival[slot] = 0
        batch.survival[slot, :count] = torch.from_numpy(survival[:count])
        batch.num_drafts[slot] = count
        if batch.texts.has_text:
            note_lookups(batch.texts, slot, known, length, min(count + 1, limit))
    # The block that stands for those outside is no store.
    if num_blocks:
        batch.lookups.add_(torch.from_numpy(found).to(batch.lookups.device))
