"""Which requests of a batch the draft model drafts for, and which are drafted for by text.

Text is there at once, a draft model takes a forward pass for each token. So in each step the question is which choice
has the most expected tokens per time, as for draft lengths (`vllm_aasd.drafting.draft_length`), with the time of the
draft model's passes added. Times are in steps of the target with one token; both models' are measured while serving.

**Catching up.** What the draft model hasn't read of a request it has to read first, up to the whole prompt. That pays
over many steps or not at all, and how many are to come isn't known: a request is expected to go on for as long as it
has, or as others did, within its ``max_tokens``. It catches up once that promises more than it costs, by what the draft
model would have gained in the request's latest steps.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from vllm_aasd.drafting.draft_length import LEAST_GAIN, lengths_and_gain
from vllm_aasd.drafting.step_time import StepTimeModel

LONGEST_DRAFT = 16
"""Tokens that the draft model drafts at most; nearly all of its drafts end earlier, where one isn't worth its time."""

READ_AT_ONCE = 8
"""Unread tokens that a request's next pass of the draft model takes along, instead of catching up first."""

MAX_PASS_TOKENS = 256
"""The most tokens that one pass of the draft model reads: the bound on what catching up adds to a step."""

_GAIN_RATE = 0.25
_FIRST_LENGTH, _LENGTH_RATE = 128.0, 0.05


class Candidate(NamedTuple):
    """A request that the draft model may draft for.

    Attributes:
        row: of the batch.
        request_id: the request.
        expected: the probability that the draft model's next token would be accepted, given those before it.
        num_unread: tokens of its context that the draft model hasn't read, >= 1: the last one never is.
        num_emitted: tokens that it has emitted.
        max_tokens: tokens that it may emit in all.
        limit: the longest draft, >= 1.
        is_pinned: whether it asks for the draft model, whatever that costs.
    """

    row: int
    request_id: str
    expected: float
    num_unread: int
    num_emitted: int
    max_tokens: int
    limit: int
    is_pinned: bool = False


class Plan(NamedTuple):
    """What the draft model does in a step.

    Attributes:
        drafted: the requests that it drafts for.
        catching_up: the requests that it reads for.
        rate: expected tokens per time of the best choice; what a further token has to reach.
    """

    drafted: list[Candidate]
    catching_up: list[Candidate]
    rate: float


class _Request:
    __slots__ = ("gain", "num_emitted")

    def __init__(self) -> None:
        self.gain = 0.0
        self.num_emitted = 0


class DraftModelRouter:
    """Decides by measured times and calibrated survivals.

    Args:
        target: what is known of the time of the target's steps.

    Attributes:
        passes: what is known of the time of the draft model's passes.
    """

    def __init__(self, target: StepTimeModel) -> None:
        self.passes = StepTimeModel(MAX_PASS_TOKENS)
        self._target = target
        self._mean_length = _FIRST_LENGTH
        self._requests: dict[str, _Request] = {}

    def pass_time(self, num_tokens: int) -> float:
        """The time of a pass of the draft model; infinite while it is unknown.

        Args:
            num_tokens: that it reads, over `MAX_PASS_TOKENS` in several passes.
        """
        ours, targets = self.passes.seconds(), self._target.seconds()
        if ours is None or targets is None:
            return math.inf
        whole, rest = divmod(num_tokens, MAX_PASS_TOKENS)
        relative = self.passes.relative()
        return ours / targets * float(whole * relative[MAX_PASS_TOKENS] + (relative[rest] if rest else 0.0))

    def plan(self, candidates: Sequence[Candidate], text: np.ndarray) -> Plan:
        """Choose what the draft model does.

        Args:
            candidates: the requests that it may draft for.
            text: ``[B, K]`` float32, the survival of each request's draft from text, 0 after its end.
        """
        times = self._target.relative()
        lengths, gain = lengths_and_gain(text, times, self._target.overhead())
        rate_of_text = gain * len(text) / times[min(len(text), len(times) - 1)]
        wanted, rate = self._best(candidates, text, lengths, rate_of_text)
        self._note(candidates, wanted, rate / rate_of_text)
        catching_up = [
            candidate
            for candidate in candidates
            if candidate.num_unread > READ_AT_ONCE
            and (candidate.is_pinned or self._pays(candidate, wanted, len(text), rate_of_text))
        ]
        ready = [candidate for candidate in candidates if candidate.num_unread <= READ_AT_ONCE]
        if len(ready) < len(candidates):
            wanted, rate = self._best(ready, text, lengths, rate_of_text)
        return Plan(wanted, catching_up, rate)

    def _best(
        self, candidates: Sequence[Candidate], text: np.ndarray, lengths: np.ndarray, rate_of_text: float
    ) -> tuple[list[Candidate], float]:
        """The requests that the draft model should draft for, and the tokens per time with it."""

        def lead(candidate: Candidate) -> float:
            return _tokens(candidate.expected, 4) - float(text[candidate.row, :4].sum())

        pinned = sum(candidate.is_pinned for candidate in candidates)
        # Those first that have the most of it.
        ranked = sorted(candidates, key=lambda candidate: (not candidate.is_pinned, -lead(candidate)))
        best: tuple[float, int] = (rate_of_text * LEAST_GAIN, 0) if not pinned else (0.0, 0)
        for count in range(max(pinned, 1), len(ranked) + 1):
            if count > pinned and lead(ranked[count - 1]) <= 0:
                break
            best = max(best, (self._rate(ranked[:count], text, lengths), count))
        return (ranked[: best[1]], best[0]) if best[1] else ([], rate_of_text)

    def _rate(self, chosen: Sequence[Candidate], text: np.ndarray, lengths: np.ndarray) -> float:
        """Expected tokens per time if the draft model drafts for some requests, at its best length."""
        times, overhead = self._target.relative(), self._target.overhead()
        of_text = lengths.copy()
        of_text[[candidate.row for candidate in chosen]] = 0
        emitted = len(text) + sum(float(text[row, :length].sum()) for row, length in enumerate(of_text) if length)
        num_tokens = len(text) + int(of_text.sum())
        time_of_pass, best = self.pass_time(len(chosen)), 0.0
        for length in range(1, LONGEST_DRAFT + 1):
            going_on = [candidate for candidate in chosen if candidate.limit >= length]
            num_tokens += len(going_on)
            if not going_on or num_tokens >= len(times):
                break
            emitted += sum(candidate.expected**length for candidate in going_on)
            best = max(best, emitted / (float(times[num_tokens]) * overhead + length * time_of_pass))
        return best

    def _note(self, candidates: Sequence[Candidate], wanted: Sequence[Candidate], ratio: float) -> None:
        gaining = {candidate.request_id for candidate in wanted}
        for candidate in candidates:
            request = self._requests.setdefault(candidate.request_id, _Request())
            request.num_emitted = candidate.num_emitted
            gain = 1.0 - 1.0 / ratio if candidate.request_id in gaining else 0.0
            request.gain += _GAIN_RATE * (gain - request.gain)

    def _pays(self, candidate: Candidate, wanted: Sequence[Candidate], num_requests: int, rate_of_text: float) -> bool:
        """Whether reading what a request lacks will be made up for by the drafts that this makes possible."""
        gain = self._requests[candidate.request_id].gain
        remaining = min(candidate.max_tokens - candidate.num_emitted, max(candidate.num_emitted, self._mean_length))
        # A step's gain is that of all requests that the draft model drafts for.
        saved = gain * remaining * num_requests / (rate_of_text * max(len(wanted), 1))
        return saved > self.pass_time(candidate.num_unread)

    def goes_on(self, survival: float, expected: float, num_going_on: int, num_tokens: int, rate: float) -> bool:
        """Whether one more token of a draft is worth its time.

        Args:
            survival: of the draft so far.
            expected: the probability that a further token is accepted, given that all before it are.
            num_going_on: requests that share the pass of the draft model.
            num_tokens: that the target's next step has so far, >= 1.
            rate: tokens per time that are to be had without it.
        """
        times = self._target.relative()
        if num_tokens + 1 >= len(times):
            return False
        verification = max(float(times[num_tokens + 1] - times[num_tokens]), 0.0)
        return survival * expected > rate * (self.pass_time(num_going_on) / num_going_on + verification)

    def forget(self, request_ids: Iterable[str]) -> None:
        """Drop what is known of requests that have ended, but how long they were; unknown ones are ignored."""
        for request_id in request_ids:
            request = self._requests.pop(request_id, None)
            if request is not None:
                self._mean_length += _LENGTH_RATE * (request.num_emitted - self._mean_length)


def _tokens(expected: float, length: int) -> float:
    """The accepted tokens that are to be expected of a draft."""
    return sum(expected**position for position in range(1, length + 1))
