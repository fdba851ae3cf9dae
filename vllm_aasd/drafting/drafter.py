"""The drafter: one suffix index per request, and the mixture over it."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from vllm_aasd.drafting.calibration import AcceptanceCalibration, UsualAcceptance
from vllm_aasd.drafting.known_text import KnownTexts, RequestText
from vllm_aasd.drafting.suffix_index import SuffixIndex
from vllm_aasd.kernels.draft import MAX_TOP_K, MixtureWeights, Prior, max_candidates, no_prior
from vllm_aasd.kernels.draft import cpu as draft_op

MAX_NGRAM_SIZE = 6
"""Largest n-gram that is looked up."""

DEFAULT_WEIGHTS = MixtureWeights(
    theta=np.array([1.571, 1.286, 0.857, 0.714, 0.8, 0.545], np.float32),
    alignment=np.array([0.583, 0.7, 0.26, 0.25, 0.25, 0.179], np.float32),
    no_alignment_discount=np.float32(2.5),
)
"""Found by ``python -m benchmarks.drafter fit`` (``benchmarks/results/fit.json``)."""

MIN_SURVIVAL = 0.02
"""A draft ends before the token that would make it less likely than this to be accepted as a whole. In a replay with
drafts of up to 8 tokens this left out 40% of the draft tokens and 0.5% of the accepted ones."""

MAX_MATCHES = 32
"""Most recent matches of each n-gram size that are used: the bound on the work of a step."""


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


GREEDY, SAMPLED, SEEDED = "greedy", "sampled", "seeded"
"""How a request chooses its tokens. Drafts of a seeded one depend on no other request's."""

NOTHING_PREDICTED = np.empty(0, np.float32)

NO_ALIGNMENT = AlignmentView(np.empty((0, 1), np.int32), np.empty(0, np.int32), 1)


class _Request:
    """What is held for one request: its index, its calibration, and the survival predicted for its last draft."""

    __slots__ = ("calibration", "index", "num_looked_up", "predicted_survival", "text")

    def __init__(self, index: SuffixIndex, text: RequestText, usual: UsualAcceptance | None) -> None:
        self.index = index
        self.text = text
        self.num_looked_up = 0
        self.calibration = AcceptanceCalibration(usual)
        self.predicted_survival = NOTHING_PREDICTED


class Drafter:
    """Drafts tokens for many requests, each with a context of its own.

    Args:
        vocab_size: token ids are below it; others never become a draft token.
        max_draft_tokens: the longest draft, >= 1.
        min_survival: a draft ends before the token whose survival would be lower, in [0, 1].
        prior: what the target says outside of any context; none by default.
        weights: the constants of the mixture, an entry for each of `MAX_NGRAM_SIZE`.
        lookups: ``[3]`` int64, added to: what was found in the alignment store, see `vllm_aasd.kernels.draft.cpu`.
        texts: what requests share; nothing by default.
    """

    def __init__(
        self,
        vocab_size: int,
        max_draft_tokens: int,
        min_survival: float,
        prior: Prior | None = None,
        weights: MixtureWeights = DEFAULT_WEIGHTS,
        lookups: np.ndarray | None = None,
        texts: KnownTexts | None = None,
    ) -> None:
        self._texts = texts if texts is not None else KnownTexts(0, max_draft_tokens)
        self._requests: dict[str, _Request] = {}
        self._admitted: dict[str, tuple[RequestText, str]] = {}
        self._usual = {GREEDY: UsualAcceptance(), SAMPLED: UsualAcceptance()}
        self._min_survival = np.float32(min_survival)
        self._prior = prior if prior is not None else no_prior()
        self._weights = weights
        self._lookups = lookups if lookups is not None else np.zeros(3, np.int64)
        self._scores = np.zeros(vocab_size, np.float32)
        most = max_candidates(MAX_MATCHES, MAX_TOP_K, self._prior.ids.shape[1])
        self._candidates = np.empty(most, np.int32)
        self._match_heads = np.empty(MAX_NGRAM_SIZE, np.int32)
        self._draft_token_ids = np.empty(max_draft_tokens, np.int32)
        self._survival = np.empty(max_draft_tokens, np.float32)

    @property
    def num_requests(self) -> int:
        """Requests that state is held for."""
        return len(self._requests)

    def admit(
        self,
        request_id: str,
        namespace: int | None,
        prediction: np.ndarray | None = None,
        corpora: Iterable[str] = (),
        sampling: str = GREEDY,
    ) -> None:
        """Give a request text besides its own context.

        Args:
            request_id: the request, before its first `draft`.
            namespace: of the earlier answers that it shares, >= 0; None if it shares none.
            prediction: ``[n]`` int32, what its client expects it to answer.
            corpora: the names of those that it draws from.
            sampling: `GREEDY`, `SAMPLED` or `SEEDED`: how often drafts are accepted is learned from requests alike.
        """
        self._admitted[request_id] = self._texts.admit(namespace, prediction, corpora), sampling

    def draft(
        self,
        request_id: str,
        token_ids: np.ndarray,
        alignment: AlignmentView,
        max_draft_tokens: int,
        min_draft_tokens: int = 0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Index what is new in a request's context, and draft its continuation.

        Args:
            request_id: the request, as `forget` will name it.
            token_ids: ``[n]`` int32, the whole context, prompt and output.
            alignment: where the target's stored distributions of this context lie; `NO_ALIGNMENT` for none.
            max_draft_tokens: the longest draft this time; 0 only learns the context.
            min_draft_tokens: how many tokens are drafted whatever their survival, as far as there are candidates.

        Returns:
            ``draft_token_ids [m]`` int32, a view that the next call overwrites, and ``survival [m]`` float32,
            the probability that the draft up to and including that token is accepted.
        """
        request = self._requests.get(request_id)
        if request is None or not request.index.continues_to(token_ids):
            text, sampling = self._admitted.get(request_id) or (self._texts.admit(None), GREEDY)
            text.restart()
            new_index = SuffixIndex(MAX_NGRAM_SIZE, len(self._draft_token_ids), len(token_ids))
            request = _Request(new_index, text, self._usual.get(sampling))
            self._requests[request_id] = request
        index = request.index
        if request.num_looked_up:
            self._texts.learn(request.text, token_ids[index.length : index.length + request.num_looked_up])
        request.text.extend(token_ids, index.length or len(token_ids) - 1)
        index.extend(token_ids[index.length :])
        limit = min(max_draft_tokens, len(self._draft_token_ids))
        count = draft_op.draft(
            index.tokens,
            index.prev,
            index.head,
            index.length,
            *alignment,
            *self._weights,
            self._prior.ids,
            self._prior.probs,
            request.text.known,
            MAX_MATCHES,
            self._min_survival if min_draft_tokens == 0 else np.float32(0.0),
            self._scores,
            self._candidates,
            self._match_heads,
            self._draft_token_ids[:limit],
            self._survival,
            self._lookups,
        )
        request.num_looked_up = min(count + 1, limit)
        survival = request.calibration.apply(self._survival[:count], request.text.known.is_known)
        count = max(np.count_nonzero(survival >= self._min_survival), min(min_draft_tokens, count))
        request.predicted_survival = survival[:count]
        return self._draft_token_ids[:count], request.predicted_survival

    def predicted_survival(self, request_id: str) -> np.ndarray:
        """The survival that was predicted for the request's last draft, ``[n]`` float32; empty if there was none."""
        request = self._requests.get(request_id)
        return request.predicted_survival if request is not None else NOTHING_PREDICTED

    def replaced(self, request_id: str, num_left: int) -> None:
        """Note that a request's last draft was given another ending; unknown requests are ignored.

        Args:
            request_id: the request.
            num_left: tokens of the draft that were left, from its beginning.
        """
        request = self._requests.get(request_id)
        if request is not None:
            request.num_looked_up = min(request.num_looked_up, num_left + 1)
            request.predicted_survival = request.predicted_survival[:num_left]

    def verified(self, request_id: str, num_draft_tokens: int, num_accepted: int) -> None:
        """Learn what became of a request's last draft; unknown requests are ignored.

        Args:
            request_id: the request.
            num_draft_tokens: how many tokens of the draft were verified, from its beginning; may be 0.
            num_accepted: how many of those were accepted.
        """
        request = self._requests.get(request_id)
        if request is not None:
            request.calibration.observe(
                request.predicted_survival[:num_draft_tokens], request.text.known.is_known, num_accepted
            )

    def abandon(self, request_id: str) -> None:
        """Drop a request in whose draft an exception was raised, and what that may have left for others."""
        self.forget([request_id])
        self._scores.fill(0)

    def clear_memory(self) -> None:
        """Forget all text but the requests' own contexts and the corpora."""
        self._texts.clear()

    def forget(self, request_ids: Iterable[str]) -> None:
        """Drop what is held for requests that have ended; unknown ones are ignored."""
        for request_id in request_ids:
            self._requests.pop(request_id, None)
            self._admitted.pop(request_id, None)


def warm_up() -> None:
    """Compile all that drafting runs, or load it from the cache on disk, before a request needs it."""
    drafter = Drafter(8, 2, 0.0, texts=KnownTexts(1 << 17, 2))
    drafter.admit("", 0, np.zeros(2, np.int32))
    context = np.array([1, 2, 3, 1, 2, 3], np.int32)
    for length in (5, 6):
        drafter.draft("", context[:length], NO_ALIGNMENT, 2)
