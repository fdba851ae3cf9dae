"""Plain torch references of both verify ops: the specification that the compiled paths are tested against.

The rule and its sources are in `vllm_aasd.kernels.verify`, the arguments of the seeded op in
`vllm_aasd.kernels.verify.seeded`.
"""

import itertools
from collections.abc import Callable

import torch

from vllm_aasd.kernels.count.reference import count_drafts
from vllm_aasd.kernels.verify import PLACEHOLDER_TOKEN_ID, VerifyBatch, VerifyOutput
from vllm_aasd.kernels.verify.random_reference import row_uniform, token_gumbel
from vllm_aasd.kernels.verify.relaxation_reference import Relaxation, row_statistics
from vllm_aasd.kernels.verify.seeded import SeededBatch


def _empty_output(batch_size: int, max_spec_len: int, logits: torch.Tensor, dtype: torch.dtype) -> VerifyOutput:
    """An output that says that nothing was emitted."""
    rows, device = len(logits), logits.device
    return VerifyOutput(
        torch.full((batch_size, max_spec_len + 1), PLACEHOLDER_TOKEN_ID, dtype=dtype, device=device),
        torch.zeros(batch_size, dtype=torch.int32, device=device),
        torch.zeros(rows, dtype=torch.bool, device=device),
        torch.zeros(rows, dtype=torch.float32, device=device),
        *torch.zeros(2, batch_size, dtype=torch.bool, device=device),
    )


def _verify_request(
    output: VerifyOutput,
    i: int,
    first_row: int,
    z: torch.Tensor,
    drafts: list[int],
    uniforms: list[float],
    is_strict: Callable[[int], bool],
    relaxation: Relaxation,
    last_token: Callable[[int], int],
) -> None:
    """Verify one request's draft tokens in their order, and fill its part of the output.

    Args:
        output: to fill.
        i: the request's index in the batch.
        first_row: its first row in the batch.
        z: [num_drafts, vocab_size] float32, the rows that test its draft tokens.
        drafts: its draft tokens.
        uniforms: of each row; without meaning for greedy requests.
        is_strict: whether the strict rule accepts the j-th draft token.
        relaxation: the request's.
        last_token: the token to emit after j accepted ones.
    """
    num_accepted = 0
    for j, x in enumerate(drafts):
        accepted = relaxed = False
        if 0 <= x < z.shape[1]:
            accepted = is_strict(j)
            following = (is_strict(k) for k in range(j + 1, len(drafts)))
            relaxed = relaxation.accepts(x, row_statistics(z[j]), accepted, uniforms[j], following)
        if not (accepted or relaxed):
            break
        if relaxed:
            output.relaxed[first_row + j] = True
            output.regret[first_row + j] = z[j].max() - z[j, x]
        relaxation.emitted(relaxed)
        output.sampled[i, j] = x
        num_accepted += 1
    output.sampled[i, num_accepted] = last_token(num_accepted)
    output.num_sampled[i] = num_accepted + 1
    relaxation.emitted(False)
    output.exhausted[i], output.guarded[i] = relaxation.exhausted, relaxation.guarded


def verify(batch: VerifyBatch) -> VerifyOutput:
    """See `vllm_aasd.kernels.verify.verify`."""
    ends = batch.cu_num_draft_tokens.tolist()
    output = _empty_output(len(ends), batch.max_spec_len, batch.target_logits, torch.int32)
    for i, (start, end) in enumerate(itertools.pairwise([0, *ends])):
        _verify(batch, i, start, end, output)
    return output


def _verify(batch: VerifyBatch, i: int, start: int, end: int, output: VerifyOutput) -> None:
    """`verify` one request."""
    z = batch.target_logits[start:end].float()
    p = z.softmax(-1)
    drafts = batch.draft_token_ids[start:end].tolist()
    greedy = bool(batch.is_greedy[i])
    uniforms = [0.0] * len(drafts) if batch.uniform_probs is None else batch.uniform_probs[start:end].tolist()

    def is_strict(j: int) -> bool:
        x = drafts[j]
        if greedy:
            return x == int(z[j].argmax())
        return 0 <= x < z.shape[1] and float(p[j, x]) > 0 and float(p[j, x]) >= uniforms[j]

    def last_token(j: int) -> int:
        if j == len(drafts):
            return int(batch.bonus_token_ids.reshape(-1)[i])
        return int(z[j].argmax()) if greedy else _recovered(batch, i, z[j], drafts[j])

    relaxation = Relaxation(batch.policies, i, greedy, batch.stop_token_ids[i], z.shape[1])
    _verify_request(output, i, start, z, drafts, uniforms, is_strict, relaxation, last_token)


def _recovered(batch: VerifyBatch, i: int, z: torch.Tensor, excluded: int) -> int:
    """Draw request i's recovered token from one row."""
    p = z.softmax(-1).nan_to_num(0.0)
    if 0 <= excluded < len(p):
        p[excluded] = 0.0
    if not p.any():
        return int(z.argmax())
    if batch.inv_q is not None and batch.inv_q_rows is not None and batch.inv_q_rows[i] >= 0:
        return int(torch.where(p > 0, p * batch.inv_q[batch.inv_q_rows[i]], -1.0).argmax())
    assert batch.recovered_probs is not None
    sums = p.double().cumsum(-1)
    # Below the total even if u rounds up to it, so that only a token with a probability is drawn.
    bar = torch.minimum(batch.recovered_probs[i] * sums[-1], torch.nextafter(sums[-1], torch.zeros_like(sums[-1])))
    return int((sums > bar).int().argmax())


def verify_seeded(batch: SeededBatch) -> VerifyOutput:
    """See `vllm_aasd.kernels.verify.seeded.verify_seeded`."""
    bounds = batch.cu_num_logits.tolist()
    output = _empty_output(len(bounds) - 1, batch.num_speculative_steps, batch.target_logits, torch.int64)
    for req, (start, end) in enumerate(itertools.pairwise(bounds)):
        if start < end:
            _verify_seeded(batch, req, start, end, output)
    is_filler = batch.expanded_local_pos > batch.num_drafts[batch.expanded_idx_mapping.long()]
    drafted = batch.draft_sampled.masked_fill(is_filler, PLACEHOLDER_TOKEN_ID)
    count_drafts(batch.totals, drafted, batch.cu_num_logits, 1, batch.idx_mapping, batch.survival, output)
    return output


def _verify_seeded(batch: SeededBatch, req: int, start: int, end: int, output: VerifyOutput) -> None:
    """`verify_seeded` one request, which has rows."""
    slot = int(batch.idx_mapping[req])
    z = batch.target_logits[start:end].float()
    drafts = batch.draft_sampled[start + 1 : end].tolist()
    drafts = [x if j < int(batch.num_drafts[slot]) else PLACEHOLDER_TOKEN_ID for j, x in enumerate(drafts)]
    greedy = bool(batch.temperature[slot] == 0)
    seed, positions = int(batch.seed[slot]), batch.pos[start:end].tolist()
    uniforms = [0.0 if greedy else float(row_uniform(seed, position)) for position in positions[:-1]]

    def is_strict(j: int) -> bool:
        x = drafts[j]
        if greedy:
            return x == int(z[j].argmax())
        if not (0 <= x < z.shape[1] and z[j].max().isfinite()):
            return False
        return bool(z[j, x] - z[j].logsumexp(-1) > torch.tensor(uniforms[j], dtype=torch.float32).log())

    def last_token(j: int) -> int:
        if greedy:
            return int(z[j].argmax())
        score = z[j] + torch.from_numpy(token_gumbel(seed, positions[j], z.shape[1]))
        if j < len(drafts) and 0 <= drafts[j] < z.shape[1]:
            score[drafts[j]] = -torch.inf
        return int(score.argmax())

    relaxation = Relaxation(batch.policies, slot, greedy, batch.stop_token_ids[slot], z.shape[1])
    _verify_request(output, req, start, z[:-1], drafts, uniforms, is_strict, relaxation, last_token)
