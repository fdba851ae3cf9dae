"""Requests that vLLM's V1 runner mishandles under speculation get what they'd get without, as do their neighbors."""

import math
from typing import NamedTuple

import numpy as np
import pytest
from transformers import AutoTokenizer

from aasd_testing.engines import drafted_and_accepted, greedy, run_engine, token_ids
from aasd_testing.prompts import real_prompts

pytestmark = pytest.mark.engine

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
    embeddings = [{**greedy([prompt], NUM_EMBEDDED)[0], "embeds": True}]
    return [thinking, sampled, scored, beside, stopped, greedy([former], 1), embeddings]


def relaxed(batch):
    """The same requests, verified by the default rule."""
    sampling = [request["sampling"] for request in batch]
    options = [{**params.get("extra_args", {}), "aasd_verification": "conditional"} for params in sampling]
    verified = [{**params, "extra_args": of} for params, of in zip(sampling, options, strict=True)]
    return [{**request, "sampling": params} for request, params in zip(batch, verified, strict=True)]


OPTIONS = {"reasoning_config": THINK, "enable_prompt_embeds": True, "max_num_seqs": 16}


@pytest.fixture(scope="module")
def tokenizer(demo_model):
    return AutoTokenizer.from_pretrained(demo_model)


@pytest.fixture(scope="module")
def plain(demo_model, tokenizer, tmp_path_factory):
    """The outputs of each round."""
    return run_engine(demo_model, rounds(tokenizer, []), tmp_path_factory.mktemp("plain") / "out", **OPTIONS)["rounds"]


class Round(NamedTuple):
    outputs: list[dict]
    drafted: int
    accepted: int


@pytest.fixture(scope="module")
def speculated(demo_model, tokenizer, plain, tmp_path_factory):
    """Every round on a strict server, and those whose outcome doesn't depend on the rule by the default one."""
    aasd = {"aasd_verification": "strict", "aasd_draft_length": 8, "aasd_alignment": True}
    aasd["aasd_allow_request_override"] = "any"
    asked = rounds(tokenizer, plain[-1][0]["token_ids"])
    out = tmp_path_factory.mktemp("strict") / "out"
    result = run_engine(demo_model, [*asked, *map(relaxed, asked[:4])], out, aasd=aasd, **OPTIONS)
    counts = np.diff([drafted_and_accepted(after) for after in result["after"]], prepend=[(0, 0)], axis=0)
    found = [Round(outputs, *of.tolist()) for outputs, of in zip(result["rounds"], counts, strict=True)]
    return {"strict": found[: len(asked)], "relaxed": found[len(asked) :]}


def ends_of_thinking(outputs, tokenizer):
    """Where each answer first stops thinking; None if it doesn't."""
    end = tokenizer.encode("</think>")
    return [
        next((place for place in range(len(answer)) if answer[place : place + len(end)] == end), None)
        for answer in token_ids(outputs)
    ]


def test_thinking_ends_where_its_budget_ends(plain, speculated, tokenizer):
    ends = ends_of_thinking(plain[0], tokenizer)
    assert [place is None for place in ends] == [budget is None for budget in BUDGETS]
    strict = speculated["strict"][0]
    assert strict.drafted > 10, "others have drafts in some steps"
    assert token_ids(strict.outputs) == token_ids(plain[0])
    assert ends_of_thinking(speculated["relaxed"][0].outputs, tokenizer) == ends


@pytest.mark.parametrize("mode", ["strict", "relaxed"])
def test_seeded_steps_without_drafts_sample_as_without_speculation(plain, speculated, mode):
    assert speculated[mode][1].drafted == 0
    assert token_ids(speculated[mode][1].outputs) == token_ids(plain[1])


def assert_same_logprobs(got, want):
    assert got["token_ids"] == want["token_ids"]
    assert len(got["logprobs"]) == len(want["logprobs"]) == len(got["token_ids"])
    for at_got, at_want in zip(got["logprobs"], want["logprobs"], strict=True):
        assert at_got == pytest.approx(at_want, abs=1e-3)


@pytest.mark.parametrize("mode", ["strict", "relaxed"])
def test_chosen_logprobs_are_reported_beside_drafts(plain, speculated, mode):
    got, want = speculated[mode][2], plain[2]
    assert got.drafted > 0
    assert got.outputs[0]["logprobs"] is None
    for at in (1, 2):
        assert_same_logprobs(got.outputs[at], want[at])


@pytest.mark.parametrize("mode", ["strict", "relaxed"])
def test_chosen_logprobs_and_the_likeliest_do_not_hurt_each_other(plain, speculated, mode):
    """Without speculation vLLM itself loses the likeliest in such a batch; the tokens' own tell the same."""
    got, want = speculated[mode][3].outputs, plain[3]
    likeliest = got[0]
    assert likeliest["token_ids"] == want[0]["token_ids"]
    for token, at_got, at_want in zip(likeliest["token_ids"], likeliest["logprobs"], want[0]["logprobs"], strict=True):
        assert at_got[str(token)] == pytest.approx(at_want[str(token)], abs=1e-3)
        assert len(at_got) in (4, 5) and all(math.isfinite(value) for value in at_got.values())
    for at in (2, 3):
        assert_same_logprobs(got[at], want[at])


def test_the_token_after_drafts_may_stop_a_request_that_has_its_least_tokens(plain, speculated):
    assert token_ids(plain[4])[0] == COPIED, "the target must copy"
    strict = speculated["strict"][4]
    assert token_ids(strict.outputs) == token_ids(plain[4])
    assert strict.drafted > 100


def test_a_prompt_of_embeddings_is_drafted_for_from_its_output_alone(plain, speculated):
    want, got = plain[6][0], speculated["strict"][6]
    (answer,) = token_ids(got.outputs)
    assert len(answer) == NUM_EMBEDDED and answer == want["token_ids"]
    assert got.accepted < 4, "the row's former prompt holds the answer"
