"""How many draft positions every request of a step gets where all get equally many, learnt while serving.

Where the next step is scheduled before this one's drafts are known, a step takes the time of its positions whether they
are drafts or fillers, and all requests get the same number of them, its *width*. What is to be known is then what each
width emits, and what it takes.
"""

import bisect
import math
from collections.abc import Sequence

import numpy as np

# Of draft tokens whose predecessors were all accepted, by position, the share accepted of the default drafter's, fillers
# counted as rejected (`benchmarks/results/end_to_end.json`, greedy, one request at a time); the last goes on.
_ACCEPTED_AT_FIRST = (0.34, 0.6, 0.75, 0.8)
# Drafts that this counts for where nothing else is known; and that the usual counts for when a request begins.
_WEIGHT_AT_FIRST = 64.0
_WEIGHT_OF_USUAL = 8.0
# Drafts after which one counts for 1/e, of what is accepted now and of what usually is; and steps at least.
_MEMORY_NOW = 64
_MEMORY_USUAL = 4096
_MEMORY_STEPS = 16

# Steps between two looks at a neighbouring width, at first and later; more where a look is expected to cost more than such
# a share of the time.
_FIRST_LOOKS = 4
_STEPS_BETWEEN_LOOKS = 64
_LOOKING_SHARE = 1 / 400
_COST_RATE = 0.1
# Largest difference, in nats of time, that a single pair of steps may teach.
_MAX_ERROR = 0.5
# Requests that may have come or gone between the steps of a pair, as a share of them.
_PAIR_TOLERANCE = 1 / 16


class WidthsByLoad:
    """Chooses the width of each step, and learns from what steps emit and take.

    A step of R requests and width w emits R (1 + s_1 + ... + s_w) tokens in expectation, s_i being the share of drafts that
    are accepted up to their i-th token, and takes a time T_R(w). The width chosen is the one whose rate is highest among
    those whose time is known. Of T_R only the ratios of neighbouring widths matter; they are learnt, at powers of two of
    requests and interpolated between, from neighbouring steps of which one is a *look*: now and then a step has the next smaller or
    next larger width, one step in 33 at most in the long run, and fewer where they cost much. So no device has to be described, and nothing is timed at
    start-up. The s_i are learnt from all requests together; requests that begin bring with them what is usual, in proportion to
    their number.

    Args:
        by_requests: ``[max_num_reqs + 1]``, the width to begin from by the number of requests; entry 0 is unused. The
            widths chosen from are those that stand here, and 0.
        max_tokens: the most tokens of a step.
    """

    def __init__(self, by_requests: Sequence[int], max_tokens: int) -> None:
        self._first = [0, *by_requests[1:]]
        self._widths = sorted(set(self._first))
        self._usual = _Acceptance(self._widths[-1])
        self._now = _Acceptance(self._widths[-1])
        self._now.move_towards(self._usual, 1.0)
        self._costs = _Costs(len(by_requests), len(self._widths))
        self._looks = [_Looks(len(self._widths)) for _ in range(len(by_requests).bit_length() + 1)]
        self._max_tokens = max_tokens
        self._before: tuple[int, int, float] | None = None

    def choose(self, num_requests: int) -> int:
        """The width of a step.

        Args:
            num_requests: of the step, 1 to ``max_num_reqs``.
        """
        rates = self._rates(num_requests)
        best = int(np.nanargmax(rates))
        looks = self._looks_at(num_requests)
        for near in (best - 1, best + 1):
            if 0 <= near < len(rates) and looks.is_due(near, rates[best] / rates[near]):
                looks.begin(near)
                return self._widths[near]
        return self._widths[best]

    def _looks_at(self, num_requests: int) -> "_Looks":
        return self._looks[round(math.log2(num_requests))]

    def _rates(self, num_requests: int) -> np.ndarray:
        """Tokens by time of each width that fits, in any unit; NaN where the time isn't known."""
        # How many of the widths leave room for every request; one at least.
        fitting = max(1, bisect.bisect_right(self._widths, self._max_tokens // num_requests - 1))
        first = min(self._widths.index(self._first[num_requests]), fitting - 1)
        # Known are those that an unbroken row of pairs joins to the first.
        costs = self._costs.of(num_requests)
        seconds = np.exp(np.concatenate((-np.cumsum(costs[:first][::-1])[::-1], [0.0], np.cumsum(costs[first:]))))
        emitted = np.concatenate(([1.0], 1.0 + np.cumsum(self.survival())))
        return (emitted[self._widths] / seconds)[:fitting]

    def survival(self) -> np.ndarray:
        """``[longest width]`` float64, the share of drafts that are accepted up to and including each position."""
        return np.cumprod(self._now.shares(self._usual.shares()))

    def observe(self, num_requests: int, num_new: int, width: int, num_accepted: Sequence[int], seconds: float | None) -> None:
        """Learn from one step.

        Args:
            num_requests: of the step, 1 to ``max_num_reqs``.
            num_new: how many of them it was the first step of.
            width: draft positions of each request that had any, up to the longest; those not chosen from teach no time.
            num_accepted: by request that had any, draft tokens accepted, 0 to ``width``.
            seconds: what the step took, > 0; None if it read prompts or its time isn't known.
        """
        if num_new:
            self._now.move_towards(self._usual, min(num_new / num_requests, 1.0))
        if width and len(num_accepted):
            counts = np.bincount(np.minimum(num_accepted, width), minlength=width + 1)
            # How many drafts were accepted up to each position, from none on.
            up_to = counts[::-1].cumsum()[::-1]
            self._now.learn(up_to, _MEMORY_NOW)
            self._usual.learn(up_to, _MEMORY_USUAL)
        if not seconds or seconds < 0 or width not in self._widths:
            self._before = None
            return
        self._looks_at(num_requests).steps_since += 1
        found = num_requests, self._widths.index(width), math.log(seconds)
        if self._before is not None:
            self._learn_cost(self._before, found)
        self._before = found

    def _learn_cost(self, one: tuple[int, int, float], other: tuple[int, int, float]) -> None:
        narrow, wide = sorted((one, other), key=lambda step: step[1])
        apart = abs(one[0] - other[0])
        if wide[1] - narrow[1] == 1 and apart <= _PAIR_TOLERANCE * one[0]:
            self._costs.learn(one[0], narrow[1], wide[2] - narrow[2])


class _Costs:
    """Nats of time by which the next width takes longer, at powers of two of requests.

    Args:
        max_requests: the most that will be asked about.
        num_widths: widths that there are.
    """

    def __init__(self, max_requests: int, num_widths: int) -> None:
        shape = max_requests.bit_length() + 1, num_widths - 1
        self._nats = np.zeros(shape)
        self._num_pairs = np.zeros(shape)

    def of(self, num_requests: int) -> np.ndarray:
        """``[widths - 1]`` float64; NaN where nothing is known about so many requests."""
        low, share = _power_of_two(num_requests)
        weights = np.minimum(self._num_pairs[low : low + 2], 1.0) * np.array([[1 - share], [share]])
        known = weights.sum(axis=0)
        with np.errstate(invalid="ignore"):
            return np.where(known >= 0.5, (weights * self._nats[low : low + 2]).sum(axis=0) / known, np.nan)

    def learn(self, num_requests: int, at: int, nats: float) -> None:
        """Take in what a step of the width behind ``at`` took longer than its neighbour of width ``at``."""
        low, share = _power_of_two(num_requests)
        for knot, part in ((low, 1 - share), (low + 1, share)):
            if part > 0:
                self._num_pairs[knot, at] += part
                error = min(max(nats - self._nats[knot, at], -_MAX_ERROR), _MAX_ERROR)
                rate = max(_COST_RATE * part, part / self._num_pairs[knot, at])
                self._nats[knot, at] = max(self._nats[knot, at] + rate * error, 0.0)


def _power_of_two(count: int) -> tuple[int, float]:
    """The exponent below, and how far the next one has been come to."""
    exponent = math.log2(count)
    return int(exponent), exponent - int(exponent)


class _Looks:
    """Looks at widths that aren't the best, with about so many requests.

    Attributes:
        steps_since: ``[widths]``, by the width that was looked at.
    """

    def __init__(self, num_widths: int) -> None:
        self.steps_since = np.zeros(num_widths, np.int64)
        self._num_looks = 0

    def is_due(self, at: int, slowdown: float) -> bool:
        """Whether a width should be looked at.

        Args:
            at: which.
            slowdown: how many times as slow as the best it is, as far as is known; NaN if it isn't.
        """
        steps = min(_FIRST_LOOKS * (1 + self._num_looks), _STEPS_BETWEEN_LOOKS)
        if not math.isnan(slowdown):
            steps = max(steps, (slowdown - 1) / _LOOKING_SHARE)
        return self.steps_since[at] >= steps

    def begin(self, at: int) -> None:
        """Take in that a width is looked at."""
        self.steps_since[at] = 0
        self._num_looks += 1


class _Acceptance:
    """Drafts that were accepted up to each position, older ones counting less.

    Args:
        longest: draft positions there are.
    """

    def __init__(self, longest: int) -> None:
        self._shares_at_first = np.array(_ACCEPTED_AT_FIRST)[np.minimum(np.arange(longest), len(_ACCEPTED_AT_FIRST) - 1)]
        self._reached = _WEIGHT_AT_FIRST * np.cumprod(np.concatenate(([1.0], self._shares_at_first)))[:longest]
        self._accepted = self._reached * self._shares_at_first

    def learn(self, up_to: np.ndarray, memory: int) -> None:
        """Take in drafts of one step.

        Args:
            up_to: ``[width + 1]``, how many were accepted up to each position at least, from none on.
            memory: drafts after which one counts for 1/e.
        """
        width = len(up_to) - 1
        keep = 1 - 1 / max(_MEMORY_STEPS, memory / up_to[0])
        self._reached[:width] = keep * self._reached[:width] + up_to[:-1]
        self._accepted[:width] = keep * self._accepted[:width] + up_to[1:]

    def move_towards(self, usual: "_Acceptance", share: float) -> None:
        """Replace so much of it by what is usual."""
        scale = _WEIGHT_OF_USUAL / max(usual._reached[0], _WEIGHT_OF_USUAL)
        self._reached += share * (scale * usual._reached - self._reached)
        self._accepted += share * (scale * usual._accepted - self._accepted)

    def shares(self, expected: np.ndarray | None = None) -> np.ndarray:
        """``[longest]`` float64: of drafts that were accepted up to a position's predecessor, those accepted there too.

        Args:
            expected: the same where nothing is known, which counts for half a draft; by default that of the average drafter.
        """
        return (self._accepted + 0.5 * (self._shares_at_first if expected is None else expected)) / (self._reached + 0.5)
