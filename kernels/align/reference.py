"""Plain torch twin of the align op: the specification that the compiled paths are tested against.

The entry's layout and the meaning of every argument are in `vllm_aasd.kernels.align`.
"""

import torch


def align(logits: torch.Tensor, token_ids: torch.Tensor, slot_mapping: torch.Tensor, table: torch.Tensor) -> None:
    """See `vllm_aasd.kernels.align.align`."""
    top_k = (table.shape[1] - 1) // 2
    for row, slot in enumerate(slot_mapping.tolist()):
        if slot < 0:
            continue
        z = logits[row].float()
        # A stable sort keeps the lowest id first among equals; topk promises no order there.
        ids = z.sort(descending=True, stable=True).indices[:top_k]
        probs = z.softmax(dim=-1)[ids]
        if not z.max().isfinite():
            ids, probs = torch.zeros_like(ids), torch.zeros_like(probs)
        table[slot, 0] = token_ids[row]
        table[slot, 1 : 1 + top_k] = ids.to(torch.int32)
        table[slot, 1 + top_k :] = probs.view(torch.int32)
