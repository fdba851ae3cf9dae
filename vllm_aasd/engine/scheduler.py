"""vLLM's scheduler, which learns how many tokens to draft, and adds up by request what the workers tell.

In force only where one of the two is wanted.
"""

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput

from vllm_aasd.engine import request_totals
from vllm_aasd.engine.failsafe import Faults
from vllm_aasd.engine.request_totals import Totals
from vllm_aasd.engine.width_schedule import WidthSchedule


class _WithWidths:
    """Stands before either of vLLM's schedulers among the base classes: it learns the widths of drafts."""

    def __init__(self, *args: Any, vllm_config: VllmConfig, **kwargs: Any) -> None:
        super().__init__(*args, vllm_config=vllm_config, **kwargs)
        self._widths: WidthSchedule | None = None
        # vLLM has dropped the schedule where it can't follow one.
        if getattr(vllm_config.speculative_config, "aasd_learns_widths", False) and self.dynamic_sd_lookup is not None:
            self._widths = WidthSchedule(self.dynamic_sd_lookup, self.max_num_scheduled_tokens)
            self.dynamic_sd_lookup = self._widths

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Also: look at the clock."""
        step = super().schedule(*args, **kwargs)
        if self._widths is not None:
            self._widths.scheduled(step)
        return step

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Also: learn from it."""
        if self._widths is not None:
            self._widths.done(scheduler_output, model_runner_output)
        return super().update_from_output(scheduler_output, model_runner_output)


class _WithTotals:
    """Stands there too: it sends a request's totals with its last output."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._totals: dict[str, Totals] = {}
        self._totals_contained = Faults().contained("metrics")

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Also: add up the step, and send what has ended."""
        with self._totals_contained:
            self._add_totals(scheduler_output, model_runner_output)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        with self._totals_contained:
            for of_client in outputs.values():
                for output in of_client.outputs:
                    if output.spec_decode_metrics is not None:
                        request_totals.send(output, self._totals.pop(output.request_id, Totals()))
        return outputs

    def _add_totals(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> None:
        for req_id in scheduler_output.finished_req_ids:
            self._totals.pop(req_id, None)
        for req_id, totals in request_totals.by_request(model_runner_output).items():
            request = self.requests.get(req_id)
            if request is None or request.is_finished():
                continue
            # vLLM throws away what comes from before a preemption.
            if request.num_stale_output_tokens > 0 and request.drop_stale_output:
                continue
            self._totals[req_id] = self._totals.get(req_id, Totals()).plus(totals)


class _Scheduler(_WithWidths, _WithTotals, Scheduler):
    pass


class _AsyncScheduler(_WithWidths, _WithTotals, AsyncScheduler):
    pass


class AASDScheduler:
    """Makes the one that vLLM would take: which, it knows when its configuration is finished."""

    def __new__(cls, vllm_config: VllmConfig, **kwargs: Any) -> Any:
        kind = _AsyncScheduler if vllm_config.scheduler_config.async_scheduling else _Scheduler
        return kind(vllm_config=vllm_config, **kwargs)
