"""The drafter: one suffix index per request, and the mixture over it."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from vllm_aasd.drafting.suffix_index import SuffixIndex
from vllm_aasd.kernels import draft as draft_op
from vllm_aasd.kernels.draft import MixtureWeights, Prior

NUM_ORDERS = 6
"""Longest run of tokens that is looked up."""

DEFAULT_WEIGHTS = MixtureWeights(
    theta=np.array([2.0, 1.5, 1.0, 1.0, 0.8, 0.6], np.float32),
    alignment=np.array([0.7, 0.5, 0.4, 0.3, 0.25, 0.25], np.float32),
)

MAX_MATCHES = 32
"""Most recent matches of each order that vote: the bound on the work of a step."""

# Enough for every vote of a step: matches of the orders used, each with its token and 8 predictions.
_MAX_CANDIDATES = 4 * MAX_MATCHES * 9


class AlignmentView(NamedTuple):
    """What the drafter reads of the alignment store, for one request.

    Attributes:
        table: ``[num_slots, 1 + 2k]`` int32.
        block_table: ``[num_blocks]`` int32, the request's KV blocks.
        block_size: slots per KV block.
    """

    table: np.ndarray
    block_table: np.ndarray
    block_size: int


NO_ALIGNMENT = AlignmentView(np.empty((0, 1), np.int32), np.empty(0, np.int32), 1)


class Drafter:
    """Drafts tokens for many requests, each with a context of its own.

    Args:
        vocab_size: token ids are below it; others never become a draft token.
        max_draft_tokens: the longest draft, >= 1.
        min_survival: a draft ends before the token whose survival would be lower, in [0, 1].
        prior: the target's successors of each token outside any context; none by default.
    """

    def __init__(
        self, vocab_size: int, max_draft_tokens: int, min_survival: float, prior: Prior | None = None
    ) -> None:
        self._indices: dict[str, SuffixIndex] = {}
        self._min_survival = np.float32(min_survival)
        self._prior = prior if prior is not None else draft_op.no_prior()
        self._scores = np.zeros(vocab_size, np.float32)
        self._seen = np.empty(_MAX_CANDIDATES, np.int32)
        self._starts = np.empty(NUM_ORDERS, np.int32)
        self._draft_token_ids = np.empty(max_draft_tokens, np.int32)
        self._survival = np.empty(max_draft_tokens, np.float32)

    @property
    def num_requests(self) -> int:
        """Requests that state is held for."""
        return len(self._indices)

    def draft(
        self, request_id: str, token_ids: np.ndarray, alignment: AlignmentView, max_draft_tokens: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Take in what is new of a request's context, and draft its continuation.

        Args:
            request_id: the request, as `forget` will name it.
            token_ids: ``[n]`` int32, the whole context, prompt and output.
            alignment: where the target's stored distributions of this context lie; `NO_ALIGNMENT` for none.
            max_draft_tokens: the longest draft this time; 0 only takes in the context.

        Returns:
            ``draft_token_ids [m]`` int32 and ``survival [m]`` float32, the probability that the draft up to
            and including that token is accepted; views that the next call overwrites.
        """
        index = self._indices.get(request_id)
        if index is None or not index.continues_to(token_ids):
            index = SuffixIndex(NUM_ORDERS, len(self._draft_token_ids), len(token_ids))
            self._indices[request_id] = index
        index.extend(token_ids[index.length :])
        limit = min(max_draft_tokens, len(self._draft_token_ids))
        count = draft_op.draft(
            index.tokens,
            index.prev,
            index.head,
            index.length,
            *alignment,
            *DEFAULT_WEIGHTS,
            *self._prior,
            MAX_MATCHES,
            self._min_survival,
            self._scores,
            self._seen,
            self._starts,
            self._draft_token_ids[:limit],
            self._survival,
        )
        return self._draft_token_ids[:count], self._survival[:count]

    def forget(self, request_ids: Iterable[str]) -> None:
        """Drop what is held for requests that have ended; unknown ones are passed over."""
        for request_id in request_ids:
            self._indices.pop(request_id, None)
