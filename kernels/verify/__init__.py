"""Verify: which draft tokens of each request are accepted, and what is emitted after them.

The rule
    For one row let z be the processed target logits, p = softmax(z) and H = -sum p log p its entropy in nats.
    A draft token x, proposed with certainty, is accepted

    - in a greedy request iff x is the argmax of z, the lowest index among equals;
    - in a sampled request iff p(x) > 0 and p(x) >= u for a uniform u;
    - in a *relaxed* request of either kind, also iff its rule says so:
        conditional:      p(x) >= min(beta - alpha H, max p)
        fly:              -sum p log p over the three likeliest tokens >= threshold, and the request's next `window`
                          draft tokens exist and each is accepted strictly at its row
        budget, greedy:   log max p - log p(x) <= cap, and fewer than `per_step` of the step's tokens were relaxed
        budget, sampled:  d(u || p(x)) <= kappa, d(q || p) = q log(q / p) + (1 - q) log((1 - q) / (1 - p)), kappa > 0
      and all guards pass:
        p(x) >= floor,
        p(x) > 0,
        x is no stop token, and p(x) > sum of p over the request's stop tokens,
        level * decay + 1 <= limit, and the request isn't in a cooldown (the collapse guard),
        under budget, the remaining budget covers its cost.

    The first rejection ends the accepted prefix. A greedy request then emits the argmax, a sampled one a recovered
    token, drawn from p without the rejected draft token. A request without a rejection emits its bonus token.
    p(x) >= max p is read as "x is the argmax", so of tokens tied for the maximum only the lowest index passes by it,
    and alpha = 0 with beta > 1 is exactly greedy. A row without a softmax (NaN, +inf, or nothing but -inf) accepts
    nothing but the greedy argmax, which for NaN is the first NaN, as in `torch.argmax`.

Recovered tokens
    A request with a seed gets vLLM's own recovered token: argmax_v p(v) / E(v) with independent exponential E(v),
    which is v with probability p(v). Drawing a vocabulary of exponentials takes a CPU twenty times as long as reading
    the row (1.0 ms against 0.05 ms at 49152 tokens), so a request without a seed uses one uniform number: the first
    token at which the running sum of p exceeds that share of the total. If the rejected draft token is the only one
    with a probability (rounding can reject it), it is emitted (vLLM emits token 0). A row without a softmax gives its
    argmax.

A request's state
    Each emitted token, the last one included, makes level <- level * decay + 1 if it was relaxed, level * decay
    otherwise, and counts a cooldown down. A draft token rejected only because of the level starts a cooldown: the
    `cooldown` tokens after the recovered one are verified strictly. A budget pays for a greedy request's relaxed
    tokens, each its regret log max p - log p(x). For a sampled request it pays min(kappa, -log p(x)) at every row that
    is reached and where the guards on p(x) and the collapse guard pass, accepted or not: the KL divergence of the
    row's distribution from p. The first cost that the budget can't cover exhausts it, and the request is strict from
    then on. With `nats` = 0, and for sampled requests with kappa = 0, it is strict throughout.

docs/verification.md explains the rules and guards and names their sources. Output layout and placeholder are those of
vLLM's `v1/sample/rejection_sampler.py`.
"""

from typing import NamedTuple

import torch

from vllm_aasd.kernels.common.checks import check_logits, check_tensor, check_tensors
from vllm_aasd.kernels.verify.policies import CONDITIONAL, NUM_PARAMETERS, NUM_STATES, VerifyPolicies, policy_tensors

PLACEHOLDER_TOKEN_ID = -1


class VerifyBatch(NamedTuple):
    """The arguments of `verify`.

    Attributes:
        draft_token_ids: [num_tokens] int32. -1, or any id outside the vocabulary, is always rejected.
        cu_num_draft_tokens: [batch_size] int32, inclusive cumulative: request i owns the rows from
            entry i - 1 (0 for the first) up to entry i.
        max_spec_len: the most draft tokens of a request.
        target_logits: [num_tokens, vocab_size] float32, bfloat16 or float16, any row stride. Already
            processed: penalties, masks (-inf), temperature, top-k and top-p; greedy rows at temperature 1.
        bonus_token_ids: [batch_size] or [batch_size, 1], int32 or int64.
        is_greedy: [batch_size] bool.
        policies: how each request is verified, and its state, see `VerifyPolicies`.
        stop_token_ids: [batch_size, max_stop] int32, the distinct ids that end the request, padded with -1.
        uniform_probs: [num_tokens] float64 in [0, 1); None only if every request is greedy.
        recovered_probs: [batch_size] float64 in [0, 1), for drawing recovered tokens; None as `uniform_probs`.
        inv_q: [n, vocab_size] float32, 1 / E with E drawn from the exponential distribution of rate 1.
        inv_q_rows: [batch_size] int32, the request's row of `inv_q`, -1 to draw by `recovered_probs`; None for all -1.
    """

    draft_token_ids: torch.Tensor
    cu_num_draft_tokens: torch.Tensor
    max_spec_len: int
    target_logits: torch.Tensor
    bonus_token_ids: torch.Tensor
    is_greedy: torch.Tensor
    policies: VerifyPolicies
    stop_token_ids: torch.Tensor
    uniform_probs: torch.Tensor | None = None
    recovered_probs: torch.Tensor | None = None
    inv_q: torch.Tensor | None = None
    inv_q_rows: torch.Tensor | None = None


class VerifyOutput(NamedTuple):
    """What one verification step emitted, and why.

    Attributes:
        sampled: [batch_size, max_spec_len + 1] int32: accepted draft tokens, the recovered or bonus token, then -1.
        num_sampled: [batch_size] int32: emitted tokens, the recovered or bonus token included.
        relaxed: [num_tokens] bool: the row's draft token was accepted although the strict rule rejects it.
        regret: [num_tokens] float32, nats: log max p - log p(x) where `relaxed`, else 0.
        exhausted: [batch_size] bool: the request's budget ran out in this step; happens once.
        guarded: [batch_size] bool: the collapse guard engaged in this step.
    """

    sampled: torch.Tensor
    num_sampled: torch.Tensor
    relaxed: torch.Tensor
    regret: torch.Tensor
    exhausted: torch.Tensor
    guarded: torch.Tensor


def verify(batch: VerifyBatch) -> VerifyOutput:
    """Verify a batch on the CPU; the module's docstring has the rule and its sources.

    Returns:
        New tensors. `policies.state` is updated in place; nothing else of the batch is modified.

    Raises:
        ValueError: an argument has a wrong shape or dtype, or the cumulative counts are impossible.
    """
    num_tokens, batch_size = batch.draft_token_ids.shape[0], batch.cu_num_draft_tokens.shape[0]
    check_logits("target_logits", batch.target_logits, num_tokens)
    bonus_shape = (batch_size, 1) if batch.bonus_token_ids.ndim == 2 else (batch_size,)
    check_tensor("bonus_token_ids", batch.bonus_token_ids, bonus_shape, torch.int32, torch.int64)
    check_tensors(
        ("draft_token_ids", batch.draft_token_ids, (num_tokens,), torch.int32),
        ("cu_num_draft_tokens", batch.cu_num_draft_tokens, (batch_size,), torch.int32),
        ("is_greedy", batch.is_greedy, (batch_size,), torch.bool),
        ("stop_token_ids", batch.stop_token_ids, (batch_size, batch.stop_token_ids.shape[-1]), torch.int32),
        *policy_tensors(batch.policies, batch_size),
    )
    for name, shape in (("uniform_probs", (num_tokens,)), ("recovered_probs", (batch_size,))):
        probs = getattr(batch, name)
        if probs is not None:
            check_tensor(name, probs, shape, torch.float64)
        elif not batch.is_greedy.all():
            raise ValueError(f"{name} is None, which is allowed only if every request is greedy")
    if batch.inv_q is not None and batch.inv_q_rows is not None:
        check_tensor("inv_q", batch.inv_q, (len(batch.inv_q), batch.target_logits.shape[1]), torch.float32)
        check_tensor("inv_q_rows", batch.inv_q_rows, (batch_size,), torch.int32)
        if batch_size and int(batch.inv_q_rows.max()) >= len(batch.inv_q):
            raise ValueError(f"inv_q_rows holds {int(batch.inv_q_rows.max())}, inv_q has {len(batch.inv_q)} rows")
    # Not at import: the GPU path does without numba.
    from vllm_aasd.kernels.verify import cpu

    return cpu.verify(batch)


def warm_up(device: torch.device, dtype: torch.dtype) -> None:
    """Compile what `verify` needs for logits of a dtype, or load it from the cache on disk.

    To be called when a worker starts, so that no request waits for the compiler (seconds without a cache).

    Args:
        device: the CPU.
        dtype: float32, bfloat16 or float16.
    """
    with device:
        draft_token_ids = torch.tensor([0, 0], dtype=torch.int32)
        policies = VerifyPolicies(
            torch.full((2,), CONDITIONAL, dtype=torch.int32),
            torch.ones(2, NUM_PARAMETERS),
            draft_token_ids,
            torch.zeros(1, NUM_STATES),
        )
        batch = VerifyBatch(
            draft_token_ids,
            torch.tensor([1, 2], dtype=torch.int32),
            1,
            torch.tensor([[0.0, 1.0], [0.0, 1.0]], dtype=dtype),
            draft_token_ids,
            torch.tensor([True, False]),
            policies,
            draft_token_ids[:, None],
            *torch.full((2, 2), 0.9, dtype=torch.float64),
        )
    verify(batch)
