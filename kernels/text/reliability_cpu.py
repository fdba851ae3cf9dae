"""How reliable known text is, on the CPU (numba). What is counted is in `vllm_aasd.kernels.text`."""

import numpy as np

from vllm_aasd.kernels.common.compiled import compiled
from vllm_aasd.kernels.text import CELL_SHAPE, MATCH_LENGTHS, MAX_COUNT, PROBABILITIES
from vllm_aasd.kernels.text.cpu import lookup

_LENGTHS = np.array(MATCH_LENGTHS)
_PROBABILITIES = np.array(PROBABILITIES, np.float32)
_, _NUM_LENGTHS, _NUM_OTHERS, _, _NUM_PROBABILITIES = CELL_SHAPE


@compiled
def cell_of(kind, length, num_equal, num_shorter, is_same, prob):
    """The cell that counts a lookup's outcome.

    Args:
        kind: of the source.
        length, num_equal, num_shorter: as `lookup` returns them, length >= `MATCH_LENGTHS[0]`.
        is_same: whether the other draft token is the same.
        prob: the probability of the other draft token.
    """
    length_class = 0
    for at in range(1, _NUM_LENGTHS):
        length_class += length >= _LENGTHS[at]
    others = 2 if num_equal > 0 else (1 if num_shorter > 0 else 0)
    prob_class = 0
    for at in range(1, _NUM_PROBABILITIES):
        prob_class += prob >= _PROBABILITIES[at]
    cell = (kind * _NUM_LENGTHS + length_class) * _NUM_OTHERS + others
    return (cell * 2 + (1 if is_same else 0)) * _NUM_PROBABILITIES + prob_class


@compiled
def stack(known, step, token_ids, end, token, prob):
    """Choose between the draft token of a request's own context and those that known text goes on with.

    Args:
        known: a `KnownText`; its outputs are written at ``step``.
        step: the draft position.
        token_ids: ``[> end]`` int32, context and draft so far.
        end: the last position of these.
        token, prob: the draft token of the own context, -1 for none, and its probability.

    Returns:
        The draft token, -1 for none, and its probability.
    """
    known.is_known[step] = False
    for at in range(known.sources.shape[0]):
        known.cells[step, at] = -1
        index = known.indexes[known.sources[at, 0]]
        namespace, kind = known.sources[at, 1], known.sources[at, 2]
        found, length, num_equal, num_shorter = lookup(index, namespace, token_ids, end)
        if found < 0:
            continue
        cell = cell_of(kind, length, num_equal, num_shorter, found == token, prob)
        known.cells[step, at] = cell
        known.tokens[step, at] = found
        reliability = known.reliability[cell]
        rest = (np.float32(1.0) - reliability) * prob
        if found == token:
            prob = reliability
            known.is_known[step] = True
        elif reliability > rest:
            token, prob = found, reliability
            known.is_known[step] = True
        else:
            prob = rest
    return token, prob


@compiled
def learn(reliability, prior, cells, tokens, true_token_ids):
    """Count what became of lookups.

    Args:
        reliability: a `Reliability`.
        prior: ``[NUM_CELLS, 2]`` float32, for each cell what its reliability is taken for before anything is counted,
            and how many outcomes that counts for.
        cells, tokens: ``[K, S]`` int32, as `stack` wrote them.
        true_token_ids: ``[n]`` int32, n <= K, the target's tokens at the first positions.
    """
    for step in range(true_token_ids.shape[0]):
        for at in range(cells.shape[1]):
            cell = cells[step, at]
            # At once, before what this call finds is added, so that its order doesn't matter.
            while cell >= 0 and reliability.found[cell] >= MAX_COUNT:
                reliability.found[cell] //= 2
                reliability.right[cell] //= 2
    for step in range(true_token_ids.shape[0]):
        for at in range(cells.shape[1]):
            cell = cells[step, at]
            if cell < 0:
                continue
            reliability.found[cell] += 1
            if tokens[step, at] == true_token_ids[step]:
                reliability.right[cell] += 1
            expected, weight = prior[cell, 0], prior[cell, 1]
            reliability.value[cell] = (reliability.right[cell] + expected * weight) / (reliability.found[cell] + weight)
