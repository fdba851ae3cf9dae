"""Recovered tokens of the V1 op: both paths against p without the rejected draft token, and edge cases."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from vllm_aasd.gpu_check.verify_inputs import strict
from vllm_aasd.kernels.verify import VerifyBatch, cpu, reference

INF = float("inf")
both_paths = pytest.mark.parametrize("path", [cpu, reference], ids=["cpu", "reference"])


def recovered(path, rows, drafts, probs=None, inv_q=None):
    """The recovered token of each row, by a uniform number or with noise; every draft token is rejected."""
    n = len(rows)
    by_noise = {} if inv_q is None else {"inv_q": inv_q, "inv_q_rows": torch.arange(n, dtype=torch.int32)}
    batch = VerifyBatch(
        draft_token_ids=torch.as_tensor(drafts, dtype=torch.int32),
        cu_num_draft_tokens=torch.arange(1, n + 1, dtype=torch.int32),
        max_spec_len=1,
        target_logits=rows,
        bonus_token_ids=torch.zeros(n, dtype=torch.int64),
        is_greedy=torch.zeros(n, dtype=torch.bool),
        policies=strict(n),
        stop_token_ids=torch.full((n, 1), -1, dtype=torch.int32),
        uniform_probs=torch.full((n,), 2.0, dtype=torch.float64),
        recovered_probs=torch.zeros(n).double() if probs is None else torch.as_tensor(probs, dtype=torch.float64),
        **by_noise,
    )
    output = path.verify(batch)
    assert (output.num_sampled == 1).all()
    return output.sampled[:, 0]


def residual(row, draft):
    """p without a draft token, in float64."""
    p = row.double().softmax(-1)
    if 0 <= draft < len(p):
        p[draft] = 0.0
    return p / p.sum()


@both_paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [2, 111, 2048, 2049, 49152])
def test_the_token_drawn_is_the_one_that_u_falls_on(path, vocab_size, dtype):
    g = torch.Generator().manual_seed(vocab_size)
    n = 64
    logits = (torch.randn(7, vocab_size + 5, generator=g) * 4).to(dtype)[torch.randint(7, (n,), generator=g)]
    logits = logits[:, :vocab_size]
    drafts = torch.randint(-1, vocab_size + 1, (n,), generator=g).int()
    drafts[::2] = logits.float().argmax(-1)[::2].int()
    uniform = torch.rand(n, dtype=torch.float64, generator=g)
    uniform[0], uniform[1] = 0.0, 1 - 2**-53
    tokens = recovered(path, logits, drafts, uniform)
    for row, draft, u, token in zip(logits, drafts.tolist(), uniform.tolist(), tokens.tolist(), strict=True):
        p = residual(row, draft)
        assert p[token] > 0
        # Float32 weights: the sums are off by a part in a million.
        assert p[:token].sum() - 2e-6 <= u <= p[: token + 1].sum() + 2e-6


@both_paths
@pytest.mark.parametrize("draft", [0, 3, -1])
def test_what_is_drawn_has_the_distribution_of_p_without_the_draft(path, draft):
    n, row = 20_000, torch.randn(6, generator=torch.Generator().manual_seed(11))
    uniform = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(draft + 1))

    def pvalue(expected_draft, uniform):
        counts = np.bincount(recovered(path, row.repeat(n, 1), [draft] * n, uniform), minlength=6)
        expected = residual(row, expected_draft).numpy() * n
        possible = expected > 0
        return 0.0 if counts[~possible].any() else chisquare(counts[possible], expected[possible]).pvalue

    assert pvalue(draft, uniform) > 1e-3
    if path is cpu:
        assert pvalue(1 if draft == -1 else -1, uniform) < 1e-6, "another residual is told apart"
        assert pvalue(draft, uniform * 0.9) < 1e-6, "a tilted u is told apart"


@both_paths
def test_a_token_without_probability_is_never_drawn(path):
    rows = torch.tensor([[-INF, 0.0, -INF, 0.0, -INF]]).repeat(4, 1)
    assert recovered(path, rows, [-1] * 4, [0.0, 0.49, 0.51, 1 - 2**-53]).tolist() == [1, 1, 3, 3]
    assert recovered(path, rows[:1], [1], inv_q=torch.tensor([[9.0, 9, 9, 1e-30, 9]])).tolist() == [3]


@both_paths
def test_the_draft_is_emitted_where_nothing_else_has_a_probability(path):
    row = torch.tensor([[-INF, 2.0, -INF]])
    for noise in (None, torch.ones(1, 3)):
        assert recovered(path, row, [1], [0.5], noise).tolist() == [1]
    row[0, 2] = -20.0
    noise = torch.tensor([[1e30, 1.0, 1e-6]])
    assert recovered(path, row, [1], inv_q=noise).tolist() == [2]
    assert recovered(path, row, [-1], inv_q=noise).tolist() == [1]


@both_paths
def test_the_noise_decides_by_the_ratios_of_p(path):
    """Where two tokens alone have noise, 1 and c, the token changes at c = the ratio of their probabilities."""
    vocab_size, nudge = 12, 1e-5
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(5)) * 2
    p = logits.double().softmax(-1)
    for x in range(vocab_size):
        anchor, *others = [v for v in range(vocab_size) if v != x]
        for v in others:
            inv_q = torch.zeros(2, vocab_size)
            inv_q[:, x], inv_q[:, anchor] = 1e20, 1.0
            inv_q[:, v] = (p[anchor] / p[v] * torch.tensor([1 - nudge, 1 + nudge])).float()
            assert recovered(path, logits.repeat(2, 1), [x, x], inv_q=inv_q).tolist() == [anchor, v]


def test_a_token_far_from_the_draft_and_nearly_impossible_is_not_lost_in_its_rounding():
    """The draft's weight is 1 and the rest of its block weighs 1e-9: subtracted, it would be rounding."""
    row = torch.full((2, 4096), -INF)
    row[:, [10, 20, 3000]] = torch.tensor([0.0, -20.7, -20.7])
    assert recovered(cpu, row, [10, 10], [0.25, 0.75]).tolist() == [20, 3000]
