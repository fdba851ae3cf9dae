"""Thinking budgets and chosen log-probabilities on the V2 model runner, its kernels interpreted."""

import pytest
from transformers import AutoTokenizer

from aasd_testing.engines import drafted_and_accepted, greedy, run_engine, token_ids

pytestmark = [pytest.mark.engine, pytest.mark.long]

THINK = {"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"}
BUDGETS = (None, 3, 0)
TEXT = "one two three one two three one two three"


def rounds(tokenizer):
    thinking = []
    for budget, text in zip(BUDGETS, (TEXT, "red green red green red", "a b a b a b a"), strict=True):
        prompt, asked = tokenizer.encode(text), {"temperature": 0.0, "max_tokens": 10}
        if budget is not None:
            prompt, asked = prompt + tokenizer.encode("<think>"), {**asked, "thinking_token_budget": budget}
        thinking.append({"prompt": prompt, "sampling": asked})
    prompt = tokenizer.encode(TEXT)
    chosen = greedy([prompt], 6, logprob_token_ids=[198, 504, 2])
    scored = greedy([tokenizer.encode("red green red green red")], 6) + chosen
    beside = greedy([tokenizer.encode("a b a b a b a")], 6, logprobs=4) + chosen
    return [thinking, scored, beside]


def run(model, out, **options):
    tokenizer = AutoTokenizer.from_pretrained(model)
    options |= {"reasoning_config": THINK, "max_num_seqs": 3, "block_size": 32}
    return run_engine(model, rounds(tokenizer), out, **options)


@pytest.fixture(scope="module")
def plain(demo_model, tmp_path_factory):
    """Without speculation, on the V1 runner."""
    return run(demo_model, tmp_path_factory.mktemp("plain") / "out.json")


@pytest.fixture(scope="module")
def strict(demo_model, tmp_path_factory):
    aasd = {"aasd_verification": "strict", "num_speculative_tokens": 4}
    out = tmp_path_factory.mktemp("strict") / "out.json"
    return run(demo_model, out, aasd=aasd, v2=True)


def drafted(result, at):
    totals = [0, *(drafted_and_accepted(after)[0] for after in result["after"])]
    return totals[at + 1] - totals[at]


def test_thinking_ends_where_its_budget_ends(plain, strict, demo_model):
    """By this runner's count: vLLM's V1 runner lets a start of several tokens count less."""
    end = AutoTokenizer.from_pretrained(demo_model).encode("</think>")
    assert drafted(strict, 0) > 5
    answers = token_ids(strict["rounds"][0])
    assert answers[0] == token_ids(plain["rounds"][0])[0]
    for answer, budget in zip(answers[1:], BUDGETS[1:], strict=True):
        places = [place for place in range(len(answer)) if answer[place : place + len(end)] == end]
        assert places[:1] == [budget]


@pytest.mark.parametrize("at", [1, 2], ids=["alone", "beside the likeliest"])
def test_chosen_logprobs_are_reported_in_steps_with_drafts(plain, strict, at):
    assert drafted(strict, at) > 3
    got, want = strict["rounds"][at], plain["rounds"][at]
    assert token_ids(got) == token_ids(want)
    assert len(got[1]["logprobs"]) == len(want[1]["logprobs"])
    for at_got, at_want in zip(got[1]["logprobs"], want[1]["logprobs"], strict=True):
        assert at_got == pytest.approx(at_want, abs=1e-3)
    if at == 2:
        # Those of V1 without speculation are lost beside chosen ones, but for the emitted tokens' own.
        for token, at_got, at_want in zip(got[0]["token_ids"], got[0]["logprobs"], want[0]["logprobs"], strict=True):
            assert at_got[str(token)] == pytest.approx(at_want[str(token)], abs=1e-3)
            assert len(at_got) in (4, 5)
