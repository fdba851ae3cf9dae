"""The draft length of a batch whose requests all get the same number of draft positions, learned while serving.

If the next step is scheduled before this step's drafts are known, all requests get the same number of draft positions,
and these take time whether they hold drafts or fillers. So what matters is how many tokens each length emits, and how
long it takes.
"""

import bisect
import itertools
import math
import operator
from collections.abc import Iterable, Sequence

from vllm_aasd.drafting.step_time import PAIR_RATE, bounded, steps_between_probes

# By position, the share of the default drafter's tokens that are accepted if all before them are; fillers count as
# rejected (`benchmarks/results/end_to_end.json`, greedy, one request at a time). The last also holds after it.
_ACCEPTED_AT_FIRST = (0.34, 0.6, 0.75, 0.8)
# The weights, in drafts, of the above before anything is known, and of what is usual when a request begins.
_WEIGHT_AT_FIRST = 64.0
_WEIGHT_OF_USUAL = 8.0
# The weight of what is expected at positions that are hardly ever reached.
_LEAST_WEIGHT = 0.5
# Drafts after which one counts for 1/e, for current and for usual acceptance; and the least number of steps.
_MEMORY_NOW = 64
_MEMORY_USUAL = 4096
_MEMORY_STEPS = 16

# Steps between two probes of a neighboring length in the long run; more if they cost more than this share of the time.
_STEPS_BETWEEN_PROBES = 64
_PROBING_SHARE = 1 / 400
# The share of requests that may have come or gone between the steps of a pair.
_PAIR_TOLERANCE = 1 / 16


class BatchDraftLength:
    """Chooses the draft length of each step, and learns from the tokens that steps emit and the time that they take.

    A step of R requests with n draft tokens each emits an expected R (1 + s_1 + ... + s_n) tokens, s_i being the share
    of drafts that are accepted up to their i-th token, and takes the time T_R(n). Of the lengths whose time is known,
    the one with the highest rate is chosen. Only the ratios of T_R between neighboring lengths matter. They are learned
    at powers of two of R, and interpolated, from neighboring steps, one of them a *probe*: now and then a step has
    the next smaller or next larger length, at most one step in 33 in the long run, and fewer if probes are expensive.
    So nothing has to be known of the device, and nothing is timed at start-up. The s_i are learned from all requests
    together; when requests begin, the estimate moves towards what is usual, in proportion to their number.

    Args:
        by_requests: ``[max_num_reqs + 1]``, the initial draft length by the number of requests; entry 0 is unused.
        max_tokens: the most tokens of a step.
        lengths: further lengths to choose from, besides the initial ones and 0.
    """

    def __init__(self, by_requests: Sequence[int], max_tokens: float, lengths: Iterable[int] = ()) -> None:
        self._first = [0, *by_requests[1:]]
        self._lengths = sorted({*self._first, *lengths})
        self._max_tokens = max_tokens
        self._usual = _Acceptance(self._lengths[-1])
        self._now = _Acceptance(self._lengths[-1])
        num_knots = len(by_requests).bit_length() + 1
        self._costs = _Costs(num_knots, len(self._lengths))
        self._probes = [_Probes(len(self._lengths)) for _ in range(num_knots)]
        self._before: tuple[int, int, float] | None = None

    def choose(self, num_requests: int) -> int:
        """The draft length of a step.

        Args:
            num_requests: of the step, 1 to ``max_num_reqs``.
        """
        # The number of lengths that leave room for every request; at least one.
        num_fitting = max(1, bisect.bisect_right(self._lengths, self._max_tokens / num_requests - 1))
        rates = self._rates(num_requests, num_fitting)
        best = max(rates, key=rates.__getitem__)
        probes = self._probes_of(num_requests)
        for near in (best - 1, best + 1):
            if 0 <= near < num_fitting and probes.is_due(near, rates[best] / rates.get(near, math.inf)):
                probes.begin(near)
                return self._lengths[near]
        return self._lengths[best]

    def survival(self) -> list[float]:
        """By position, the share of drafts that are accepted up to and including it."""
        return list(itertools.accumulate(self._now.shares(self._usual.shares()), operator.mul))

    def observe(
        self, num_requests: int, num_new: int, num_spec_tokens: int, num_accepted: Sequence[int], seconds: float | None
    ) -> None:
        """Learn from one step.

        Args:
            num_requests: of the step, 1 to ``max_num_reqs``.
            num_new: requests whose first step it was.
            num_spec_tokens: draft positions of each request with drafts; the times of lengths that aren't chosen from
                are ignored.
            num_accepted: accepted draft tokens of each request with drafts, 0 to ``num_spec_tokens``.
            seconds: the time of the step; None if it read prompts or its time isn't known.
        """
        if num_new:
            self._now.move_towards(self._usual, min(num_new / num_requests, 1.0))
        if num_accepted:
            counts = [0] * (num_spec_tokens + 1)
            for count in num_accepted:
                counts[count] += 1
            # The number of drafts that were accepted up to each position, or further.
            up_to = list(itertools.accumulate(reversed(counts)))[::-1]
            self._now.learn(up_to, _MEMORY_NOW)
            self._usual.learn(up_to, _MEMORY_USUAL)
        if seconds is None or seconds <= 0 or num_spec_tokens not in self._lengths:
            self._before = None
            return
        self._probes_of(num_requests).pass_by()
        before, self._before = self._before, (num_requests, self._lengths.index(num_spec_tokens), math.log(seconds))
        if before is not None:
            self._learn_cost(before, self._before)

    def _probes_of(self, num_requests: int) -> "_Probes":
        return self._probes[round(math.log2(num_requests))]

    def _rates(self, num_requests: int, num_fitting: int) -> dict[int, float]:
        """Tokens per time, in any unit, of each length that fits, if its time relative to the initial one is known."""
        emitted = list(itertools.accumulate(self.survival(), initial=1.0))
        costs = self._costs.of(num_requests)
        first = min(self._lengths.index(self._first[num_requests]), num_fitting - 1)
        rates = {first: emitted[self._lengths[first]]}
        for direction, ends in ((-1, range(first - 1, -1, -1)), (1, range(first + 1, num_fitting))):
            nats = 0.0
            for at in ends:
                step = costs[min(at, at - direction)]
                if step is None:
                    break
                nats += direction * step
                rates[at] = emitted[self._lengths[at]] * math.exp(-nats)
        return rates

    def _learn_cost(self, one: tuple[int, int, float], other: tuple[int, int, float]) -> None:
        narrow, wide = sorted((one, other), key=lambda step: step[1])
        apart = abs(one[0] - other[0])
        if wide[1] - narrow[1] == 1 and apart <= _PAIR_TOLERANCE * one[0]:
            self._costs.learn(one[0], narrow[1], wide[2] - narrow[2])


class _Acceptance:
    """Counts of drafts that were accepted up to each position, older ones weighted less.

    Args:
        longest: number of draft positions.
    """

    def __init__(self, longest: int) -> None:
        last = len(_ACCEPTED_AT_FIRST) - 1
        self._at_first = [_ACCEPTED_AT_FIRST[min(at, last)] for at in range(longest)]
        up_to = list(itertools.accumulate(self._at_first, operator.mul, initial=_WEIGHT_AT_FIRST))
        self._reached, self._accepted = up_to[:-1], up_to[1:]

    def learn(self, up_to: Sequence[int], memory: int) -> None:
        """Learn from the drafts of one step.

        Args:
            up_to: ``[num_spec_tokens + 1]``, the number of drafts with at least 0, 1, ... accepted tokens.
            memory: drafts after which one counts for 1/e.
        """
        keep = 1 - 1 / max(_MEMORY_STEPS, memory / up_to[0])
        for at, (reached, accepted) in enumerate(itertools.pairwise(up_to)):
            self._reached[at] = keep * self._reached[at] + reached
            self._accepted[at] = keep * self._accepted[at] + accepted

    def move_towards(self, usual: "_Acceptance", share: float) -> None:
        """Replace a share of it by what is usual."""
        usual_share = share * _WEIGHT_OF_USUAL / max(usual._reached[0], _WEIGHT_OF_USUAL)
        for ours, theirs in ((self._reached, usual._reached), (self._accepted, usual._accepted)):
            ours[:] = [(1 - share) * one + usual_share * other for one, other in zip(ours, theirs, strict=True)]

    def shares(self, expected: Sequence[float] | None = None) -> list[float]:
        """By position, the share of tokens that are accepted if all before them are.

        Args:
            expected: the same where nothing is known; by default, the average drafter's.
        """
        return [
            (accepted + _LEAST_WEIGHT * share) / (reached + _LEAST_WEIGHT)
            for accepted, reached, share in zip(self._accepted, self._reached, expected or self._at_first, strict=True)
        ]


class _Costs:
    """Nats of time that the next length takes longer, at powers of two of requests.

    Args:
        num_knots: powers of two, from 1 on.
        num_lengths: number of draft lengths.
    """

    def __init__(self, num_knots: int, num_lengths: int) -> None:
        self._nats = [[0.0] * (num_lengths - 1) for _ in range(num_knots)]
        self._num_pairs = [[0.0] * (num_lengths - 1) for _ in range(num_knots)]

    def of(self, num_requests: int) -> list[float | None]:
        """By length, except the last; None if nothing is known for this number of requests."""
        low, share = _power_of_two(num_requests)
        found: list[float | None] = []
        for at in range(len(self._nats[low])):
            below = (1 - share) * min(self._num_pairs[low][at], 1.0)
            above = share * min(self._num_pairs[low + 1][at], 1.0)
            nats = below * self._nats[low][at] + above * self._nats[low + 1][at]
            found.append(nats / (below + above) if below + above >= 0.5 else None)
        return found

    def learn(self, num_requests: int, at: int, nats: float) -> None:
        """Learn from two neighboring steps, of length ``at`` and of the next length, which took ``nats`` longer."""
        low, share = _power_of_two(num_requests)
        for knot, part in ((low, 1 - share), (low + 1, share)):
            if part > 0:
                self._num_pairs[knot][at] += part
                error = bounded(nats - self._nats[knot][at])
                rate = max(PAIR_RATE * part, part / self._num_pairs[knot][at])
                self._nats[knot][at] = max(self._nats[knot][at] + rate * error, 0.0)


def _power_of_two(count: int) -> tuple[int, float]:
    """The exponent of the power of two below, and how far the count is on the way to the next, in [0, 1)."""
    exponent = math.log2(count)
    return int(exponent), exponent - int(exponent)


class _Probes:
    """When lengths that aren't the best are probed, for about the same number of requests.

    Args:
        num_lengths: number of draft lengths.
    """

    def __init__(self, num_lengths: int) -> None:
        self._steps_since = [0] * num_lengths
        self._num_probes = 0

    def pass_by(self) -> None:
        """Note a step whose time is known."""
        self._steps_since = [steps + 1 for steps in self._steps_since]

    def is_due(self, at: int, slowdown: float) -> bool:
        """Whether a length should be probed.

        Args:
            at: the length.
            slowdown: its slowdown relative to the best; 0 if it isn't known.
        """
        steps = steps_between_probes(self._num_probes, _STEPS_BETWEEN_PROBES)
        return self._steps_since[at] >= max(steps, (slowdown - 1) / _PROBING_SHARE)

    def begin(self, at: int) -> None:
        """Note a probe of a length."""
        self._steps_since[at] = 0
        self._num_probes += 1
