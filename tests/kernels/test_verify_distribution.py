"""The distributions of verify and recovered tokens: losslessness, the conditional rule, properties of any input."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from scipy.stats import chisquare

from aasd_testing.policy_tensors import policy_tensors
from vllm_aasd.kernels.verify import cpu as verify_cpu
from vllm_aasd.kernels.verify import recovered_cpu, recovered_reference, verify
from vllm_aasd.kernels.verify import reference as verify_reference
from vllm_aasd.kernels.verify.policies import (
    ALPHA,
    BETA,
    BUDGET,
    CONDITIONAL,
    FLOOR,
    LIMIT,
    SPENT,
    STRICT,
    VerifyPolicies,
)
from vllm_aasd.kernels.verify.recovered import sample_recovered_tokens
from vllm_aasd.kernels.verify.relaxation_reference import binary_kl

# A true sampler fails a chi-square at this p-value once in 100,000 seeds; the seeds are fixed.
TRUE_SAMPLER = 1e-5
# A sampler that is off by a tenth must be told apart beyond doubt.
TILTED_SAMPLER = 1e-12

both_paths = pytest.mark.parametrize("path", [verify_cpu, verify_reference], ids=["cpu", "reference"])
RECOVERED = {verify_cpu: recovered_cpu, verify_reference: recovered_reference}


def one_row_each(
    path,
    logits,
    drafts,
    greedy=True,
    uniform=None,
    relaxed=False,
    alpha=0.1,
    beta=0.5,
    floor=0.1,
    stop_ids=(),
    policies=None,
):
    """Verify one draft in each of len(drafts) requests that all see the same row."""
    n = len(drafts)
    rules = [CONDITIONAL if relaxed else STRICT] * n
    return path.verify(
        torch.as_tensor(drafts, dtype=torch.int32),
        torch.arange(1, n + 1, dtype=torch.int32),
        1,
        logits.expand(n, -1).contiguous(),
        torch.zeros(n, dtype=torch.int64),
        torch.full((n,), greedy),
        uniform,
        policies or policy_tensors(rules, alpha=alpha, beta=beta, floor=floor),
        torch.tensor([list(stop_ids)] * n, dtype=torch.int32).reshape(n, -1),
    )


def peaked_logits(vocab_size, seed, scale=2.0):
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


@both_paths
def test_strict_sampling_is_lossless_by_algebra(path):
    """P(x accepted) is p(x), the race's weights are p without x, and so the emitted distribution is p.

    A draft is accepted up to u = p(x) and not beyond, so its chance is p(x). In a race where two tokens alone
    have noise, 1 and c, the winner changes at c = the ratio of their weights, so the ratios are p's.
    """
    vocab_size, nudge = 12, 1e-5
    logits = peaked_logits(vocab_size, seed=5)
    p = logits.double().softmax(-1)
    every = torch.arange(vocab_size)
    below = one_row_each(path, logits, every, greedy=False, uniform=p * (1 - nudge))
    above = one_row_each(path, logits, every, greedy=False, uniform=(p * (1 + nudge)).clamp(max=1 - 1e-16))
    assert below.num_accepted.all() and not above.num_accepted.any()
    for x in range(vocab_size):
        others = [v for v in range(vocab_size) if v != x]
        anchor = others[0]
        for v in others[1:]:
            ratio = p[anchor] / p[v]
            inv_q = torch.zeros(2, vocab_size)
            inv_q[:, x] = 1e20
            inv_q[:, anchor] = 1.0
            inv_q[:, v] = torch.stack([ratio * (1 - nudge), ratio * (1 + nudge)]).float()
            drafts = torch.tensor([x, x], dtype=torch.int32)
            assert RECOVERED[path].sample_recovered_tokens(
                logits[None], torch.tensor([0, 0]), drafts, inv_q
            ).tolist() == [anchor, v]
        q = torch.nn.functional.one_hot(torch.tensor(x), vocab_size).double()
        residual = torch.where(q == 0, p, 0.0) / p[others].sum()
        emitted = torch.minimum(p, q) + (1 - p[x]) * residual
        torch.testing.assert_close(emitted, p, rtol=1e-14, atol=1e-16)


@both_paths
def test_the_draft_is_recovered_when_nothing_else_has_a_probability(path):
    row = torch.tensor([[-torch.inf, 2.0, -torch.inf]])
    first, one = torch.tensor([0]), torch.tensor([1], dtype=torch.int32)
    sample = RECOVERED[path].sample_recovered_tokens
    assert sample(row, first, one, torch.ones(1, 3)).tolist() == [1]
    row[0, 2] = -20.0
    inv_q = torch.tensor([[1e30, 1.0, 1e-6]])
    assert sample(row, first, one, inv_q).tolist() == [2]
    assert sample(row, first, -one, inv_q).tolist() == [1]


def emitted_counts(logits, draft, n, seed, stretch=1.0, exclude_draft=True, policies=None):
    """Count the tokens that n sampled requests emit; `stretch` and `exclude_draft` break the sampler."""
    g = torch.Generator().manual_seed(seed)
    uniform = torch.rand(n, dtype=torch.float64, generator=g) * stretch
    drafts = torch.full((n,), draft, dtype=torch.int32)
    result = one_row_each(verify_cpu, logits, drafts, greedy=False, uniform=uniform, policies=policies)
    tokens = result.output_token_ids[:, 0].clone()
    rejected = (tokens == -1).nonzero()[:, 0]
    inv_q = torch.empty(len(rejected), len(logits)).exponential_(generator=g).reciprocal()
    excluded = drafts[rejected] if exclude_draft else torch.full_like(drafts[rejected], -1)
    tokens[rejected] = sample_recovered_tokens(logits.expand(n, -1).contiguous(), rejected, excluded, inv_q)
    return np.bincount(tokens.numpy(), minlength=len(logits))


@pytest.mark.parametrize("draft", range(6))
def test_emitted_tokens_have_the_targets_distribution(draft):
    n, logits = 40_000, peaked_logits(6, seed=11, scale=1.0)
    expected = logits.double().softmax(-1).numpy() * n
    assert chisquare(emitted_counts(logits, draft, n, seed=draft), expected).pvalue > TRUE_SAMPLER


@pytest.mark.parametrize("broken", [{"stretch": 0.9}, {"stretch": 1.1}, {"exclude_draft": False}])
def test_the_chi_square_finds_a_tilted_sampler(broken):
    n, logits = 40_000, peaked_logits(6, seed=11, scale=1.0)
    probs = logits.double().softmax(-1).numpy()
    counts = emitted_counts(logits, int(probs.argmax()), n, seed=1, **broken)
    assert chisquare(counts, probs * n).pvalue < TILTED_SAMPLER


def raised(p, kappa):
    """The largest p' whose coin is within kappa nats of p's, by bisection in float64."""
    low, high = p, 1.0
    if binary_kl(high, p) <= kappa:
        return high
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if binary_kl(middle, p) <= kappa else (low, middle)
    return low


def budgets_distribution(p, draft, kappa):
    """What a sampled request under a budget emits: p' at the draft, and p scaled elsewhere."""
    distribution = p * (1 - raised(p[draft], kappa)) / (1 - p[draft])
    distribution[draft] = raised(p[draft], kappa)
    return distribution


@both_paths
@pytest.mark.parametrize("kappa", [1e-3, 0.02, 0.5])
def test_a_budgets_sampler_accepts_up_to_the_inverted_divergence(path, kappa):
    """A draft is accepted up to u = p' and not beyond, so its chance is p'; this costs at most kappa."""
    vocab_size, nudge = 12, 1e-4
    logits = peaked_logits(vocab_size, seed=5)
    p = logits.double().softmax(-1).numpy()
    every = torch.arange(vocab_size)
    bound = torch.tensor([raised(p[x], kappa) for x in range(vocab_size)], dtype=torch.float64)
    budget = {"kappa": kappa, "nats": 100.0, "floor": 1e-6}
    results = []
    for factor in (1 - nudge, 1 + nudge):
        policies = policy_tensors([BUDGET] * vocab_size, **budget)
        uniform = (bound * factor).clamp(max=1 - 1e-12)
        results.append(one_row_each(path, logits, every, greedy=False, uniform=uniform, policies=policies))
        # Paid whether the draft was accepted or not.
        paid = policies.state[:, SPENT].double()
        torch.testing.assert_close(paid, torch.tensor(np.minimum(kappa, -np.log(p))), rtol=1e-4, atol=1e-7)
    assert results[0].num_accepted.all() and results[0].relaxed.all()
    assert not results[1].num_accepted[bound < 1].any()
    for x in range(vocab_size):
        distribution = budgets_distribution(p, x, kappa)
        assert distribution.sum() == pytest.approx(1, abs=1e-12)
        assert (
            distribution[distribution > 0] * np.log(distribution[distribution > 0] / p[distribution > 0])
        ).sum() <= kappa + 1e-12


@both_paths
def test_no_divergence_is_strict_even_where_u_exceeds_p_by_next_to_nothing(path):
    """There d(u || p) is 0, or less, by rounding."""
    row, n = torch.zeros(2), 400
    uniform = 0.5 + torch.arange(1, n + 1, dtype=torch.float64) * 2.0**-53
    for kappa, accepted in ((0.0, 0), (1e-6, 1)):
        policies = policy_tensors([BUDGET] * n, kappa=kappa)
        result = one_row_each(path, row, [1] * n, greedy=False, uniform=uniform, policies=policies)
        assert (result.num_accepted == accepted).all()


@pytest.mark.parametrize("draft", range(6))
def test_tokens_of_a_budget_have_the_promised_distribution(draft):
    n, logits, kappa = 40_000, peaked_logits(6, seed=11, scale=1.0), 0.05
    p = logits.double().softmax(-1).numpy()
    policies = policy_tensors([BUDGET] * n, kappa=kappa, nats=1.0, floor=1e-4)
    counts = emitted_counts(logits, draft, n, seed=draft, policies=policies)
    assert chisquare(counts, budgets_distribution(p, draft, kappa) * n).pvalue > TRUE_SAMPLER
    assert chisquare(counts, p * n).pvalue < TILTED_SAMPLER
    assert chisquare(counts, budgets_distribution(p, draft, 1.5 * kappa) * n).pvalue < TILTED_SAMPLER


@both_paths
@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("scale", [0.5, 1.5, 4.0])
def test_conditional_accepts_what_its_rule_says(path, greedy, scale):
    # Decisions nearer than this to a bar may differ between float32 and float64.
    vocab_size, margin = 60, 1e-5
    called = close = accepted_by_bar = 0
    for seed, (alpha, beta, floor, stop_ids) in enumerate(
        [
            (0.1, 0.5, 0.1, (3,)),
            (0.2, 0.3, 0.01, ()),
            (0.3, 0.4, 0.001, (7, 8, -1)),
            (0.0, 0.05, 0.02, (1,)),
            (10.0, 2.0, 0.03, ()),
        ]
    ):
        logits = peaked_logits(vocab_size, seed, scale)
        logits[40:] = -torch.inf
        z = logits.double().numpy()
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        entropy = -(p[p > 0] * np.log(p[p > 0])).sum()
        bar = max(floor, min(beta - alpha * entropy, p.max()))
        stopping = sum(p[s] for s in stop_ids if s >= 0)
        result = one_row_each(
            path,
            logits,
            torch.arange(vocab_size),
            greedy=greedy,
            uniform=torch.full((vocab_size,), 1 - 1e-12, dtype=torch.float64),
            relaxed=True,
            alpha=alpha,
            beta=beta,
            floor=floor,
            stop_ids=stop_ids,
        )
        for x in range(vocab_size):
            by_rule = p[x] >= bar and p[x] > 0 and x not in stop_ids and p[x] > stopping
            strict = greedy and x == p.argmax()
            called += 1
            if 0 < abs(p[x] - bar) < margin or 0 < abs(p[x] - stopping) < margin * p[x]:
                close += 1
                continue
            assert bool(result.num_accepted[x]) == (by_rule or strict)
            assert bool(result.relaxed[x]) == (by_rule and not strict)
            if result.relaxed[x]:
                accepted_by_bar += 1
                assert float(result.regret[x]) == pytest.approx(np.log(p.max()) - np.log(p[x]), abs=1e-5)
    assert close <= 0.02 * called
    assert accepted_by_bar > 0


@st.composite
def batches(draw):
    """Draw a small batch with masked, tied and ordinary logits, and policies of every kind."""
    vocab_size = draw(st.integers(1, 7))
    counts = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    n, batch_size = sum(counts), len(counts)
    logit = st.sampled_from([-float("inf"), 0.0, 0.5, 1.0, 3.0]) | st.floats(-20, 20, width=32)
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.tensor(draw(st.lists(logit, min_size=n * vocab_size, max_size=n * vocab_size)))
    unit = torch.rand(6, batch_size, generator=generator)
    rules = torch.randint(0, 5, (batch_size,), generator=generator).tolist()
    return (
        torch.randint(-1, vocab_size + 1, (n,), generator=generator).int(),
        torch.tensor(counts).cumsum(0).int(),
        4,
        logits.float().reshape(n, vocab_size),
        torch.randint(0, vocab_size, (batch_size,), generator=generator),
        torch.rand(batch_size, generator=generator) < 0.5,
        torch.rand(n, dtype=torch.float64, generator=generator) * (torch.rand(n, generator=generator) < 0.9),
        policy_tensors(
            rules,
            alpha=unit[0],
            beta=unit[1],
            floor=unit[2] * 0.3,
            cap=3 * unit[3],
            nats=2 * unit[4],
            kappa=unit[3],
            limit=1.2 + 3 * unit[5],
        ),
        torch.randint(-1, vocab_size, (batch_size, 2), generator=generator).int(),
    )


def spans(cu_num_draft_tokens):
    ends = cu_num_draft_tokens.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def complete(arguments, result):
    """Return the outputs with the recovered tokens of sampled requests drawn."""
    drafts, cu, _, logits, _, is_greedy = arguments[:6]
    output = result.output_token_ids.clone()
    for i, (start, end) in enumerate(spans(cu)):
        accepted = int(result.num_accepted[i])
        if accepted < end - start and not is_greedy[i]:
            assert output[i, accepted] == -1
            inv_q = torch.empty(1, logits.shape[1]).exponential_(generator=torch.Generator().manual_seed(i))
            row = torch.tensor([start + accepted])
            output[i, accepted] = sample_recovered_tokens(logits, row, drafts[row], inv_q.reciprocal())
    return output


@settings(max_examples=80, deadline=None)
@given(batches())
def test_output_is_an_accepted_prefix_one_token_and_placeholders(arguments):
    drafts, cu, _, logits, bonus = arguments[:5]
    result = verify(*arguments)
    output = complete(arguments, result)
    for i, (start, end) in enumerate(spans(cu)):
        accepted = int(result.num_accepted[i])
        assert output[i, :accepted].tolist() == drafts[start : start + accepted].tolist()
        assert (output[i, accepted + 1 :] == -1).all()
        if accepted == end - start:
            assert output[i, accepted] == bonus[i]
        assert not result.relaxed[start + accepted : end].any()
        emitted = min(accepted + 1, end - start)
        probs = logits[start : start + emitted].double().softmax(-1)
        for row, token in enumerate(output[i, :emitted].tolist()):
            assert 0 <= token < logits.shape[1]
            assert probs[row].isnan().any() or probs[row, token] > 0


@settings(max_examples=80, deadline=None)
@given(batches(), st.sampled_from([ALPHA, BETA, FLOOR]), st.floats(0, 0.5))
def test_a_looser_bar_never_shortens_an_accepted_prefix(arguments, parameter, step):
    policies = arguments[7]
    policies.rule[policies.rule != STRICT] = CONDITIONAL
    policies.parameters[:, LIMIT] = torch.inf
    sign = 1.0 if parameter == ALPHA else -1.0
    looser = policies._replace(parameters=policies.parameters.clone())
    looser.parameters[:, parameter] += sign * step
    tight = verify(*arguments).num_accepted
    assert (verify(*arguments[:7], looser, arguments[8]).num_accepted >= tight).all()
    strict = policies._replace(rule=torch.zeros_like(policies.rule))
    assert (verify(*arguments[:7], strict, arguments[8]).num_accepted <= tight).all()


def assert_same(arguments, one, other):
    """Two policies give the same output for a batch, bit for bit."""
    for actual, expected in zip(
        verify(*arguments[:7], one, arguments[8]), verify(*arguments[:7], other, arguments[8]), strict=True
    ):
        assert torch.equal(actual, expected)


@settings(max_examples=80, deadline=None)
@given(batches())
def test_alpha_zero_and_beta_above_one_is_strict_for_greedy_requests(arguments):
    n = len(arguments[5])
    greedy = (*arguments[:5], torch.ones_like(arguments[5]), None, *arguments[7:])
    same = policy_tensors([CONDITIONAL] * n, alpha=0, beta=1.001, floor=1e-4)
    assert_same(greedy, same, policy_tensors([STRICT] * n))


@settings(max_examples=80, deadline=None)
@given(batches(), st.sampled_from(["nats", "kappa and per_step"]))
def test_a_budget_of_nothing_is_strict(arguments, what):
    """Both kinds of request; exact ties, which cost nothing, are among the drafts."""
    n = len(arguments[5])
    nothing = dict.fromkeys(what.split(" and "), 0)
    budget = policy_tensors([BUDGET] * n, **{"cap": 20.0, "kappa": 20.0, "floor": 1e-4, **nothing})
    strict = verify(*arguments[:7], policy_tensors([STRICT] * n), arguments[8])
    ours = verify(*arguments[:7], budget, arguments[8])
    for actual, expected in zip(ours[:4], strict[:4], strict=True):
        assert torch.equal(actual, expected)


@settings(max_examples=80, deadline=None)
@given(batches())
def test_requests_of_a_batch_do_not_affect_each_other(arguments):
    drafts, cu, width, logits, bonus, is_greedy, uniform, policies, stop_token_ids = arguments
    state = policies.state.clone()
    together = verify(*arguments)
    for i, (start, end) in enumerate(spans(cu)):
        alone = verify(
            drafts[start:end],
            torch.tensor([end - start], dtype=torch.int32),
            width,
            logits[start:end],
            bonus[i : i + 1],
            is_greedy[i : i + 1],
            uniform[start:end],
            VerifyPolicies(*(tensor[i : i + 1] for tensor in policies[:-1]), state),
            stop_token_ids[i : i + 1],
        )
        assert torch.equal(alone.output_token_ids[0], together.output_token_ids[i])
        assert torch.equal(alone.relaxed, together.relaxed[start:end])
        assert torch.equal(alone.regret, together.regret[start:end])
    assert torch.equal(state, policies.state)
