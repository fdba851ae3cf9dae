"""Counting on the V2 model runner: on the device, without waiting for it.

Nothing here can harm a step: what fails is a fault of ``metrics``, see `vllm_aasd.engine.failsafe`.
"""

from typing import Any

import torch

from vllm_aasd.counters import Counters
from vllm_aasd.engine.failsafe import Faults
from vllm_aasd.kernels.count import UNPROMISED, count_drafts


class V2Counting:
    """Counts what became of the drafts of each step, by request slot.

    Args:
        counters: to count in.
        faults: of the worker.
        max_num_reqs: slots.
        max_draft_tokens: the longest draft.
        device: that of the batch.
    """

    def __init__(
        self, counters: Counters, faults: Faults, max_num_reqs: int, max_draft_tokens: int, device: torch.device
    ) -> None:
        self._counters = counters
        self._faults = faults
        self._contained = faults.contained("metrics")
        shape = max_num_reqs, max_draft_tokens
        self._predicted_survival = torch.full(shape, UNPROMISED, dtype=torch.float32, device=device)

    def predict(self, idx_mapping: torch.Tensor, survival: torch.Tensor) -> None:
        """Keep the survival predicted for the drafts until they are verified.

        Args:
            idx_mapping: ``[num_reqs]`` integer, the slot of each row.
            survival: ``[num_reqs, max_draft_tokens]`` float32, probabilities.
        """
        if not self._faults.is_off("metrics"):
            with self._contained:
                self._predicted_survival[idx_mapping] = survival

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
            result: the `VerifyOutput`; None where vLLM's own sampler verified, strictly.
        """
        if self._faults.is_off("metrics"):
            return
        with self._contained:
            if result is None:
                relaxed = torch.zeros(len(draft_sampled), dtype=torch.bool, device=draft_sampled.device)
                no_events = torch.zeros(len(num_sampled), dtype=torch.bool, device=draft_sampled.device)
                by_rule = relaxed, relaxed.float(), no_events, no_events
            else:
                by_rule = result.relaxed, result.regret, result.exhausted, result.guarded
            step = draft_sampled, cu_num_logits, 1, num_sampled, idx_mapping, self._predicted_survival
            count_drafts(self._counters.totals, *step, *by_rule)
