"""Sampling through the real engine: strict verification keeps the target's distribution, and a tilt is seen."""

import itertools

import numpy as np
import pytest
import scipy.stats

from aasd_testing.engines import with_options

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("V1 engines")]

# Two tokens that continue each other in the prompt, so that every position gets a draft; and both likely enough for a
# relaxed rule, which the negative control uses.
WORDS = [" one", " four"]
MORE_WORDS = [" one", " two", " three", " four", " five", " six", " seven"]
NUM_SAMPLES = 800
DEPTH = 3
# A seeded test: it passes or fails for good. A correct sampler fails it for one seed in a thousand.
P_VALUE = 1e-3


@pytest.fixture(scope="module")
def task(demo_model):
    """The task of two words."""
    return task_of(demo_model, WORDS)


def task_of(demo_model, words):
    """The prompt, the allowed ids, and the target's exact distribution of the next tokens among them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    ids = [tokenizer.encode(word)[0] for word in words]
    rng = np.random.default_rng(3)
    prompt = tokenizer.encode("Random numbers:") + [ids[i] for i in rng.integers(0, len(ids), 64)]
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    distribution = {}
    for depth in range(DEPTH):
        prefixes = list(itertools.product(ids, repeat=depth))
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *prefix] for prefix in prefixes])).logits[:, -1]
        probs = logits[:, ids].double().softmax(-1).numpy()
        distribution.update({(prefix, t): probs[i, j] for i, prefix in enumerate(prefixes) for j, t in enumerate(ids)})
    cells = list(itertools.product(ids, repeat=DEPTH))
    joint = np.array([np.prod([distribution[cell[:d], cell[d]] for d in range(DEPTH)]) for cell in cells])
    np.testing.assert_allclose(joint.sum(), 1.0, rtol=1e-9)
    return prompt, ids, cells, joint


def sample(engine, task, options, **sampling):
    prompt, ids, _, _ = task
    params = {"temperature": 1.0, "max_tokens": DEPTH, "ignore_eos": True, "allowed_token_ids": ids, **sampling}
    batch = [{"prompt": prompt, "sampling": {**params, "seed": seed}} for seed in range(NUM_SAMPLES)]
    # Two blocks of the prompt are shared by all through the prefix cache.
    found = engine.run(with_options(batch, **options))
    assert found.drafted > NUM_SAMPLES / 2, "drafts must be verified"
    return [tuple(token_ids) for token_ids in found.token_ids], found


def p_value(samples, cells, joint):
    """Chi-square of the samples against the distribution, cells with fewer than five expected pooled."""
    counts = np.array([samples.count(cell) for cell in cells], float)
    expected = joint * len(samples)
    rare = expected < 5
    if rare.any():
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    return scipy.stats.chisquare(counts, expected).pvalue


def test_strict_samples_the_targets_distribution(aasd_engine, task):
    samples, found = sample(aasd_engine, task, {"aasd_verification": "strict"})
    assert 0.05 < found.accepted / found.drafted < 0.95, "both acceptance and recovery must be exercised"
    assert p_value(samples, *task[2:]) > P_VALUE


def test_a_sampler_that_favours_its_drafts_is_seen(aasd_engine, task):
    samples, _ = sample(aasd_engine, task, {"aasd_relax_sampling": True, "aasd_beta": 0.05})
    assert p_value(samples, *task[2:]) < 1e-6


@pytest.mark.long
def test_top_k_and_top_p_hold(demo_model, aasd_engine):
    """The two faults of vLLM's CPU build: garbage temperatures, and a dead engine on a step without drafts."""
    task = task_of(demo_model, MORE_WORDS)
    _, ids, cells, joint = task
    first = np.array([joint[[c[0] == t for c in cells]].sum() for t in ids])
    best_two = {ids[i] for i in np.argsort(-first)[:2]}
    samples, _ = sample(aasd_engine, task, {}, top_k=2, top_p=0.999)
    assert {s[0] for s in samples} == best_two
    share = np.mean([s[0] == ids[int(np.argmax(first))] for s in samples])
    want = np.sort(first)[-1] / np.sort(first)[-2:].sum()
    assert share == pytest.approx(want, abs=5 * np.sqrt(want * (1 - want) / NUM_SAMPLES))
