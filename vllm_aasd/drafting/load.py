"""Draft lengths by load: what steps take, learnt while serving, and what drafts are worth by it."""

import math
from collections.abc import Iterable

import numpy as np

from vllm_aasd.drafting.lengths import lengths_and_gain, reproducible_lengths
from vllm_aasd.drafting.step_time import StepTimeModel

# Drafts expected to gain less than this lose as often as not, for survival and times are estimates: there are none then.
_LEAST_GAIN = 1.03
# Those expected to gain less than this might not gain at all: what they cost is then looked at now and then, by a
# step without them. At worst that takes a 160th of the time.
_CONTESTED_GAIN = 1.2
_STEPS_BETWEEN_LOOKS = 32
_FIRST_LOOKS = 4


class LengthsByLoad:
    """Chooses the lengths of each step's drafts, and learns from what its steps take.

    Args:
        max_tokens: the most tokens of a step, >= 1.
    """

    def __init__(self, max_tokens: int) -> None:
        self._step_time = StepTimeModel(max_tokens)
        self._num_looks = 0

    def warm_start(self, samples: Iterable[tuple[int, float]]) -> None:
        """Begin from steps that were timed for the purpose: see `StepTimeModel.warm_start`."""
        self._step_time.warm_start(samples)

    def relative(self) -> np.ndarray:
        """The step-time curve: see `StepTimeModel.relative`."""
        return self._step_time.relative()

    def least(self, num_requests: int) -> int:
        """How many draft tokens a request should have, however unlikely, because that makes its step faster.

        Args:
            num_requests: that decode in the step, >= 1.

        Returns:
            0 but where steps of more tokens were seen to take less time.
        """
        times = self._step_time.relative()[num_requests:]
        fastest = int(np.argmin(times)) if len(times) else 0
        if fastest == 0 or times[0] < _LEAST_GAIN * times[fastest]:
            return 0
        return math.ceil(fastest / num_requests)

    def observe(self, num_tokens: int | None, seconds: float, has_drafts: bool) -> None:
        """Learn from one step.

        Args:
            num_tokens: tokens in its batch; None if it read prompts, which says nothing of decoding.
            seconds: how long it took, > 0.
            has_drafts: whether draft tokens were among them.
        """
        if num_tokens is None:
            self._step_time.skip()
        else:
            self._step_time.observe(num_tokens, seconds, has_drafts)

    def choose(self, survival: np.ndarray, is_seeded: np.ndarray) -> np.ndarray:
        """Choose the draft lengths of a step.

        Args:
            survival: ``[B, K]``, as for `vllm_aasd.drafting.lengths.draft_lengths`.
            is_seeded: ``[B]`` bool, the requests whose lengths may depend on nothing but their drafts.

        Returns:
            ``[B]`` int64.
        """
        by_load = np.where(is_seeded[:, None], 0, survival)
        lengths, gain = lengths_and_gain(by_load, self._step_time.relative(), self._step_time.overhead())
        if is_seeded.any():
            lengths[is_seeded] = reproducible_lengths(survival[is_seeded])
        elif gain < _LEAST_GAIN:
            return np.zeros_like(lengths)
        elif gain < _CONTESTED_GAIN and self._is_look_due():
            self._num_looks += 1
            return np.zeros_like(lengths)
        return lengths

    def _is_look_due(self) -> bool:
        # At first more often, as nothing is known.
        steps = min(_FIRST_LOOKS * (1 + self._num_looks), _STEPS_BETWEEN_LOOKS)
        return self._step_time.drafts_since_pair >= steps
