"""Requests that vLLM's V1 runner mishandles under speculation get what they'd get without, as do their neighbors."""

import math

import numpy as np
import pytest
from transformers import AutoTokenizer

from aasd_testing.engines import greedy, run_engine, token_ids
from aasd_testing.prompts import real_prompts

pytestmark = pytest.mark.engine

THINK = {"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"}
BUDGETS = (None, 4, None, 9, 0, 17)
UNDRAFTED = {"extra_args": {"aasd_enabled": False}}
# A text that is copied, so that drafts of eight are accepted: the bonus token after them is one of these.
COPIED = np.random.default_rng(5).permutation(np.arange(2000, 12000))[:24].tolist()
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


def run(model, tokenizer, out, embedded=(), **options):
    options |= {"reasoning_config": THINK, "enable_prompt_embeds": True, "max_num_seqs": 16}
    return run_engine(model, rounds(tokenizer, list(embedded)), out, **options)


@pytest.fixture(scope="module")
def tokenizer(demo_model):
    return AutoTokenizer.from_pretrained(demo_model)


@pytest.fixture(scope="module")
def plain(demo_model, tokenizer, tmp_path_factory):
    return run(demo_model, tokenizer, tmp_path_factory.mktemp("plain") / "out.json")


@pytest.fixture(scope="module")
def strict(demo_model, tokenizer, plain, tmp_path_factory):
    aasd = {"aasd_verification": "strict", "aasd_draft_length": 8, "aasd_alignment": True}
    out = tmp_path_factory.mktemp("strict") / "out.json"
    return run(demo_model, tokenizer, out, plain["rounds"][-1][0]["token_ids"], aasd=aasd)


@pytest.fixture(scope="module")
def relaxed(demo_model, tokenizer, plain, tmp_path_factory):
    out = tmp_path_factory.mktemp("relaxed") / "out.json"
    return run(demo_model, tokenizer, out, plain["rounds"][-1][0]["token_ids"], aasd={"aasd_draft_length": 8})


def drafted(result, kind="draft"):
    """Draft tokens of each round; with another `kind`, those accepted."""
    totals = [after["metrics"][f"vllm:spec_decode_num_{kind}_tokens"] for after in result["after"]]
    return np.diff(totals, prepend=0).tolist()


def ends_of_thinking(result, tokenizer):
    """Where each answer first stops thinking; None if it doesn't."""
    end = tokenizer.encode("</think>")
    answers = token_ids(result["rounds"][0])
    return [
        next((place for place in range(len(answer)) if answer[place : place + len(end)] == end), None)
        for answer in answers
    ]


def test_thinking_ends_where_its_budget_ends(plain, strict, tokenizer):
    assert [place is None for place in ends_of_thinking(plain, tokenizer)] == [budget is None for budget in BUDGETS]
    assert drafted(strict)[0] > 10, "others have drafts in some steps"
    assert token_ids(strict["rounds"][0]) == token_ids(plain["rounds"][0])


@pytest.mark.parametrize("mode", ["strict", "relaxed"])
def test_seeded_steps_without_drafts_sample_as_without_speculation(plain, mode, request):
    result = request.getfixturevalue(mode)
    assert drafted(result)[1] == 0
    assert token_ids(result["rounds"][1]) == token_ids(plain["rounds"][1])


def test_relaxed_answers_end_their_thinking_too(plain, relaxed, tokenizer):
    assert ends_of_thinking(relaxed, tokenizer) == ends_of_thinking(plain, tokenizer)


def assert_same_logprobs(got, want):
    assert len(got["logprobs"]) == len(want["logprobs"]) == len(got["token_ids"])
    for at_got, at_want in zip(got["logprobs"], want["logprobs"], strict=True):
        assert at_got == pytest.approx(at_want, abs=1e-3)


@pytest.mark.parametrize("mode", ["strict", "relaxed"])
def test_chosen_logprobs_are_reported_beside_drafts(plain, mode, request):
    result = request.getfixturevalue(mode)
    assert drafted(result)[2] > 0
    got, want = result["rounds"][2], plain["rounds"][2]
    assert got[0]["logprobs"] is None
    for at in (1, 2):
        assert got[at]["token_ids"] == want[at]["token_ids"]
        assert_same_logprobs(got[at], want[at])


@pytest.mark.parametrize("mode", ["strict", "relaxed"])
def test_chosen_logprobs_and_the_likeliest_do_not_hurt_each_other(plain, mode, request):
    """Without speculation vLLM itself loses the likeliest in such a batch; the tokens' own tell the same."""
    got, want = request.getfixturevalue(mode)["rounds"][3], plain["rounds"][3]
    likeliest = got[0]
    assert likeliest["token_ids"] == want[0]["token_ids"]
    for token, at_got, at_want in zip(likeliest["token_ids"], likeliest["logprobs"], want[0]["logprobs"], strict=True):
        assert at_got[str(token)] == pytest.approx(at_want[str(token)], abs=1e-3)
        assert len(at_got) in (4, 5) and all(math.isfinite(value) for value in at_got.values())
    for at in (2, 3):
        assert got[at]["token_ids"] == want[at]["token_ids"]
        assert_same_logprobs(got[at], want[at])


def test_the_token_after_drafts_may_stop_a_request_that_has_its_least_tokens(plain, strict):
    assert token_ids(plain["rounds"][4])[0] == COPIED, "the target must copy"
    assert token_ids(strict["rounds"][4]) == token_ids(plain["rounds"][4])
    assert drafted(strict)[4] > 100


def test_a_prompt_of_embeddings_is_drafted_for_from_its_output_alone(plain, strict):
    want, got = plain["rounds"][6][0], strict["rounds"][6][0]
    assert len(got["token_ids"]) == NUM_EMBEDDED and got["token_ids"] == want["token_ids"]
    assert drafted(strict, "accepted")[6] < 4, "the row's former prompt holds the answer"
