"""Counts each step of the V1 model runner.

Errors here are contained as the component ``metrics``, see `vllm_aasd.engine.failsafe`.
"""

from typing import Protocol

import numpy as np
import torch

from vllm_aasd.counters import Counters
from vllm_aasd.engine.failsafe import Faults
from vllm_aasd.kernels.count import UNPROMISED, strict_output
from vllm_aasd.kernels.count.cpu import count_arrays
from vllm_aasd.kernels.verify import VerifyOutput


class _Predicts(Protocol):
    def predicted_survival(self, request_id: str) -> np.ndarray: ...


class V1Counting:
    """Counts how many draft tokens of each step were accepted, and how.

    Args:
        counters: to count in.
        faults: of the worker.
        max_num_reqs: the most requests of a batch.
        max_draft_tokens: the longest draft.

    Attributes:
        drafter: predicted the survival of each request's last draft; None if nothing did.
    """

    def __init__(self, counters: Counters, faults: Faults, max_num_reqs: int, max_draft_tokens: int) -> None:
        self.drafter: _Predicts | None = None
        self._faults = faults
        self._contained = faults.contained("metrics")
        # Kept between steps: making these arrays takes longer than counting.
        self._totals = counters.totals.numpy()
        self._cu_num_rows = np.zeros(max_num_reqs + 1, np.int32)
        self._rows = np.arange(max_num_reqs)
        self._survival = np.full((max_num_reqs, max_draft_tokens), UNPROMISED, np.float32)

    def warm_up(self) -> None:
        """Compile, or load from the cache on disk, before a request waits for it."""
        nothing_drafted = torch.tensor([-1], dtype=torch.int32)
        self.verified([""], nothing_drafted, torch.tensor([1], dtype=torch.int32), torch.tensor([[0]]))

    def verified(
        self,
        req_ids: list[str],
        draft_token_ids: torch.Tensor,
        cu_num_draft_tokens: torch.Tensor,
        result: VerifyOutput | torch.Tensor,
    ) -> None:
        """Count a step.

        Args:
            req_ids: the batch.
            draft_token_ids, cu_num_draft_tokens: as `vllm_aasd.kernels.verify.verify` takes them.
            result: what that returned; or the output of vLLM's own sampler, which is strict,
                ``[batch_size, max_spec_len + 1]`` int32.
        """
        if len(draft_token_ids) == 0 or self._faults.is_off("metrics"):
            return
        with self._contained:
            if isinstance(result, torch.Tensor):
                result = strict_output((result >= 0).sum(1, dtype=torch.int32), len(draft_token_ids))
            cu_num_rows = self._cu_num_rows[: len(req_ids) + 1]
            cu_num_rows[1:] = cu_num_draft_tokens.numpy()
            survival = self._survival[: len(req_ids)]
            survival.fill(UNPROMISED)
            if self.drafter is not None:
                for row, req_id in enumerate(req_ids):
                    predicted = self.drafter.predicted_survival(req_id)
                    survival[row, : len(predicted)] = predicted
            count_arrays(
                self._totals,
                draft_token_ids.numpy(),
                cu_num_rows,
                0,
                self._rows,
                self._survival,
                *(tensor.numpy() for tensor in result[1:]),
            )
