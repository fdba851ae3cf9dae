"""Compiled CPU path of the verify op; the rule and its sources are in `vllm_aasd.kernels.verify`.

The maximum of a greedy row usually decides: the draft token is the argmax, or the request is strict, or the draft
token fails a condition that needs no normalizer (`vllm_aasd.kernels.verify.relaxation_cpu`). Only the other rows need
exponentials, in a second sweep over a row that is in the cache by then. A sampled row takes one sweep with
exponentials. Rows after the first rejection are not read, except for the window of a fly request after a mismatch that
passed the entropy threshold; rows of an accepted window are not read again. A weight e^(z - m) below 2^-126, where
float32 becomes subnormal, counts as 0, and p(x) > 0 means that it isn't 0.

One thread does all of it: a row takes tens of microseconds, and threads that numba started from vLLM's
worker would inherit the worker's affinity to a single core.
"""

import numpy as np
import torch

from vllm_aasd.kernels.common.compiled import compiled
from vllm_aasd.kernels.common.rows_cpu import flat_view
from vllm_aasd.kernels.verify import PLACEHOLDER_TOKEN_ID, VerifyBatch, VerifyOutput
from vllm_aasd.kernels.verify.policies import (
    BUDGET,
    CONDITIONAL,
    COOLDOWN,
    DECAY,
    EXHAUSTED,
    FLY,
    LEVEL,
    LIMIT,
    NATS,
    PER_STEP,
    SPENT,
    STRICT,
    STRICT_LEFT,
    WINDOW,
)
from vllm_aasd.kernels.verify.recovered_cpu import by_noise, by_uniform
from vllm_aasd.kernels.verify.relaxation_cpu import CANDIDATE, CLOSED, judge, strictly

# For fields of the batch that are None.
_NO_PROBS, _NO_NOISE, _NO_NOISE_ROWS = np.empty(0), np.empty((0, 0), np.float32), np.empty(0, np.int32)


@compiled
def _window_holds(logits, stride, vocab_size, drafts, uniform_probs, is_greedy, row, end, window):
    """Return whether the request has `window` draft tokens after a row and the strict rule accepts each."""
    if row + window >= end:
        return False
    for later in range(row + 1, row + 1 + window):
        logits_row = logits[later * stride : later * stride + vocab_size]
        uniform = 0.0 if is_greedy else uniform_probs[later]
        if not strictly(logits_row, np.int64(drafts[later]), is_greedy, uniform)[0]:
            return False
    return True


@compiled
def _verify_kernel(
    draft_token_ids,
    cu_num_draft_tokens,
    logits,
    stride,
    vocab_size,
    bonus_token_ids,
    is_greedy,
    uniform_probs,
    recovered_probs,
    inv_q,
    inv_q_rows,
    rules,
    parameters,
    state_rows,
    state,
    stop_token_ids,
    sampled,
    num_sampled,
    relaxed,
    regret,
    exhausted,
    guarded,
):
    """Fill the outputs; return the first request whose cumulative count is impossible, or -1."""
    start = 0
    one = np.float32(1.0)
    for i in range(cu_num_draft_tokens.size):
        end = cu_num_draft_tokens[i]
        if end < start or end > draft_token_ids.size or end - start >= sampled.shape[1]:
            return i
        rule = rules[i]
        has_state = 0 <= state_rows[i] < state.shape[0]
        if not has_state or not CONDITIONAL <= rule <= BUDGET or state[state_rows[i], EXHAUSTED] != 0.0:
            rule = STRICT
        is_relaxing = rule != STRICT
        spent, level, strict_left = np.float32(0.0), np.float32(0.0), np.float32(0.0)
        if is_relaxing:
            spent = state[state_rows[i], SPENT]
            level = state[state_rows[i], LEVEL]
            strict_left = state[state_rows[i], STRICT_LEFT]
        decay, limit = parameters[i, DECAY], parameters[i, LIMIT]
        num_relaxed = 0
        accepted = 0
        settled: int = start
        last = np.int64(bonus_token_ids[i])
        exhausted[i] = False
        guarded[i] = False
        for row in range(start, end):
            x = np.int64(draft_token_ids[row])
            is_accepted = row < settled
            is_relaxed = False
            argmax = np.int64(0)
            logits_row = logits[row * stride : row * stride + vocab_size]
            if not is_accepted:
                uniform = 0.0 if is_greedy[i] else uniform_probs[row]
                is_accepted, maximum, argmax, s, t = strictly(logits_row, x, is_greedy[i], uniform)
                may_relax = rule != STRICT and strict_left <= 0.0
                if rule == BUDGET and is_greedy[i] and num_relaxed >= parameters[i, PER_STEP]:
                    may_relax = False
                verdict = CLOSED
                if may_relax:
                    strictly_found = (is_accepted, uniform, maximum, argmax, s, t)
                    verdict, cost, row_regret = judge(
                        logits_row, x, is_greedy[i], *strictly_found, rule, parameters[i], stop_token_ids[i]
                    )
                if verdict == CANDIDATE and rule == FLY:
                    window = int(parameters[i, WINDOW])
                    drafts = (draft_token_ids, uniform_probs, is_greedy[i])
                    if _window_holds(logits, stride, vocab_size, *drafts, row, end, window):
                        settled = row + 1 + window
                    else:
                        verdict = CLOSED
                if verdict != CLOSED and level * decay + one > limit:
                    if verdict == CANDIDATE:
                        guarded[i] = True
                        # The recovered token counts as one of them.
                        strict_left = parameters[i, COOLDOWN] + one
                    verdict = CLOSED
                if verdict != CLOSED and rule == BUDGET:
                    total = spent + np.float32(cost)
                    nats = parameters[i, NATS]
                    if nats > 0.0 and total <= nats:
                        spent = total
                    else:
                        # The first cost that doesn't fit ends the budget, even if a smaller one would still fit.
                        exhausted[i] = True
                        rule = STRICT
                        verdict = CLOSED
                if verdict == CANDIDATE:
                    is_accepted = is_relaxed = True
                    relaxed[row] = True
                    regret[row] = row_regret
                    num_relaxed += 1
            if not is_accepted:
                if is_greedy[i]:
                    last = argmax
                elif inv_q_rows.size > 0 and inv_q_rows[i] >= 0:
                    last = np.int64(by_noise(logits_row, x, inv_q[inv_q_rows[i]]))
                else:
                    last = np.int64(by_uniform(logits_row, x, recovered_probs[i]))
                break
            sampled[i, accepted] = x
            accepted += 1
            level = level * decay + np.float32(is_relaxed)
            strict_left = max(strict_left - one, np.float32(0.0))
        sampled[i, accepted] = last
        num_sampled[i] = accepted + 1
        if is_relaxing:
            own = state_rows[i]
            state[own, SPENT] = spent
            state[own, LEVEL] = level * decay
            state[own, STRICT_LEFT] = max(strict_left - one, np.float32(0.0))
            state[own, EXHAUSTED] = np.float32(exhausted[i])
        start = end
    return -1


def verify(batch: VerifyBatch) -> VerifyOutput:
    """See `vllm_aasd.kernels.verify.verify`."""
    num_tokens, vocab_size = batch.target_logits.shape
    batch_size = batch.cu_num_draft_tokens.shape[0]
    output = VerifyOutput(
        torch.full((batch_size, batch.max_spec_len + 1), PLACEHOLDER_TOKEN_ID, dtype=torch.int32),
        torch.empty(batch_size, dtype=torch.int32),
        torch.zeros(num_tokens, dtype=torch.bool),
        torch.zeros(num_tokens, dtype=torch.float32),
        torch.empty(batch_size, dtype=torch.bool),
        torch.empty(batch_size, dtype=torch.bool),
    )
    logits, stride = flat_view(batch.target_logits)
    bad_request = _verify_kernel(
        batch.draft_token_ids.contiguous().numpy(),
        batch.cu_num_draft_tokens.contiguous().numpy(),
        logits,
        stride,
        vocab_size,
        batch.bonus_token_ids.reshape(-1).to(torch.int32).contiguous().numpy(),
        batch.is_greedy.contiguous().numpy(),
        _NO_PROBS if batch.uniform_probs is None else batch.uniform_probs.contiguous().numpy(),
        _NO_PROBS if batch.recovered_probs is None else batch.recovered_probs.contiguous().numpy(),
        _NO_NOISE if batch.inv_q is None else batch.inv_q.contiguous().numpy(),
        _NO_NOISE_ROWS if batch.inv_q_rows is None else batch.inv_q_rows.contiguous().numpy(),
        *(tensor.contiguous().numpy() for tensor in batch.policies[:-1]),
        batch.policies.state.numpy(),
        batch.stop_token_ids.contiguous().numpy(),
        *(tensor.numpy() for tensor in output),
    )
    if bad_request >= 0:
        raise ValueError(
            f"cu_num_draft_tokens[{bad_request}] is {int(batch.cu_num_draft_tokens[bad_request])}: counts must not "
            f"decrease, exceed the {num_tokens} rows, or give a request more than {batch.max_spec_len} draft tokens"
        )
    return output
