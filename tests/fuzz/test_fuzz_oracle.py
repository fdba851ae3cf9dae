"""The fuzzer's oracle: what is wrong with an answer is found, and nothing else is; and how one over HTTP is read."""

import asyncio
import copy
import dataclasses
import json
import types

import httpx
import pytest

from aasd_testing.fuzz import kinds, over_http
from aasd_testing.fuzz.observed import Choice, Observation, Reference
from aasd_testing.fuzz.oracle import NEAR_TIE, Judge

STEP = {
    "do": "ask", "kind": "plain", "compared": True, "prompt": {"shape": "text", "seed": 0, "tokens": 5},
    "sampling": {"temperature": 0.0, "max_tokens": 4}, "xargs": kinds.STRICT, "priority": 0, "via": "stream", "wait": 0,
}  # fmt: skip
LIKELY = [{7: -0.1, 8: -0.1 - NEAR_TIE / 2, 9: -3.0}] * 4
REFERENCE = Reference([7, 7, 7, 7], "aaaa", "length", LIKELY)
PROMPTS = types.SimpleNamespace(ids=lambda prompt: [1] * prompt["tokens"], encode=lambda word: [3, 4])


def answered(token_ids=(7, 7, 7, 7), text="aaaa", finish="length", **more):
    of_choice = {name: more.pop(name) for name in ("logprobs", "prompt_logprobs") if name in more}
    seen = Observation(200, choices=[Choice(list(token_ids), text, finish, **of_choice)], num_prompt_tokens=5)
    return dataclasses.replace(seen, **{"num_answer_tokens": len(token_ids), **more})


def found(seen, step=None, reference=REFERENCE, **sampling):
    step = copy.deepcopy(step or STEP)
    step["sampling"].update(sampling)
    return [finding.what for finding in Judge(0, step, seen, 5, PROMPTS).judge(reference)]


def test_the_right_answer_is_right():
    assert found(answered()) == []
    assert found(answered((7, 7), "aa", None, left=True, num_answer_tokens=None)) == []
    assert found(answered((7, 7), "aa", "abort", disturbed={"abort"})) == []
    assert found(answered(disturbed={"abort"}), n=3) == [], "a choice without a token isn't in a stream"
    named = [(-0.1, {"token_id:5": -2.0})] * 4
    assert found(answered(logprobs=named), logprobs=1, logprob_token_ids=[5]) == []


@pytest.mark.parametrize(
    ("what", "seen", "sampling"),
    [
        ("lost", Observation(), {}),
        ("count", answered(), {"n": 3}),
        ("status", Observation(status=500, error="boom"), {}),
        ("mismatch", answered((7, 9, 7, 7)), {}),
        ("mismatch", answered((7, 9), "aa", None, left=True, num_answer_tokens=None), {}),
        ("mismatch", answered(text="aaab"), {}),
        ("mismatch", answered(finish="stop"), {}),
        ("near_tie", answered((7, 8, 7, 7)), {}),
        ("count", answered((7, 7, 7), finish="length"), {}),
        ("count", answered((7,) * 5), {}),
        ("count", answered(num_answer_tokens=5), {}),
        ("count", answered((7, 7), "aa", "stop"), {"min_tokens": 3}),
        ("finish", answered((7, 7), "aa", "abort"), {}),
        ("finish", answered((7, 7), "aa", "stop"), {"ignore_eos": True}),
        ("finish", answered((7, 7), "a.a", "stop"), {"stop": ["."]}),
        ("finish", answered(), {"stop_token_ids": {"from": 7, "to": 9}}),
        ("form", answered((7, 3, 4, 7)), {"bad_words": ["no"]}),
        ("form", answered(), {"allowed_token_ids": {"from": 8, "to": 9}}),
        ("form", answered(text='{"kind": "text"}', finish="stop"), {"structured_outputs": {"json": kinds.SCHEMA}}),
        ("form", answered(text="yes no", finish="stop"), {"structured_outputs": {"regex": kinds.CALL_REGEX}}),
        ("form", answered(text="poem", finish="stop"), {"structured_outputs": {"choice": kinds.CHOICES}}),
        ("logprobs", answered(), {"logprobs": 1}),
        ("logprobs", answered(logprobs=[(-0.1, {})] * 3), {"logprobs": 1}),
        ("logprobs", answered(logprobs=[(-0.2, {})] * 4), {"logprobs": 1}),
        ("logprobs", answered(logprobs=[(-0.1, {"token_id:5": -2.0})] * 4), {"logprob_token_ids": [5, 6]}),
        ("logprobs", answered(prompt_logprobs=4), {"prompt_logprobs": 1}),
    ],
)  # fmt: skip
def test_a_wrong_answer_is_found(what, seen, sampling):
    assert what in found(seen, **sampling)


def test_a_refusal_must_come_and_say_why_and_little_else():
    step = {**STEP, "refused": "min_p", "compared": False}
    assert found(Observation(status=400, error="The min_p and logit_bias ..."), step, None) == []
    assert found(Observation(status=400, error="something else"), step, None) == ["status"]
    assert found(Observation(status=400, error="min_p" + "v" * 81), step, None) == ["status"]
    assert found(answered(), step, None) == ["status"]


def asked_over_http(step, answer):
    client = httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://server")
    return asyncio.run(over_http.ask(client, step, PROMPTS))


def streamed(*parts):
    choices = [{"index": 0, "text": "a" * n, "token_ids": [7] * n, "finish_reason": end} for n, end in parts]
    events = [{"choices": [choice]} for choice in choices]
    events.append({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 4}})
    return lambda request: httpx.Response(200, text="".join(f"data: {json.dumps(event)}\n\n" for event in events))


def test_the_pieces_of_a_stream_are_put_together_and_it_is_left_when_the_case_says_so():
    answer = streamed((2, None), (1, None), (1, "length"))
    seen = asked_over_http(STEP, answer)
    assert seen.choices[0].token_ids == [7, 7, 7, 7] and found(seen) == []
    seen = asked_over_http({**STEP, "leave_after": 1}, answer)
    assert seen.left and seen.choices[0].token_ids == [7, 7] and found(seen) == []
    nothing = asked_over_http({**STEP, "leave_after": 0}, answer)
    assert nothing.left and nothing.choices == [] and found(nothing) == []
    called = Choice(token_ids=None)
    for part in ({"name": "f", "arguments": "{"}, {"arguments": "}"}):
        over_http._add(called, {"delta": {"tool_calls": [{"index": 0, "function": part}]}})
    assert called.tool_arguments == ["{}"]


def test_a_stream_without_an_end_or_with_an_error_is_lost():
    assert found(asked_over_http(STEP, streamed((2, None)))) != []
    refusal = 'data: {"error": {"message": "The min_p and ...", "code": 400}}\n\n'
    refused = asked_over_http(STEP, lambda request: httpx.Response(200, text=refusal))
    assert found(refused) == ["status"] and found(refused, {**STEP, "refused": "min_p"}) == []
    assert found(asked_over_http(STEP, lambda request: httpx.Response(200, text="data: {"))) == ["lost"]
