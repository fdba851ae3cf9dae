"""Known text in one step of the draft kernel, after its own token. The rule is in `vllm_aasd.kernels.text`."""

import triton
import triton.language as tl

from vllm_aasd.kernels import text
from vllm_aasd.kernels.text import batch
from vllm_aasd.kernels.text.index_triton import GROUP, NUM_SOURCES, lookup

_CORPUS, _ANSWERS = tl.constexpr(text.CORPUS), tl.constexpr(text.ANSWERS)
_ANSWERS_COLUMN = tl.constexpr(batch.ANSWERS_COLUMN)
_MATCH_LENGTHS = tl.constexpr(text.MATCH_LENGTHS)
_PROBABILITIES = tl.constexpr(text.PROBABILITIES)
_, _NUM_LENGTHS, _NUM_OTHERS, _, _NUM_PROBABILITIES = map(tl.constexpr, text.CELL_SHAPE)


@triton.jit
def stack(
    token,  # of the own context, -1 for none
    prob,
    tokens_ptr,  # [length] of all_token_ids
    length,
    draft_token_ids_ptr,  # [num_drafts]
    num_drafts,
    namespaces_ptr,  # [NUM_SOURCES]
    text_tokens_ptr,
    pages_ptr,
    heads_ptr,
    num_pages,
    num_corpus_pages,
    reliability_ptr,  # [NUM_CELLS]
    cells_ptr,  # [NUM_SOURCES]
    found_tokens_ptr,  # [NUM_SOURCES]
):
    """Choose between the draft token of the own context and those that known text goes on with; see the reference.

    Returns the draft token, -1 for none, and its probability.
    """
    # One group after the other, for the sake of registers; none is looked up that isn't asked.
    for first in tl.static_range(0, NUM_SOURCES, GROUP):
        columns = first + tl.arange(0, GROUP)
        namespaces = tl.load(namespaces_ptr + columns, mask=columns < NUM_SOURCES, other=-1)
        if tl.sum((namespaces != -1).to(tl.int32), axis=0) > 0:
            # All sources of a group lie in the same index.
            first_page, source_pages = num_pages, num_corpus_pages
            if first >= _ANSWERS_COLUMN:
                first_page, source_pages = tl.full((), 0, tl.int32), num_pages
            found, match_length, others = lookup(
                tokens_ptr,
                length,
                draft_token_ids_ptr,
                num_drafts,
                namespaces,
                first_page,
                source_pages,
                num_pages + num_corpus_pages,
                text_tokens_ptr,
                pages_ptr,
                heads_ptr,
            )
            length_class = tl.zeros_like(match_length)
            for at in tl.static_range(1, _NUM_LENGTHS):
                length_class += (match_length >= _MATCH_LENGTHS[at]).to(tl.int32)
            kind = tl.maximum(columns - _ANSWERS_COLUMN + _ANSWERS, _CORPUS)
            class_of = (kind * _NUM_LENGTHS + length_class) * _NUM_OTHERS + others
            for column in tl.static_range(GROUP):
                is_one = columns == first + column
                one = tl.max(tl.where(is_one, found, -1), axis=0)
                first_cell = tl.sum(tl.where(is_one, class_of, 0), axis=0)
                is_found = one >= 0
                is_same = is_found & (one == token)
                prob_class = 0
                for at in tl.static_range(1, _NUM_PROBABILITIES):
                    prob_class += (prob >= _PROBABILITIES[at]).to(tl.int32)
                cell = (first_cell * 2 + is_same.to(tl.int32)) * _NUM_PROBABILITIES + prob_class
                reliability = tl.load(reliability_ptr + cell, mask=is_found, other=0.0)
                rest = (1.0 - reliability) * prob
                takes = is_found & (is_same | (reliability > rest))
                token = tl.where(takes, one, token)
                prob = tl.where(takes, reliability, tl.where(is_found, rest, prob))
                if first + column < NUM_SOURCES:
                    tl.store(cells_ptr + first + column, tl.where(is_found, cell, -1))
                    tl.store(found_tokens_ptr + first + column, one, mask=is_found)
        else:
            tl.store(cells_ptr + columns, -1, mask=columns < NUM_SOURCES)
    return token, prob
