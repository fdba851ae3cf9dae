"""The compiled CPU path of `count` (numba), and its specification. See `vllm_aasd.kernels.count`."""

from typing import Any

import numpy as np
import torch

from vllm_aasd.kernels.common.compiled import compiled
from vllm_aasd.kernels.count import (
    EXHAUSTED,
    GUARDED,
    REGRET,
    RELAXED,
    SURVIVAL_ACCEPTED,
    SURVIVAL_BINS,
    SURVIVAL_PROMISED,
    SURVIVAL_TOKENS,
)


@compiled
def count_arrays(totals, ids, cu_num_rows, first_draft, emitted, slots, survival, relaxed, regret, exhausted, guarded):
    """The op on numpy arrays, for callers that have them: handing over tensors takes ten times as long as this."""
    for req in range(emitted.size):
        totals[EXHAUSTED] += exhausted[req]
        totals[GUARDED] += guarded[req]
        start = cu_num_rows[req]
        for row in range(start, min(cu_num_rows[req + 1] - first_draft, start + survival.shape[1])):
            if ids[row + first_draft] < 0:
                break
            place = row - start
            is_accepted = place < emitted[req] - 1
            if is_accepted:
                totals[RELAXED] += relaxed[row]
                totals[REGRET] += regret[row]
            promised = survival[slots[req], place]
            if promised >= 0:
                tenth = min(int(promised * np.float32(SURVIVAL_BINS)), SURVIVAL_BINS - 1)
                totals[SURVIVAL_TOKENS + tenth] += 1
                totals[SURVIVAL_PROMISED + tenth] += promised
                totals[SURVIVAL_ACCEPTED + tenth] += is_accepted


def count_drafts(totals: torch.Tensor, *step: Any) -> None:
    """See `vllm_aasd.kernels.count.count_drafts`."""
    count_arrays(totals.numpy(), *(each.numpy() if torch.is_tensor(each) else each for each in step))
