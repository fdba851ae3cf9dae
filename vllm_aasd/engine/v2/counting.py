"""Counts each step of the V2 model runner, on the device and without waiting for it.

Errors here are contained as the component ``metrics``, see `vllm_aasd.engine.failsafe`.
"""

import torch

from vllm_aasd.counters import Counters
from vllm_aasd.engine.failsafe import Faults
from vllm_aasd.kernels.count import UNPROMISED, count_drafts, strict_output
from vllm_aasd.kernels.verify import VerifyOutput


class V2Counting:
    """Counts how many draft tokens of each step were accepted, and how.

    Args:
        counters: to count in.
        faults: of the worker.
        max_num_reqs: request indices.
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
            idx_mapping: ``[num_reqs]`` integer, the request index of each row.
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
        result: VerifyOutput | None = None,
    ) -> None:
        """Count one step.

        Args:
            draft_sampled: ``[num_logits]`` integer, as `verify_seeded` takes it: fillers are -1.
            cu_num_logits: ``[num_reqs + 1]`` integer.
            idx_mapping: ``[num_reqs]`` integer, the request index of each request.
            num_sampled: ``[num_reqs]`` int32, emitted tokens.
            result: of `verify_seeded`; None if vLLM's own sampler verified, strictly.
        """
        if not self._faults.is_off("metrics"):
            with self._contained:
                result = result or strict_output(num_sampled, len(draft_sampled))
                step = draft_sampled, cu_num_logits, 1, idx_mapping, self._predicted_survival
                count_drafts(self._counters.totals, *step, result)
