"""What the target writes unasked: text to draft from, and a better prior of single tokens.

A request's own context says little about the plain words between what is copied. What the target writes unasked belongs
to no one, and is like what it will write. This is the datastore of REST (He et al., 2023, arXiv 2311.08252) with the
model as its corpus.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vllm_aasd.drafting.prior import MAX_TEXT_TOKENS
from vllm_aasd.kernels.draft import Prior


class Text(NamedTuple):
    """A text, and what the target predicted in it.

    Attributes:
        token_ids: ``[n]`` int32.
        table: ``[n, 1 + 2k]`` int32, an alignment store of it: by position its token, and the ids and probabilities
            (float32 bits) of the likeliest next ones; -1 where nothing was predicted.
    """

    token_ids: np.ndarray
    table: np.ndarray


def with_texts(prior: Prior, texts: Sequence[Text]) -> Prior:
    """A prior that knows what was predicted in texts.

    Args:
        prior: of single tokens, of whose distributions each counts as one more observation.
        texts: all with predictions of the same number, at least one position of each.

    Returns:
        The successors of a token averaged over where it was seen, the likeliest k kept; and the texts.
    """
    if not texts:
        return prior
    separator = np.array([-1], np.int32)
    joined = np.concatenate([part for text in texts for part in (text.token_ids, separator)])
    return Prior(*_successors(prior, np.concatenate([text.table for text in texts])), joined[:MAX_TEXT_TOKENS])


def _successors(prior: Prior, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    table = table[table[:, 0] >= 0]
    vocab_size, kept = prior.ids.shape
    top_k = (table.shape[1] - 1) // 2
    tokens = table[:, 0].astype(np.int64)
    ids, probs = table[:, 1 : 1 + top_k], np.ascontiguousarray(table[:, 1 + top_k :]).view(np.float32)
    seen = np.unique(tokens)
    times = 1 + np.bincount(tokens, minlength=vocab_size)
    # A pair of token and successor is one number, so that equal ones can be added up.
    sources = ((tokens, ids, probs), (seen, prior.ids[seen], prior.probs[seen]))
    pairs = np.concatenate([(of[:, None] * vocab_size + after)[after >= 0] for of, after, _ in sources])
    weights = np.concatenate([share[after >= 0] for _, after, share in sources])
    pairs, places = np.unique(pairs, return_inverse=True)
    token, successor = np.divmod(pairs, vocab_size)
    mean = np.bincount(places, weights) / times[token]
    order = np.lexsort((-mean, token))
    token, successor, mean = token[order], successor[order], mean[order]
    rank = np.arange(len(token)) - np.searchsorted(token, token)
    found_ids, found_probs = prior.ids.copy(), prior.probs.copy()
    # A token that was seen has as many successors as before at least.
    is_kept = rank < kept
    found_ids[token[is_kept], rank[is_kept]] = successor[is_kept]
    found_probs[token[is_kept], rank[is_kept]] = mean[is_kept]
    return found_ids, found_probs
