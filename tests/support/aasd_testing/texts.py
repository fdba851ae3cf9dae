"""Random documents in a text index, and known text of a device, for tests of these and of drafts from them."""

import numpy as np
import torch

from vllm_aasd.drafting.known_text import prior_reliability
from vllm_aasd.kernels.text import ANSWERS, CORPUS, NUM_CELLS, PREDICTION, KnownText, TextIndex, new_index
from vllm_aasd.kernels.text.batch import TextTensors, new_texts


class Documents:
    """Documents that grow in turn in an index, and the same as plain lists.

    Args:
        implementation: of `vllm_aasd.kernels.text`: its `cpu` or `reference`.
        num_pages: of the index.

    Attributes:
        index: the index.
        texts: the namespace and all tokens of each document.
    """

    def __init__(self, implementation, num_pages):
        self.index = new_index(num_pages)
        self.texts: list[tuple[int, list[int]]] = []
        self._append = implementation.append
        self._last_pages: list[int] = []

    def begin(self, namespace):
        """Begin a document, and return its number."""
        self.texts.append((namespace, []))
        self._last_pages.append(-1)
        return len(self.texts) - 1

    def extend(self, document, token_ids):
        """Append tokens to a document."""
        namespace, known = self.texts[document]
        known += token_ids
        first, last = len(known) - len(token_ids), len(known)
        self._last_pages[document] = self._append(
            self.index, namespace, self._last_pages[document], first, np.array(known, np.int32), first, last
        )


def grow(rng, documents, num_rounds, vocab_size=6):
    """Extend documents of three namespaces at random, often by what another one holds; the same in each of several."""
    for _ in range(num_rounds):
        if not documents[0].texts or rng.random() < 0.2:
            namespace = int(rng.integers(3))
            for of in documents:
                of.begin(namespace)
        document = int(rng.integers(len(documents[0].texts)))
        tokens = rng.integers(vocab_size, size=rng.integers(1, 90)).tolist()
        other = documents[0].texts[rng.integers(len(documents[0].texts))][1]
        if other and rng.random() < 0.5:
            start = int(rng.integers(len(other)))
            tokens = other[start : start + 70]
        for of in documents:
            of.extend(document, tokens)


def random_known(rng, implementation, num_steps, vocab_size=6):
    """A `KnownText` of one request, over random texts with random reliabilities."""
    documents, corpus = Documents(implementation, 32), Documents(implementation, 16)
    grow(rng, (documents,), 30, vocab_size)
    grow(rng, (corpus,), 10, vocab_size)
    sources = np.array([[1, 1, CORPUS], [1, 2, CORPUS], [0, 0, ANSWERS], [0, 1, PREDICTION]], np.int64)
    shape = (num_steps, len(sources))
    return KnownText(
        (documents.index, corpus.index),
        sources,
        rng.random(NUM_CELLS).astype(np.float32),
        np.zeros(shape, np.int32),
        np.zeros(shape, np.int32),
        np.zeros(num_steps, np.bool_),
    )


def no_known(num_steps):
    """A `KnownText` of a request that knows of no other text."""
    nothing = np.empty((num_steps, 0), np.int32)
    return KnownText(
        (new_index(0), new_index(0)),
        np.empty((0, 3), np.int64),
        np.zeros(NUM_CELLS, np.float32),
        nothing,
        nothing.copy(),
        np.zeros(num_steps, np.bool_),
    )


def texts_of(max_num_reqs: int, max_draft_tokens: int, num_pages: int, corpora: TextIndex | None = None) -> TextTensors:
    """Text of this many pages, and corpora; nothing is known of any slot."""
    corpora = new_index(0) if corpora is None else corpora
    return new_texts(max_num_reqs, max_draft_tokens, num_pages, corpora, prior_reliability(), "cpu")


def no_texts(max_num_reqs: int, max_draft_tokens: int) -> TextTensors:
    """No room for any."""
    return texts_of(max_num_reqs, max_draft_tokens, 0)


def copy_texts(into: TextTensors, source: TextTensors) -> None:
    """Copy all that an op may have written."""
    for one, other in zip(into, source, strict=True):
        if isinstance(one, torch.Tensor):
            one.copy_(other)
