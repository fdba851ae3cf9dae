"""The V2 model runner, its kernels interpreted, through the real engine: what it emits, with what it was given."""

import json
import math

import pytest
import torch

from aasd_testing.engines import drafted_and_accepted, greedy, run_engine, token_ids
from aasd_testing.fault_injection import FAULT_POINTS
from aasd_testing.prompts import real_prompts
from vllm_aasd.kernels.verify import seeded_reference as verify_seeded_reference
from vllm_aasd.kernels.verify.policies import VerifyPolicies
from vllm_aasd.kernels.verify.seeded import SeededBatch

pytestmark = pytest.mark.engine

STRICT = {"aasd_verification": "strict", "num_speculative_tokens": 4}
# None where two run at once.
WIDTHS = {"num_speculative_tokens_per_batch_size": [[1, 1, 4], [2, 2, 0], [3, 3, 4]]}
PROMPTS = real_prompts(3, max_chars=140)
PAIR = ["one two one two one two", "red green red green red"]
MAX_TOKENS = 10
PROCESSED = {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.2, "logprobs": 2}
BAD_WORDS = [" the", "The", " of"]
SCHEMA = {"type": "object", "properties": {"kind": {"enum": ["text", "code"]}}, "required": ["kind"]}
FAULTS = FAULT_POINTS["V2"]


def counted(metrics):
    """Draft tokens and accepted ones, by our own counters."""
    return tuple(
        sum(value for name, value in metrics.items() if name.startswith(f"aasd:survival_{kind}:"))
        for kind in ("tokens", "accepted")
    )


@pytest.fixture(scope="module")
def plain(demo_model, tmp_path_factory):
    """Without speculation, on the V1 runner: what the target itself says."""
    out = tmp_path_factory.mktemp("plain") / "out.json"
    requests = greedy(PROMPTS[:1], MAX_TOKENS, prompt_logprobs=4) + greedy(PROMPTS[1:], MAX_TOKENS)
    processed = greedy(PROMPTS[1:2], MAX_TOKENS, bad_words=BAD_WORDS, **PROCESSED)
    return run_engine(demo_model, [requests, processed, greedy(PAIR, 5)], out, max_num_seqs=3, block_size=32)


@pytest.fixture(scope="module")
def speculated(demo_model, tmp_path_factory):
    """Three prompts at once, in chunks of 48; one again from the prefix cache, and a JSON object; one that wants no
    speculation; two at once; and then, with faults."""
    out = tmp_path_factory.mktemp("v2") / "out.json"
    constrained = greedy(["Text or code? Answer in JSON.\n\nprint(1)"], 16, structured_outputs={"json": SCHEMA})
    again = greedy(PROMPTS[:1], MAX_TOKENS, logprobs=1)
    processed = greedy(PROMPTS[1:2], MAX_TOKENS, bad_words=BAD_WORDS, **PROCESSED)
    return run_engine(
        demo_model,
        [
            greedy(PROMPTS, MAX_TOKENS),
            again + constrained + processed,
            greedy(PROMPTS[:1], MAX_TOKENS, extra_args={"aasd_enabled": False}),
            greedy(PAIR, 5),
            *(greedy(PROMPTS[:1], MAX_TOKENS) for _ in FAULTS),
        ],
        out,
        v2=True,
        faults=[None] * 4 + [*FAULTS],
        aasd={**STRICT, **WIDTHS, "aasd_alignment": True},
        record_store=True,
        max_num_batched_tokens=48,
    )


def test_the_worker_says_which_runner_is_live(speculated):
    lines = [line for line in speculated["log"].splitlines() if "is live" in line]
    assert len(lines) == 1 and "V2 model runner" in lines[0]
    assert {"align.triton", "count.triton", "draft.triton", "verify.triton"} <= set(speculated["kernels"])


def test_chunked_prompts_give_what_the_target_says_alone(plain, speculated):
    assert min(len(output["prompt_token_ids"]) for output in speculated["rounds"][0]) > 48, "more than one chunk"
    drafted, accepted = drafted_and_accepted(speculated)
    assert 0 < accepted < drafted
    # Before faults are injected.
    metrics = speculated["after"][2]["metrics"]
    assert counted(metrics) == drafted_and_accepted(speculated["after"][2]), "on the device"
    assert metrics["aasd:store_lookups:hit"] > 0
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


def test_a_request_that_wants_no_speculation_has_nothing_drafted(plain, speculated):
    before, after = (drafted_and_accepted(one)[0] for one in speculated["after"][1:3])
    assert after == before > 0
    assert speculated["rounds"][2][0]["token_ids"] == plain["rounds"][0][0]["token_ids"]


def test_the_number_of_requests_says_how_much_is_drafted(plain, speculated):
    before, after = (drafted_and_accepted(one)[0] for one in speculated["after"][2:4])
    assert after == before, "two at once"
    assert token_ids(speculated["rounds"][3]) == token_ids(plain["rounds"][2])


def test_scheduled_ahead_with_widths_that_are_learnt(plain, demo_model, tmp_path):
    """Every step takes as many positions as the longest draft may have, before it is known what was drafted."""
    result = run_engine(
        demo_model,
        [greedy(PAIR, 5), greedy(PROMPTS[:1], MAX_TOKENS)],
        tmp_path / "out.json",
        v2=True,
        ahead=True,
        aasd={"aasd_verification": "strict", "num_speculative_tokens": 2},
    )
    assert "is live: the scheduler learns" in result["log"]
    assert token_ids(result["rounds"][0]) == token_ids(plain["rounds"][2])
    assert result["rounds"][1][0]["token_ids"] == plain["rounds"][0][0]["token_ids"]
    drafted, accepted = drafted_and_accepted(result)
    without_fillers, kept = counted(result["metrics"])
    assert 0 < accepted == kept and without_fillers < drafted, "fillers are no drafts"
    assert "aasd: a fault" not in result["log"]


def test_faults_at_every_place_in_turn_cost_no_token(plain, speculated):
    wanted = plain["rounds"][0][0]["token_ids"]
    rounds = zip(FAULTS.items(), speculated["rounds"][4:], speculated["after"][4:], strict=True)
    for (seam, place), (output,), after in rounds:
        assert output["token_ids"] == wanted, seam
        assert {place for place, count in after["faults"].items() if count} == {place}, seam


@pytest.mark.long
@pytest.mark.parametrize("ahead", [False, True])
def test_preemption(demo_model, tmp_path, ahead):
    prompts = real_prompts(4, max_chars=250)
    plain = run_engine(demo_model, [greedy(prompts, 40)], tmp_path / "plain", max_num_seqs=3, block_size=32)
    # Eight blocks of 32 tokens beside the null block: the prompts of the first two requests fill them.
    few_blocks = {"num_gpu_blocks_override": 9, "max_model_len": 256}
    result = run_engine(
        demo_model, [greedy(prompts, 40)], tmp_path / "v2", v2=True, ahead=ahead, aasd=STRICT, **few_blocks
    )
    assert result["metrics"]["vllm:num_preemptions"] > 0, "the KV cache must be too small for the batch"
    assert drafted_and_accepted(result)[1] > 0
    assert token_ids(result["rounds"][0]) == token_ids(plain["rounds"][0])


@pytest.mark.long
def test_two_pipeline_stages_scheduled_ahead(plain, demo_model, tmp_path):
    stages = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}
    aasd = {"aasd_verification": "strict", "num_speculative_tokens": 2}
    result = run_engine(demo_model, [greedy(PAIR, 5)], tmp_path / "v2", v2=True, ahead=True, aasd=aasd, **stages)
    assert token_ids(result["rounds"][0]) == token_ids(plain["rounds"][2])
    assert drafted_and_accepted(result)[1] > 0


@pytest.mark.long
def test_both_runners_emit_the_same_tokens_and_accept_the_same_drafts(demo_model, tmp_path):
    # Neither load nor how earlier drafts fared may shorten a draft: V1 looks at both.
    whole = {**STRICT, "aasd_draft_length": 4, "aasd_alignment": False}
    runs = [
        run_engine(demo_model, [greedy(PROMPTS, 24)], tmp_path / str(v2), v2=v2, aasd=whole, block_size=32)
        for v2 in (False, True)
    ]
    assert token_ids(runs[0]["rounds"][0]) == token_ids(runs[1]["rounds"][0])
    assert drafted_and_accepted(runs[0]) == drafted_and_accepted(runs[1])
    assert drafted_and_accepted(runs[0])[1] > 0


@pytest.mark.long
def test_penalties_logprobs_and_seeds_as_without_speculation(demo_model, tmp_path):
    """On the V2 runner both times. A seeded sample depends on what was drafted, so it is compared with itself."""
    requests = greedy(PROMPTS[1:2], MAX_TOKENS, bad_words=BAD_WORDS, **PROCESSED) + greedy(
        PROMPTS[:1], MAX_TOKENS, logprobs=2
    )
    seeded = greedy(PROMPTS[2:], MAX_TOKENS, temperature=1.0, seed=7)
    rounds = [requests, seeded, seeded]
    stock, ours = (
        run_engine(demo_model, rounds, tmp_path / name, v2=True, aasd=aasd, enable_prefix_caching=False)
        for name, aasd in (("stock", None), ("ours", STRICT))
    )
    assert drafted_and_accepted(ours)[1] > 0
    assert_same_outputs(stock["rounds"][0], ours["rounds"][0])
    assert token_ids(ours["rounds"][1]) == token_ids(ours["rounds"][2])


def test_penalties_bad_words_and_logprobs(plain, speculated):
    assert_same_outputs(plain["rounds"][1], speculated["rounds"][1][2:])
    assert plain["rounds"][1][0]["token_ids"] != plain["rounds"][0][1]["token_ids"], "they change the output"


def assert_same_outputs(wanted, got):
    assert token_ids(wanted) == token_ids(got)
    for one, other in zip(wanted, got, strict=True):
        for at, at_other in zip(one["logprobs"], other["logprobs"], strict=True):
            assert at.keys() == at_other.keys()
            assert list(at.values()) == pytest.approx(list(at_other.values()), abs=1e-3)


@pytest.fixture(scope="module")
def loose(demo_model, tmp_path_factory):
    """A rule that relaxes often, with everything recorded that the verifier was asked."""
    out = tmp_path_factory.mktemp("loose") / "out.json"
    # A draft for every step that can have one.
    rule = {"aasd_verification": "fly", "aasd_fly_window": 1, "aasd_fly_threshold": 0.0, "aasd_collapse_guard": False}
    aasd = {**rule, "num_speculative_tokens": 4}
    requests = greedy(PROMPTS[:2], 20) + greedy(PROMPTS[2:], 10, temperature=0.7, seed=3)
    result = run_engine(demo_model, [requests], out, v2=True, aasd=aasd, record_verification=True)
    return result, torch.load(f"{out}.pt", weights_only=True)


def test_a_relaxed_rule_accepts_exactly_what_the_reference_says(loose):
    result, calls = loose
    relaxed, says_relaxed, says_regret = 0, 0, 0.0
    for one in calls:
        call = one["call"]
        policies = VerifyPolicies(*one["policies"])
        batch = SeededBatch(**call, policies=policies, stop_token_ids=one["stop_token_ids"])
        says = verify_seeded_reference.verify_seeded(batch)
        assert one["num_sampled"].tolist() == says.num_sampled.tolist()
        assert one["sampled"].tolist() == says.sampled.tolist()
        for row, first in enumerate(call["cu_num_logits"][:-1].tolist()):
            emitted = one["sampled"][row, : one["num_sampled"][row]]
            argmax = call["target_logits"][first : first + len(emitted)].argmax(dim=1)
            is_greedy = call["temperature"][call["idx_mapping"][row]] == 0
            relaxed += int((emitted != argmax).sum()) if is_greedy else 0
            accepted = slice(first, first + len(emitted) - 1)
            says_relaxed += int(says.relaxed[accepted].sum())
            says_regret += float(says.regret[accepted].double().sum())
    assert len(calls) > 4 and relaxed > 0, "the rule must let something by"
    assert result["metrics"]["aasd:relaxed_tokens"] == says_relaxed >= relaxed
    assert result["metrics"]["aasd:regret_nats"] == pytest.approx(says_regret, rel=1e-5)
    _, accepted = drafted_and_accepted(result)
    assert accepted == sum(int(one["num_sampled"].sum()) - len(one["num_sampled"]) for one in calls)
