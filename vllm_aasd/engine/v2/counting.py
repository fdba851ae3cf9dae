"""Counting on the V2 model runner: on the device, without waiting for it.

Nothing here can harm a step: what fails is a fault of ``metrics``, see `vllm_aasd.engine.failsafe`.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from vllm_aasd.counters import Counters
from vllm_aasd.engine.failsafe import Faults
from vllm_aasd.engine.request_totals import StepTotals
from vllm_aasd.kernels.count import UNPROMISED, count_drafts


class DeviceTimer:
    """Times a part of the step where it runs: on the device's own clock, asked for only once the time has passed.

    One measurement is under way at a time; while the device has not come to its end, steps go untimed.

    Args:
        device: where the part runs; on a CPU, the host's clock is the device's.
        faults: of the worker.
        observe: told the seconds.
    """

    def __init__(self, device: torch.device, faults: Faults, observe: Callable[[float], None]) -> None:
        self._device = device
        self._faults = faults
        self._contained = faults.contained("metrics")
        self._observe = observe
        self._began = 0.0
        self._events: tuple[torch.Event, torch.Event] | None = None
        self._is_pending = False

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Around the part; what that raises goes on, and is not timed."""
        is_timed = False
        if not self._faults.is_off("metrics"):
            with self._contained:
                is_timed = self._begin()
        yield
        if is_timed:
            with self._contained:
                self._end()

    def _begin(self) -> bool:
        if self._device.type == "cpu":
            self._began = time.perf_counter()
            return True
        if self._events is None:
            self._events = tuple(torch.Event(self._device, enable_timing=True) for _ in range(2))
        start, end = self._events
        if self._is_pending:
            if not end.query():
                return False
            self._is_pending = False
            self._observe(start.elapsed_time(end) / 1000)
        start.record()
        return True

    def _end(self) -> None:
        if self._device.type == "cpu":
            self._observe(time.perf_counter() - self._began)
            return
        self._events[1].record()
        self._is_pending = True


class V2Counting:
    """Counts what became of the drafts of each step, by request slot.

    Args:
        counters: to count in.
        faults: of the worker.
        max_num_reqs: slots.
        max_draft_tokens: the longest draft.
        device: that of the batch.
        step_totals: told by request too; None where nobody asks for that.

    Attributes:
        drafter, verifier: time these parts of a step.
    """

    def __init__(
        self,
        counters: Counters,
        faults: Faults,
        max_num_reqs: int,
        max_draft_tokens: int,
        device: torch.device,
        step_totals: StepTotals | None = None,
    ) -> None:
        self._step_totals = step_totals
        self._counters = counters
        self._faults = faults
        self._contained = faults.contained("metrics")
        self._promised = torch.full((max_num_reqs, max_draft_tokens), UNPROMISED, dtype=torch.float32, device=device)
        self._no_events = torch.empty(0, dtype=torch.bool, device=device)
        # `Counters.clear` makes the histograms anew.
        self.drafter = DeviceTimer(device, faults, lambda seconds: counters.drafter_time.observe(seconds))
        self.verifier = DeviceTimer(device, faults, lambda seconds: counters.verifier_time.observe(seconds))

    def promise(self, idx_mapping: torch.Tensor, survival: torch.Tensor) -> None:
        """Keep what was promised of the drafts until they are verified.

        Args:
            idx_mapping: ``[num_reqs]`` integer, the slot of each row.
            survival: ``[num_reqs, max_draft_tokens]`` float32, probabilities.
        """
        if not self._faults.is_off("metrics"):
            with self._contained:
                self._promised[idx_mapping] = survival

    def verified(
        self,
        draft_sampled: torch.Tensor,
        cu_num_logits: torch.Tensor,
        idx_mapping: torch.Tensor,
        num_sampled: torch.Tensor,
        result: Any = None,
    ) -> None:
        """Count one step.

        Args:
            draft_sampled: ``[num_logits]`` integer, as `verify_seeded` takes it: fillers are -1.
            cu_num_logits: ``[num_reqs + 1]`` integer.
            idx_mapping: ``[num_reqs]`` integer, the slot of each request.
            num_sampled: ``[num_reqs]`` int32, emitted tokens.
            result: the `SeededVerifyOutput`; None where vLLM's own sampler verified, strictly.
        """
        if self._faults.is_off("metrics"):
            return
        with self._contained:
            if result is None:
                relaxed = torch.zeros(len(draft_sampled), dtype=torch.bool, device=draft_sampled.device)
                regret = relaxed.float()
                exhausted = guarded = self._no_events
            else:
                relaxed, regret = result.relaxed, result.regret
                exhausted, guarded = result.exhausted, result.guarded
            count_drafts(
                self._counters.totals,
                draft_sampled,
                cu_num_logits,
                1,
                num_sampled,
                idx_mapping,
                self._promised,
                relaxed,
                regret,
                exhausted,
                guarded,
            )
            if result is not None and self._step_totals is not None:
                self._step_totals.add(cu_num_logits, num_sampled, relaxed, regret)
