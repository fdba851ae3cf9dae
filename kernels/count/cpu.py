"""The compiled CPU path of `count` (numba). What is counted is in `vllm_aasd.kernels.count`."""

import numpy as np
import torch

from vllm_aasd.kernels.common.compiled import compiled
from vllm_aasd.kernels.count.reference import (
    ACCEPTED,
    DRAFT_TOKENS,
    DRAFTS,
    EXHAUSTED,
    GUARDED,
    LENGTHS,
    REGRET,
    RELAXED,
    SURVIVAL_ACCEPTED,
    SURVIVAL_BINS,
    SURVIVAL_PROMISED,
    SURVIVAL_TOKENS,
)


@compiled
def count_arrays(
    totals,
    draft_token_ids,
    cu_num_rows,
    first_draft,
    num_emitted,
    idx_mapping,
    survival,
    relaxed,
    regret,
    exhausted,
    guarded,
):
    """The op on numpy arrays, for who has them: tensors cost ten times as much to hand over as this takes."""
    for req in range(exhausted.size):
        totals[EXHAUSTED] += exhausted[req]
    for req in range(guarded.size):
        totals[GUARDED] += guarded[req]
    for req in range(num_emitted.size):
        start = cu_num_rows[req]
        length = 0
        for row in range(start + first_draft, cu_num_rows[req + 1]):
            length += draft_token_ids[row] >= 0
        if length == 0:
            continue
        accepted = num_emitted[req] - 1
        totals[DRAFTS] += 1
        totals[DRAFT_TOKENS] += length
        totals[ACCEPTED] += accepted
        totals[LENGTHS + length - 1] += 1
        for row in range(start, start + accepted):
            totals[RELAXED] += relaxed[row]
            totals[REGRET] += regret[row]
        for place in range(min(length, survival.shape[1])):
            promised = survival[idx_mapping[req], place]
            if promised < 0:
                continue
            tenth = min(int(promised * np.float32(SURVIVAL_BINS)), SURVIVAL_BINS - 1)
            totals[SURVIVAL_TOKENS + tenth] += 1
            totals[SURVIVAL_PROMISED + tenth] += promised
            totals[SURVIVAL_ACCEPTED + tenth] += place < accepted


def count_drafts(
    totals: torch.Tensor,
    draft_token_ids: torch.Tensor,
    cu_num_rows: torch.Tensor,
    first_draft: int,
    num_emitted: torch.Tensor,
    idx_mapping: torch.Tensor,
    survival: torch.Tensor,
    relaxed: torch.Tensor,
    regret: torch.Tensor,
    exhausted: torch.Tensor,
    guarded: torch.Tensor,
) -> None:
    """See `vllm_aasd.kernels.count.count_drafts`."""
    count_arrays(
        totals.numpy(),
        draft_token_ids.numpy(),
        cu_num_rows.numpy(),
        first_draft,
        num_emitted.numpy(),
        idx_mapping.numpy(),
        survival.numpy(),
        relaxed.numpy(),
        regret.numpy(),
        exhausted.numpy(),
        guarded.numpy(),
    )
