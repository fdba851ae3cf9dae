"""Where a draft ends on the V1 model runner."""

from collections.abc import Sequence

import numpy as np
from vllm.v1.core.sched.output import NewRequestData

from vllm_aasd.drafting.draft_length import LengthsByLoad, reproducible_lengths
from vllm_aasd.engine.failsafe import Faults
from vllm_aasd.engine.mm_tokens import PlaceholderTokens


class V1DraftLengths:
    """Limits drafts by the placeholders of images, and by what a longer step would cost.

    Args:
        max_step_tokens: the most tokens of a step, >= 1.
        is_adaptive: whether lengths depend on the time that steps take.
        faults: of the worker.

    Attributes:
        by_load: what is known of the time that steps take.
    """

    def __init__(self, max_step_tokens: int, is_adaptive: bool, faults: Faults) -> None:
        self.by_load = LengthsByLoad(max_step_tokens)
        self._is_adaptive = is_adaptive
        self._faults = faults
        self._placeholders = PlaceholderTokens()

    def learn(self, requests: Sequence[NewRequestData]) -> None:
        """Note which tokens stand for images in new requests."""
        self._placeholders.learn(requests)

    def observe(self, num_decode_tokens: int | None, seconds: float, has_drafts: bool) -> None:
        """Learn from the time of a step; see `LengthsByLoad.observe`."""
        if not self._faults.is_off("step_time"):
            with self._faults.contained("step_time"):
                self.by_load.observe(num_decode_tokens, seconds, has_drafts)

    def min_draft_tokens(self, num_requests: int) -> int:
        """How many tokens to draft for each request at least, because that makes the step faster."""
        if self._is_adaptive and not self._faults.is_off("step_time"):
            with self._faults.contained("step_time"):
                return self.by_load.min_draft_tokens(num_requests)
        return 0

    def times(self) -> tuple[np.ndarray | None, float]:
        """The times of steps by their tokens, None if lengths don't depend on them; and the overhead of drafts."""
        if not self._is_adaptive or self._faults.is_off("step_time"):
            return None, 1.0
        return self.by_load.step_time.relative(), self.by_load.step_time.overhead()

    def before_placeholders(self, drafts: list[list[int]], survival: np.ndarray) -> list[list[int]]:
        """End the drafts of a step before placeholders.

        Args:
            drafts: per request.
            survival: ``[B, K]`` float32, of each draft token; set to 0 after the end.
        """
        drafts = [self._placeholders.before_first(draft) for draft in drafts]
        for row, draft in enumerate(drafts):
            survival[row, len(draft) :] = 0
        return drafts

    def cut(self, drafts: list[list[int]], survival: np.ndarray, is_seeded: Sequence[bool]) -> list[list[int]]:
        """End the drafts of a step where more tokens aren't worth the time.

        Args:
            drafts: per request.
            survival: ``[B, K]`` float32, the probability that each draft token is accepted; 0 after the end.
            is_seeded: per request, whether its length may depend on its draft only.
        """
        if not self._is_adaptive:
            return drafts
        lengths = self._lengths(survival, np.array(is_seeded, np.bool_))
        return [draft[:length] for draft, length in zip(drafts, lengths, strict=True)]

    def _lengths(self, survival: np.ndarray, is_seeded: np.ndarray) -> np.ndarray:
        if not self._faults.is_off("step_time"):
            with self._faults.contained("step_time"):
                return self.by_load.choose(survival, is_seeded)
        return reproducible_lengths(survival)
