"""Plain twin of the redraw op; see `vllm_aasd.kernels.verify.recovered`."""

import torch


def redraw(
    target_logits: torch.Tensor, rows: torch.Tensor, draft_token_ids: torch.Tensor, uniform: torch.Tensor
) -> torch.Tensor:
    """See `vllm_aasd.kernels.verify.recovered.redraw`."""
    logits = target_logits[rows].float()
    weights = logits.softmax(dim=-1).nan_to_num(0.0).double()
    drafts = draft_token_ids.long()
    excluded = ((drafts >= 0) & (drafts < logits.shape[-1])).nonzero()[:, 0]
    weights[excluded, drafts[excluded]] = 0.0
    sums = weights.cumsum(dim=-1)
    # Below the total even where u rounds up to it, so that the last token with a weight is the last that is drawn.
    bar = torch.minimum(uniform * sums[:, -1], torch.nextafter(sums[:, -1], torch.zeros(())))
    drawn = (sums > bar[:, None]).int().argmax(dim=-1)
    return torch.where(sums[:, -1] > 0, drawn, logits.argmax(dim=-1)).to(torch.int32)
