"""The distributions that verify_seeded obeys: the distribution of emitted tokens, and properties of any input.

The reference draws the samples, since the interpreter takes milliseconds for each; that the kernels emit the same
tokens for the same seeds is tested on a part of the very samples, and in `test_verify_seeded.py`.
"""

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from scipy.stats import chisquare

from aasd_testing.policy_tensors import policy_tensors
from aasd_testing.seeded_batches import batch
from vllm_aasd.kernels.verify import seeded_reference as verify_seeded_reference
from vllm_aasd.kernels.verify.policies import ALPHA, BETA, BUDGET, CONDITIONAL, FLOOR, LIMIT, STRICT
from vllm_aasd.kernels.verify.seeded import SeededBatch

OP = "vllm_aasd.kernels.verify.seeded:verify_seeded"
# A true sampler fails a chi-square at this p-value once in 100,000 seeds; the seeds are fixed.
TRUE_SAMPLER = 1e-5
# A sampler that is off must be told apart beyond doubt.
TILTED_SAMPLER = 1e-12
NUM_SAMPLES = 4000
LOGITS = torch.log(torch.tensor([0.36, 0.26, 0.16, 0.12, 0.06, 0.04]))
BAR = {"alpha": 0.1, "beta": 0.35, "floor": 0.05}


def samples(n, relaxed, logits=LOGITS, drafts=None, first_seed=0):
    """One draft in each of n sampled requests that all see the same row; drafts go around the vocabulary."""
    drafts = [i % len(logits) for i in range(n)] if drafts is None else drafts
    rule = {name: [value] * n for name, value in BAR.items()}
    return batch(
        logits.expand(n, 2, -1), [[draft] for draft in drafts], temperature=[1.0] * n,
        seed=range(first_seed, first_seed + n), relaxed=[relaxed] * n, **rule,
    )  # fmt: skip


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
    """Samples of the reference, strict and conditional."""
    return {
        relaxed: verify_seeded_reference.verify_seeded(SeededBatch(**samples(NUM_SAMPLES, relaxed)))
        for relaxed in (False, True)
    }


@pytest.mark.parametrize("relaxed", [False, True], ids=["strict", "conditional"])
def test_emitted_tokens_have_the_exact_distribution(drawn, relaxed):
    assert p_value(drawn[relaxed].sampled[:, 0], expected_distribution(relaxed)) > TRUE_SAMPLER


def test_bonus_tokens_have_the_targets_distribution(drawn):
    bonus = drawn[False].sampled[drawn[False].num_sampled == 2, 1]
    assert len(bonus) > 500
    assert p_value(bonus, expected_distribution(False)) > TRUE_SAMPLER


@pytest.mark.parametrize("relaxed", [False, True], ids=["strict", "conditional"])
def test_the_kernels_draw_the_twins_samples(interpreter, drawn, relaxed):
    n = 120
    emitted = interpreter.call(OP, SeededBatch(**samples(n, relaxed)))
    assert emitted.sampled.tolist() == drawn[relaxed].sampled[:n].tolist()


def test_the_chi_square_finds_what_is_wrong(drawn):
    """Another rule's distribution, a row at temperature 2, and a race that doesn't leave out the rejected draft."""
    assert p_value(drawn[True].sampled[:, 0], expected_distribution(False)) < TILTED_SAMPLER
    assert p_value(drawn[False].sampled[:, 0], expected_distribution(True)) < TILTED_SAMPLER
    n = 2000
    hot, top, free = (
        verify_seeded_reference.verify_seeded(SeededBatch(**samples(n, False, logits=logits, drafts=[draft] * n)))
        for logits, draft in ((LOGITS / 2, 0), (LOGITS, 0), (LOGITS, -1))
    )
    assert p_value(top.sampled[:, 0], expected_distribution(False)) > TRUE_SAMPLER
    assert p_value(hot.sampled[:, 0], expected_distribution(False)) < TILTED_SAMPLER
    careless = torch.where(top.num_sampled == 2, top.sampled[:, 0], free.sampled[:, 0])
    assert p_value(careless, expected_distribution(False)) < TILTED_SAMPLER


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
        stops=torch.randint(-1, vocab_size, (num_reqs, 2), generator=g).sort(descending=True).values.tolist(),
        num_speculative_steps=3,
    )


def bounds(arguments):
    ends = arguments["cu_num_logits"].tolist()
    return list(itertools.pairwise(ends))


# The interpreter takes a tenth of a second for such a batch, more on a busy machine.
some = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@some
@given(arguments=batches())
def test_output_is_an_accepted_prefix_one_token_and_placeholders(interpreter, arguments):
    result = interpreter.call(OP, SeededBatch(**arguments))
    logits, drafts = arguments["target_logits"], arguments["draft_sampled"].tolist()
    for req, (start, end) in enumerate(bounds(arguments)):
        emitted = int(result.num_sampled[req])
        tokens = result.sampled[req].tolist()
        assert 1 <= emitted <= end - start
        assert tokens[: emitted - 1] == drafts[start + 1 : start + emitted]
        assert tokens[emitted:] == [-1] * (4 - emitted)
        assert not result.relaxed[start + emitted - 1 : end].any()
        probs = logits[start : start + emitted].double().softmax(-1)
        for row, token in enumerate(tokens[:emitted]):
            assert 0 <= token < logits.shape[1]
            assert probs[row].isnan().any() or probs[row, token] > 0, "a token with p = 0"


@some
@given(batches(), st.sampled_from([ALPHA, BETA, FLOOR]), st.floats(0, 0.5))
def test_a_looser_bar_never_shortens_an_accepted_prefix(interpreter, arguments, parameter, step):
    policies = arguments["policies"]
    policies.rule[policies.rule != STRICT] = CONDITIONAL
    policies.parameters[:, LIMIT] = torch.inf
    sign = 1.0 if parameter == ALPHA else -1.0
    looser = policies._replace(parameters=policies.parameters.clone())
    looser.parameters[:, parameter] += sign * step
    strict = policies._replace(rule=torch.zeros_like(policies.rule))
    rules = (strict, policies, looser)
    lengths = [interpreter.call(OP, SeededBatch(**{**arguments, "policies": rule})).num_sampled for rule in rules]
    assert (lengths[0] <= lengths[1]).all() and (lengths[1] <= lengths[2]).all()


@some
@given(batches())
def test_alpha_zero_and_beta_above_one_is_strict_for_greedy_requests(interpreter, arguments):
    arguments["temperature"].zero_()
    n = len(arguments["temperature"])
    same = policy_tensors([CONDITIONAL] * n, alpha=0, beta=1.001, floor=1e-4)
    assert_same(interpreter, arguments, same, policy_tensors([STRICT] * n))


def assert_same(interpreter, arguments, *policies):
    """Two policies give the same output for a batch, bit for bit; but for what is said of budgets and guards."""
    ours, others = (interpreter.call(OP, SeededBatch(**{**arguments, "policies": one})) for one in policies)
    for actual, expected in zip(ours[:4], others[:4], strict=True):
        assert torch.equal(actual, expected)


@some
@given(batches(), st.sampled_from(["nats", "kappa and per_step"]))
def test_a_budget_of_nothing_is_strict(interpreter, arguments, what):
    """Both kinds of request; exact ties, which cost nothing, are among the drafts."""
    n = len(arguments["temperature"])
    nothing = dict.fromkeys(what.split(" and "), 0)
    budget = policy_tensors([BUDGET] * n, **{"cap": 20.0, "kappa": 20.0, "floor": 1e-4, **nothing})
    assert_same(interpreter, arguments, budget, policy_tensors([STRICT] * n))


@some
@given(batches())
def test_requests_of_a_batch_do_not_affect_each_other(interpreter, arguments):
    together = interpreter.call(OP, SeededBatch(**arguments))
    for req, (start, end) in enumerate(bounds(arguments)):
        alone = dict(arguments)
        for name in ("target_logits", "draft_sampled", "pos", "expanded_idx_mapping", "expanded_local_pos"):
            alone[name] = arguments[name][start:end]
        alone["idx_mapping"] = arguments["idx_mapping"][req : req + 1]
        alone["cu_num_logits"] = torch.tensor([0, end - start], dtype=torch.int32)
        single = interpreter.call(OP, SeededBatch(**alone))
        assert torch.equal(single.sampled[0], together.sampled[req])
        assert torch.equal(single.relaxed, together.relaxed[start:end])
        assert torch.equal(single.regret, together.regret[start:end])
