"""Plain reference of `vllm_aasd.kernels.text`: the specification."""

import numpy as np

from vllm_aasd.kernels.common.ngram_hash import HASH_MULTIPLIER
from vllm_aasd.kernels.text import (
    CELL_SHAPE,
    MATCH_LENGTHS,
    MAX_COUNT,
    MAX_MATCH,
    NAMESPACE,
    NEXT,
    NGRAM_SIZES,
    NUM_CELLS,
    NUMBER,
    PAGE_SIZE,
    PLACE_BITS,
    PREVIOUS,
    PROBABILITIES,
    WAYS,
)


def append(index, namespace, last_page, length, token_ids, first, last):
    """Same arguments and result as `vllm_aasd.kernels.text.cpu.append`."""
    if not len(index.pages):
        return -1
    first_begun = begin_pages(index, namespace, last_page, length, last - first)
    write(index, namespace, last_page, first_begun, length, token_ids, first, last)
    return last_page_of(index, last_page, first_begun, length, length + last - first)


def begin_pages(index, namespace, last_page, length, num_tokens):
    """Begin the pages that a document needs to grow by `num_tokens`; return how many were begun before."""
    first_begun = int(index.begun[0])
    num_begun = _num_pages(length + num_tokens) - _num_pages(length)
    index.begun[0] += num_begun
    previous = last_page
    for count in range(first_begun, first_begun + num_begun):
        number = _number_of(index, count)
        _page(index, number)[:] = number, namespace, previous, -1
        _tokens(index, number)[:] = -1
        if _is_held(index, previous):
            _page(index, previous)[NEXT] = number
        previous = number
    return first_begun


def write(index, namespace, last_page, first_begun, length, token_ids, first, last):
    """Write tokens to the last page of a document and those begun for it, as far as they are held; enter n-grams."""
    for at in range(first, last):
        number = last_page_of(index, last_page, first_begun, length, length + at - first + 1)
        before = last_page_of(index, last_page, first_begun, length, length + at - first)
        offset = (length + at - first) % PAGE_SIZE
        # Else newer pages have overwritten this one: the document goes on with its next page.
        if not _is_held(index, number):
            continue
        _tokens(index, number)[offset] = token_ids[at]
        if not _is_held(index, before):
            continue
        position = before * PAGE_SIZE + (offset - 1) % PAGE_SIZE
        for table, size in zip(index.heads, NGRAM_SIZES, strict=True):
            if size <= length + at - first:
                bucket, way = _bucket(index, namespace, token_ids[at - size : at]), _way(token_ids[at])
                table[bucket, way] = max(table[bucket, way], position)


def last_page_of(index, last_page, first_begun, length, new_length):
    """The last page of the first ``new_length`` tokens of a document that had ``length`` of them before it grew."""
    num_begun = _num_pages(new_length) - _num_pages(length)
    return _number_of(index, first_begun + num_begun - 1) if num_begun > 0 else last_page


def lookup(index, namespace, token_ids, end):
    """Same arguments and result as `vllm_aasd.kernels.text.cpu.lookup`."""
    if not len(index.pages):
        return -1, 0, 0, 0
    context = [int(token) for token in token_ids[: end + 1]]
    for table, size in reversed(list(zip(index.heads, NGRAM_SIZES, strict=True))):
        if size > len(context):
            continue
        matches = []
        for position in table[_bucket(index, namespace, context[-size:])]:
            if position < 0 or not _is_held(index, position // PAGE_SIZE):
                continue
            page = _page(index, position // PAGE_SIZE)
            following = _token_after(index, int(position))
            common = _common(index, int(position), context)
            if page[NAMESPACE] == namespace and common >= size and following >= 0:
                matches.append((common, int(position), following))
        if matches:
            longest, _, token = max(matches)
            num_equal = sum(common == longest for common, _, _ in matches) - 1
            return token, longest, num_equal, len(matches) - 1 - num_equal
    return -1, 0, 0, 0


def cell_of(kind, length, num_equal, num_shorter, is_same, prob):
    """Same arguments and result as `vllm_aasd.kernels.text.reliability_cpu.cell_of`."""
    others = 2 if num_equal else 1 if num_shorter else 0
    length_class = sum(length >= bound for bound in MATCH_LENGTHS[1:])
    prob_class = sum(prob >= np.float32(bound) for bound in PROBABILITIES[1:])
    return int(np.ravel_multi_index((kind, length_class, others, int(is_same), prob_class), CELL_SHAPE))


def stack(known, step, token_ids, end, token, prob):
    """Same arguments and result as `vllm_aasd.kernels.text.reliability_cpu.stack`."""
    known.is_known[step] = False
    known.cells[step] = -1
    for at, (which, namespace, kind) in enumerate(known.sources):
        found, length, num_equal, num_shorter = lookup(known.indexes[which], namespace, token_ids, end)
        if found < 0:
            continue
        cell = cell_of(kind, length, num_equal, num_shorter, found == token, prob)
        known.cells[step, at], known.tokens[step, at] = cell, found
        reliability = known.reliability[cell]
        rest = (np.float32(1) - reliability) * np.float32(prob)
        if found == token or reliability > rest:
            token, prob = found, reliability
            known.is_known[step] = True
        else:
            prob = rest
    return token, prob


def learn(reliability, prior, cells, tokens, true_token_ids):
    """Same arguments and result as `vllm_aasd.kernels.text.reliability_cpu.learn`."""
    found, right, value = reliability
    num_found, num_right = np.zeros(NUM_CELLS, np.int64), np.zeros(NUM_CELLS, np.int64)
    for step, truth in enumerate(true_token_ids):
        for cell, token in zip(cells[step], tokens[step], strict=True):
            if cell >= 0:
                num_found[cell] += 1
                num_right[cell] += token == truth
    for cell in np.flatnonzero(num_found):
        while found[cell] >= MAX_COUNT:
            found[cell] //= 2
            right[cell] //= 2
        found[cell] += num_found[cell]
        right[cell] += num_right[cell]
        expected, weight = prior[cell]
        value[cell] = (right[cell] + expected * weight) / (found[cell] + weight)


def _num_pages(length):
    return -(-length // PAGE_SIZE)


def _number_of(index, count):
    lap, place = divmod(count, len(index.pages))
    return lap << PLACE_BITS | place


def _place(number):
    return number & ((1 << PLACE_BITS) - 1)


def _page(index, number):
    return index.pages[_place(number)]


def _is_held(index, number):
    return number >= 0 and _page(index, number)[NUMBER] == number


def _tokens(index, number):
    slot = _place(number)
    return index.tokens[slot * PAGE_SIZE : (slot + 1) * PAGE_SIZE]


def _token_after(index, position):
    number, offset = divmod(position, PAGE_SIZE)
    if offset + 1 < PAGE_SIZE:
        return int(_tokens(index, number)[offset + 1])
    following = _page(index, number)[NEXT]
    return int(_tokens(index, following)[0]) if following >= 0 else -1


def _common(index, position, context):
    """How many tokens up to a position equal the last ones of a context, at most `MAX_MATCH`."""
    number, offset = divmod(position, PAGE_SIZE)
    for length, token in enumerate(reversed(context[-MAX_MATCH:])):
        if offset < 0:
            number, offset = int(_page(index, number)[PREVIOUS]), PAGE_SIZE - 1
            if not _is_held(index, number):
                return length
        if _tokens(index, number)[offset] != token:
            return length
        offset -= 1
    return min(len(context), MAX_MATCH)


def _bucket(index, namespace, ngram):
    hashed = int(namespace) & 0xFFFFFFFFFFFFFFFF
    for token in reversed(ngram):
        hashed = _hash_with(hashed, token)
    return (hashed >> 32) * index.heads.shape[1] >> 32


def _way(token):
    return (_hash_with(0, token) >> 48) & (WAYS - 1)


def _hash_with(hashed, token):
    return ((hashed ^ (int(token) & 0xFFFFFFFF)) * HASH_MULTIPLIER) & 0xFFFFFFFFFFFFFFFF
