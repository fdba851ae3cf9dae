"""Strict verification through the real engine emits exactly what the target alone emits (greedy, float32)."""

import numpy as np
import pytest

from aasd_testing.engines import drafted_and_accepted, greedy, run_engine, token_ids
from aasd_testing.fault_injection import FAULT_POINTS
from aasd_testing.prompts import real_prompts
from vllm_aasd.drafting.prior import cache_path, save
from vllm_aasd.engine.model_key import model_key
from vllm_aasd.kernels.draft import Prior

pytestmark = pytest.mark.engine

STRICT = {"aasd_verification": "strict"}
PROMPTS = real_prompts(40, max_chars=700)
MAX_TOKENS = 32
FEW_TOKENS = 12
FAULTS = FAULT_POINTS["V1"]


@pytest.fixture(scope="module")
def plain(demo_model, tmp_path_factory):
    """The 40 prompts without speculation."""
    out = tmp_path_factory.mktemp("plain") / "out.json"
    logprobs = [*greedy(PROMPTS[:4], MAX_TOKENS, logprobs=2), *greedy(PROMPTS[4:], MAX_TOKENS)]
    return run_engine(demo_model, [logprobs], out)


@pytest.fixture(scope="module")
def speculated(demo_model, tmp_path_factory):
    """The same, eight requests at once; then four of them again, from the prefix cache, with log-probabilities.

    Predictions are stored, whatever the machine makes `auto` choose; and the drafts' length doesn't
    follow its step times, by which there were once too few of them to tell anything.
    """
    out = tmp_path_factory.mktemp("strict") / "out.json"
    rounds = [greedy(PROMPTS, MAX_TOKENS), greedy(PROMPTS[:4], MAX_TOKENS, logprobs=2)]
    return run_engine(demo_model, rounds, out, aasd={**STRICT, "aasd_alignment": True, "aasd_draft_length": 8})


def test_forty_real_prompts_eight_at_once(plain, speculated):
    drafted, accepted = drafted_and_accepted(speculated)
    assert drafted > 500 and accepted > 0.1 * drafted, "the drafts must be real ones, and some of them right"
    assert token_ids(speculated["rounds"][0]) == token_ids(plain["rounds"][0])


def test_the_metrics_are_to_be_had_offline_and_agree_with_vllms(plain, speculated):
    drafted, accepted = drafted_and_accepted(speculated)
    ours = speculated["metrics"]
    assert ours["aasd:relaxed_tokens"] == ours["aasd:regret_nats"] == 0
    tenths = [name.partition(":survival_tokens:")[2] for name in ours if ":survival_tokens:" in name]
    tokens, promised, kept = (
        np.array([ours[f"aasd:survival_{kind}:{tenth}"] for tenth in tenths])
        for kind in ("tokens", "promised", "accepted")
    )
    assert tokens.sum() == drafted and kept.sum() == accepted
    low, high = np.array([tenth.split("-") for tenth in tenths], float).T
    assert (low * tokens - 1e-3 <= promised).all() and (promised <= high * tokens + 1e-3).all()
    rate = [kept[half].sum() / tokens[half].sum() for half in (slice(5), slice(5, None))]
    assert rate[0] + 0.2 < rate[1], "what was promised more is kept more often: promises are of their own tokens"
    assert ours["aasd:store_lookups:hit"] > 0
    assert not any(name.startswith("aasd:") for name in plain["metrics"])


def test_prefix_cache_hits(plain, speculated):
    again = speculated["rounds"][1]
    assert all(output["num_cached_tokens"] > 0 for output in again)
    assert token_ids(again) == token_ids(plain["rounds"][0])[:4]


def test_logprobs_are_reported_as_without_speculation(plain, speculated):
    for got, want in zip(speculated["rounds"][1], plain["rounds"][0], strict=False):
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
    aasd = {**STRICT, "aasd_draft_length": 8}
    result = run_engine(demo_model, [greedy(PROMPTS[:8], MAX_TOKENS)], tmp_path / "out.json", aasd=aasd)
    assert "aasd: prior with 4 successors a token from" in result["log"]
    drafted, accepted = drafted_and_accepted(result)
    assert 0 < accepted < 0.3 * drafted, "most of it must have been nonsense"
    assert token_ids(result["rounds"][0]) == token_ids(plain["rounds"][0])[:8]


@pytest.fixture(scope="module")
def crowded(demo_model, tmp_path_factory):
    """A KV cache too small for its requests; then four of them with a fault at every place in turn, and with none."""
    return run_engine(
        demo_model,
        [greedy(PROMPTS[:20], MAX_TOKENS), *(greedy(PROMPTS[:4], FEW_TOKENS) for _ in (*FAULTS, None))],
        tmp_path_factory.mktemp("crowded") / "out.json",
        aasd={**STRICT, "aasd_alignment": True, "aasd_memory": "process"},
        faults=[None, *FAULTS, None],
        max_num_batched_tokens=128,
        max_model_len=1024,
        block_size=32,
        num_gpu_blocks_override=40,
    )


def test_chunked_prefill_and_preemption(plain, crowded):
    assert crowded["after"][0]["metrics"]["vllm:num_preemptions"] > 0, "the KV cache must be too small for the batch"
    longest = max(len(output["prompt_token_ids"]) for output in crowded["rounds"][0])
    assert longest > 128, "a prompt must need more than one chunk"
    assert drafted_and_accepted(crowded["after"][0])[1] > 0
    assert token_ids(crowded["rounds"][0]) == token_ids(plain["rounds"][0])[:20]


def test_faults_at_every_place_in_turn_cost_no_token(plain, crowded):
    wanted = [tokens[:FEW_TOKENS] for tokens in token_ids(plain["rounds"][0])[:4]]
    rounds = zip([*FAULTS, None], crowded["rounds"][1:], crowded["after"][1:], strict=True)
    for seam, outputs, after in rounds:
        assert token_ids(outputs) == wanted, seam
        assert {place for place, count in after["faults"].items() if count} == ({FAULTS[seam]} if seam else set()), seam
    accepted = [drafted_and_accepted(after)[1] for after in crowded["after"]]
    assert accepted[-1] > accepted[-2], "when nothing fails any more, requests are sped up again"
    assert "RuntimeError: injected into draft" in crowded["log"]


@pytest.mark.long
def test_a_request_that_reaches_the_models_length(plain, demo_model, tmp_path):
    """vLLM schedules rows of zeros for the whole batch there; the others must not pay for it with wrong tokens."""
    by_length = sorted(plain["rounds"][0], key=lambda output: len(output["prompt_token_ids"]))
    long, short = by_length[-1], by_length[0]
    max_model_len = len(long["prompt_token_ids"]) + 20
    requests = greedy([long["prompt_token_ids"], short["prompt_token_ids"]], MAX_TOKENS)
    result = run_engine(demo_model, [requests], tmp_path / "out.json", aasd=STRICT, max_model_len=max_model_len)
    got_long, got_short = token_ids(result["rounds"][0])
    assert got_long == long["token_ids"][:20] and len(got_long) == 20
    assert got_short == short["token_ids"]
    drafted, _ = drafted_and_accepted(result)
    assert drafted < 8 * len(got_long), "steps without a proposal must not verify eight zeros a request"
