"""Plain torch reference of the recovered tokens; see `vllm_aasd.kernels.verify.recovered`."""

import torch


def sample_recovered_tokens(
    target_logits: torch.Tensor, rows: torch.Tensor, draft_token_ids: torch.Tensor, inv_q: torch.Tensor
) -> torch.Tensor:
    """See `vllm_aasd.kernels.verify.recovered.sample_recovered_tokens`."""
    logits = target_logits[rows].float()
    probs = logits.softmax(dim=-1)
    score = torch.where(probs > 0, probs * inv_q, -1.0)
    score[_excluded(logits, draft_token_ids)] = -1.0
    # Where no other token has a probability the argmax is the only token that has one; NaN rows end here too.
    return torch.where(score.amax(dim=-1) >= 0, score.argmax(dim=-1), logits.argmax(dim=-1)).to(torch.int32)


def sample_recovered_tokens_by_uniform(
    target_logits: torch.Tensor, rows: torch.Tensor, draft_token_ids: torch.Tensor, uniform: torch.Tensor
) -> torch.Tensor:
    """See `vllm_aasd.kernels.verify.recovered.sample_recovered_tokens_by_uniform`."""
    logits = target_logits[rows].float()
    weights = logits.softmax(dim=-1).nan_to_num(0.0).double()
    weights[_excluded(logits, draft_token_ids)] = 0.0
    sums = weights.cumsum(dim=-1)
    # Below the total even where u rounds up to it, so that the last token with a weight is the last that is drawn.
    bar = torch.minimum(uniform * sums[:, -1], torch.nextafter(sums[:, -1], torch.zeros(())))
    drawn = (sums > bar[:, None]).int().argmax(dim=-1)
    return torch.where(sums[:, -1] > 0, drawn, logits.argmax(dim=-1)).to(torch.int32)


def _excluded(logits: torch.Tensor, draft_token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of each draft token of the vocabulary."""
    drafts = draft_token_ids.long()
    rows = ((drafts >= 0) & (drafts < logits.shape[-1])).nonzero()[:, 0]
    return rows, drafts[rows]
