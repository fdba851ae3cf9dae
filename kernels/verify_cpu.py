"""Compiled CPU path of the verify op; the rule and its sources are in `vllm_aasd.kernels.verify`.

A greedy row is settled by its maximum in most cases: the draft is the argmax, or the request is strict, or
the draft fails a condition that needs no normaliser. Since s >= 1, p(x) <= e^(z(x) - m), so a draft with
e^(z(x) - m) < floor fails the floor, and the EOS guard compares weights of the same s. Only what is left
pays for exponentials, in a second sweep over a row that the first one brought into the cache. A sampled row
takes one sweep with exponentials. Rows past the first rejection are not read. A weight e^(z - m) below
2^-126, where float32 becomes subnormal, counts as 0, and p(x) > 0 means that it does not.

One thread does all of it: a row takes tens of microseconds, and threads that numba started from vLLM's
worker would inherit the worker's affinity to a single core.
"""

import math

import numpy as np
import torch

from vllm_aasd.kernels.compiled import compiled
from vllm_aasd.kernels.rows_cpu import (
    BLOCK,
    exp_nonpositive,
    first_with_key,
    flat_view,
    max_key,
    order_key,
    row_max,
    softmax_stats,
    to_float32,
)
from vllm_aasd.kernels.verify_reference import PLACEHOLDER_TOKEN_ID, VerifyOutput, VerifyPolicies

_REJECTED, _ACCEPTED, _RELAXED = 0, 1, 2


@compiled
def _stop_weight(row, x, maximum, stops):
    """Return sum of e**(z - maximum) over the stop tokens, or inf when x is one of them."""
    weight = 0.0
    for j in range(stops.size):
        stop = stops[j]
        if stop == x:
            return np.inf
        if 0 <= stop < row.size:
            weight += exp_nonpositive(to_float32(row[stop]) - maximum)
    return weight


@compiled
def _judge(row, x, is_greedy, uniform, relaxed, alpha, beta, floor, stops):
    """Return (verdict, token emitted if rejected, regret in nats) for draft token x at one row."""
    known = 0 <= x < row.size
    if is_greedy:
        maximum, argmax = row_max(row)
        if x == argmax:
            return _ACCEPTED, argmax, 0.0
        if not (known and relaxed and np.isfinite(maximum)):
            return _REJECTED, argmax, 0.0
        weight = np.float64(exp_nonpositive(to_float32(row[x]) - maximum))
        if weight < floor or weight <= _stop_weight(row, x, maximum, stops):
            return _REJECTED, argmax, 0.0
        recovered = argmax
    elif not known:
        return _REJECTED, PLACEHOLDER_TOKEN_ID, 0.0
    else:
        recovered = PLACEHOLDER_TOKEN_ID
    maximum, argmax, s, t = softmax_stats(row)
    if s == 0.0:
        return _REJECTED, recovered, 0.0
    weight = np.float64(exp_nonpositive(to_float32(row[x]) - maximum))
    p = weight / s
    if not is_greedy and p > 0.0 and p >= uniform:
        return _ACCEPTED, recovered, 0.0
    if not relaxed:
        return _REJECTED, recovered, 0.0
    entropy = max(0.0, math.log(s) - t / s)
    clears = p >= beta - alpha * entropy or x == argmax
    # The stop tokens' weight is at least 0, so that to exceed it implies p > 0.
    if p >= floor and clears and weight > _stop_weight(row, x, maximum, stops):
        return _RELAXED, recovered, np.float64(maximum) - np.float64(to_float32(row[x]))
    return _REJECTED, recovered, 0.0


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
    policy_relaxed,
    alpha,
    beta,
    floor,
    stop_token_ids,
    output_token_ids,
    num_accepted,
    relaxed,
    regret,
):
    """Fill the four outputs; return the first request whose cumulative count is impossible, or -1."""
    start = 0
    for i in range(cu_num_draft_tokens.size):
        end = cu_num_draft_tokens[i]
        if end < start or end > draft_token_ids.size or end - start >= output_token_ids.shape[1]:
            return i
        accepted = 0
        last = np.int64(bonus_token_ids[i])
        for row in range(start, end):
            x = np.int64(draft_token_ids[row])
            verdict, recovered, row_regret = _judge(
                logits[row * stride : row * stride + vocab_size],
                x,
                is_greedy[i],
                0.0 if is_greedy[i] else uniform_probs[row],
                policy_relaxed[i],
                np.float64(alpha[i]),
                np.float64(beta[i]),
                np.float64(floor[i]),
                stop_token_ids[i],
            )
            if verdict == _REJECTED:
                last = recovered
                break
            output_token_ids[i, accepted] = x
            relaxed[row] = verdict == _RELAXED
            regret[row] = row_regret
            accepted += 1
        output_token_ids[i, accepted] = last
        num_accepted[i] = accepted
        start = end
    return -1


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
    batch_size = cu_num_draft_tokens.shape[0]
    output = VerifyOutput(
        torch.full((batch_size, max_spec_len + 1), PLACEHOLDER_TOKEN_ID, dtype=torch.int32),
        torch.empty(batch_size, dtype=torch.int32),
        torch.zeros(num_tokens, dtype=torch.bool),
        torch.zeros(num_tokens, dtype=torch.float32),
    )
    logits, stride = flat_view(target_logits)
    uniform = np.empty(0) if uniform_probs is None else uniform_probs.contiguous().numpy()
    bad_request = _verify_kernel(
        draft_token_ids.contiguous().numpy(),
        cu_num_draft_tokens.contiguous().numpy(),
        logits,
        stride,
        vocab_size,
        bonus_token_ids.reshape(-1).to(torch.int32).contiguous().numpy(),
        is_greedy.contiguous().numpy(),
        uniform,
        *(parameter.contiguous().numpy() for parameter in policies),
        stop_token_ids.contiguous().numpy(),
        *(tensor.numpy() for tensor in output),
    )
    if bad_request >= 0:
        raise ValueError(
            f"cu_num_draft_tokens[{bad_request}] is {int(cu_num_draft_tokens[bad_request])}: counts must not "
            f"fall, nor exceed the {num_tokens} rows, nor give a request more than {max_spec_len} drafts"
        )
    return output


@compiled
def _score(raw, inv_q, maximum):
    """Return a token's score in the race: e**(z - maximum) inv_q, or -1 for a token of probability 0."""
    weight = exp_nonpositive(to_float32(raw) - maximum)
    return weight * inv_q if weight > np.float32(0.0) else np.float32(-1.0)


@compiled
def _race(row, inv_q, draft):
    """Return the winner of the exponential race over one row without its draft token."""
    maximum, argmax = row_max(row)
    if not np.isfinite(maximum):
        return argmax
    none = order_key(np.float32(-1.0))
    best = none
    winner = argmax
    scores = np.empty(BLOCK, dtype=np.float32)
    for start in range(0, row.size, BLOCK):
        block = row[start : start + BLOCK]
        block_inv_q = inv_q[start : start + BLOCK]
        for i in range(block.size):
            scores[i] = _score(block[i], block_inv_q[i], maximum)
        if start <= draft < start + block.size:
            scores[draft - start] = np.float32(-1.0)
        key = max_key(scores[: block.size])
        if key > best:
            best = key
            winner = start + first_with_key(scores[: block.size], key)
    return winner


@compiled
def _recover_kernel(
    logits, num_tokens, stride, vocab_size, rows, draft_token_ids, inv_q, inv_q_stride, recovered_token_ids
):
    """Fill the recovered tokens; return the position of the first row that does not exist, or -1."""
    for i in range(rows.size):
        if not 0 <= rows[i] < num_tokens:
            return i
        row = logits[rows[i] * stride : rows[i] * stride + vocab_size]
        noise = inv_q[i * inv_q_stride : i * inv_q_stride + vocab_size]
        recovered_token_ids[i] = _race(row, noise, np.int64(draft_token_ids[i]))
    return -1


def recover(
    target_logits: torch.Tensor, rows: torch.Tensor, draft_token_ids: torch.Tensor, inv_q: torch.Tensor
) -> torch.Tensor:
    """See `vllm_aasd.kernels.verify.recover`."""
    recovered_token_ids = torch.empty(rows.shape[0], dtype=torch.int32)
    logits, stride = flat_view(target_logits)
    noise, inv_q_stride = flat_view(inv_q)
    bad = _recover_kernel(
        logits,
        target_logits.shape[0],
        stride,
        target_logits.shape[1],
        rows.contiguous().numpy(),
        draft_token_ids.contiguous().numpy(),
        noise,
        inv_q_stride,
        recovered_token_ids.numpy(),
    )
    if bad >= 0:
        raise ValueError(f"rows[{bad}] is {int(rows[bad])}, target_logits has {target_logits.shape[0]} rows")
    return recovered_token_ids
