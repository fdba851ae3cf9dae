"""Recovered tokens by a uniform number: both paths against p itself, its distribution, edge cases, argument checks."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from vllm_aasd.kernels.verify import recovered_cpu, recovered_reference
from vllm_aasd.kernels.verify.recovered import sample_recovered_tokens_by_uniform, warm_up

INF, NAN = float("inf"), float("nan")
both_paths = pytest.mark.parametrize("path", [recovered_cpu, recovered_reference], ids=["cpu", "reference"])


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
    logits = (torch.randn(7, vocab_size + 5, generator=g) * 4).to(dtype)[:, :vocab_size]
    rows = torch.randint(7, (n,), generator=g)
    drafts = torch.randint(-1, vocab_size + 1, (n,), generator=g).int()
    drafts[::2] = logits[rows].float().argmax(-1)[::2].int()
    uniform = torch.rand(n, dtype=torch.float64, generator=g)
    uniform[0], uniform[1] = 0.0, 1 - 2**-53
    tokens = path.sample_recovered_tokens_by_uniform(logits, rows, drafts, uniform)
    for row, draft, u, token in zip(rows, drafts.tolist(), uniform.tolist(), tokens.tolist(), strict=True):
        p = residual(logits[row], draft)
        assert p[token] > 0
        # Float32 weights: the sums are off by a part in a million.
        assert p[:token].sum() - 2e-6 <= u <= p[: token + 1].sum() + 2e-6


@both_paths
@pytest.mark.parametrize("draft", [0, 3, -1])
def test_what_is_drawn_has_the_distribution_of_p_without_the_draft(path, draft):
    n, row = 40_000, torch.randn(6, generator=torch.Generator().manual_seed(11))
    uniform = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(draft + 1))

    def pvalue(expected_draft, uniform):
        counts = np.bincount(path.sample_recovered_tokens_by_uniform(row[None], torch.zeros(n, dtype=torch.int64),
                                         torch.full((n,), draft, dtype=torch.int32), uniform), minlength=6)  # fmt: skip
        expected = residual(row, expected_draft).numpy() * n
        possible = expected > 0
        if counts[~possible].any():
            return 0.0
        return chisquare(counts[possible], expected[possible]).pvalue

    assert pvalue(draft, uniform) > 1e-3
    assert pvalue(1 if draft == -1 else -1, uniform) < 1e-6, "another residual is told apart"
    assert pvalue(draft, uniform * 0.9) < 1e-6, "a tilted u is told apart"


@both_paths
def test_a_token_without_probability_is_never_drawn(path):
    row = torch.tensor([[-INF, 0.0, -INF, 0.0, -INF]])
    for u, token in ((0.0, 1), (0.49, 1), (0.51, 3), (1 - 2**-53, 3)):
        assert path.sample_recovered_tokens_by_uniform(row, torch.tensor([0]), torch.tensor([-1], dtype=torch.int32),
                           torch.tensor([u], dtype=torch.float64)).tolist() == [token]  # fmt: skip


@both_paths
def test_the_draft_is_emitted_where_nothing_else_has_a_probability(path):
    row = torch.tensor([[-INF, 2.0, -INF]])
    draft, u = torch.tensor([1], dtype=torch.int32), torch.tensor([0.5], dtype=torch.float64)
    assert path.sample_recovered_tokens_by_uniform(row, torch.tensor([0]), draft, u).tolist() == [1]


@both_paths
@pytest.mark.parametrize("row", [[NAN] * 4, [1.0, NAN, 2.0, 3.0], [-INF] * 4, [0.0, INF, 0.0, 1.0]])
def test_a_row_without_softmax_gives_its_argmax(path, row):
    logits = torch.tensor([row])
    u = torch.tensor([0.5], dtype=torch.float64)
    drawn = path.sample_recovered_tokens_by_uniform(logits, torch.tensor([0]), torch.tensor([2], dtype=torch.int32), u)
    assert drawn.tolist() == [int(logits[0].argmax())]


def test_a_token_far_from_the_draft_and_nearly_impossible_is_not_lost_in_its_rounding():
    """The draft's weight is 1 and the rest of its block weighs 1e-9: subtracted, it would be rounding."""
    row = torch.full((1, 4096), -INF)
    row[0, 10], row[0, 20], row[0, 3000] = 0.0, -20.7, -20.7
    draft, where = torch.tensor([10, 10], dtype=torch.int32), torch.tensor([0, 0])
    u = torch.tensor([0.25, 0.75], dtype=torch.float64)
    assert sample_recovered_tokens_by_uniform(row, where, draft, u).tolist() == [20, 3000]


def test_nothing_compiles_after_warm_up_and_nothing_to_draw_is_legal():
    warm_up(torch.device("cpu"), torch.float32)
    before = len(recovered_cpu._uniform_kernel.signatures)
    nothing = torch.empty(0, dtype=torch.int64)
    assert sample_recovered_tokens_by_uniform(
        torch.zeros(3, 9)[::2], nothing, nothing.int(), nothing.double()
    ).shape == (0,)
    sample_recovered_tokens_by_uniform(
        torch.zeros(3, 9)[::2], torch.tensor([1]), torch.tensor([4], dtype=torch.int32), torch.rand(1).double()
    )
    assert len(recovered_cpu._uniform_kernel.signatures) == before


def test_bad_arguments_are_named():
    row, draft, u = torch.tensor([0]), torch.tensor([0], dtype=torch.int32), torch.tensor([0.5]).double()
    logits = torch.zeros(2, 4)
    for arguments, name in (
        ((logits.double(), row, draft, u), "target_logits"),
        ((logits, row.int(), draft, u), "rows"),
        ((logits, row + 2, draft, u), r"rows\[0\] is 2"),
        ((logits, row - 1, draft, u), r"rows\[0\] is -1"),
        ((logits, row, draft.long(), u), "draft_token_ids"),
        ((logits, row, draft, u.float()), "uniform"),
        ((logits, row, draft, u.repeat(2)), "uniform"),
    ):
        with pytest.raises(ValueError, match=name):
            sample_recovered_tokens_by_uniform(*arguments)
