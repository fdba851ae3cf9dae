"""vLLM's scheduler, extended.

It says whose text a request may draft from, learns how many tokens to draft, and drafts where there is a grammar.
"""

import math
from typing import TYPE_CHECKING, Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_aasd.drafting.router import LONGEST_DRAFT
from vllm_aasd.engine.draft_length_schedule import DraftLengthSchedule
from vllm_aasd.engine.failsafe import Faults
from vllm_aasd.engine.namespaces import Namespaces

if TYPE_CHECKING:
    from vllm_aasd.engine.grammar.drafts import GrammarDrafts

# For mypy only: either of vLLM's schedulers comes next in the base classes.
_Base: Any = Scheduler if TYPE_CHECKING else object


def _most_graph_tokens(vllm_config: VllmConfig) -> float:
    """The most tokens of a step for which there is a CUDA graph; no bound where there are none at all."""
    compilation_config = vllm_config.compilation_config
    if not compilation_config.cudagraph_mode:
        return math.inf
    return compilation_config.max_cudagraph_capture_size or math.inf


class _AASDScheduling(_Base):
    """Comes before either of vLLM's schedulers in the base classes."""

    dynamic_sd_lookup: Any

    def __init__(self, *args: Any, vllm_config: VllmConfig, **kwargs: Any) -> None:
        super().__init__(*args, vllm_config=vllm_config, **kwargs)
        self._namespaces = Namespaces()
        self._draft_lengths: DraftLengthSchedule | None = None
        self._grammars = _grammar_drafts(vllm_config, self.structured_output_manager)
        if getattr(vllm_config.speculative_config, "aasd_draft_model", None) is not None:
            # It reads its own draft tokens, which the target hasn't been scheduled for.
            self.num_lookahead_tokens = LONGEST_DRAFT
        # vLLM has dropped the schedule where it can't follow one.
        if getattr(vllm_config.speculative_config, "aasd_learns_widths", False) and self.dynamic_sd_lookup is not None:
            self._draft_lengths = DraftLengthSchedule(
                self.dynamic_sd_lookup,
                min(self.max_num_scheduled_tokens, _most_graph_tokens(vllm_config)),
                vllm_config.model_config.is_moe,
            )
            self.dynamic_sd_lookup = self._draft_lengths
        elif not vllm_config.use_v2_model_runner and self.dynamic_sd_lookup is None:
            # Without a schedule, vLLM pads steps with placeholder draft tokens, for CUDA graphs. On CPUs they only take
            # time and random numbers, and requests that must have no drafts would get some.
            self.dynamic_sd_lookup = [self.num_spec_tokens] * (self.max_num_running_reqs + 1)

    def add_request(self, request: Request) -> None:
        """Also: say whose text it shares."""
        self._namespaces.assign(request)
        super().add_request(request)

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """Also: from now on, requests don't share the text of earlier ones."""
        self._namespaces.reset()
        return super().reset_prefix_cache(*args, **kwargs)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Also: note the time."""
        step = super().schedule(*args, **kwargs)
        if self._draft_lengths is not None:
            self._draft_lengths.scheduled(step)
        if self._grammars is not None:
            self._grammars.forget(step.finished_req_ids)
        return step

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Also: with structured output, draft what the grammar forces."""
        if self._grammars is not None:
            draft_token_ids = self._grammars.steered(draft_token_ids, self.requests)
        super().update_draft_token_ids(draft_token_ids)

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> GrammarOutput | None:
        """Also: tell the workers, which keep the metrics, what became of drafts."""
        masks = super().get_grammar_bitmask(scheduler_output)
        return masks if masks is None or self._grammars is None else self._grammars.counted(masks)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Also: learn from it."""
        if self._draft_lengths is not None:
            self._draft_lengths.done(scheduler_output, model_runner_output)
        if self._grammars is not None:
            self._grammars.learn(scheduler_output, model_runner_output)
        return super().update_from_output(scheduler_output, model_runner_output)


class _Scheduler(_AASDScheduling, Scheduler):
    pass


class _AsyncScheduler(_AASDScheduling, AsyncScheduler):
    pass


class AASDScheduler:
    """Makes the one that vLLM would take: which, it knows when its configuration is finished."""

    def __new__(cls, vllm_config: VllmConfig, **kwargs: Any) -> Any:
        kind = _AsyncScheduler if vllm_config.scheduler_config.async_scheduling else _Scheduler
        return kind(vllm_config=vllm_config, **kwargs)


def _grammar_drafts(vllm_config: VllmConfig, manager: StructuredOutputManager) -> "GrammarDrafts | None":
    """What drafts beside grammars; None where a step begins before it is known where the grammars stand."""
    if vllm_config.scheduler_config.async_scheduling or vllm_config.model_config.skip_tokenizer_init:
        return None
    # It loads compiled code, which takes a while.
    from vllm_aasd.engine.grammar.drafts import GrammarDrafts

    return GrammarDrafts(vllm_config, manager, Faults())
