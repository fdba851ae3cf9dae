"""How long a step of the target model takes, by the number of tokens in its batch, learned while serving."""

import math
from collections.abc import Iterable

import numpy as np

from vllm_aasd.drafting.probes import PAIR_RATE, bounded

_LEVEL_RATE = 0.2
_SHAPE_RATE = 0.02
# So many tokens may each be another kernel's.
_ALL_UP_TO = 16
# Steps between two evaluations of the curve.
_REFRESH = 16
# Of the overhead of drafts, per step without drafts, in which it can't be seen.
_OVERHEAD_FORGETTING = 0.01
_MAX_OVERHEAD = 0.7


class StepTimeModel:
    """The step-time curve: ``log T(n) = level + shape(n)``, n being the tokens in the batch.

    Drafting only ever compares step times of the same moment, so what matters is the shape. The level follows
    fast, and takes with it whatever slows all steps alike (a busy machine, longer contexts); the shape follows
    slowly from what is left. It is linear between knots, which are all counts at first and then lie ever farther
    apart. It need not rise: kernels for matrices of one row can take longer than those for several (on a CPU in
    bfloat16, 3 to 6 tokens were seen to take 0.85 of the time of 1, and 7 tokens 1.25 times as long as 6). One step
    moves level or shape by a bounded amount.

    Drafts also cost what doesn't depend on how many there are: their step samples by another way, which copies
    logits and verifies. This *overhead* is learned from neighboring steps of which one had drafts and the other
    none, the curve's difference taken off. While there are no drafts it can't be seen, and fades, so that one too
    high doesn't end drafting for good.

    Args:
        max_tokens: the most tokens that will be asked about, >= 1.

    Attributes:
        drafts_since_pair: steps with drafts since two neighboring steps last told of the overhead.
    """

    def __init__(self, max_tokens: int) -> None:
        self._knots = knots(max_tokens)
        # Before anything is known, tokens cost nothing: as on a device that is far from its knee.
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
        """Begin from steps that were timed for the purpose.

        Args:
            samples: tokens in the batch and seconds, at least one; the fastest of those with equally many
                tokens counts. Beyond the most tokens the curve goes on as straight as it came there.
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
        """Note that a step has passed that says nothing: the steps beside it are no pair."""
        self._before = None

    def overhead(self) -> float:
        """By what a step with drafts takes longer than the curve says of its tokens; >= 1."""
        return math.exp(self._log_overhead)

    def relative(self) -> np.ndarray:
        """Step times by tokens in the batch, in units of that of one token.

        Returns:
            ``[max_tokens + 1]`` float64, > 0; entry 0 is that of one token.
        """
        return self._relative

    def _refresh(self) -> None:
        self._unread = 0
        self._relative = np.exp(np.interp(self._tokens, self._knots, self._shape - self._shape[0]))


def knots(max_tokens: int) -> np.ndarray:
    """Token counts that the curve is held at: 1 to 16, then 24, 32, 48, 64, ... and ``max_tokens``."""
    counts = {*range(1, min(_ALL_UP_TO, max_tokens) + 1), max_tokens}
    power = _ALL_UP_TO
    while power < max_tokens:
        counts |= {power, min(power * 3 // 2, max_tokens)}
        power *= 2
    return np.array(sorted(counts))
