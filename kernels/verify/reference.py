"""Plain torch reference of the verify op: the specification that the compiled paths are tested against.

The rule, its sources and the meaning of every argument are in `vllm_aasd.kernels.verify`.
"""

from typing import NamedTuple

import torch

from vllm_aasd.kernels.verify.policies import VerifyPolicies
from vllm_aasd.kernels.verify.relaxation_reference import Relaxation, RowStatistics, row_statistics

PLACEHOLDER_TOKEN_ID = -1


class VerifyOutput(NamedTuple):
    """What one verification step decided."""

    output_token_ids: torch.Tensor
    """[batch_size, max_spec_len + 1] int32: accepted tokens, then the recovered or the bonus token, then -1.
    The recovered token of a sampled request is -1 too, until it is drawn (`vllm_aasd.kernels.verify.recovered`)."""
    num_accepted: torch.Tensor
    """[batch_size] int32: accepted draft tokens, without the recovered or bonus token."""
    relaxed: torch.Tensor
    """[num_tokens] bool: accepted though the strict rule rejects it."""
    regret: torch.Tensor
    """[num_tokens] float32, nats: log max p - log p(x) where `relaxed`, else 0."""
    exhausted: torch.Tensor
    """[batch_size] bool: the request's budget ran out in this step; happens once."""
    guarded: torch.Tensor
    """[batch_size] bool: the collapse guard engaged in this step."""


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
    output = torch.full((batch_size, max_spec_len + 1), PLACEHOLDER_TOKEN_ID, dtype=torch.int32, device=device)
    num_accepted = torch.zeros(batch_size, dtype=torch.int32, device=device)
    relaxed = torch.zeros(num_tokens, dtype=torch.bool, device=device)
    regret = torch.zeros(num_tokens, dtype=torch.float32, device=device)
    exhausted, guarded = torch.zeros(2, batch_size, dtype=torch.bool, device=device)
    uniform_of = torch.zeros(num_tokens) if uniform_probs is None else uniform_probs

    def strictly(row: int, is_greedy: bool) -> tuple[bool, RowStatistics]:
        x, statistics = int(draft_token_ids[row]), row_statistics(target_logits[row])
        if is_greedy:
            return x == statistics.argmax, statistics
        p = statistics.probs
        return 0 <= x < vocab_size and bool(p[x] > 0 and p[x] >= uniform_of[row]), statistics

    start = 0
    for i, end in enumerate(cu_num_draft_tokens.tolist()):
        last = bonus_token_ids.reshape(-1)[i]
        greedy = bool(is_greedy[i])
        relaxation = Relaxation(policies, i, greedy, stop_token_ids[i], vocab_size)
        for row in range(start, end):
            x, (accepted, statistics) = int(draft_token_ids[row]), strictly(row, greedy)

            def strict_ahead(window: int, row: int = row, end: int = end, greedy: bool = greedy) -> bool:
                ahead = range(row + 1, row + 1 + window)
                return row + window < end and all(strictly(later, greedy)[0] for later in ahead)

            if 0 <= x < vocab_size:
                uniform = 0.0 if greedy else float(uniform_of[row])
                relaxed[row] = relaxation.accepts(x, statistics, accepted, uniform, strict_ahead)
            if not (accepted or relaxed[row]):
                last = statistics.argmax if greedy else PLACEHOLDER_TOKEN_ID
                break
            if relaxed[row]:
                regret[row] = torch.log(statistics.probs.max()) - torch.log(statistics.probs[x])
            relaxation.emitted(bool(relaxed[row]))
            output[i, num_accepted[i]] = x
            num_accepted[i] += 1
        relaxation.emitted(False)
        output[i, num_accepted[i]] = last
        exhausted[i], guarded[i] = relaxation.exhausted, relaxation.guarded
        start = end
    return VerifyOutput(output, num_accepted, relaxed, regret, exhausted, guarded)
