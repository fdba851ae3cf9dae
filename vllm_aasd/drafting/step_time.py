"""How long a step of the target model takes, by the number of tokens in its batch, learned while serving."""

import math
from collections.abc import Iterable

import numpy as np

MAX_ERROR = 0.5
"""Largest error, in nats of time, that a step is learned from: a step ten times as long is an accident."""

PAIR_RATE = 0.1
"""Share of the error that a pair of neighboring steps corrects in the long run."""

_FIRST_PROBES = 4

_LEVEL_RATE = 0.2
_SHAPE_RATE = 0.02
# Up to this many tokens, each number may have a kernel of its own.
_ALL_UP_TO = 16
# Steps between two evaluations of the curve.
_REFRESH = 16
# The share of the drafts' overhead that is forgotten with each step without drafts, which don't show it.
_OVERHEAD_FORGETTING = 0.01
_MAX_OVERHEAD = 0.7


class StepTimeModel:
    """The step-time curve: ``log T(n) = level + shape(n)``, for n tokens in the batch.

    Only step times of the same moment are ever compared, so what matters is the shape. The level adapts fast, and
    absorbs whatever slows all steps alike (a busy machine, longer contexts); the shape adapts slowly to the rest. It is
    linear between knots: all counts at first, then ever fewer. It need not increase: kernels for matrices of one row
    can take longer than those for several (on a CPU in bfloat16, 3 to 6 tokens took 0.85x the time of 1 token, and 7
    tokens 1.25x the time of 6). One step moves level and shape by a bounded amount.

    Drafts also have a cost that doesn't depend on their number: a step with drafts samples in another way, which copies
    logits and verifies. This *overhead* is learned from neighboring steps, one with drafts and one
    without, minus the difference that the curve predicts. It fades while nothing is drafted, so that an estimate
    that is too high doesn't end drafting for good.

    Args:
        max_tokens: the most tokens that will be asked about, >= 1.

    Attributes:
        drafts_since_pair: steps with drafts since the overhead was last observed.
    """

    def __init__(self, max_tokens: int) -> None:
        self._knots = knots(max_tokens)
        # Until something is known, tokens cost nothing, as on a device that is limited by memory bandwidth.
        self._shape = np.zeros(len(self._knots))
        self._level: float | None = None
        self._tokens = np.arange(max_tokens + 1)
        self._unread = 0
        self._log_overhead = 0.0
        self._num_pairs = 0
        self._before: tuple[bool, float] | None = None
        self.drafts_since_pair = 0
        self._refresh()

    def warm_start(self, samples: Iterable[tuple[int, float]]) -> None:
        """Begin from steps that were timed for this.

        Args:
            samples: tokens in the batch and seconds, at least one; of those with the same number of tokens, the
                fastest counts. Beyond the last, the curve continues linearly.
        """
        fastest: dict[int, float] = {}
        for num_tokens, seconds in samples:
            fastest[num_tokens] = min(seconds, fastest.get(num_tokens, seconds))
        known = np.array(sorted(fastest))
        times = np.array([fastest[num_tokens] for num_tokens in known])
        seconds = np.interp(self._knots, known, times)
        if len(known) > 1:
            slope = max((times[-1] - times[-2]) / (known[-1] - known[-2]), 0.0)
            seconds += slope * np.maximum(self._knots - known[-1], 0)
        self._shape = np.log(seconds / seconds[0])
        self._level = float(np.log(seconds[0]))
        self._refresh()

    def observe(self, num_tokens: int, seconds: float, has_drafts: bool = False) -> None:
        """Learn from one step.

        Args:
            num_tokens: tokens in the batch, 1 to ``max_tokens``; others are ignored.
            seconds: how long it took, > 0.
            has_drafts: whether draft tokens are among them.
        """
        if not 1 <= num_tokens < len(self._tokens) or seconds <= 0:
            return
        high = int(np.searchsorted(self._knots, num_tokens))
        low = max(high - 1, 0)
        span = self._knots[high] - self._knots[low]
        share = (num_tokens - self._knots[low]) / span if span else 1.0
        expected = (1 - share) * self._shape[low] + share * self._shape[high]
        found = float(np.log(seconds)) - expected
        self._observe_overhead(has_drafts, found)
        if has_drafts:
            found -= self._log_overhead
        if self._level is None:
            self._level = found
        error = bounded(found - self._level)
        self._level += _LEVEL_RATE * error
        self._shape[low] += _SHAPE_RATE * (1 - share) * error
        self._shape[high] += _SHAPE_RATE * share * error
        self._unread += 1
        if self._unread >= _REFRESH:
            self._refresh()

    def _observe_overhead(self, has_drafts: bool, found: float) -> None:
        self.drafts_since_pair += has_drafts
        if self._before is not None and self._before[0] != has_drafts:
            difference = found - self._before[1] if has_drafts else self._before[1] - found
            error = bounded(difference - self._log_overhead)
            rate = max(PAIR_RATE, 1 / (2 + self._num_pairs))
            self._log_overhead = min(max(self._log_overhead + rate * error, 0.0), _MAX_OVERHEAD)
            self._num_pairs += 1
            self.drafts_since_pair = 0
        elif not has_drafts:
            self._log_overhead *= 1 - _OVERHEAD_FORGETTING
        self._before = (has_drafts, found)

    def skip(self) -> None:
        """Note a step that can't be learned from: the steps before and after it aren't neighbors."""
        self._before = None

    def overhead(self) -> float:
        """How many times as long a step with drafts takes as the curve predicts; >= 1."""
        return math.exp(self._log_overhead)

    def relative(self) -> np.ndarray:
        """Step times by tokens in the batch, relative to one token's.

        Returns:
            ``[max_tokens + 1]`` float64, > 0; entry 0 is that of one token.
        """
        return self._relative

    def seconds(self) -> float | None:
        """How long a step of one token takes now; None if none was observed."""
        return None if self._level is None else math.exp(self._level + self._shape[0])

    def _refresh(self) -> None:
        self._unread = 0
        self._relative = np.exp(np.interp(self._tokens, self._knots, self._shape - self._shape[0]))


def knots(max_tokens: int) -> np.ndarray:
    """The token counts of the curve's knots: 1 to 16, then 24, 32, 48, 64, ... and ``max_tokens``."""
    counts = {*range(1, min(_ALL_UP_TO, max_tokens) + 1), max_tokens}
    power = _ALL_UP_TO
    while power < max_tokens:
        counts |= {power, min(power * 3 // 2, max_tokens)}
        power *= 2
    return np.array(sorted(counts))


def bounded(error: float) -> float:
    """An error in nats of time, within `MAX_ERROR`."""
    return min(max(error, -MAX_ERROR), MAX_ERROR)


def steps_between_probes(num_probes: int, most: int) -> int:
    """After how many steps the next probe is due: fewer at first, when nothing is known.

    Args:
        num_probes: made so far.
        most: steps between two probes in the long run.
    """
    return min(_FIRST_PROBES * (1 + num_probes), most)
