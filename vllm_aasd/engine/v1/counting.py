"""Counting on the V1 model runner: what the host sees of each step goes into the worker's counters.

Nothing here can harm a step: what fails is a fault of ``metrics``, see `vllm_aasd.engine.failsafe`.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from vllm_aasd.counters import Counters
from vllm_aasd.drafting.drafter import Drafter
from vllm_aasd.engine.failsafe import Faults
from vllm_aasd.engine.request_totals import StepTotals
from vllm_aasd.kernels.count import UNPROMISED
from vllm_aasd.kernels.count.cpu import count_arrays
from vllm_aasd.kernels.verify import VerifyOutput

_NO_EVENTS = np.empty(0, np.bool_)


class V1Counting:
    """Counts what became of the drafts of each step.

    Args:
        counters: to count in.
        faults: of the worker.
        max_num_reqs: the most requests of a batch.
        max_draft_tokens: the longest draft.
        step_totals: told by request too; None where nobody asks for that.

    Attributes:
        drafter: has what was promised of each request's last draft; None where nothing is promised.
    """

    def __init__(
        self,
        counters: Counters,
        faults: Faults,
        max_num_reqs: int,
        max_draft_tokens: int,
        step_totals: StepTotals | None = None,
    ) -> None:
        self.drafter: Drafter | None = None
        self._step_totals = step_totals
        self._counters = counters
        self._faults = faults
        self._contained = faults.contained("metrics")
        # Views and scratch that last: to make them at every step would cost more than to count.
        self._totals = counters.totals.numpy()
        self._cu_num_rows = np.zeros(max_num_reqs + 1, np.int32)
        self._rows = np.arange(max_num_reqs)
        self._survival = np.full((max_num_reqs, max_draft_tokens), UNPROMISED, np.float32)

    def warm_up(self) -> None:
        """Compile, or load from the cache on disk, before a request waits for it."""
        nothing = torch.empty(0, dtype=torch.int32)
        with self._contained:
            self._count([], nothing, nothing, nothing.numpy(), _NO_EVENTS, np.empty(0, np.float32))

    def verified(
        self,
        req_ids: list[str],
        draft_token_ids: torch.Tensor,
        cu_num_draft_tokens: torch.Tensor,
        result: VerifyOutput,
        seconds: float,
    ) -> None:
        """Count a step that we verified.

        Args:
            req_ids: the batch.
            draft_token_ids, cu_num_draft_tokens: as `vllm_aasd.kernels.verify.verify` takes them.
            result: what that returned.
            seconds: how long it took.
        """
        if self._is_due(draft_token_ids):
            with self._contained:
                self._counters.verifier_time.observe(seconds)
                self._count(
                    req_ids,
                    draft_token_ids,
                    cu_num_draft_tokens,
                    result.num_accepted.numpy() + 1,
                    result.relaxed.numpy(),
                    result.regret.numpy(),
                    result.exhausted.numpy(),
                    result.guarded.numpy(),
                )
                if self._step_totals is not None:
                    cu_num_rows = torch.from_numpy(self._cu_num_rows[: len(req_ids) + 1])
                    self._step_totals.add(cu_num_rows, result.num_accepted + 1, result.relaxed, result.regret)

    def verified_by_vllm(
        self,
        req_ids: list[str],
        draft_token_ids: torch.Tensor,
        cu_num_draft_tokens: torch.Tensor,
        output_token_ids: torch.Tensor,
    ) -> None:
        """Count a step that vLLM's own sampler verified, strictly.

        Args:
            req_ids: the batch.
            draft_token_ids, cu_num_draft_tokens: as that takes them.
            output_token_ids: what it returned, ``[batch_size, max_spec_len + 1]`` int32.
        """
        if self._is_due(draft_token_ids):
            with self._contained:
                num_emitted = (output_token_ids >= 0).sum(1, dtype=torch.int32).numpy()
                strict = np.zeros(len(draft_token_ids), np.bool_)
                self._count(
                    req_ids, draft_token_ids, cu_num_draft_tokens, num_emitted, strict, strict.astype(np.float32)
                )

    def _is_due(self, draft_token_ids: torch.Tensor) -> bool:
        return len(draft_token_ids) > 0 and not self._faults.is_off("metrics")

    def _count(
        self,
        req_ids: list[str],
        draft_token_ids: torch.Tensor,
        cu_num_draft_tokens: torch.Tensor,
        num_emitted: np.ndarray,
        relaxed: np.ndarray,
        regret: np.ndarray,
        exhausted: np.ndarray = _NO_EVENTS,
        guarded: np.ndarray = _NO_EVENTS,
    ) -> None:
        cu_num_rows = self._cu_num_rows[: len(req_ids) + 1]
        cu_num_rows[1:] = cu_num_draft_tokens.numpy()
        survival = self._survival[: len(req_ids)]
        survival.fill(UNPROMISED)
        if self.drafter is not None:
            for row, req_id in enumerate(req_ids):
                promised = self.drafter.promised(req_id)
                survival[row, : len(promised)] = promised
        count_arrays(
            self._totals,
            draft_token_ids.numpy(),
            cu_num_rows,
            0,
            num_emitted,
            self._rows,
            self._survival,
            relaxed,
            regret,
            exhausted,
            guarded,
        )

    def drafted(self, seconds: float) -> None:
        """Count what a batch's drafts took."""
        if not self._faults.is_off("metrics"):
            with self._contained:
                self._counters.drafter_time.observe(seconds)


def timed(propose: Callable) -> Callable:
    """Have an adapter's `propose` tell its `counting` how long it takes."""

    @functools.wraps(propose)
    def timed_propose(self: Any, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        drafts = propose(self, *args, **kwargs)
        self.counting.drafted(time.perf_counter() - began)
        return drafts

    return timed_propose
