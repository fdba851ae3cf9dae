"""Known text in one step of the draft kernel, after its own token. The rule is in `vllm_aasd.kernels.text`."""

import triton
import triton.language as tl

from vllm_aasd.kernels import text
from vllm_aasd.kernels.text.index_triton import NUM_SOURCES, lookup

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
    found, match_length, others = lookup(
        tokens_ptr,
        length,
        draft_token_ids_ptr,
        num_drafts,
        namespaces_ptr,
        text_tokens_ptr,
        pages_ptr,
        heads_ptr,
        num_pages,
        num_corpus_pages,
    )
    source = tl.arange(0, found.shape[0])
    length_class = tl.zeros_like(match_length)
    for at in tl.static_range(1, _NUM_LENGTHS):
        length_class += (match_length >= _MATCH_LENGTHS[at]).to(tl.int32)
    class_of = (source * _NUM_LENGTHS + length_class) * _NUM_OTHERS + others
    for kind in tl.static_range(NUM_SOURCES):
        one = tl.max(tl.where(source == kind, found, -1), axis=0)
        first_cell = tl.sum(tl.where(source == kind, class_of, 0), axis=0)
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
        tl.store(cells_ptr + kind, tl.where(is_found, cell, -1))
        tl.store(found_tokens_ptr + kind, one, mask=is_found)
    return token, prob
