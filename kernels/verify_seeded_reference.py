"""Plain torch twin of the seeded verify op: the specification that the Triton path is tested against.

The rule, its sources and the meaning of every argument are in `vllm_aasd.kernels.verify_seeded`.
"""

from typing import NamedTuple

import torch

from vllm_aasd.kernels import align_reference
from vllm_aasd.kernels.noise_reference import row_uniform, token_gumbel
from vllm_aasd.kernels.verify_reference import (
    PLACEHOLDER_TOKEN_ID,
    VerifyPolicies,
    clears_relaxed_bar,
    row_statistics,
)


class AlignmentRows(NamedTuple):
    """Where the alignment entries of the verified rows go; the fields are arguments of `align`."""

    token_ids: torch.Tensor
    """[num_logits] int32, the input token at each row's own position."""
    slot_mapping: torch.Tensor
    """[num_logits] int64, the slot of each row; negative skips it."""
    table: torch.Tensor
    """[num_slots, 1 + 2k] int32; modified in place."""


class SeededVerifyOutput(NamedTuple):
    """What one verification step emitted, as vLLM's V2 `rejection_sample` gives it, and why."""

    sampled: torch.Tensor
    """[num_reqs, num_speculative_steps + 1] int64: accepted tokens, the recovered or bonus token, then -1."""
    num_sampled: torch.Tensor
    """[num_reqs] int32: emitted tokens, the recovered or bonus token included; 0 for a request of no rows."""
    relaxed: torch.Tensor
    """[num_logits] bool: the draft tested by this row was accepted only thanks to the relaxed bar."""
    regret: torch.Tensor
    """[num_logits] float32, nats: log max p - log p(x) where `relaxed`, else 0."""


def _strictly_accepted(z: torch.Tensor, x: int, seed: int, position: int) -> bool:
    """vLLM's test of a sampled request, log p(x) > log u; false where there is no softmax."""
    log_p = z[x] - z.logsumexp(dim=-1)
    return bool(z.max().isfinite() and log_p > torch.log(torch.tensor(row_uniform(seed, position))))


def _race(z: torch.Tensor, excluded: int, seed: int, position: int) -> int:
    """Draw a token from softmax(z), without the excluded one unless that is -1."""
    score = z + torch.from_numpy(token_gumbel(seed, position, len(z)))
    if 0 <= excluded < len(z):
        score[excluded] = -torch.inf
    return int(score.argmax())


def verify_seeded(
    target_logits: torch.Tensor,
    draft_sampled: torch.Tensor,
    cu_num_logits: torch.Tensor,
    pos: torch.Tensor,
    idx_mapping: torch.Tensor,
    expanded_idx_mapping: torch.Tensor,
    expanded_local_pos: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    num_speculative_steps: int,
    policies: VerifyPolicies,
    stop_token_ids: torch.Tensor,
    alignment: AlignmentRows | None = None,
    all_greedy: bool = False,
) -> SeededVerifyOutput:
    """See `vllm_aasd.kernels.verify_seeded.verify_seeded`."""
    num_logits, vocab_size = target_logits.shape
    num_reqs = len(cu_num_logits) - 1
    device = target_logits.device
    sampled = torch.full((num_reqs, num_speculative_steps + 1), PLACEHOLDER_TOKEN_ID, device=device)
    num_sampled = torch.zeros(num_reqs, dtype=torch.int32, device=device)
    relaxed = torch.zeros(num_logits, dtype=torch.bool, device=device)
    regret = torch.zeros(num_logits, dtype=torch.float32, device=device)
    bounds = cu_num_logits.tolist()
    for req, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        slot = int(idx_mapping[req])
        is_greedy = temperature[slot] == 0
        for row in range(start, end):
            z, position = target_logits[row].float(), int(pos[row])
            x = int(draft_sampled[row + 1]) if row + 1 < end else PLACEHOLDER_TOKEN_ID
            accepted, statistics = False, row_statistics(z)
            if 0 <= x < vocab_size:
                if is_greedy:
                    accepted = x == statistics.argmax
                else:
                    accepted = _strictly_accepted(z, x, int(seed[slot]), position)
                if not accepted and clears_relaxed_bar(x, statistics, stop_token_ids[slot], policies, slot):
                    accepted = relaxed[row] = True
                    regret[row] = z.max() - z[x]
            if not accepted:
                x = statistics.argmax if is_greedy else _race(z, x, int(seed[slot]), position)
            sampled[req, num_sampled[req]] = x
            num_sampled[req] += 1
            if not accepted:
                break
    if alignment is not None:
        align_reference.align(target_logits, *alignment)
    return SeededVerifyOutput(sampled, num_sampled, relaxed, regret)
