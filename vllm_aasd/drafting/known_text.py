"""Text that is known besides a request's own context: earlier answers, predictions, corpora, siblings."""

from collections.abc import Iterable

import numpy as np

from vllm_aasd.drafting.corpora import Corpora
from vllm_aasd.kernels.text import (
    ANSWERS,
    CELL_SHAPE,
    CORPUS,
    NUM_CELLS,
    PREDICTION,
    PROBABILITIES,
    KnownText,
    new_index,
    new_reliability,
    num_pages_for,
)
from vllm_aasd.kernels.text.cpu import append
from vllm_aasd.kernels.text.reliability_cpu import learn

PROMPT_TAIL = 32
"""Tokens of a prompt that stand before its answer: they tell apart the beginnings of answers."""

# How often text is right, by the length of its match (`MATCH_LENGTHS`), before anything is counted, and how many
# outcomes that is worth.
_FIRST_RELIABILITY = (0.35, 0.45, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)
_FIRST_WEIGHT = 8.0


def prior_reliability() -> np.ndarray:
    """What is taken for the reliability of each cell at first, and its weight: ``[NUM_CELLS, 2]`` float32."""
    expected = np.empty(CELL_SHAPE, np.float32)
    middle = [(low + high) / 2 for low, high in zip(PROBABILITIES, (*PROBABILITIES[1:], 1.0), strict=True)]
    for kind, length, others, is_same, at in np.ndindex(*CELL_SHAPE):
        right, other = _FIRST_RELIABILITY[length], middle[at]
        right *= (1.0, 0.8, 0.5)[others]
        right = min(right, 0.95)
        disagreeing = right * (1 - other) / (right * (1 - other) + (1 - right))
        agreeing = 1 - (1 - right) * (1 - other)
        expected[kind, length, others, is_same, at] = agreeing if is_same else disagreeing
    return np.stack([expected.reshape(NUM_CELLS), np.full(NUM_CELLS, _FIRST_WEIGHT, np.float32)], axis=1)


class RequestText:
    """What one request sees and adds.

    Attributes:
        known: for `vllm_aasd.kernels.draft.cpu.draft`.
    """

    __slots__ = ("_last_page", "_length", "_namespace", "known")

    def __init__(self, known: KnownText, namespace: int | None) -> None:
        self.known = known
        self._namespace = namespace
        self._last_page = -1
        self._length = 0

    def restart(self) -> None:
        """Begin a new document: the context is another one."""
        self._last_page = -1
        self._length = 0

    def extend(self, token_ids: np.ndarray, first: int) -> None:
        """Add tokens of the request's context to its document.

        Args:
            token_ids: ``[n]`` int32, the context.
            first: where the new ones begin.
        """
        if self._namespace is None or not len(self.known.indexes[0].pages):
            return
        if self._length == 0:
            first = max(first - PROMPT_TAIL, 0)
        self._last_page = append(
            self.known.indexes[0],
            self._namespace,
            self._last_page,
            self._length,
            token_ids,
            first,
            len(token_ids),
        )
        self._length += len(token_ids) - first


class KnownTexts:
    """The text that requests share, bounded in bytes, and how reliable it has been.

    Args:
        num_bytes: of the index of earlier answers and predictions, at most; 0 for none.
        max_draft_tokens: the longest draft.
        corpora: what does not come from requests; None for nothing.
    """

    def __init__(self, num_bytes: int, max_draft_tokens: int, corpora: Corpora | None = None) -> None:
        self._max_draft_tokens = max_draft_tokens
        self._corpora = corpora if corpora is not None else Corpora()
        self._indexes = (new_index(num_pages_for(num_bytes)), self._corpora.index)
        self._prior = prior_reliability()
        self.reliability = new_reliability(self._prior)
        self._num_predictions = 0

    def admit(
        self, namespace: int | None, prediction: np.ndarray | None = None, corpora: Iterable[str] = ()
    ) -> RequestText:
        """What a new request sees.

        Args:
            namespace: of the earlier answers that it shares, >= 0; None if it neither reads nor writes any.
            prediction: ``[n]`` int32, what its client expects.
            corpora: the names of those that it draws from.
        """
        sources = [(1, of_one, CORPUS) for of_one in self._corpora.namespaces(corpora)]
        if namespace is not None:
            sources.append((0, namespace, ANSWERS))
        if prediction is not None and len(self._indexes[0].pages):
            # No other request is given a negative namespace.
            self._num_predictions += 1
            append(self._indexes[0], -self._num_predictions, -1, 0, prediction, 0, len(prediction))
            sources.append((0, -self._num_predictions, PREDICTION))
        shape = (self._max_draft_tokens, len(sources))
        known = KnownText(
            self._indexes,
            np.array(sources, np.int64).reshape(-1, 3),
            self.reliability.value,
            np.full(shape, -1, np.int32),
            np.empty(shape, np.int32),
            np.zeros(self._max_draft_tokens, np.bool_),
        )
        return RequestText(known, namespace)

    def clear(self) -> None:
        """Forget all text. Requests go on with what they add from now on."""
        growing = self._indexes[0]
        for array in (growing.tokens, growing.pages, growing.heads):
            array.fill(-1)

    def learn(self, text: RequestText, true_token_ids: np.ndarray) -> None:
        """Count how right the text was that a request's last draft was made from.

        Args:
            text: of the request.
            true_token_ids: ``[n]`` int32, the target's tokens at the first draft positions, as far as they are known.
        """
        learn(self.reliability, self._prior, text.known.cells, text.known.tokens, true_token_ids)
