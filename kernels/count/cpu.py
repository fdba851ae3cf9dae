"""The compiled CPU path of `count` (numba), and its specification. See `vllm_aasd.kernels.count`."""

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
from vllm_aasd.kernels.verify import VerifyOutput


@compiled
def count_arrays(totals, ids, cu_num_rows, first_draft, slots, survival, emitted, relaxed, regret, exhausted, guarded):
    """The op on numpy arrays, the output's in its order: converting tensors takes ten times as long as counting."""
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


def count_drafts(
    totals: torch.Tensor,
    draft_token_ids: torch.Tensor,
    cu_num_rows: torch.Tensor,
    first_draft: int,
    idx_mapping: torch.Tensor,
    survival: torch.Tensor,
    output: VerifyOutput,
) -> None:
    """See `vllm_aasd.kernels.count.count_drafts`."""
    rows = totals.numpy(), draft_token_ids.numpy(), cu_num_rows.numpy()
    by_request = idx_mapping.numpy(), survival.numpy(), *(tensor.numpy() for tensor in output[1:])
    count_arrays(*rows, first_draft, *by_request)
