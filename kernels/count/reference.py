"""Plain reference of `vllm_aasd.kernels.count`: the specification, request by request, on CPU tensors."""

import itertools

import torch

from vllm_aasd.kernels import count


def count_drafts(totals, draft_token_ids, cu_num_rows, first_draft, idx_mapping, survival, output):
    """See `vllm_aasd.kernels.count.count_drafts`."""
    _, emitted, relaxed, regret, exhausted, guarded = output
    totals[count.EXHAUSTED] += exhausted.sum()
    totals[count.GUARDED] += guarded.sum()
    for req, (start, end) in enumerate(itertools.pairwise(cu_num_rows.tolist())):
        ids = draft_token_ids[start + first_draft : end][: survival.shape[1]].tolist()
        accepted = min(int(emitted[req]) - 1, len(ids))
        length = next((at for at, token in enumerate(ids) if token < 0), len(ids))
        totals[count.RELAXED] += relaxed[start : start + accepted].sum()
        totals[count.REGRET] += regret[start : start + accepted].double().sum()
        promised = survival[idx_mapping[req], :length]
        is_accepted = torch.arange(length) < accepted
        # In float32, where some numbers just below a tenth, times ten, are whole.
        tenths = (promised * count.SURVIVAL_BINS).int().clamp(max=count.SURVIVAL_BINS - 1)
        for tenth in range(count.SURVIVAL_BINS):
            among = (promised >= 0) & (tenths == tenth)
            totals[count.SURVIVAL_TOKENS + tenth] += among.sum()
            totals[count.SURVIVAL_PROMISED + tenth] += promised[among].double().sum()
            totals[count.SURVIVAL_ACCEPTED + tenth] += (among & is_accepted).sum()
