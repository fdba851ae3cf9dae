"""Plain torch reference of the align ops: the specification that the compiled paths are tested against.

The entry's layout and the meaning of every argument are in `vllm_aasd.kernels.align`.
"""

import torch

_LOWEST = torch.finfo(torch.float32).min


def align(logits: torch.Tensor, token_ids: torch.Tensor, slot_mapping: torch.Tensor, table: torch.Tensor) -> None:
    """See `vllm_aasd.kernels.align.align`."""
    partials = align_shard(logits, slot_mapping, 0, table.shape[1] // 2)
    align_merge(partials[None], token_ids, slot_mapping, table)


def align_shard(logits: torch.Tensor, slot_mapping: torch.Tensor, first_token_id: int, top_k: int) -> torch.Tensor:
    """See `vllm_aasd.kernels.align.align_shard`."""
    z = logits.float()
    candidates = z.nan_to_num(nan=_LOWEST, posinf=torch.inf, neginf=_LOWEST)
    # A stable sort keeps the lowest id first among equals.
    ids = candidates.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    best = candidates.gather(1, ids)
    total = (z - best[:, :1]).exp().sum(dim=-1, keepdim=True)
    entries = [(ids + first_token_id).int(), best.view(torch.int32), total.view(torch.int32)]
    return torch.cat(entries, dim=1)


def align_merge(
    partials: torch.Tensor, token_ids: torch.Tensor, slot_mapping: torch.Tensor, table: torch.Tensor
) -> None:
    """See `vllm_aasd.kernels.align.align_merge`."""
    top_k = table.shape[1] // 2
    logits = partials[..., top_k : 2 * top_k].contiguous().view(torch.float32)
    sums = partials[..., 2 * top_k].contiguous().view(torch.float32)
    for row, slot in enumerate(slot_mapping.tolist()):
        if slot < 0 or slot >= len(table):
            continue
        ids = partials[:, row, :top_k].flatten()
        by_id = ids.argsort()
        z = logits[:, row].flatten()[by_id]
        best = by_id[z.sort(descending=True, stable=True).indices[:top_k]]
        total = (sums[:, row] * (logits[:, row, 0] - z.max()).exp()).sum()
        probs = (logits[:, row].flatten()[best] - z.max()).exp() / total
        # The sum is 0 for a row of nothing but -inf, and NaN for one with NaN or +inf.
        usable = bool(total > 0)
        table[slot, 0] = token_ids[row]
        table[slot, 1 : 1 + top_k] = ids[best] if usable else 0
        table[slot, 1 + top_k :] = probs.view(torch.int32) if usable else 0
