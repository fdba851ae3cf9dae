"""Requests that vLLM's V1 runner mishandles under speculation get what they'd get without, as do their neighbors."""

import math

import numpy as np
import pytest
from transformers import AutoTokenizer

from aasd_testing.engines import engine, greedy, with_options
from aasd_testing.prompts import real_prompts

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("V1 engines")]

THINK = {"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"}
BUDGETS = (None, 4, None, 9, 0, 17)
UNDRAFTED = {"extra_args": {"aasd_enabled": False}}
# A text that is copied, so that drafts of eight are accepted: the bonus token after them is one of these.
COPIED = np.random.default_rng(3).permutation(np.arange(2000, 12000))[:24].tolist()
STOPS = range(5, 17)
NUM_EMBEDDED = 16


def rounds(tokenizer, embedded):
    """Thinking greedy and sampled; chosen log-probabilities, beside others or not; early stops; and embeddings, after a
    prompt that holds their answer `embedded`."""

    def chat(prompt):
        messages = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    prompts = [chat(prompt) for prompt in real_prompts(len(BUDGETS), 400)]
    thinking = []
    for prompt, budget in zip(prompts, BUDGETS, strict=True):
        asked = {"temperature": 0.0, "max_tokens": 32}
        if budget is not None:
            prompt, asked = prompt + tokenizer.encode("<think>"), {**asked, "thinking_token_budget": budget}
        thinking.append({"prompt": prompt, "sampling": asked})
    sampled = [
        {**request, "sampling": {**request["sampling"], "temperature": 0.8, "seed": seed, **UNDRAFTED}}
        for seed, request in enumerate(thinking)
    ]
    scored = [
        *greedy(prompts[:1], 24),
        *greedy(prompts[2:3], 24, logprob_token_ids=[198, 504, 2]),
        *greedy(prompts[3:4], 24, logprob_token_ids=[46, 30]),
    ]
    beside = [*greedy(prompts[1:2], 24, logprobs=4), *scored]
    stopped = [
        *greedy([COPIED * 4], 24),
        *(greedy([COPIED * 4], 24, min_tokens=end - 2, stop_token_ids=[COPIED[end]])[0] for end in STOPS),
    ]
    prompt = prompts[4]
    former = [*embedded, *(COPIED * len(prompt))][: len(prompt) - 1]
    # Its answer was given before.
    (asked,) = with_options(greedy([prompt], NUM_EMBEDDED), aasd_memory="off")
    embeddings = [{**asked, "embeds": True}]
    return [thinking, sampled, scored, beside, stopped, greedy([former], 1), embeddings]


@pytest.fixture(scope="module")
def tokenizer(demo_model):
    return AutoTokenizer.from_pretrained(demo_model)


@pytest.fixture(scope="module")
def plain(plain_engine, tokenizer):
    return [plain_engine.run(requests) for requests in rounds(tokenizer, [])]


@pytest.fixture(scope="module")
def speculated(aasd_engine, tokenizer, plain):
    """Every round verified strictly, and those whose outcome doesn't depend on the rule by the default one, too."""
    asked = rounds(tokenizer, plain[-1].token_ids[0])
    relaxed = [with_options(requests, aasd_verification="conditional") for requests in asked[:4]]
    strict = [with_options(requests, aasd_verification="strict") for requests in asked]
    return {"strict": [*map(aasd_engine.run, strict)], "relaxed": [*map(aasd_engine.run, relaxed)]}


def ends_of_thinking(found, tokenizer):
    """Where each answer first stops thinking; None if it doesn't."""
    end = tokenizer.encode("</think>")
    return [
        next((place for place in range(len(answer)) if answer[place : place + len(end)] == end), None)
        for answer in found.token_ids
    ]


def test_thinking_ends_where_its_budget_ends(plain, speculated, tokenizer):
    ends = ends_of_thinking(plain[0], tokenizer)
    assert [place is None for place in ends] == [budget is None for budget in BUDGETS]
    strict = speculated["strict"][0]
    assert strict.drafted > 10, "others have drafts in some steps"
    assert strict.token_ids == plain[0].token_ids
    assert ends_of_thinking(speculated["relaxed"][0], tokenizer) == ends


@pytest.mark.parametrize("mode", ["strict", "relaxed"])
def test_seeded_steps_without_drafts_sample_as_without_speculation(plain, speculated, mode):
    assert speculated[mode][1].drafted == 0
    assert speculated[mode][1].token_ids == plain[1].token_ids


def assert_same_logprobs(got, want):
    assert got["token_ids"] == want["token_ids"]
    assert len(got["logprobs"]) == len(want["logprobs"]) == len(got["token_ids"])
    for at_got, at_want in zip(got["logprobs"], want["logprobs"], strict=True):
        assert at_got == pytest.approx(at_want, abs=1e-3)


@pytest.mark.parametrize("mode", ["strict", "relaxed"])
def test_chosen_logprobs_are_reported_beside_drafts(plain, speculated, mode):
    got = speculated[mode][2]
    assert got.drafted > 0
    assert got.outputs[0]["logprobs"] is None
    for at in (1, 2):
        assert_same_logprobs(got.outputs[at], plain[2].outputs[at])


@pytest.mark.parametrize("mode", ["strict", "relaxed"])
def test_chosen_logprobs_and_the_likeliest_do_not_hurt_each_other(plain, speculated, mode):
    """Without speculation vLLM itself loses the likeliest in such a batch; the tokens' own tell the same."""
    got, want = speculated[mode][3].outputs, plain[3].outputs
    assert_same_likeliest(got[0], want[0])
    for at in (2, 3):
        assert_same_logprobs(got[at], want[at])


def assert_same_likeliest(got, want):
    """The four likeliest tokens, of which `want` has only the emitted one."""
    assert got["token_ids"] == want["token_ids"]
    for token, at_got, at_want in zip(got["token_ids"], got["logprobs"], want["logprobs"], strict=True):
        assert at_got[token] == pytest.approx(at_want[token], abs=1e-3)
        assert len(at_got) in (4, 5) and all(math.isfinite(value) for value in at_got.values())


def test_the_token_after_drafts_may_stop_a_request_that_has_its_least_tokens(plain, speculated):
    assert plain[4].token_ids[0] == COPIED, "the target must copy"
    strict = speculated["strict"][4]
    assert strict.token_ids == plain[4].token_ids
    assert strict.drafted > 100


def test_a_prompt_of_embeddings_is_drafted_for_from_its_output_alone(plain, speculated):
    got = speculated["strict"][6]
    (answer,) = got.token_ids
    assert len(answer) == NUM_EMBEDDED and got.token_ids == plain[6].token_ids
    assert got.accepted < 4, "the row's former prompt holds the answer"


def test_a_prompt_of_one_token_beside_others_gets_its_own_logprobs(plain_engine, aasd_engine):
    """It comes when a place is free: vLLM would fill its step up with drafts that nobody made."""
    prompts = [[number, 5, 6, 7] for number in range(10, 25)]
    requests = [
        *greedy(prompts, 24),
        *greedy([[30, 5, 6, 7]], 2),
        *greedy([[5]], 6, logprobs=2, logprob_token_ids=[28, 30]),
    ]
    plain = plain_engine.run(requests)
    found = aasd_engine.run(with_options(requests, aasd_verification="strict"))
    assert found.token_ids == plain.token_ids
    for ours, theirs in zip(found.outputs[-1]["logprobs"], plain.outputs[-1]["logprobs"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)


@pytest.mark.long
def test_a_seeded_request_is_served_in_chunks_as_in_one(demo_model):
    prompt = real_prompts(1, max_chars=400)[0]
    params = {"temperature": 0.9, "seed": 3, "max_tokens": 12, "extra_args": {"aasd_enabled": False}}
    rounds = []
    for size in (2048, 32):
        with engine(demo_model, aasd={}, max_num_batched_tokens=size) as started:
            rounds.append(started.run([{"prompt": prompt, "sampling": params}]))
    whole, chunked = rounds
    assert len(whole.outputs[0]["prompt_token_ids"]) > 64, "more than two chunks"
    assert chunked.token_ids == whole.token_ids


# The V2 model runner, its kernels interpreted.

V2_BUDGETS = (None, 3, 0)
TEXTS = ("one two three one two three one two three", "red green red green red", "a b a b a b a")


@pytest.fixture(scope="module")
def v2_rounds(demo_model, tokenizer, plain_engine):
    """Three rounds without speculation on V1, and with it on V2."""
    prompts = [tokenizer.encode(text) for text in TEXTS]
    thinking = greedy(prompts[:1], 10)
    for prompt, budget in zip(prompts[1:], V2_BUDGETS[1:], strict=True):
        thinking += greedy([prompt + tokenizer.encode("<think>")], 10, thinking_token_budget=budget)
    chosen = greedy(prompts[:1], 6, logprob_token_ids=[198, 504, 2])
    asked = [thinking, greedy(prompts[1:2], 6) + chosen, greedy(prompts[2:], 6, logprobs=4) + chosen]
    aasd = {"aasd_verification": "strict", "num_speculative_tokens": 4}
    with engine(demo_model, aasd=aasd, v2=True, reasoning_config=THINK) as started:
        return [*map(plain_engine.run, asked)], [*map(started.run, asked)]


@pytest.mark.long
def test_v2_thinking_ends_where_its_budget_ends(v2_rounds, tokenizer):
    """By this runner's count: vLLM's V1 runner lets a start of several tokens count less."""
    (plain, *_), (strict, *_) = v2_rounds
    assert strict.drafted > 5
    assert strict.token_ids[0] == plain.token_ids[0]
    assert ends_of_thinking(strict, tokenizer)[1:] == [*V2_BUDGETS[1:]]


@pytest.mark.long
def test_v2_chosen_logprobs_are_reported_in_steps_with_drafts(v2_rounds):
    for want, got in zip(v2_rounds[0][1:], v2_rounds[1][1:], strict=True):
        assert got.drafted > 3
        assert got.token_ids == want.token_ids
        assert_same_logprobs(got.outputs[1], want.outputs[1])
    assert_same_likeliest(v2_rounds[1][2].outputs[0], v2_rounds[0][2].outputs[0])
