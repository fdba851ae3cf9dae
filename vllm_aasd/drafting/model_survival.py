"""How likely a draft model's tokens are accepted, learned while serving."""

import bisect
from collections.abc import Iterable, Sequence

import numpy as np

from vllm_aasd.drafting.calibration import AcceptanceCalibration

_EDGES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
# The draft model's own probability counts as many tokens in its bin. Older tokens are forgotten.
_PRIOR_TOKENS = 8.0
_MOST_TOKENS = 2000.0
# Optimistic, since a draft model that isn't asked can't show that it is better; a few drafts correct it.
_FIRST_RATE = 0.8
_FIRST_TOKENS = 10
_RATE_OF_ALL, _RATE_OF_ONE = 0.02, 0.1
# Per step in which a request's model isn't asked, towards what is known of all; and of all, towards `_FIRST_RATE`.
_FORGETTING_OF_ONE, _FORGETTING_OF_ALL = 0.01, 0.0003


class _Request:
    __slots__ = ("calibration", "rate")

    def __init__(self, rate: float) -> None:
        self.calibration = AcceptanceCalibration()
        self.rate = rate


class ModelSurvival:
    """Two estimates: of a token before the draft model has run, and of one that it has drafted with some confidence.

    The first is the share of a request's recent tokens that were accepted. The second is the share of all tokens with
    such a confidence that were, corrected by the request's own record.
    """

    def __init__(self) -> None:
        centers = [(low + high) / 2 for low, high in zip((0.0, *_EDGES), (*_EDGES, 1.0), strict=True)]
        self._tries = [_PRIOR_TOKENS] * len(centers)
        self._hits = [_PRIOR_TOKENS * center for center in centers]
        self._rate = _FIRST_RATE
        self._num_tokens = 0
        self._requests: dict[str, _Request] = {}

    def expected(self, request_id: str) -> float:
        """The probability that the next token would be accepted, given that those before it are."""
        request = self._requests.get(request_id)
        return self._rate if request is None else request.rate

    def survival(self, request_id: str, confidences: Sequence[float]) -> np.ndarray:
        """The probability that a draft is accepted up to and including each of its tokens.

        Args:
            request_id: whose draft it is.
            confidences: ``[n]``, the draft model's own probability of each of its tokens.

        Returns:
            ``[n]`` float32.
        """
        shares = [self._hits[at] / self._tries[at] for at in map(_bin_of, confidences)]
        return self._of(request_id).calibration.apply(np.cumprod(shares, dtype=np.float32), _own(shares))

    def observe(self, request_id: str, confidences: Sequence[float], num_accepted: int) -> None:
        """Learn from a draft, also one that wasn't verified, if the answer says what would have become of it.

        Args:
            request_id: whose draft it was.
            confidences: ``[n]``, of the tokens that were verified; none if the draft model wasn't asked.
            num_accepted: how many of these were accepted.
        """
        request = self._of(request_id)
        if not confidences:
            request.rate += _FORGETTING_OF_ONE * (self._rate - request.rate)
            self._rate += _FORGETTING_OF_ALL * (_FIRST_RATE - self._rate)
            return
        request.calibration.observe(self.survival(request_id, confidences), _own(confidences), num_accepted)
        for position, confidence in enumerate(confidences[: num_accepted + 1]):
            is_hit, at = position < num_accepted, _bin_of(confidence)
            if self._tries[at] >= _MOST_TOKENS:
                self._tries[at] /= 2
                self._hits[at] /= 2
            self._tries[at] += 1
            self._hits[at] += is_hit
            request.rate += _RATE_OF_ONE * (is_hit - request.rate)
            self._num_tokens += 1
            self._rate += max(_RATE_OF_ALL, 1 / (_FIRST_TOKENS + self._num_tokens)) * (is_hit - self._rate)

    def forget(self, request_ids: Iterable[str]) -> None:
        """Drop what is known of requests that have ended; unknown ones are ignored."""
        for request_id in request_ids:
            self._requests.pop(request_id, None)

    def _of(self, request_id: str) -> _Request:
        if request_id not in self._requests:
            self._requests[request_id] = _Request(self._rate)
        return self._requests[request_id]


def _bin_of(confidence: float) -> int:
    return bisect.bisect_right(_EDGES, confidence)


def _own(tokens: Sequence[float]) -> np.ndarray:
    """No token of a draft model's comes from known text."""
    return np.zeros(len(tokens), np.bool_)
