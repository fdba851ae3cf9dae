"""Counting on the V1 model runner: what the host sees of each step goes into the worker's counters."""

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from vllm_aasd.counters import Counters
from vllm_aasd.kernels.count import UNPROMISED
from vllm_aasd.kernels.count_cpu import count_arrays
from vllm_aasd.kernels.verify import VerifyOutput

_NO_EVENTS = np.empty(0, np.bool_)


class V1Counting:
    """Counts what became of the drafts of each step.

    Args:
        counters: to count in.
        max_num_reqs: the most requests of a batch.
        max_draft_tokens: the longest draft.
        promised: of the request in a row of the batch, the survival promised of its last draft, ``[n]`` float32.
    """

    def __init__(
        self,
        counters: Counters,
        max_num_reqs: int,
        max_draft_tokens: int,
        promised: Callable[[int], np.ndarray],
    ) -> None:
        self._counters = counters
        self._promised = promised
        # Views and scratch that last: to make them at every step would cost more than to count.
        self._totals = counters.totals.numpy()
        self._cu_num_rows = np.zeros(max_num_reqs + 1, np.int32)
        self._rows = np.arange(max_num_reqs)
        self._survival = np.full((max_num_reqs, max_draft_tokens), UNPROMISED, np.float32)

    def verified(
        self,
        draft_token_ids: torch.Tensor,
        cu_num_draft_tokens: torch.Tensor,
        result: VerifyOutput,
        seconds: float,
    ) -> None:
        """Count one step.

        Args:
            draft_token_ids, cu_num_draft_tokens: as `vllm_aasd.kernels.verify.verify` took them.
            result: what it returned.
            seconds: how long verification took.
        """
        if not len(draft_token_ids):
            return
        self._counters.verifier_time.observe(seconds)
        batch_size = len(cu_num_draft_tokens)
        cu_num_rows = self._cu_num_rows[: batch_size + 1]
        cu_num_rows[1:] = cu_num_draft_tokens.numpy()
        for row in (cu_num_rows[1:] > cu_num_rows[:-1]).nonzero()[0].tolist():
            promised = self._promised(row)
            self._survival[row, : len(promised)] = promised
            self._survival[row, len(promised) :] = UNPROMISED
        count_arrays(
            self._totals,
            draft_token_ids.numpy(),
            cu_num_rows,
            0,
            result.num_accepted.numpy() + 1,
            self._rows,
            self._survival,
            result.relaxed.numpy(),
            result.regret.numpy(),
            _events(result, "exhausted"),
            _events(result, "guarded"),
        )


def timed(propose: Callable) -> Callable:
    """Count the time that an adapter's `propose` takes, in its `counters`."""

    @functools.wraps(propose)
    def timed_propose(self: Any, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        drafts = propose(self, *args, **kwargs)
        self.counters.drafter_time.observe(time.perf_counter() - began)
        return drafts

    return timed_propose


def _events(result: VerifyOutput, name: str) -> np.ndarray:
    """What a policy with a budget or a guard tells besides; nothing of one without."""
    events = getattr(result, name, None)
    return _NO_EVENTS if events is None else events.numpy()
