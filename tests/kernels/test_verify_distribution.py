"""The distributions that verification obeys: losslessness, the conditional rule, budgets, properties of any input.

The CPU path and the reference of the seeded op draw the samples, since the interpreter takes milliseconds for each;
that the kernels emit the same tokens for the same seeds is tested on a part of the very samples.
"""

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from scipy.stats import chisquare

from aasd_testing import verify_paths
from aasd_testing.verify_paths import with_own_state
from vllm_aasd.gpu_check.verify_inputs import batch, policy_tensors
from vllm_aasd.kernels.verify import VerifyBatch, cpu, reference
from vllm_aasd.kernels.verify.policies import ALPHA, BETA, BUDGET, CONDITIONAL, FLOOR, LIMIT, SPENT, STRICT
from vllm_aasd.kernels.verify.relaxation_reference import binary_kl
from vllm_aasd.kernels.verify.seeded import SeededBatch

# A true sampler fails a chi-square at this p-value once in 100,000 seeds; the seeds are fixed.
TRUE_SAMPLER = 1e-5
# A sampler that is off by a tenth must be told apart beyond doubt.
TILTED_SAMPLER = 1e-12

both_paths = pytest.mark.parametrize("path", [cpu, reference], ids=["cpu", "reference"])


def one_row_each(path, logits, drafts, uniform, policies=None, seed=0):
    """Verify one draft in each of len(drafts) sampled V1 requests that all see the same row."""
    n = len(drafts)
    return path.verify(
        VerifyBatch(
            torch.as_tensor(drafts, dtype=torch.int32),
            torch.arange(1, n + 1, dtype=torch.int32),
            1,
            logits.expand(n, -1).contiguous(),
            torch.zeros(n, dtype=torch.int64),
            torch.zeros(n, dtype=torch.bool),
            policies or policy_tensors([STRICT] * n),
            torch.empty(n, 0, dtype=torch.int32),
            uniform,
            torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1000)),
        )
    )


def peaked_logits(vocab_size, seed, scale=2.0):
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


@both_paths
def test_strict_sampling_is_lossless_by_algebra(path):
    """A draft is accepted up to u = p(x) and not beyond, so its chance is p(x); `test_recovered` shows that the
    recovered token has the distribution of p without x. So the emitted distribution is p."""
    vocab_size, nudge = 12, 1e-5
    logits = peaked_logits(vocab_size, seed=5)
    p = logits.double().softmax(-1)
    every = torch.arange(vocab_size)
    below = one_row_each(path, logits, every, p * (1 - nudge))
    above = one_row_each(path, logits, every, (p * (1 + nudge)).clamp(max=1 - 1e-16))
    assert (below.num_sampled == 2).all() and (above.num_sampled == 1).all()
    for x in range(vocab_size):
        q = torch.nn.functional.one_hot(torch.tensor(x), vocab_size).double()
        residual = torch.where(q == 0, p, 0.0) / p[q == 0].sum()
        emitted = torch.minimum(p, q) + (1 - p[x]) * residual
        torch.testing.assert_close(emitted, p, rtol=1e-14, atol=1e-16)


def emitted_counts(logits, draft, n, seed, stretch=1.0, exclude_draft=True, policies=None):
    """Count the tokens that n sampled V1 requests emit; `stretch` and `exclude_draft` break the sampler."""
    uniform = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * stretch
    result = one_row_each(cpu, logits, [draft] * n, uniform, policies, seed)
    tokens = result.sampled[:, 0]
    if not exclude_draft:
        # What a placeholder's recovered tokens are, of which no token is excluded.
        free = one_row_each(cpu, logits, [-1] * n, uniform, seed=seed).sampled[:, 0]
        tokens = torch.where(result.num_sampled == 2, tokens, free)
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
    """The largest p' for which Bernoulli(p') is within kappa nats of Bernoulli(p), by bisection in float64."""
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
    bound = torch.tensor([raised(p[x], kappa) for x in range(vocab_size)], dtype=torch.float64)
    results = []
    for factor in (1 - nudge, 1 + nudge):
        policies = policy_tensors([BUDGET] * vocab_size, kappa=kappa, nats=100.0, floor=1e-6)
        uniform = (bound * factor).clamp(max=1 - 1e-12)
        results.append(one_row_each(path, logits, torch.arange(vocab_size), uniform, policies))
        # Paid whether the draft was accepted or not.
        paid = policies.state[:, SPENT].double()
        torch.testing.assert_close(paid, torch.tensor(np.minimum(kappa, -np.log(p))), rtol=1e-4, atol=1e-7)
    assert (results[0].num_sampled == 2).all() and results[0].relaxed.all()
    assert (results[1].num_sampled[bound < 1] == 1).all()
    for x in range(vocab_size):
        distribution = budgets_distribution(p, x, kappa)
        assert distribution.sum() == pytest.approx(1, abs=1e-12)
        positive = distribution[distribution > 0]
        assert (positive * np.log(positive / p[distribution > 0])).sum() <= kappa + 1e-12


@both_paths
def test_no_divergence_is_strict_even_where_u_exceeds_p_by_next_to_nothing(path):
    """There d(u || p) is 0, or less, by rounding."""
    n = 400
    uniform = 0.5 + torch.arange(1, n + 1, dtype=torch.float64) * 2.0**-53
    for kappa, accepted in ((0.0, 0), (1e-6, 1)):
        result = one_row_each(path, torch.zeros(2), [1] * n, uniform, policy_tensors([BUDGET] * n, kappa=kappa))
        assert (result.num_sampled == 1 + accepted).all()


@pytest.mark.parametrize("draft", range(6))
def test_tokens_of_a_budget_have_the_promised_distribution(draft):
    n, logits, kappa = 40_000, peaked_logits(6, seed=11, scale=1.0), 0.05
    p = logits.double().softmax(-1).numpy()
    policies = policy_tensors([BUDGET] * n, kappa=kappa, nats=1.0, floor=1e-4)
    counts = emitted_counts(logits, draft, n, seed=draft, policies=policies)
    assert chisquare(counts, budgets_distribution(p, draft, kappa) * n).pvalue > TRUE_SAMPLER
    assert chisquare(counts, p * n).pvalue < TILTED_SAMPLER
    assert chisquare(counts, budgets_distribution(p, draft, 1.5 * kappa) * n).pvalue < TILTED_SAMPLER


NUM_SAMPLES = 4000
LOGITS = torch.log(torch.tensor([0.36, 0.26, 0.16, 0.12, 0.06, 0.04]))
BAR = {"alpha": 0.1, "beta": 0.35, "floor": 0.05}


def samples(n, relaxed, logits=LOGITS, drafts=None):
    """One draft in each of n sampled requests that all see the same row; drafts go around the vocabulary."""
    drafts = [i % len(logits) for i in range(n)] if drafts is None else drafts
    rule = {name: [value] * n for name, value in BAR.items()}
    return batch(
        logits.expand(n, 2, -1), [[draft] for draft in drafts], temperature=[1.0] * n, seed=range(n),
        relaxed=[relaxed] * n, **rule,
    )  # fmt: skip


def seeded_reference(*args, **kwargs):
    return reference.verify_seeded(SeededBatch(**samples(*args, **kwargs)))


def expected_distribution(relaxed):
    """The distribution of a request's first token: p, or under the bar the draft itself, uniform over the drafts."""
    p = LOGITS.double().softmax(-1).numpy()
    if not relaxed:
        return p
    entropy = -(p * np.log(p)).sum()
    clears = p >= max(BAR["floor"], min(BAR["beta"] - BAR["alpha"] * entropy, p.max()))
    assert 0 < clears.sum() < len(p)
    return np.where(clears, 1.0, 0.0) / len(p) + (~clears).mean() * p


def p_value(tokens, distribution):
    counts = np.bincount(tokens.numpy(), minlength=len(distribution))
    return chisquare(counts, distribution * len(tokens)).pvalue


@pytest.fixture(scope="module")
def drawn():
    """Samples of the seeded op's reference, strict and conditional."""
    return {relaxed: seeded_reference(NUM_SAMPLES, relaxed) for relaxed in (False, True)}


@pytest.mark.parametrize("relaxed", [False, True], ids=["strict", "conditional"])
def test_seeded_tokens_have_the_exact_distribution(interpreter, drawn, relaxed):
    assert p_value(drawn[relaxed].sampled[:, 0], expected_distribution(relaxed)) > TRUE_SAMPLER
    n = 120
    emitted = verify_paths.run("triton", samples(n, relaxed), interpreter).sampled
    assert emitted.tolist() == drawn[relaxed].sampled[:n].tolist(), "the kernels draw the same"
    if not relaxed:
        bonus = drawn[False].sampled[drawn[False].num_sampled == 2, 1]
        assert len(bonus) > 500 and p_value(bonus, expected_distribution(False)) > TRUE_SAMPLER


def test_the_chi_square_of_seeded_tokens_finds_what_is_wrong(drawn):
    """Another rule's distribution, a row at temperature 2, and a draw that doesn't exclude the rejected draft."""
    assert p_value(drawn[True].sampled[:, 0], expected_distribution(False)) < TILTED_SAMPLER
    assert p_value(drawn[False].sampled[:, 0], expected_distribution(True)) < TILTED_SAMPLER
    n = 2000
    hot, top, free = (
        seeded_reference(n, False, logits=logits, drafts=[draft] * n)
        for logits, draft in ((LOGITS / 2, 0), (LOGITS, 0), (LOGITS, -1))
    )
    assert p_value(top.sampled[:, 0], expected_distribution(False)) > TRUE_SAMPLER
    assert p_value(hot.sampled[:, 0], expected_distribution(False)) < TILTED_SAMPLER
    careless = torch.where(top.num_sampled == 2, top.sampled[:, 0], free.sampled[:, 0])
    assert p_value(careless, expected_distribution(False)) < TILTED_SAMPLER


@pytest.fixture(params=verify_paths.V1 + verify_paths.V2)
def any_path(request):
    """Verifies a batch of the seeded op by one of the implementations."""
    interpreter = request.getfixturevalue("interpreter") if request.param == "triton" else None
    return lambda arguments, **given: verify_paths.run(request.param, with_own_state(arguments), interpreter, **given)


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("scale", [0.5, 1.5, 4.0])
def test_conditional_accepts_what_its_rule_says(any_path, greedy, scale):
    # Decisions nearer than this to a bar may differ between float32 and float64.
    n, margin = 60, 1e-5
    called = close = accepted_by_bar = 0
    for seed, (alpha, beta, floor, stops) in enumerate(
        [(0.1, 0.5, 0.1, [3]), (0.2, 0.3, 0.01, []), (0.3, 0.4, 0.001, [7, 8]), (0.0, 0.05, 0.02, [1]),
         (10.0, 2.0, 0.03, [])]
    ):  # fmt: skip
        logits = peaked_logits(n, seed, scale)
        logits[40:] = -torch.inf
        p = logits.double().softmax(-1).numpy()
        entropy = -(p[p > 0] * np.log(p[p > 0])).sum()
        bar = max(floor, min(beta - alpha * entropy, p.max()))
        stopping = sum(p[s] for s in stops)
        arguments = batch(
            logits.expand(n, 2, -1), [[x] for x in range(n)], temperature=[0.0 if greedy else 1.0] * n, seed=range(n),
            relaxed=[True] * n, alpha=[alpha] * n, beta=[beta] * n, floor=[floor] * n, stops=[stops] * n,
        )  # fmt: skip
        uniform, _ = verify_paths.as_v1(arguments)[0].uniform_probs.numpy(), None
        result = any_path(arguments)
        for x, (count, relaxed, regret) in enumerate(
            zip(result.num_sampled.tolist(), result.relaxed[::2].tolist(), result.regret[::2].tolist(), strict=True)
        ):
            by_rule = p[x] >= bar and p[x] > 0 and x not in stops and p[x] > stopping
            strict = x == p.argmax() if greedy else p[x] >= uniform[x]
            called += 1
            if 0 < abs(p[x] - bar) < margin or 0 < abs(p[x] - stopping) < margin * p[x]:
                close += 1
                continue
            assert count == 1 + (by_rule or strict)
            assert relaxed == (by_rule and not strict)
            accepted_by_bar += relaxed
            assert not relaxed or regret == pytest.approx(np.log(p.max()) - np.log(p[x]), abs=1e-5)
    assert close <= 0.02 * called
    assert accepted_by_bar > 0


@st.composite
def batches(draw):
    """Draw a small batch with masked, tied and ordinary logits, and requests of every kind."""
    vocab_size = draw(st.integers(1, 7))
    counts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    n, num_reqs = sum(counts), len(counts)
    logit = st.sampled_from([-float("inf"), 0.0, 0.5, 1.0, 3.0]) | st.floats(-20, 20, width=32)
    logits = torch.tensor(draw(st.lists(logit, min_size=n * vocab_size, max_size=n * vocab_size)))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    drafts = torch.randint(-1, vocab_size + 1, (n,), generator=g).tolist()
    starts = np.cumsum([0, *counts])
    unit = torch.rand(4, num_reqs, generator=g)
    return batch(
        [logits.float().reshape(n, -1)[a : a + c] for a, c in zip(starts, counts, strict=False)],
        [drafts[a : a + c - 1] for a, c in zip(starts, counts, strict=False)],
        temperature=(unit[0] < 0.5).float(),
        seed=torch.randint(0, 2**62, (num_reqs,), generator=g),
        rules=torch.randint(0, 5, (num_reqs,), generator=g).tolist(),
        alpha=unit[1],
        beta=unit[2],
        floor=unit[3] * 0.3,
        limit=1.2 + 3 * unit[0],
        cap=3 * unit[1],
        nats=2 * unit[2],
        kappa=unit[3],
        stops=torch.randint(-1, vocab_size, (num_reqs, 2), generator=g).sort(descending=True).values.tolist(),
        num_speculative_steps=3,
    )


@pytest.fixture(params=["cpu", "triton"])
def kernels(request):
    """Verifies a batch of the seeded op by one of the compiled paths, leaving the batch as it was."""
    interpreter = request.getfixturevalue("interpreter") if request.param == "triton" else None
    return lambda arguments: verify_paths.run(request.param, with_own_state(arguments), interpreter)


# The interpreter takes a tenth of a second for such a batch, more on a busy machine.
some = settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def bounds(arguments):
    return list(itertools.pairwise(arguments["cu_num_logits"].tolist()))


@some
@given(arguments=batches())
def test_output_is_an_accepted_prefix_one_token_and_placeholders(kernels, arguments):
    logits, drafts = arguments["target_logits"], arguments["draft_sampled"].tolist()
    result = kernels(arguments)
    for tokens, (start, end) in zip(verify_paths.tokens(result), bounds(arguments), strict=True):
        assert 1 <= len(tokens) <= end - start
        assert tokens[:-1] == drafts[start + 1 : start + len(tokens)]
        assert not result.relaxed[start + len(tokens) - 1 : end].any()
        probs = logits[start : start + len(tokens)].double().softmax(-1)
        for row, token in enumerate(tokens):
            assert 0 <= token < logits.shape[1]
            assert probs[row].isnan().any() or probs[row, token] > 0, "a token with p = 0"


@some
@given(arguments=batches(), parameter=st.sampled_from([ALPHA, BETA, FLOOR]), step=st.floats(0, 0.5))
def test_a_looser_bar_never_shortens_an_accepted_prefix(kernels, arguments, parameter, step):
    policies = arguments["policies"]
    policies.rule[policies.rule != STRICT] = CONDITIONAL
    policies.parameters[:, LIMIT] = torch.inf
    looser = policies._replace(parameters=policies.parameters.clone())
    looser.parameters[:, parameter] += step if parameter == ALPHA else -step
    strict = policies._replace(rule=torch.zeros_like(policies.rule))
    lengths = [kernels({**arguments, "policies": of}).num_sampled for of in (strict, policies, looser)]
    assert (lengths[0] <= lengths[1]).all() and (lengths[1] <= lengths[2]).all()


NOTHING = [
    (CONDITIONAL, {"alpha": 0, "beta": 1.001}),
    (BUDGET, {"cap": 20.0, "kappa": 20.0, "nats": 0}),
    (BUDGET, {"cap": 20.0, "kappa": 0, "per_step": 0}),
]


@some
@given(arguments=batches(), nothing=st.sampled_from(NOTHING))
def test_rules_that_relax_nothing_are_strict(kernels, arguments, nothing):
    """Exact ties, which cost a budget nothing, are among the drafts."""
    n = len(arguments["temperature"])
    rule, parameters = nothing
    if rule == CONDITIONAL:
        # Sampled requests would accept the argmax.
        arguments["temperature"].zero_()
    same = policy_tensors([rule] * n, **parameters, floor=1e-4)
    ours, strict = (kernels({**arguments, "policies": of}) for of in (same, policy_tensors([STRICT] * n)))
    for name in ("sampled", "num_sampled", "relaxed", "regret"):
        assert torch.equal(getattr(ours, name), getattr(strict, name)), name


@some
@given(arguments=batches())
def test_requests_of_a_batch_do_not_affect_each_other(kernels, arguments):
    together = kernels(arguments)
    for req, (start, end) in enumerate(bounds(arguments)):
        alone = dict(arguments)
        for name in ("target_logits", "draft_sampled", "pos", "expanded_idx_mapping", "expanded_local_pos"):
            alone[name] = arguments[name][start:end]
        alone["idx_mapping"] = arguments["idx_mapping"][req : req + 1]
        alone["cu_num_logits"] = torch.tensor([0, end - start], dtype=torch.int32)
        single = kernels(alone)
        greedy = arguments["temperature"][arguments["idx_mapping"][req]] == 0
        width = None if greedy else single.num_sampled[0] - 1
        assert single.num_sampled[0] == together.num_sampled[req]
        assert torch.equal(single.sampled[0, :width], together.sampled[req, :width])
        assert torch.equal(single.relaxed, together.relaxed[start:end])
        assert torch.equal(single.regret, together.regret[start:end])
        assert torch.equal(single.state[0], together.state[req])
