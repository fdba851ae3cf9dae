"""Plain torch twin of the verify op: the specification that the compiled paths are tested against.

The rule, its sources and the meaning of every argument are in `vllm_aasd.kernels.verify`.
"""

from typing import NamedTuple

import torch

PLACEHOLDER_TOKEN_ID = -1


class VerifyPolicies(NamedTuple):
    """How each request of a batch is verified."""

    relaxed: torch.Tensor
    """[batch_size] bool: also accept what clears the relaxed bar; False is strict."""
    alpha: torch.Tensor
    """[batch_size] float32, probability per nat: how far a nat of entropy lowers the bar."""
    beta: torch.Tensor
    """[batch_size] float32, probability: the bar where the target is certain."""
    floor: torch.Tensor
    """[batch_size] float32, probability: the bar never lies lower."""


class VerifyOutput(NamedTuple):
    """What one verification step decided."""

    output_token_ids: torch.Tensor
    """[batch_size, max_spec_len + 1] int32: accepted tokens, then the recovered or the bonus token, then -1.
    The recovered token of a sampled request is -1 too, until `recover` has drawn it."""
    num_accepted: torch.Tensor
    """[batch_size] int32: accepted draft tokens, without the recovered or bonus token."""
    relaxed: torch.Tensor
    """[num_tokens] bool: accepted only thanks to the relaxed bar."""
    regret: torch.Tensor
    """[num_tokens] float32, nats: log max p - log p(x) where `relaxed`, else 0."""


class RowStatistics(NamedTuple):
    """What the rule needs of one row of logits."""

    probs: torch.Tensor
    """[vocab_size] float32."""
    argmax: int
    """The first NaN if there is one, else the lowest id of the maximum."""
    entropy: torch.Tensor
    """float32, nats."""


def row_statistics(logits: torch.Tensor) -> RowStatistics:
    """Reduce one row, [vocab_size], in float32."""
    probs = logits.softmax(dim=-1, dtype=torch.float32)
    return RowStatistics(probs, int(logits.float().argmax()), torch.special.entr(probs).sum())


def clears_relaxed_bar(
    x: int, row: RowStatistics, stop_token_ids: torch.Tensor, policies: VerifyPolicies, i: int
) -> bool:
    """Whether the relaxed bar of request i accepts draft token x at a row, whatever the strict rule says."""
    p = row.probs
    stops = [stop for stop in stop_token_ids.tolist() if 0 <= stop < len(p)]
    if not policies.relaxed[i] or x in stops:
        return False
    clears = p[x] >= policies.beta[i] - policies.alpha[i] * row.entropy or x == row.argmax
    return bool(clears and p[x] > 0 and p[x] >= policies.floor[i] and p[x] > p[stops].sum())


def verify(
    draft_token_ids: torch.Tensor,
    cu_num_draft_tokens: torch.Tensor,
    max_spec_len: int,
    target_logits: torch.Tensor,
    bonus_token_ids: torch.Tensor,
    is_greedy: torch.Tensor,
    uniform_probs: torch.Tensor | None,
    policies: VerifyPolicies,
    stop_token_ids: torch.Tensor,
) -> VerifyOutput:
    """See `vllm_aasd.kernels.verify.verify`."""
    num_tokens, vocab_size = target_logits.shape
    device = target_logits.device
    batch_size = cu_num_draft_tokens.shape[0]
    output = torch.full(
        (batch_size, max_spec_len + 1), PLACEHOLDER_TOKEN_ID, dtype=torch.int32, device=device
    )
    num_accepted = torch.zeros(batch_size, dtype=torch.int32, device=device)
    relaxed = torch.zeros(num_tokens, dtype=torch.bool, device=device)
    regret = torch.zeros(num_tokens, dtype=torch.float32, device=device)
    start = 0
    for i, end in enumerate(cu_num_draft_tokens.tolist()):
        last = bonus_token_ids.reshape(-1)[i]
        for row in range(start, end):
            x, statistics = int(draft_token_ids[row]), row_statistics(target_logits[row])
            p = statistics.probs
            known = 0 <= x < vocab_size
            if is_greedy[i]:
                accepted = x == statistics.argmax
            else:
                accepted = known and p[x] > 0 and p[x] >= uniform_probs[row]
            if not accepted and known:
                accepted = clears_relaxed_bar(x, statistics, stop_token_ids[i], policies, i)
                relaxed[row] = accepted
                regret[row] = torch.log(p.max()) - torch.log(p[x]) if accepted else 0.0
            if not accepted:
                last = statistics.argmax if is_greedy[i] else PLACEHOLDER_TOKEN_ID
                break
            output[i, num_accepted[i]] = x
            num_accepted[i] += 1
        output[i, num_accepted[i]] = last
        start = end
    return VerifyOutput(output, num_accepted, relaxed, regret)


def recover(
    target_logits: torch.Tensor, rows: torch.Tensor, draft_token_ids: torch.Tensor, inv_q: torch.Tensor
) -> torch.Tensor:
    """See `vllm_aasd.kernels.verify.recover`."""
    logits = target_logits[rows].float()
    probs = logits.softmax(dim=-1)
    score = torch.where(probs > 0, probs * inv_q, -1.0)
    drafts = draft_token_ids.long()
    excluded = ((drafts >= 0) & (drafts < logits.shape[-1])).nonzero()[:, 0]
    score[excluded, drafts[excluded]] = -1.0
    # Where no other token has a probability the argmax is the only token that has one; NaN rows end here too.
    return torch.where(score.amax(dim=-1) >= 0, score.argmax(dim=-1), logits.argmax(dim=-1)).to(torch.int32)
