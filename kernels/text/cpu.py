"""The text index on the CPU (numba). Its structure is in `vllm_aasd.kernels.text`."""

import numpy as np

from vllm_aasd.kernels.common.compiled import compiled
from vllm_aasd.kernels.common.ngram_hash_cpu import hash_with
from vllm_aasd.kernels.text import (
    MAX_MATCH,
    NAMESPACE,
    NEXT,
    NGRAM_SIZES,
    NUMBER,
    PAGE_SIZE,
    PLACE_BITS,
    PREVIOUS,
    WAYS,
)

_LARGEST = NGRAM_SIZES[-1]
_PLACE = (1 << PLACE_BITS) - 1


@compiled
def append(index, namespace, last_page, length, token_ids, first, last):
    """Append tokens to a document.

    Args:
        index: a `TextIndex`.
        namespace: of the document.
        last_page: the number of its last page; -1 if it has none.
        length: tokens that it has already, at most ``first``.
        token_ids: ``[>= last]`` int32, a context in which the document's tokens stand before position ``first``.
        first, last: the tokens ``first`` to ``last - 1`` of it are appended.

    Returns:
        The number of the document's last page now.
    """
    num_pages = index.pages.shape[0]
    if num_pages == 0:
        return np.int64(-1)
    # All pages come first, so that requests that grow at the same time give the same index in whatever order.
    first_begun = index.begun[0]
    previous = np.int64(last_page)
    for _ in range((length + PAGE_SIZE - 1) // PAGE_SIZE, (length + last - first + PAGE_SIZE - 1) // PAGE_SIZE):
        number = _number_of(index.begun[0], num_pages)
        index.begun[0] += 1
        slot = number & _PLACE
        index.pages[slot, NUMBER] = number
        index.pages[slot, NAMESPACE] = namespace
        index.pages[slot, PREVIOUS] = previous
        index.pages[slot, NEXT] = -1
        index.tokens[slot * PAGE_SIZE : (slot + 1) * PAGE_SIZE] = -1
        if previous >= 0 and index.pages[previous & _PLACE, NUMBER] == previous:
            index.pages[previous & _PLACE, NEXT] = number
        previous = number
    page = np.int64(last_page)
    for at in range(first, last):
        offset = length % PAGE_SIZE
        position = page * PAGE_SIZE + (length - 1) % PAGE_SIZE
        is_held = page >= 0 and index.pages[page & _PLACE, NUMBER] == page
        if offset == 0:
            page = _number_of(first_begun, num_pages)
            first_begun += 1
        # Else newer pages have overwritten this one: the document goes on with its next page.
        if page >= 0 and index.pages[page & _PLACE, NUMBER] == page:
            index.tokens[(page & _PLACE) * PAGE_SIZE + offset] = token_ids[at]
            if is_held:
                _enter(index, namespace, token_ids, at - 1, length, position)
        length += 1
    return page


@compiled
def _number_of(count, num_pages):
    return np.int64(count // num_pages << PLACE_BITS | count % num_pages)


@compiled
def _enter(index, namespace, token_ids, end, length, position):
    """Enter the n-grams of the last ``length`` tokens up to ``end``, which stand up to ``position`` in the index."""
    num_buckets = index.heads.shape[1]
    way = _way_of(token_ids[end + 1])
    hashed = np.uint64(namespace)
    at = 0
    for size in range(1, min(_LARGEST, length) + 1):
        hashed = hash_with(hashed, token_ids[end - size + 1])
        if size == NGRAM_SIZES[at]:
            bucket = _bucket_of(hashed, num_buckets)
            index.heads[at, bucket, way] = max(index.heads[at, bucket, way], position)
            at += 1


@compiled
def _bucket_of(hashed, num_buckets):
    return ((hashed >> np.uint64(32)) * np.uint64(num_buckets)) >> np.uint64(32)


@compiled
def _way_of(token):
    return (hash_with(np.uint64(0), token) >> np.uint64(48)) & np.uint64(WAYS - 1)


@compiled
def _match(index, namespace, position, token_ids, end):
    """How many tokens up to ``position`` equal those of a context up to ``end``, and the token that comes next.

    Both are 0 and -1 where the position isn't held any more, or isn't of this namespace.
    """
    number = position // PAGE_SIZE
    slot = number & _PLACE
    offset = position % PAGE_SIZE
    if index.pages[slot, NUMBER] != number or index.pages[slot, NAMESPACE] != namespace:
        return 0, np.int32(-1)
    if offset < PAGE_SIZE - 1:
        token = index.tokens[slot * PAGE_SIZE + offset + 1]
    else:
        following = index.pages[slot, NEXT]
        token = index.tokens[(following & _PLACE) * PAGE_SIZE] if following >= 0 else np.int32(-1)
    length = 0
    while length < MAX_MATCH and length <= end:
        if index.tokens[slot * PAGE_SIZE + offset] != token_ids[end - length]:
            break
        length += 1
        offset -= 1
        if offset < 0:
            number = index.pages[slot, PREVIOUS]
            slot = number & _PLACE
            if number < 0 or index.pages[slot, NUMBER] != number:
                break
            offset = PAGE_SIZE - 1
    return length, token


@compiled
def lookup(index, namespace, token_ids, end):
    """Find how text of a namespace goes on where it equals the end of a context.

    Args:
        index: a `TextIndex`.
        namespace: to look into.
        token_ids: ``[> end]`` int32, the context.
        end: its last position.

    Returns:
        The next token, -1 if there is no match; how many tokens match, at most `MAX_MATCH`; how many of that many
        tokens match but go on otherwise; and how many shorter ones do.
    """
    best = np.int32(-1)
    best_length = 0
    best_position = np.int64(-1)
    num_equal = 0
    num_shorter = 0
    num_buckets = index.heads.shape[1]
    if num_buckets == 0:
        return best, best_length, num_equal, num_shorter
    buckets = np.empty(len(NGRAM_SIZES), np.uint64)
    hashed = np.uint64(namespace)
    num_sizes = 0
    for size in range(1, min(_LARGEST, end + 1) + 1):
        hashed = hash_with(hashed, token_ids[end - size + 1])
        if size == NGRAM_SIZES[num_sizes]:
            buckets[num_sizes] = _bucket_of(hashed, num_buckets)
            num_sizes += 1
    for at in range(num_sizes - 1, -1, -1):
        for way in range(WAYS):
            position = index.heads[at, buckets[at], way]
            if position < 0:
                continue
            length, token = _match(index, namespace, position, token_ids, end)
            if length < NGRAM_SIZES[at] or token < 0:
                continue
            if length > best_length:
                num_shorter += num_equal + (1 if best >= 0 else 0)
                num_equal = 0
                best, best_length, best_position = token, length, position
            elif length < best_length:
                num_shorter += 1
            else:
                num_equal += 1
                if position > best_position:
                    best, best_position = token, position
        if best >= 0:
            break
    return best, best_length, num_equal, num_shorter
