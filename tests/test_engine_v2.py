"""The V2 model runner, its kernels interpreted, through the real engine: what it emits, with what it was given."""

import json
import math

import pytest
from engines import greedy, run_engine, token_ids
from prompts import real_prompts

pytestmark = pytest.mark.engine

STRICT = {"aasd_verification": "strict", "num_speculative_tokens": 4}
PROMPTS = real_prompts(3, max_chars=140)
MAX_TOKENS = 10
SCHEMA = {"type": "object", "properties": {"kind": {"enum": ["text", "code"]}}, "required": ["kind"]}


def drafted_and_accepted(result):
    metrics = result["metrics"]
    return metrics["vllm:spec_decode_num_draft_tokens"], metrics["vllm:spec_decode_num_accepted_tokens"]


@pytest.fixture(scope="module")
def plain(demo_model, tmp_path_factory):
    """Without speculation, on the V1 runner: what the target itself says."""
    out = tmp_path_factory.mktemp("plain") / "out.json"
    requests = greedy(PROMPTS[:1], MAX_TOKENS, prompt_logprobs=4) + greedy(PROMPTS[1:], MAX_TOKENS)
    return run_engine(demo_model, [requests], out, max_num_seqs=3, block_size=32)


@pytest.fixture(scope="module")
def speculated(demo_model, tmp_path_factory):
    """Three prompts at once, in chunks of 48; then one again from the prefix cache, and a JSON object."""
    out = tmp_path_factory.mktemp("v2") / "out.json"
    constrained = greedy(["Text or code? Answer in JSON.\n\nprint(1)"], 16, schema=SCHEMA)
    again = greedy(PROMPTS[:1], MAX_TOKENS, logprobs=1)
    return run_engine(
        demo_model,
        [greedy(PROMPTS, MAX_TOKENS), again + constrained],
        out,
        v2=True,
        aasd={**STRICT, "aasd_alignment": True},
        record_store=True,
        max_num_batched_tokens=48,
    )


def test_the_worker_says_which_runner_is_live(speculated):
    lines = [line for line in speculated["log"].splitlines() if "is live" in line]
    assert len(lines) == 1 and "V2 model runner" in lines[0]
    assert {"align_triton", "draft_triton", "verify_seeded_triton"} <= set(speculated["kernels"])


def test_chunked_prompts_give_what_the_target_says_alone(plain, speculated):
    assert min(len(output["prompt_token_ids"]) for output in speculated["rounds"][0]) > 48, "more than one chunk"
    drafted, accepted = drafted_and_accepted(speculated)
    assert 0 < accepted < drafted
    ours = speculated["metrics"]
    assert (ours["aasd:draft_tokens"], ours["aasd:accepted_tokens"]) == (drafted, accepted), "counted on the device"
    assert ours["aasd:store_lookups:hit"] > 0
    assert token_ids(speculated["rounds"][0]) == token_ids(plain["rounds"][0])


def test_prefix_cache_hits(plain, speculated):
    again = speculated["rounds"][1][0]
    assert again["num_cached_tokens"] > 0
    assert again["token_ids"] == plain["rounds"][0][0]["token_ids"]
    assert len(again["logprobs"]) == len(again["token_ids"])


def test_the_store_holds_every_position_of_every_request(speculated):
    assert len(speculated["store"]) > 10
    for snapshot in speculated["store"]:
        assert all(snapshot["fresh"]), "chunks, generated tokens and prefix-cache hits alike"


def test_entries_equal_the_prompt_logprobs_of_the_other_runner(plain, speculated):
    prompt, want = (plain["rounds"][0][0][name] for name in ("prompt_token_ids", "prompt_logprobs"))
    of_prompt = [one for one in speculated["store"] if one["token_ids"][: len(prompt)] == prompt]
    assert len(of_prompt) > 2
    for got in (of_prompt[0], of_prompt[-1]):
        for position in range(len(prompt) - 1):
            expected = max(want[position + 1].items(), key=lambda item: item[1])
            assert got["ids"][position][0] == int(expected[0])
            for token, prob in zip(got["ids"][position], got["probs"][position], strict=True):
                assert prob == pytest.approx(math.exp(want[position + 1][str(token)]), abs=1e-4)


def test_constrained_output_is_valid(speculated):
    output = speculated["rounds"][1][1]
    assert output["finish_reason"] == "stop"
    assert json.loads(output["text"])["kind"] in ("text", "code")


@pytest.mark.long
def test_preemption(demo_model, tmp_path):
    prompts = real_prompts(4, max_chars=250)
    plain = run_engine(demo_model, [greedy(prompts, 40)], tmp_path / "plain", max_num_seqs=3, block_size=32)
    result = run_engine(
        demo_model, [greedy(prompts, 40)], tmp_path / "v2", v2=True, aasd=STRICT, num_gpu_blocks_override=14
    )
    assert result["metrics"]["vllm:num_preemptions"] > 0, "the KV cache must be too small for the batch"
    assert drafted_and_accepted(result)[1] > 0
    assert token_ids(result["rounds"][0]) == token_ids(plain["rounds"][0])


@pytest.mark.long
def test_both_runners_emit_the_same_tokens(demo_model, tmp_path):
    runs = [
        run_engine(demo_model, [greedy(PROMPTS, 24)], tmp_path / str(v2), v2=v2, aasd=STRICT, block_size=32)
        for v2 in (False, True)
    ]
    assert token_ids(runs[0]["rounds"][0]) == token_ids(runs[1]["rounds"][0])
    assert all(drafted_and_accepted(run)[1] > 0 for run in runs)


@pytest.mark.long
def test_the_loosest_bar_accepts_more(demo_model, tmp_path):
    loosest = {"aasd_alpha": 10.0, "aasd_beta": 0.0, "aasd_floor": 1e-4, "num_speculative_tokens": 4}
    strict, loose = (
        run_engine(demo_model, [greedy(PROMPTS, 16)], tmp_path / name, v2=True, aasd=aasd)
        for name, aasd in (("strict", STRICT), ("loose", loosest))
    )
    assert drafted_and_accepted(loose)[1] > drafted_and_accepted(strict)[1]
    assert token_ids(loose["rounds"][0]) != token_ids(strict["rounds"][0])
