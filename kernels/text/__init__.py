"""Text: an index over token text that is already known, by namespace, from which every request may draft.

Documents
    A document is token text of one origin: an answer with the end of its prompt, a prediction, a file of a corpus. It
    grows while its request decodes, so that other requests see it at once. Each document belongs to one *namespace*,
    and a lookup sees one namespace only: tenants, and kinds of text, are kept apart by it.

Pages
    Text lies in pages of `PAGE_SIZE` tokens. The ``n``-th page that is begun lies in slot ``n % num_pages``, in the
    place of the oldest, so memory and the work of a step are bounded whatever is stored. Its *number* is
    ``n // num_pages << PLACE_BITS | n % num_pages``: numbers grow, and their low bits are the slot. An answer that is
    drafted from is written again by the request that drafts from it, so the oldest text is also the text whose use lies
    furthest back. A *position* is ``number * PAGE_SIZE + offset``. It is never reused, and says by itself whether its
    page is still there.

Lookup
    For each size in `NGRAM_SIZES` a hash table maps an n-gram of a namespace to the most recent positions that end it,
    one for each of `WAYS` classes of next tokens. So a document doesn't displace what others say otherwise, and many
    copies take the place of one. Tables hold no keys: what a bucket leads to is compared with the context, token by
    token, and its page's namespace with the one that was asked for. Of the largest size with a match, the longest match
    counts, up to `MAX_MATCH` tokens; of equally long ones the most recent.

Reliability
    How often the token that a lookup finds is the target's next one, counted online by *cell*: the source, the length
    of the match, whether there are others, and what the draft from the request's own context says, by its probability
    and whether it is the same token. The draft token is the one found if its reliability ``r`` is higher than what that
    leaves to the other, ``(1 - r) p``. A source that doesn't help is soon found unreliable, and changes nothing then.
    Sources are asked from the least to the most specific one, each with the outcome of those before it.

`vllm_aasd.kernels.text.reference` is the specification; `cpu` is compiled for CPUs.
"""

from typing import NamedTuple

import numpy as np

__all__ = [
    "ANSWERS",
    "CORPUS",
    "MAX_CORPORA",
    "MAX_MATCH",
    "NGRAM_SIZES",
    "NUM_CELLS",
    "PAGE_SIZE",
    "PREDICTION",
    "WAYS",
    "KnownText",
    "Reliability",
    "TextIndex",
    "index_bytes",
    "new_index",
    "new_reliability",
    "num_pages_for",
]

PAGE_SIZE = 64
"""Tokens of a page. Half a page is lost for each document on average."""

PLACE_BITS = 25
"""All tokens of an index are numbered in 31 bits."""

NGRAM_SIZES = (2, 4, 8, 16)
"""N-grams that are entered, ascending."""

WAYS = 4
"""Matches of an n-gram that are kept, and compared in a lookup, at most; a power of two."""

MAX_MATCH = 32
"""Tokens of a match that are compared: longer ones are not told apart."""

CORPUS, ANSWERS, PREDICTION = range(3)
"""Kinds of sources, in the order in which they are asked."""

MAX_CORPORA = 4
"""Corpora that one request may draft from: it has one source of each other kind at most."""

MATCH_LENGTHS = (2, 3, 4, 5, 7, 9, 13, 17, 25, 32)
"""Lengths of matches from which another cell counts, ascending."""

PROBABILITIES = (0.0, 0.3, 0.7)
"""Probabilities of the other draft token from which another cell counts, ascending."""

_NUM_KINDS, _NUM_OTHERS = 3, 3
CELL_SHAPE = (_NUM_KINDS, len(MATCH_LENGTHS), _NUM_OTHERS, 2, len(PROBABILITIES))
NUM_CELLS = int(np.prod(CELL_SHAPE))

MAX_COUNT = 512
"""A cell that was counted this often is halved before more is added: what it says follows the traffic."""

# Columns of `TextIndex.pages`.
NUMBER, NAMESPACE, PREVIOUS, NEXT, PAGE_COLUMNS = range(5)


class TextIndex(NamedTuple):
    """The arrays of an index, written in place.

    Attributes:
        tokens: ``[num_pages * PAGE_SIZE]`` int32, by slot; -1 where nothing is written yet.
        pages: ``[num_pages, PAGE_COLUMNS]`` int64, by slot: the page's number and namespace, and the numbers of the
            pages before and after it in its document; -1 where there is none.
        heads: ``[len(NGRAM_SIZES), num_buckets, WAYS]`` int64, positions; -1 where there is none.
        begun: ``[1]`` int64, how many pages were ever begun.
    """

    tokens: np.ndarray
    pages: np.ndarray
    heads: np.ndarray
    begun: np.ndarray


def num_pages_for(num_bytes: int) -> int:
    """How many pages an index of at most this many bytes has."""
    return num_bytes // index_bytes(1)


def new_index(num_pages: int) -> TextIndex:
    """An index that holds nothing.

    Args:
        num_pages: 0 for an index that never holds anything.
    """
    num_buckets = num_pages * PAGE_SIZE // WAYS
    return TextIndex(
        np.full(num_pages * PAGE_SIZE, -1, np.int32),
        np.full((num_pages, PAGE_COLUMNS), -1, np.int64),
        np.full((len(NGRAM_SIZES), num_buckets, WAYS), -1, np.int64),
        np.zeros(1, np.int64),
    )


def index_bytes(num_pages: int) -> int:
    """The bytes of an index of this many pages, but for the count of those that were begun."""
    per_token = 4 + 8 * len(NGRAM_SIZES)
    return num_pages * (PAGE_SIZE * per_token + 8 * PAGE_COLUMNS)


class Reliability(NamedTuple):
    """What was counted by cell, written in place.

    Attributes:
        found: ``[NUM_CELLS]`` int64, how often a lookup had an outcome that is known by now.
        right: ``[NUM_CELLS]`` int64, how often it was the target's next token.
        value: ``[NUM_CELLS]`` float32, the reliability that follows, a probability.
    """

    found: np.ndarray
    right: np.ndarray
    value: np.ndarray


def new_reliability(prior: np.ndarray) -> Reliability:
    """Nothing counted yet.

    Args:
        prior: ``[NUM_CELLS, 2]`` float32, for each cell what its reliability is taken for until something is counted,
            and how many outcomes that counts for.
    """
    return Reliability(np.zeros(NUM_CELLS, np.int64), np.zeros(NUM_CELLS, np.int64), prior[:, 0].copy())


class KnownText(NamedTuple):
    """What one request may draft from besides its own context; below `reliability`, what drafting writes.

    Attributes:
        indexes: two of them: the one that grows, and that of the corpora.
        sources: ``[S, 3]`` int64, in the order in which they are asked: which of the indexes, the namespace, the kind.
        reliability: ``[NUM_CELLS]`` float32, see `Reliability.value`.
        cells: ``[K, S]`` int32, by draft position and source the cell of what was found; -1 where nothing was.
        tokens: ``[K, S]`` int32, what was found.
        is_known: ``[K]`` bool, whether the draft token is one of those found.
    """

    indexes: tuple[TextIndex, TextIndex]
    sources: np.ndarray
    reliability: np.ndarray
    cells: np.ndarray
    tokens: np.ndarray
    is_known: np.ndarray
