"""The V2 model runner, its kernels interpreted, through the real engine: what it emits, with what it was given."""

import json
import math

import pytest

from aasd_testing.engines import engine, greedy, with_options
from aasd_testing.fault_injection import FAULT_POINTS
from aasd_testing.prompts import real_prompts
from vllm_aasd.kernels.verify import reference as verify_reference
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


def counted(found):
    """Draft tokens and accepted ones, by our own counters."""
    return tuple(
        sum(value for name, value in found.metrics.items() if name.startswith(f"aasd:survival_{kind}:"))
        for kind in ("tokens", "accepted")
    )


def processed():
    return greedy(PROMPTS[1:2], MAX_TOKENS, bad_words=BAD_WORDS, **PROCESSED)


@pytest.fixture(scope="module")
def plain(plain_engine):
    """What the target itself says to the three prompts."""
    requests = greedy(PROMPTS[:1], MAX_TOKENS, prompt_logprobs=4) + greedy(PROMPTS[1:], MAX_TOKENS)
    return plain_engine.run(requests)


@pytest.fixture(scope="module")
def v2(demo_model):
    aasd = {**STRICT, **WIDTHS, "aasd_alignment": True, "aasd_allow_request_override": "any"}
    with engine(demo_model, aasd=aasd, v2=True, max_num_batched_tokens=48) as started:
        yield started


@pytest.fixture(scope="module")
def speculated(v2):
    """Three prompts at once, in chunks of 48; then one again from the prefix cache, beside a JSON object."""
    constrained = greedy(["Text or code? Answer in JSON.\n\nprint(1)"], 16, structured_outputs={"json": SCHEMA})
    again = greedy(PROMPTS[:1], MAX_TOKENS, logprobs=1) + constrained + processed()
    return [v2.run(requests, record="store") for requests in (greedy(PROMPTS, MAX_TOKENS), again)]


def test_the_worker_says_which_runner_is_live(v2, speculated):
    lines = [line for line in v2.log().splitlines() if "is live" in line]
    assert len(lines) == 1 and "V2 model runner" in lines[0]
    assert {"align.triton", "draft.triton", "verify.triton"} <= v2.kernels()


def test_chunked_prompts_give_what_the_target_says_alone(plain, speculated):
    found = speculated[0]
    assert min(len(output["prompt_token_ids"]) for output in found.outputs) > 48, "more than one chunk"
    assert 0 < found.accepted < found.drafted
    assert counted(found) == (found.drafted, found.accepted), "on the device"
    assert found.metrics["aasd:store_lookups:hit"] > 0
    assert found.token_ids == plain.token_ids


def test_prefix_cache_hits(plain, speculated):
    again = speculated[1].outputs[0]
    assert again["num_cached_tokens"] > 0
    assert again["token_ids"] == plain.token_ids[0]
    assert len(again["logprobs"]) == len(again["token_ids"])


def test_the_store_holds_every_position_of_every_request(speculated):
    records = speculated[0].records + speculated[1].records
    assert len(records) > 6
    for record in records:
        assert all(record["fresh"]), "chunks, generated tokens and prefix-cache hits alike"


def test_entries_equal_the_prompt_logprobs_of_the_other_runner(plain, speculated):
    prompt, want = (plain.outputs[0][name] for name in ("prompt_token_ids", "prompt_logprobs"))
    records = speculated[0].records + speculated[1].records
    of_prompt = [one for one in records if one["token_ids"][: len(prompt)] == prompt]
    assert len(of_prompt) > 2
    for got in (of_prompt[0], of_prompt[-1]):
        for position in range(len(prompt) - 1):
            expected = max(want[position + 1].items(), key=lambda item: item[1])
            assert got["ids"][position][0] == expected[0]
            for token, prob in zip(got["ids"][position], got["probs"][position], strict=True):
                assert prob == pytest.approx(math.exp(want[position + 1][token]), abs=1e-4)


def test_constrained_output_is_valid(speculated):
    output = speculated[1].outputs[1]
    assert output["finish_reason"] == "stop"
    assert json.loads(output["text"])["kind"] in ("text", "code")
    assert speculated[1].metrics["aasd:grammar_accepted_tokens:forced"] > 0


def test_penalties_bad_words_and_logprobs(plain_engine, plain, speculated):
    wanted = plain_engine.run(processed()).outputs
    assert_same_outputs(wanted, speculated[1].outputs[2:])
    assert wanted[0]["token_ids"] != plain.token_ids[1], "they change the output"


def assert_same_outputs(wanted, got):
    for one, other in zip(wanted, got, strict=True):
        assert one["token_ids"] == other["token_ids"]
        for at, at_other in zip(one["logprobs"], other["logprobs"], strict=True):
            assert at.keys() == at_other.keys()
            assert list(at.values()) == pytest.approx(list(at_other.values()), abs=1e-3)


def test_a_request_that_wants_no_speculation_has_nothing_drafted(plain, v2):
    found = v2.run(with_options(greedy(PROMPTS[:1], MAX_TOKENS), aasd_enabled=False))
    assert found.drafted == 0
    assert found.token_ids == plain.token_ids[:1]


def test_the_number_of_requests_says_how_much_is_drafted(plain_engine, v2):
    found = v2.run(greedy(PAIR, 5))
    assert found.drafted == 0, "two at once"
    assert found.token_ids == plain_engine.run(greedy(PAIR, 5)).token_ids


def test_faults_at_every_place_in_turn_cost_no_token(plain, v2):
    for function, component in FAULTS.items():
        found = v2.run(greedy(PROMPTS[:1], MAX_TOKENS), fault=function)
        assert found.token_ids == plain.token_ids[:1], function
        assert set(found.faults) == {component}, function


def test_a_relaxed_rule_accepts_exactly_what_the_reference_says(v2):
    """A rule that relaxes often, with everything recorded that the verifier was asked."""
    rule = {"aasd_verification": "fly", "aasd_fly_window": 1, "aasd_fly_threshold": 0.0, "aasd_collapse_guard": False}
    requests = greedy(PROMPTS[:2], 20) + greedy(PROMPTS[2:], 10, temperature=0.7, seed=3)
    found = v2.run(with_options(requests, **rule), record="verification")
    relaxed, says_relaxed, says_regret = 0, 0, 0.0
    for one in found.records:
        call = one["call"]
        policies = VerifyPolicies(*one["policies"])
        batch = SeededBatch(**call, policies=policies, **one["given"])
        says = verify_reference.verify_seeded(batch)
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
    assert len(found.records) > 4 and relaxed > 0, "the rule must let something by"
    assert found.metrics["aasd:relaxed_tokens"] == says_relaxed >= relaxed
    assert found.metrics["aasd:regret_nats"] == pytest.approx(says_regret, rel=1e-5)
    accepted = sum(int(one["num_sampled"].sum()) - len(one["num_sampled"]) for one in found.records)
    assert accepted == found.accepted


def test_scheduled_ahead_with_widths_that_are_learnt(plain_engine, plain, demo_model):
    """Every step takes as many positions as the longest draft may have, before it is known what was drafted."""
    with engine(
        demo_model, v2=True, ahead=True, aasd={"aasd_verification": "strict", "num_speculative_tokens": 2}
    ) as ahead:
        pair, found = ahead.run(greedy(PAIR, 5)), ahead.run(greedy(PROMPTS[:1], MAX_TOKENS))
        log = ahead.log()
    assert "is live: the scheduler learns" in log and "aasd: a fault" not in log
    assert pair.token_ids == plain_engine.run(greedy(PAIR, 5)).token_ids
    assert found.token_ids == plain.token_ids[:1]
    without_fillers, kept = map(sum, zip(counted(pair), counted(found), strict=True))
    assert 0 < pair.accepted + found.accepted == kept
    assert without_fillers < pair.drafted + found.drafted, "fillers are no drafts"


@pytest.mark.long
@pytest.mark.parametrize("ahead", [False, True])
def test_preemption(plain_engine, demo_model, ahead):
    requests = greedy(real_prompts(4, max_chars=250), 40)
    # Eight blocks of 32 tokens beside the null block: the prompts of the first two requests fill them.
    few_blocks = {"num_gpu_blocks_override": 9, "max_model_len": 256}
    with engine(demo_model, v2=True, ahead=ahead, aasd=STRICT, **few_blocks) as started:
        found = started.run(requests)
    assert found.metrics["vllm:num_preemptions"] > 0, "the KV cache must be too small for the batch"
    assert found.accepted > 0
    assert found.token_ids == plain_engine.run(requests).token_ids


@pytest.mark.long
def test_two_pipeline_stages_scheduled_ahead(plain_engine, demo_model):
    stages = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}
    aasd = {"aasd_verification": "strict", "num_speculative_tokens": 2}
    with engine(demo_model, v2=True, ahead=True, aasd=aasd, **stages) as started:
        found = started.run(greedy(PAIR, 5))
    assert found.token_ids == plain_engine.run(greedy(PAIR, 5)).token_ids
    assert found.accepted > 0


@pytest.mark.long
def test_both_runners_emit_the_same_tokens_and_accept_the_same_drafts(demo_model):
    # Neither load nor how earlier drafts fared may shorten a draft: V1 looks at both.
    whole = {**STRICT, "aasd_draft_length": 4, "aasd_alignment": False}
    rounds = []
    for is_v2 in (False, True):
        with engine(demo_model, v2=is_v2, aasd=whole, block_size=32) as started:
            rounds.append(started.run(greedy(PROMPTS, 24)))
    assert rounds[0].token_ids == rounds[1].token_ids
    assert (rounds[0].drafted, rounds[0].accepted) == (rounds[1].drafted, rounds[1].accepted)
    assert rounds[0].accepted > 0


@pytest.mark.long
def test_penalties_logprobs_and_seeds_as_without_speculation(demo_model):
    """On the V2 runner both times. A seeded sample depends on what was drafted, so it is compared with itself."""
    requests = processed() + greedy(PROMPTS[:1], MAX_TOKENS, logprobs=2)
    seeded = greedy(PROMPTS[2:], MAX_TOKENS, temperature=1.0, seed=7)
    with engine(demo_model, v2=True, enable_prefix_caching=False) as stock:
        wanted = stock.run(requests)
    with engine(demo_model, v2=True, aasd=STRICT | {"aasd_memory": "off"}, enable_prefix_caching=False) as started:
        found, *samples = map(started.run, (requests, seeded, seeded))
    assert found.accepted > 0
    assert_same_outputs(wanted.outputs, found.outputs)
    assert samples[0].token_ids == samples[1].token_ids
