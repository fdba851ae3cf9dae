"""How many draft tokens each request of a batch gets: as many as are worth their share of the next step.

`LengthsByLoad` learns while serving how long steps take, and chooses by it.
"""

import math

import numpy as np

from vllm_aasd.drafting.step_time import StepTimeModel, steps_between_probes

LEAST_GAIN = 1.03
"""Survival and times are estimates, so drafts with a smaller expected gain lose as often as not: none are made."""

# Drafts with a smaller expected gain might not gain at all. Their cost is probed now and then, by a step without them,
# which costs at most a 160th of the time.
_CONTESTED_GAIN = 1.2
_STEPS_BETWEEN_PROBES = 32

REPRODUCIBLE_SURVIVAL = 0.1
"""The least survival of a draft token that is worth verifying, if step times must not decide: between what one request
at a time needs, and what sixteen do."""


def lengths_and_gain(survival: np.ndarray, step_times: np.ndarray, overhead: float = 1.0) -> tuple[np.ndarray, float]:
    """Choose the draft lengths with the most expected tokens per second.

    A step in which n draft tokens are verified emits one token per request and, in expectation, the sum of
    the survivals of those n. Its time depends on how many tokens are in the batch, not on whose they are. So
    for each n the best drafts are the n likeliest tokens of the whole batch, and the best n maximizes::

        (B + s_1 + ... + s_n) / (T(B + n) overhead[n > 0])      s sorted descending, B requests, T the step time

    Survival falls along a draft, so the likeliest tokens are a prefix of each. n = 0 is a valid choice.

    Args:
        survival: ``[B, K]``, the probability that a draft is accepted up to and including each of its tokens;
            non-increasing along a row, 0 after a draft's end.
        step_times: ``[>= B + 1]``, the time of a step by the tokens in its batch, in any unit; nothing is
            drafted beyond its end.
        overhead: how many times as long a step with drafts takes as its tokens do; >= 1.

    Returns:
        ``[B]`` int64, the length of each draft; and how many times the tokens per second drafting gives, >= 1.
    """
    num_requests, width = survival.shape
    flat = survival.ravel()
    # Stable, so that of equal survivals in a row the earlier token comes first.
    order = np.argsort(-flat, kind="stable")
    order = order[: min(np.count_nonzero(flat), len(step_times) - num_requests - 1)]
    emitted = num_requests + np.concatenate(([0.0], np.cumsum(flat[order])))
    rate = emitted / step_times[num_requests : num_requests + len(order) + 1]
    rate[1:] /= overhead
    best = int(np.argmax(rate))
    gain = float(rate[best] / rate[0]) if best else 1.0
    return np.bincount(order[:best] // width, minlength=num_requests), gain


def reproducible_lengths(survival: np.ndarray) -> np.ndarray:
    """Choose draft lengths that depend on the drafts alone, neither on time nor on other requests.

    For sampled requests with a seed. A request's random numbers are drawn in the order of its tokens and draft
    tokens, so the same seed gives the same answer only if the same lengths are drafted.

    Args:
        survival: ``[B, K]``, as for `lengths_and_gain`.

    Returns:
        ``[B]`` int64, the tokens whose survival is at least `REPRODUCIBLE_SURVIVAL`.
    """
    return np.count_nonzero(survival >= REPRODUCIBLE_SURVIVAL, axis=1)


class LengthsByLoad:
    """Chooses the draft lengths of each step, and learns from the time that steps take.

    Args:
        max_tokens: the most tokens of a step, >= 1.

    Attributes:
        step_time: what is known about the time that steps take.
    """

    def __init__(self, max_tokens: int) -> None:
        self.step_time = StepTimeModel(max_tokens)
        self._num_probes = 0

    def min_draft_tokens(self, num_requests: int) -> int:
        """How many draft tokens a request should have at least, however unlikely, because that makes its step faster.

        Args:
            num_requests: that decode in the step, >= 1.

        Returns:
            0, unless steps with more tokens were seen to take less time.
        """
        times = self.step_time.relative()[num_requests:]
        fastest = int(np.argmin(times)) if len(times) else 0
        if fastest == 0 or times[0] < LEAST_GAIN * times[fastest]:
            return 0
        return math.ceil(fastest / num_requests)

    def observe(self, num_tokens: int | None, seconds: float, has_drafts: bool) -> None:
        """Learn from one step.

        Args:
            num_tokens: tokens in its batch; None if it read prompts, which says nothing about decoding.
            seconds: how long it took, > 0.
            has_drafts: whether draft tokens were among them.
        """
        if num_tokens is None:
            self.step_time.skip()
        else:
            self.step_time.observe(num_tokens, seconds, has_drafts)

    def choose(self, survival: np.ndarray, is_seeded: np.ndarray) -> np.ndarray:
        """Choose the draft lengths of a step.

        Args:
            survival: ``[B, K]``, as for `lengths_and_gain`.
            is_seeded: ``[B]`` bool, the requests whose lengths may only depend on their drafts.

        Returns:
            ``[B]`` int64.
        """
        by_load = np.where(is_seeded[:, None], 0, survival)
        lengths, gain = lengths_and_gain(by_load, self.step_time.relative(), self.step_time.overhead())
        if is_seeded.any():
            lengths[is_seeded] = reproducible_lengths(survival[is_seeded])
        elif gain < LEAST_GAIN:
            return np.zeros_like(lengths)
        elif gain < _CONTESTED_GAIN and self._is_probe_due():
            self._num_probes += 1
            return np.zeros_like(lengths)
        return lengths

    def _is_probe_due(self) -> bool:
        return self.step_time.drafts_since_pair >= steps_between_probes(self._num_probes, _STEPS_BETWEEN_PROBES)
