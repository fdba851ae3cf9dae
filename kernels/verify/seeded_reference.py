"""Plain torch reference of the seeded verify op: the specification that the Triton path is tested against.

The rule, its sources and the meaning of every argument are in `vllm_aasd.kernels.verify.seeded`.
"""

import itertools

import torch

from vllm_aasd.kernels.verify.random_reference import row_uniform, token_gumbel
from vllm_aasd.kernels.verify.reference import PLACEHOLDER_TOKEN_ID
from vllm_aasd.kernels.verify.relaxation_reference import Relaxation, row_statistics
from vllm_aasd.kernels.verify.seeded import SeededBatch, SeededVerifyOutput


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


def verify_seeded(batch: SeededBatch) -> SeededVerifyOutput:
    """See `vllm_aasd.kernels.verify.seeded.verify_seeded`."""
    num_logits, vocab_size = batch.target_logits.shape
    num_reqs = len(batch.cu_num_logits) - 1
    device = batch.target_logits.device
    sampled = torch.full((num_reqs, batch.num_speculative_steps + 1), PLACEHOLDER_TOKEN_ID, device=device)
    num_sampled = torch.zeros(num_reqs, dtype=torch.int32, device=device)
    relaxed = torch.zeros(num_logits, dtype=torch.bool, device=device)
    regret = torch.zeros(num_logits, dtype=torch.float32, device=device)
    exhausted, guarded = torch.zeros(2, num_reqs, dtype=torch.bool, device=device)

    def strictly(row: int, slot: int) -> bool:
        """Whether the strict rule accepts the draft that a row tests."""
        x, z = int(batch.draft_sampled[row + 1]), batch.target_logits[row].float()
        if batch.temperature[slot] == 0:
            return x == int(z.argmax())
        return 0 <= x < vocab_size and _strictly_accepted(z, x, int(batch.seed[slot]), int(batch.pos[row]))

    bounds = batch.cu_num_logits.tolist()
    for req, (start, end) in enumerate(itertools.pairwise(bounds)):
        slot = int(batch.idx_mapping[req])
        is_greedy = bool(batch.temperature[slot] == 0)
        relaxation = Relaxation(batch.policies, slot, is_greedy, batch.stop_token_ids[slot], vocab_size)
        for row in range(start, end):
            z, position = batch.target_logits[row].float(), int(batch.pos[row])
            x = int(batch.draft_sampled[row + 1]) if row + 1 < end else PLACEHOLDER_TOKEN_ID
            accepted, statistics = False, row_statistics(z)

            def strict_ahead(window: int, row: int = row, end: int = end, slot: int = slot) -> bool:
                ahead = range(row + 1, row + 1 + window)
                return row + window < end - 1 and all(strictly(later, slot) for later in ahead)

            if 0 <= x < vocab_size:
                accepted = strictly(row, slot)
                uniform = 0.0 if is_greedy else float(row_uniform(int(batch.seed[slot]), position))
                if relaxation.accepts(x, statistics, accepted, uniform, strict_ahead):
                    accepted = relaxed[row] = True
                    regret[row] = z.max() - z[x]
            if not accepted:
                x = statistics.argmax if is_greedy else _race(z, x, int(batch.seed[slot]), position)
            relaxation.emitted(bool(relaxed[row]))
            sampled[req, num_sampled[req]] = x
            num_sampled[req] += 1
            if not accepted:
                break
        exhausted[req], guarded[req] = relaxation.exhausted, relaxation.guarded
    return SeededVerifyOutput(sampled, num_sampled, relaxed, regret, exhausted, guarded)
