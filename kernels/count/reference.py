"""Plain twin of the count op: the specification, and the places in the totals. See `vllm_aasd.kernels.count`."""

import torch

MAX_DRAFT_TOKENS = 128
"""The longest draft that is counted; vLLM verifies none that is longer."""

SURVIVAL_BINS = 10
"""Promised survival is told apart by tenths; 1.0 is in the last."""

UNPROMISED = -1.0
"""Stands in the place of a survival that nobody promised: such a token says nothing of calibration."""

DRAFTS, DRAFT_TOKENS, ACCEPTED, RELAXED, REGRET, EXHAUSTED, GUARDED = range(7)
LENGTHS = 7
"""First of MAX_DRAFT_TOKENS places: the drafts of 1, 2, ... tokens."""
SURVIVAL_TOKENS = LENGTHS + MAX_DRAFT_TOKENS
SURVIVAL_PROMISED = SURVIVAL_TOKENS + SURVIVAL_BINS
SURVIVAL_ACCEPTED = SURVIVAL_PROMISED + SURVIVAL_BINS
SIZE = SURVIVAL_ACCEPTED + SURVIVAL_BINS


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
    totals[EXHAUSTED] += exhausted.sum()
    totals[GUARDED] += guarded.sum()
    bounds = cu_num_rows.tolist()
    for req, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        drafts = draft_token_ids[start + first_draft : end]
        length = int((drafts >= 0).sum())
        if length == 0:
            continue
        accepted = int(num_emitted[req]) - 1
        totals[DRAFTS] += 1
        totals[DRAFT_TOKENS] += length
        totals[ACCEPTED] += accepted
        totals[RELAXED] += relaxed[start : start + accepted].sum()
        totals[REGRET] += regret[start : start + accepted].double().sum()
        totals[LENGTHS + length - 1] += 1
        for place, promised in enumerate(survival[int(idx_mapping[req]), :length]):
            if promised < 0:
                continue
            tenth = min(int(promised * SURVIVAL_BINS), SURVIVAL_BINS - 1)
            totals[SURVIVAL_TOKENS + tenth] += 1
            totals[SURVIVAL_PROMISED + tenth] += promised
            totals[SURVIVAL_ACCEPTED + tenth] += place < accepted
