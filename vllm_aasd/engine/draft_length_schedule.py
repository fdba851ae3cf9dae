"""The draft lengths that vLLM's scheduler uses, learned from each step."""

import collections
import logging
import time

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from vllm_aasd.drafting.batch_draft_length import BatchDraftLength
from vllm_aasd.engine.configuration import DRAFT_SCHEDULE
from vllm_aasd.engine.failsafe import Faults

logger = logging.getLogger("vllm.aasd")

MOE_SCHEDULE = ((8, 1),)
"""`DRAFT_SCHEDULE` for mixtures of experts. Each draft token brings experts of its own: with few requests, a step reads
the weights of nearly as many experts more as it has tokens more."""

# The most steps in flight: vLLM has one per pipeline stage, and one more.
_MAX_UNDER_WAY = 64


class DraftLengthSchedule:
    """Replaces the scheduler's ``dynamic_sd_lookup``, which is indexed by the number of requests.

    Args:
        lookup: vLLM's, by the number of requests. Its lengths are those to choose from, for which there are CUDA
            graphs. The initial ones are those of `DRAFT_SCHEDULE`.
        max_step_tokens: the most tokens of a step with drafts: that there is room for, and a CUDA graph.
        is_moe: whether the target is a mixture of experts, which begins with `MOE_SCHEDULE`.
    """

    def __init__(self, lookup: list[int], max_step_tokens: float, is_moe: bool) -> None:
        longest = max(lookup)
        first = MOE_SCHEDULE if is_moe else ((DRAFT_SCHEDULE[0][0], longest), *DRAFT_SCHEDULE[1:])
        self._lookup = [
            next((min(length, longest) for last, length in first if number <= last), 0) for number in range(len(lookup))
        ]
        self._draft_length = BatchDraftLength(self._lookup, max_step_tokens, lookup)
        self._faults = Faults()
        self._contained = self._faults.contained("step_time")
        # Steps in flight, oldest first, and when they were scheduled.
        self._under_way: collections.deque[tuple[SchedulerOutput, float]] = collections.deque(maxlen=_MAX_UNDER_WAY)
        self._last_done = 0.0
        logger.info("aasd is live: the scheduler learns the draft length from its steps")

    def __getitem__(self, num_requests: int) -> int:
        if not self._faults.is_off("step_time"):
            with self._contained:
                return self._draft_length.choose(num_requests)
        return self._lookup[num_requests]

    def scheduled(self, step: SchedulerOutput) -> None:
        """Note that a step was scheduled."""
        self._under_way.append((step, time.perf_counter()))

    def done(self, step: SchedulerOutput, output: ModelRunnerOutput) -> None:
        """Learn from a step that is done."""
        now = time.perf_counter()
        if not self._faults.is_off("step_time"):
            with self._contained:
                self._learn(step, output, now)
        self._last_done = now

    def _learn(self, step: SchedulerOutput, output: ModelRunnerOutput, now: float) -> None:
        began = None
        while self._under_way and began is None:
            other, scheduled = self._under_way.popleft()
            if other is step:
                # The device begins a step when it is scheduled and the one before is done.
                began = max(scheduled, self._last_done)
        drafts = step.scheduled_spec_decode_tokens
        num_requests = len(step.num_scheduled_tokens)
        if num_requests == 0:
            return
        emitted = [len(output.sampled_token_ids[output.req_id_to_index[req_id]]) for req_id in drafts]
        is_decode = all(
            num_tokens == 1 + len(drafts.get(req_id, ())) for req_id, num_tokens in step.num_scheduled_tokens.items()
        )
        self._draft_length.observe(
            num_requests,
            len(step.scheduled_new_reqs),
            max(map(len, drafts.values()), default=0),
            [count - 1 for count in emitted if count],
            now - began if is_decode and began is not None else None,
        )
