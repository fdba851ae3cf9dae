"""The text index in Triton kernels: its hashes and a lookup. Its structure is in `vllm_aasd.kernels.text`."""

import triton
import triton.language as tl

from vllm_aasd.kernels import text
from vllm_aasd.kernels.common.ngram_hash import HASH_MULTIPLIER
from vllm_aasd.kernels.text import batch

_MULTIPLIER = tl.constexpr(HASH_MULTIPLIER)
_NUMBER, _NAMESPACE = tl.constexpr(text.NUMBER), tl.constexpr(text.NAMESPACE)
_PREVIOUS, _NEXT = tl.constexpr(text.PREVIOUS), tl.constexpr(text.NEXT)
_LAP = tl.constexpr(1 << text.PLACE_BITS)
PAGE_COLUMNS, PAGE_SIZE = tl.constexpr(text.PAGE_COLUMNS), tl.constexpr(text.PAGE_SIZE)
WAYS, SIZES = tl.constexpr(text.WAYS), tl.constexpr(len(text.NGRAM_SIZES))
LARGEST, MAX_MATCH = tl.constexpr(text.NGRAM_SIZES[-1]), tl.constexpr(text.MAX_MATCH)
PART = tl.constexpr(8)
"""Tokens of a match that are compared at once."""
GROUP = tl.constexpr(text.MAX_CORPORA)
"""Sources that are looked up at once."""
NUM_SOURCES, SLOT_COLUMNS = tl.constexpr(batch.NUM_SOURCES), tl.constexpr(batch.NUM_SOURCES + 1)
# A size, a match of at most `MAX_MATCH` tokens and a position in one number, which orders matches.
_POSITION_BITS = tl.constexpr(54)

# Powers of two from 2 on: their ranks follow from the size.
assert tuple(2 << rank for rank in range(len(text.NGRAM_SIZES))) == text.NGRAM_SIZES
assert text.MAX_MATCH <= text.PAGE_SIZE


@triton.jit
def hash_with(hashed, token):
    """An n-gram's hash, uint64, lengthened by an int32 token."""
    return (hashed ^ token.to(tl.uint32, bitcast=True).to(tl.uint64)) * _MULTIPLIER


@triton.jit
def bucket_of(hashed, num_buckets):
    """The bucket of a hash, int64."""
    return (((hashed >> 32) * num_buckets.to(tl.uint64)) >> 32).to(tl.int64)


@triton.jit
def way_of(token):
    """The class of a next token, int64."""
    return (hash_with(tl.zeros_like(token).to(tl.uint64), token) >> 48).to(tl.int64) & (WAYS - 1)


@triton.jit
def place_of(number):
    """Where a page lies, or lay, among those of its index, int32."""
    return (number & (_LAP - 1)).to(tl.int32)


@triton.jit
def number_of(count, num_pages):
    """The number of a page, by how many were begun before it."""
    num_pages = tl.maximum(num_pages, 1)
    return (count // num_pages) * _LAP + count % num_pages


@triton.jit
def page_number(pages_ptr, number, base, mask):
    """The number of the page that lies where a page lies, or lay."""
    page_slot = (base + place_of(number)).to(tl.int64)
    return tl.load(pages_ptr + page_slot * PAGE_COLUMNS + _NUMBER, mask=mask, other=-1)


@triton.jit
def _token_at(tokens_ptr, length, draft_token_ids_ptr, num_drafts, back, mask):
    """The token `back` places before the last one of context plus draft."""
    drafted = tl.load(draft_token_ids_ptr + (num_drafts - 1 - back), mask=mask & (back < num_drafts), other=0)
    in_context = mask & (back >= num_drafts)
    known = tl.load(tokens_ptr + (length + num_drafts - 1 - back), mask=in_context, other=0)
    return tl.where(in_context, known, drafted.to(tl.int32))


@triton.jit
def lookup(
    tokens_ptr,  # [length] of all_token_ids
    length,
    draft_token_ids_ptr,  # [num_drafts]
    num_drafts,
    namespaces,  # [GROUP]
    base,
    source_pages,
    all_pages,
    text_tokens_ptr,  # [all_pages * PAGE_SIZE]
    pages_ptr,  # [all_pages, PAGE_COLUMNS]
    heads_ptr,  # [SIZES, all_buckets, WAYS]
):
    """Look the end of context plus draft up in a group of sources.

    Args are, beside those of `stack`: the namespaces, -1 for none; the first page and the number of pages of their
    index; and the pages of both indexes.

    Returns, by source, the next token, -1 for none; how many tokens match; and whether others match as many (2), or
    less (1), or there are none.
    """
    buckets_of_page: tl.constexpr = PAGE_SIZE // WAYS
    namespace = tl.where(source_pages > 0, namespaces[:, None], -1)
    places = tl.arange(0, SIZES * WAYS)[None, :]
    rank, way = places // WAYS, places % WAYS
    size = 2 << rank
    num_tokens = length + num_drafts
    asked = (namespace != -1) & (size <= num_tokens)

    hashed = namespace.to(tl.uint64)
    hash_of_size = tl.zeros([GROUP, SIZES * WAYS], tl.uint64)
    for back in tl.static_range(LARGEST):
        hashed = hash_with(
            hashed, _token_at(tokens_ptr, length, draft_token_ids_ptr, num_drafts, back, back < num_tokens)
        )
        hash_of_size = tl.where(size == back + 1, hashed, hash_of_size)
    bucket = base.to(tl.int64) * buckets_of_page + bucket_of(hash_of_size, source_pages.to(tl.int64) * buckets_of_page)
    all_buckets = all_pages.to(tl.int64) * buckets_of_page
    position = tl.load(heads_ptr + (rank * all_buckets + bucket) * WAYS + way, mask=asked, other=-1)

    number, offset = position // PAGE_SIZE, (position % PAGE_SIZE).to(tl.int32)
    page_slot = base + place_of(number)
    page_ptr = pages_ptr + page_slot.to(tl.int64) * PAGE_COLUMNS
    there = position >= 0
    is_held = there & (tl.load(page_ptr + _NUMBER, mask=there, other=-1) == number)
    is_held &= tl.load(page_ptr + _NAMESPACE, mask=there, other=-1) == namespace
    following_page = tl.load(page_ptr + _NEXT, mask=is_held, other=-1)
    is_last = offset == PAGE_SIZE - 1
    following_slot = tl.where(is_last, base + place_of(following_page), page_slot)
    following = tl.load(
        text_tokens_ptr + following_slot.to(tl.int64) * PAGE_SIZE + tl.where(is_last, 0, offset + 1),
        mask=is_held & ((following_page >= 0) | (offset < PAGE_SIZE - 1)),
        other=-1,
    )
    # A match reaches back into one other page at most.
    previous = tl.load(page_ptr + _PREVIOUS, mask=is_held & (offset < MAX_MATCH), other=-1)
    is_previous_held = (previous >= 0) & (page_number(pages_ptr, previous, base, is_held & (previous >= 0)) == previous)
    previous_slot = base + place_of(previous)

    # int32: `all_pages * PAGE_SIZE` lies below 2^31.
    reach = tl.where(is_held, tl.where(is_previous_held, MAX_MATCH, offset + 1), 0)
    reach = tl.minimum(reach, num_tokens)
    page_start = page_slot * PAGE_SIZE
    previous_start = previous_slot * PAGE_SIZE
    common = tl.full([GROUP, SIZES * WAYS], MAX_MATCH, tl.int32)
    # In parts, for the sake of registers.
    for part in range(0, MAX_MATCH, PART):
        behind = part + tl.arange(0, PART)
        window = _token_at(tokens_ptr, length, draft_token_ids_ptr, num_drafts, behind, behind < num_tokens)
        in_page = behind[None, None, :] <= offset[:, :, None]
        start = tl.where(in_page, page_start[:, :, None], previous_start[:, :, None])
        place = start + ((offset[:, :, None] - behind[None, None, :]) & (PAGE_SIZE - 1))
        compared = behind[None, None, :] < reach[:, :, None]
        texts = tl.load(text_tokens_ptr + place, mask=compared, other=-1)
        is_same = compared & (texts == window[None, None, :])
        common = tl.minimum(common, tl.min(tl.where(is_same, MAX_MATCH, behind[None, None, :]), axis=2))

    matches = is_held & (following >= 0) & (common >= size)
    order = ((rank * 2 * MAX_MATCH + common).to(tl.int64) << _POSITION_BITS) | position
    best = tl.max(tl.where(matches, order, -1), axis=1)
    token = tl.max(tl.where(matches & (order == best[:, None]), following, -1), axis=1)
    best_common = ((best >> _POSITION_BITS) & (2 * MAX_MATCH - 1)).to(tl.int32)
    best_rank = (best >> _POSITION_BITS) // (2 * MAX_MATCH)
    of_size = matches & (rank == best_rank[:, None])
    num_matches = tl.sum(of_size.to(tl.int32), axis=1)
    num_longest = tl.sum((of_size & (common == best_common[:, None])).to(tl.int32), axis=1)
    others = tl.where(num_longest > 1, 2, tl.where(num_matches > num_longest, 1, 0))
    return token, best_common, others
