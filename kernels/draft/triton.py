"""The Triton path of `draft_batch`. The method is in `vllm_aasd.kernels.draft.batch`."""

import triton
import triton.language as tl

from vllm_aasd.kernels import draft
from vllm_aasd.kernels.common.backends import gpu_kind
from vllm_aasd.kernels.draft.batch import MAX_EXCLUDED, PART, DraftBatch, num_parts
from vllm_aasd.kernels.draft.candidates_triton import argmax_candidate, gather_candidates
from vllm_aasd.kernels.text import batch as text_batch
from vllm_aasd.kernels.text.index_triton import NUM_SOURCES, SLOT_COLUMNS
from vllm_aasd.kernels.text.stack_triton import stack

_HIT, _MISS, _STALE = tl.constexpr(draft.HIT), tl.constexpr(draft.MISS), tl.constexpr(draft.STALE)
_MAX_EXCLUDED = tl.constexpr(MAX_EXCLUDED)
_LOOKED_FROM, _NUM_LOOKED_UP = tl.constexpr(text_batch.LOOKED_FROM), tl.constexpr(text_batch.NUM_LOOKED_UP)
_LOOKED_UP_COLUMNS = tl.constexpr(text_batch.LOOKED_UP_COLUMNS)

TILE = 2048
"""Context positions compared at once: eight a thread, two loads of 16 bytes, of a tile ahead of the one compared."""

LOOK = tl.constexpr(512)
"""Of a tile that holds the token looked for, positions whose tokens before are compared at once."""

CHUNK = 256
"""Candidates scored at once: one a thread, and most steps have fewer than that."""

LAUNCH_OPTIONS = {
    # 256 threads either way. Left alone, ptxas spills a few registers to fit a third program on a multiprocessor, and
    # with exactly 128 allowed it spills too. With more allowed it spills none, and with known text takes at most 128
    # from sm_90 on, so that two fit.
    "cuda": {"num_warps": 8, "maxnreg": 168, "enable_fp_fusion": False},
    "hip": {"num_warps": 4, "enable_fp_fusion": False},
}
"""By the kind of GPU. A product that is not fused with its sum is rounded, as the reference's is."""


@triton.jit
def _collect_matches(
    tokens_ptr,  # [end] of all_token_ids
    first,
    end,
    suffix,  # MAX_NGRAM_SIZE tokens, the last of context plus draft first
    counts_ptr,  # [MAX_NGRAM_SIZE]
    matches_ptr,  # [MAX_NGRAM_SIZE, MAX_MATCHES]
    MAX_NGRAM_SIZE: tl.constexpr,
    MAX_MATCHES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write the latest matches from `first` to before `end`, latest first, and how many there are, by n-gram size."""
    SIZES_PAD: tl.constexpr = triton.next_power_of_2(MAX_NGRAM_SIZE)
    sizes = 1 + tl.arange(0, SIZES_PAD)
    counts = tl.zeros([SIZES_PAD], tl.int32)
    lanes = tl.arange(0, TILE)
    start = tl.maximum(end - 1, 0) // TILE * TILE
    following = tl.load(tokens_ptr + start + lanes, mask=start + lanes < end, other=-1)
    # What matches m + 1 tokens matches m, so lists fill up in the order of m: these are the open ones.
    lowest_open = 1
    while (start + TILE > first) & (end > first) & (lowest_open <= MAX_NGRAM_SIZE):
        tokens = following
        # Every tile but the last of the context is whole: one mask for all of it.
        is_there = tl.zeros([TILE], tl.int1) | (start > 0)
        following = tl.load(tokens_ptr + tl.maximum(start - TILE, 0) + lanes, mask=is_there, other=-1)
        if tl.max((tokens == suffix[0]).to(tl.int32), axis=0) > 0:
            # In parts, for the sake of registers.
            for past in range(0, TILE, LOOK):
                positions = start + TILE - LOOK - past + tl.arange(0, LOOK)
                in_range = (positions >= first) & (positions < end)
                last = tl.load(tokens_ptr + positions, mask=in_range, other=-1)
                matched = (in_range & (last == suffix[0])).to(tl.int32)
                for back in tl.static_range(1, MAX_NGRAM_SIZE):
                    # A suffix token from before the context is never compared: no position reaches back as far.
                    same = (matched == back) & (positions >= back)
                    before = tl.load(tokens_ptr + positions - back, mask=same, other=-1)
                    matched += (same & (before == suffix[back])).to(tl.int32)
                for size in range(lowest_open, tl.max(matched, axis=0) + 1):
                    ends = (matched >= size).to(tl.int32)
                    found = tl.sum(tl.where(sizes == size, counts, 0), axis=0)
                    ranks = found + tl.cumsum(ends, axis=0, reverse=True) - 1
                    places = (size - 1) * MAX_MATCHES + ranks
                    tl.store(matches_ptr + places, positions, mask=(ends > 0) & (ranks < MAX_MATCHES))
                    counts += tl.where(sizes == size, tl.sum(ends, axis=0), 0)
            lowest_open = 1 + tl.sum((counts >= MAX_MATCHES).to(tl.int32), axis=0)
        start -= TILE
    tl.store(counts_ptr + sizes - 1, tl.minimum(counts, MAX_MATCHES), mask=sizes <= MAX_NGRAM_SIZE)


@triton.jit
def _join_parts(
    tokens_ptr,  # [num_positions] of all_token_ids
    near,  # where the last part begins
    num_parts,
    token,  # the last of context plus draft
    num_drafts,
    counts_ptr,  # [1 + PARTS, MAX_NGRAM_SIZE], all parts, then joined
    matches_ptr,  # [1 + PARTS, MAX_NGRAM_SIZE, MAX_MATCHES]
    MAX_NGRAM_SIZE: tl.constexpr,
    MAX_MATCHES: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Join the latest part's matches and what the draft has led to from the others' matches."""
    RANKS_PAD: tl.constexpr = triton.next_power_of_2(MAX_MATCHES)
    sizes = 1 + tl.arange(0, triton.next_power_of_2(MAX_NGRAM_SIZE))[:, None]
    lanes = tl.arange(0, triton.next_power_of_2(PARTS) * RANKS_PAD)[None, :]
    part, rank = lanes // RANKS_PAD, lanes % RANKS_PAD
    is_far = part > 0
    # A match of the context's end, which is shorter by the draft.
    lists = part * MAX_NGRAM_SIZE + tl.where(is_far, tl.maximum(sizes - num_drafts, 1), sizes) - 1
    is_list = (sizes <= MAX_NGRAM_SIZE) & (part < num_parts)
    there = rank < tl.load(counts_ptr + lists, mask=is_list, other=0)
    entries = lists * MAX_MATCHES + rank
    positions = tl.load(matches_ptr + entries, mask=there, other=-1)
    goes_on = positions >= 0
    positions += tl.where(is_far, num_drafts, 0)
    goes_on &= (is_far == 0) | (positions < near)
    goes_on &= tl.load(tokens_ptr + positions, mask=goes_on, other=-1) == token
    # Several sizes may share a list. A lane that reads what another has stored here gets the same result.
    tl.store(matches_ptr + entries, -1, mask=there & is_far & (goes_on == 0))
    ranks = tl.cumsum(goes_on.to(tl.int32), axis=1) - 1
    joined_ptr = matches_ptr + PARTS * MAX_NGRAM_SIZE * MAX_MATCHES
    tl.store(joined_ptr + (sizes - 1) * MAX_MATCHES + ranks, positions, mask=goes_on & (ranks < MAX_MATCHES))
    counts = tl.minimum(tl.sum(goes_on.to(tl.int32), axis=1), MAX_MATCHES)
    sizes = 1 + tl.arange(0, triton.next_power_of_2(MAX_NGRAM_SIZE))
    tl.store(counts_ptr + PARTS * MAX_NGRAM_SIZE + sizes - 1, counts, mask=sizes <= MAX_NGRAM_SIZE)


# What may change from step to step must not ask for another compilation.
@triton.jit(
    do_not_specialize=["longest", "num_pages", "num_corpus_pages", "num_spec_tokens"],
    do_not_specialize_on_alignment=["idx_mapping_ptr", "num_sampled_ptr"],
)
def draft_kernel(
    all_token_ids_ptr,  # [max_num_reqs, max_model_len]
    all_token_ids_stride,
    total_len_ptr,  # [max_num_reqs]
    idx_mapping_ptr,  # [num_reqs]
    max_len_ptr,  # [max_num_reqs]
    num_sampled_ptr,  # [num_reqs]
    excluded_ptr,  # [MAX_EXCLUDED]
    longest,
    table_ptr,  # [num_slots, 1 + 2 TOP_K]
    num_slots,
    block_tables_ptr,  # [max_num_reqs, max_blocks]
    block_tables_stride,
    block_size,
    theta_ptr,  # [MAX_NGRAM_SIZE]
    alignment_ptr,  # [MAX_NGRAM_SIZE]
    no_alignment_discount_ptr,  # [1]
    prior_ids_ptr,  # [prior_vocab_size, PRIOR_TOP_K]
    prior_probs_ptr,  # [prior_vocab_size, PRIOR_TOP_K]
    prior_vocab_size,
    vocab_size,
    min_survival,
    workspace_ptr,  # [max_num_reqs, workspace_stride]
    workspace_stride,
    draft_token_ids_ptr,  # [num_reqs, num_spec_tokens]
    num_drafts_ptr,  # [max_num_reqs]
    survival_ptr,  # [max_num_reqs, num_spec_tokens]
    lookups_ptr,  # [3]
    slots_ptr,  # [max_num_reqs, SLOT_COLUMNS]
    text_tokens_ptr,  # [all_pages * PAGE_SIZE]
    pages_ptr,  # [all_pages, PAGE_COLUMNS]
    heads_ptr,  # [SIZES, all_buckets, WAYS]
    num_pages,
    num_corpus_pages,
    reliability_ptr,  # [NUM_CELLS]
    looked_up_ptr,  # [max_num_reqs, 2]
    cells_ptr,  # [max_num_reqs, max_draft_tokens, NUM_SOURCES]
    found_tokens_ptr,  # [max_num_reqs, max_draft_tokens, NUM_SOURCES]
    max_draft_tokens,
    num_spec_tokens,
    MAX_NGRAM_SIZE: tl.constexpr,
    MAX_MATCHES: tl.constexpr,
    TOP_K: tl.constexpr,
    PRIOR_TOP_K: tl.constexpr,
    TILE: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_TEXT: tl.constexpr,
):
    """Draft for one request by a program for each part of its context; see `vllm_aasd.kernels.draft.batch`."""
    # int64: a row of a large batch times a long context leaves int32.
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(idx_mapping_ptr + row).to(tl.int64)
    length = tl.load(total_len_ptr + slot, mask=slot >= 0, other=0)
    has_sampled = (slot >= 0) & (tl.load(num_sampled_ptr + row) > 0)
    limit = tl.minimum(tl.load(max_len_ptr + slot, mask=has_sampled, other=0) - length - 1, longest)
    tokens_ptr = all_token_ids_ptr + slot * all_token_ids_stride
    blocks_ptr = block_tables_ptr + slot * block_tables_stride
    num_ended_ptr = workspace_ptr + row * workspace_stride
    # By part; joined after them, where there is more than one.
    JOINED: tl.constexpr = PARTS if PARTS > 1 else 0
    counts_ptr = num_ended_ptr + 1
    matches_ptr = counts_ptr + (1 + JOINED) * MAX_NGRAM_SIZE
    candidates_ptr = matches_ptr + (1 + JOINED) * MAX_NGRAM_SIZE * MAX_MATCHES
    draft_token_ids_ptr += row * num_spec_tokens
    survival_ptr += slot * num_spec_tokens
    excluded = tl.load(excluded_ptr + tl.arange(0, _MAX_EXCLUDED))

    suffix = ()
    for back in tl.static_range(MAX_NGRAM_SIZE):
        suffix = suffix + (tl.load(tokens_ptr + length - 1 - back, mask=length > back, other=-1),)  # type: ignore
    last_token = tl.where(length > 0, suffix[0], 0)  # type: ignore

    # The last token has no successor yet.
    num_positions = tl.maximum(length - 1, 0)
    drafting = (length > 0) & (limit > 0)
    num_parts = tl.where(drafting, tl.minimum(tl.maximum(tl.cdiv(num_positions, PART), 1), PARTS), 1)
    part = tl.program_id(1)
    if part >= num_parts:
        return
    if drafting:
        _collect_matches(
            tokens_ptr,
            tl.maximum(num_positions - (part + 1) * PART, 0),
            num_positions - part * PART,
            suffix,
            counts_ptr + part * MAX_NGRAM_SIZE,
            matches_ptr + part * MAX_NGRAM_SIZE * MAX_MATCHES,
            MAX_NGRAM_SIZE,
            MAX_MATCHES,
            TILE,
        )
    # Matches and candidates go from thread to thread through memory (L1).
    tl.debug_barrier()
    num_ended = num_parts - 1
    if num_parts > 1:
        # What the others have stored before this, the last one reads after it.
        num_ended = tl.atomic_add(num_ended_ptr, 1, sem="acq_rel")
    if num_ended < num_parts - 1:
        return
    tl.store(num_ended_ptr, 0)

    num_drafts = 0
    survival = 1.0
    num_hits = 0
    num_misses = 0
    num_stales = 0
    while drafting:
        tl.debug_barrier()
        if PARTS > 1:
            _join_parts(
                tokens_ptr,
                num_positions - PART,
                num_parts,
                suffix[0],  # type: ignore
                num_drafts,
                counts_ptr,
                matches_ptr,
                MAX_NGRAM_SIZE,
                MAX_MATCHES,
                PARTS,
            )
            tl.debug_barrier()
        num_candidates, num_fresh, num_stale, num_matching = gather_candidates(
            tokens_ptr,
            suffix,
            counts_ptr + JOINED * MAX_NGRAM_SIZE,
            matches_ptr + JOINED * MAX_NGRAM_SIZE * MAX_MATCHES,
            table_ptr,
            num_slots,
            blocks_ptr,
            block_size,
            theta_ptr,
            alignment_ptr,
            no_alignment_discount_ptr,
            prior_ids_ptr,
            prior_probs_ptr,
            prior_vocab_size,
            vocab_size,
            candidates_ptr,
            MAX_NGRAM_SIZE,
            MAX_MATCHES,
            TOP_K,
            PRIOR_TOP_K,
        )
        num_hits += num_fresh
        num_misses += num_matching - num_fresh - num_stale
        num_stales += num_stale
        tl.debug_barrier()
        token, score = argmax_candidate(candidates_ptr, num_candidates, CHUNK)
        if HAS_TEXT:
            # The draft so far was stored before the barriers above.
            entry = (slot * max_draft_tokens + num_drafts) * NUM_SOURCES
            token, score = stack(
                token,
                score,
                tokens_ptr,
                length,
                draft_token_ids_ptr,
                num_drafts,
                slots_ptr + slot * SLOT_COLUMNS,
                text_tokens_ptr,
                pages_ptr,
                heads_ptr,
                num_pages,
                num_corpus_pages,
                reliability_ptr,
                cells_ptr + entry,
                found_tokens_ptr + entry,
            )
        survival *= score
        drafting = (token >= 0) & (token < vocab_size) & (survival >= min_survival)
        drafting = drafting & (tl.max((excluded == token).to(tl.int32), axis=0) == 0)
        if drafting:
            tl.store(draft_token_ids_ptr + num_drafts, token.to(tl.int64))
            tl.store(survival_ptr + num_drafts, survival)
            num_drafts += 1
            suffix = (token,) + suffix[:-1]  # type: ignore
        drafting = drafting & (num_drafts < limit)
        if drafting:
            _collect_matches(
                tokens_ptr,
                tl.maximum(num_positions - PART, 0),
                num_positions,
                suffix,
                counts_ptr,
                matches_ptr,
                MAX_NGRAM_SIZE,
                MAX_MATCHES,
                TILE,
            )

    tl.store(num_drafts_ptr + slot, num_drafts, mask=slot >= 0)
    if HAS_TEXT:
        looked_up_ptr += slot * _LOOKED_UP_COLUMNS
        tl.store(looked_up_ptr + _LOOKED_FROM, length, mask=slot >= 0)
        num_looked_up = tl.where(length > 0, tl.maximum(tl.minimum(num_drafts + 1, limit), 0), 0)
        tl.store(looked_up_ptr + _NUM_LOOKED_UP, num_looked_up, mask=slot >= 0)
    if (TOP_K > 0) & (num_slots > 0):
        tl.atomic_add(lookups_ptr + _HIT, num_hits.to(tl.int64))  # type: ignore
        tl.atomic_add(lookups_ptr + _MISS, num_misses.to(tl.int64))  # type: ignore
        tl.atomic_add(lookups_ptr + _STALE, num_stales.to(tl.int64))  # type: ignore
    for column in range(num_drafts, num_spec_tokens):
        tl.store(draft_token_ids_ptr + column, last_token.to(tl.int64))
        tl.store(survival_ptr + column, 0.0, mask=slot >= 0)


def draft_batch(batch: DraftBatch) -> None:
    """See `vllm_aasd.kernels.draft.batch.draft_batch`."""
    num_reqs, texts = len(batch.idx_mapping), batch.texts
    if num_reqs == 0:
        return
    parts = num_parts(batch.all_token_ids.shape[1])
    draft_kernel[(num_reqs, parts)](
        batch.all_token_ids,
        batch.all_token_ids.stride(0),
        batch.total_len,
        batch.idx_mapping,
        batch.max_len,
        batch.num_sampled,
        batch.excluded,
        batch.longest,
        batch.table,
        batch.table.shape[0],
        batch.block_tables,
        batch.block_tables.stride(0),
        batch.block_size,
        batch.theta,
        batch.alignment,
        batch.no_alignment_discount,
        batch.prior_ids,
        batch.prior_probs,
        batch.prior_ids.shape[0],
        batch.vocab_size,
        batch.min_survival,
        batch.workspace,
        batch.workspace.stride(0),
        batch.draft_token_ids,
        batch.num_drafts,
        batch.survival,
        batch.lookups,
        texts.slots,
        texts.tokens,
        texts.pages,
        texts.heads,
        texts.num_pages,
        texts.pages.shape[0] - texts.num_pages,
        texts.value,
        texts.looked_up,
        texts.cells,
        texts.found_tokens,
        texts.cells.shape[1],
        batch.draft_token_ids.shape[1],
        MAX_NGRAM_SIZE=len(batch.theta),
        MAX_MATCHES=batch.max_matches,
        TOP_K=(batch.table.shape[1] - 1) // 2,
        PRIOR_TOP_K=batch.prior_ids.shape[1],
        TILE=TILE,
        PART=PART,
        PARTS=parts,
        CHUNK=CHUNK,
        HAS_TEXT=texts.has_text,
        **LAUNCH_OPTIONS[gpu_kind()],
    )
