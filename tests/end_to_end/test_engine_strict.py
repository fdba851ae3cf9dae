"""Strict verification through the real engine emits exactly what the target alone emits (greedy, float32)."""

import numpy as np
import pytest

from aasd_testing.engines import engine, greedy, with_options
from aasd_testing.fault_injection import FAULT_POINTS
from aasd_testing.prompts import real_prompts
from vllm_aasd.drafting.prior import cache_path, save
from vllm_aasd.engine.model_key import model_key
from vllm_aasd.kernels.draft import Prior

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("V1 engines")]

STRICT = {"aasd_verification": "strict"}
PROMPTS = real_prompts(40, max_chars=700)
MAX_TOKENS = 32
FEW_TOKENS = 12
FAULTS = FAULT_POINTS["V1"]


@pytest.fixture(scope="module")
def plain(plain_engine):
    """The 40 prompts without speculation."""
    return plain_engine.run(greedy(PROMPTS[:4], MAX_TOKENS, logprobs=2) + greedy(PROMPTS[4:], MAX_TOKENS))


@pytest.fixture(scope="module")
def speculated(aasd_engine):
    """The same, 16 requests at once."""
    return aasd_engine.run(with_options(greedy(PROMPTS, MAX_TOKENS), **STRICT))


def test_forty_real_prompts_sixteen_at_once(plain, speculated):
    assert speculated.drafted > 500, "the drafts must be real ones"
    assert speculated.accepted > 0.1 * speculated.drafted, "and some of them right"
    assert speculated.token_ids == plain.token_ids


def test_the_metrics_are_to_be_had_offline_and_agree_with_vllms(plain, speculated):
    ours = speculated.metrics
    assert ours["aasd:relaxed_tokens"] == ours["aasd:regret_nats"] == 0
    tenths = [name.partition(":survival_tokens:")[2] for name in ours if ":survival_tokens:" in name]
    tokens, promised, kept = (
        np.array([ours[f"aasd:survival_{kind}:{tenth}"] for tenth in tenths])
        for kind in ("tokens", "promised", "accepted")
    )
    assert tokens.sum() == speculated.drafted and kept.sum() == speculated.accepted
    low, high = np.array([tenth.split("-") for tenth in tenths], float).T
    assert (low * tokens - 1e-3 <= promised).all() and (promised <= high * tokens + 1e-3).all()
    rate = [kept[half].sum() / tokens[half].sum() for half in (slice(5), slice(5, None))]
    assert rate[0] + 0.2 < rate[1], "what was promised more is kept more often: promises are of their own tokens"
    assert ours["aasd:store_lookups:hit"] > 0
    assert not any(name.startswith("aasd:") for name in plain.metrics)


def test_prefix_cache_hits_and_logprobs(plain, aasd_engine, speculated):
    again = aasd_engine.run(with_options(greedy(PROMPTS[:4], MAX_TOKENS, logprobs=2), **STRICT))
    assert all(output["num_cached_tokens"] > 0 for output in again.outputs)
    assert again.token_ids == plain.token_ids[:4]
    for got, want in zip(again.outputs, plain.outputs, strict=False):
        assert len(got["logprobs"]) == len(got["token_ids"])
        for at_got, at_want in zip(got["logprobs"], want["logprobs"], strict=True):
            assert at_got == pytest.approx(at_want, abs=1e-3)


@pytest.mark.long
def test_a_prior_full_of_nonsense_costs_nothing_but_time(plain, demo_model, tmp_path, monkeypatch):
    monkeypatch.setenv("AASD_CACHE_ROOT", str(tmp_path))
    rng = np.random.default_rng(0)
    key, vocab_size = model_key(demo_model), 49152
    ids = rng.integers(-1, vocab_size, (vocab_size, 4)).astype(np.int32)
    save(cache_path(key), Prior(ids, np.full(ids.shape, 0.25, np.float32)), key)
    with engine(demo_model, aasd={**STRICT, "aasd_prior": 0, "aasd_draft_length": 8}) as started:
        found = started.run(greedy(PROMPTS[:8], MAX_TOKENS))
        assert "aasd: prior with what follows" in started.log()
    assert 0 < found.accepted < 0.3 * found.drafted, "most of it must have been nonsense"
    assert found.token_ids == plain.token_ids[:8]


@pytest.fixture(scope="module")
def crowded(demo_model):
    """An engine whose KV cache is too small for its requests."""
    with engine(
        demo_model,
        aasd={**STRICT, "aasd_alignment": True, "aasd_memory": 16},
        max_num_batched_tokens=128,
        max_model_len=1024,
        block_size=32,
        num_gpu_blocks_override=40,
    ) as started:
        yield started


def test_chunked_prefill_and_preemption(plain, crowded):
    found = crowded.run(greedy(PROMPTS[:20], MAX_TOKENS))
    assert found.metrics["vllm:num_preemptions"] > 0, "the KV cache must be too small for the batch"
    longest = max(len(output["prompt_token_ids"]) for output in found.outputs)
    assert longest > 128, "a prompt must need more than one chunk"
    assert found.accepted > 0
    assert found.token_ids == plain.token_ids[:20]


def test_faults_at_every_place_in_turn_cost_no_token(plain, crowded):
    wanted = [tokens[:FEW_TOKENS] for tokens in plain.token_ids[:4]]
    accepted = []
    for function in (*FAULTS, None):
        found = crowded.run(greedy(PROMPTS[:4], FEW_TOKENS), fault=function)
        assert found.token_ids == wanted, function
        assert set(found.faults) == ({FAULTS[function]} if function else set()), function
        accepted.append(found.accepted)
    assert accepted[-1] > 0, "when nothing fails any more, requests are sped up again"
    assert "InjectedFault: injected into draft" in crowded.log()


@pytest.mark.long
def test_a_request_that_reaches_the_models_length(plain, demo_model):
    """vLLM schedules rows of zeros for the whole batch there; the others must not pay for it with wrong tokens."""
    by_length = sorted(plain.outputs, key=lambda output: len(output["prompt_token_ids"]))
    long, short = by_length[-1], by_length[0]
    max_model_len = len(long["prompt_token_ids"]) + 20
    requests = greedy([long["prompt_token_ids"], short["prompt_token_ids"]], MAX_TOKENS)
    with engine(demo_model, aasd=STRICT, max_model_len=max_model_len) as started:
        found = started.run(requests)
    got_long, got_short = found.token_ids
    assert got_long == long["token_ids"][:20] and len(got_long) == 20
    assert got_short == short["token_ids"]
    assert found.drafted < 8 * len(got_long), "steps without a proposal must not verify eight zeros a request"
