"""The fuzzer's checks find what is wrong with a response and nothing else; and how a response is read."""

import asyncio
import dataclasses
import json

import httpx
import pytest

from aasd_testing.fuzz import client
from aasd_testing.fuzz.checks import NEAR_TIE, Reference, check, check_log
from aasd_testing.fuzz.client import Choice, Response
from aasd_testing.fuzz.request_types import CALL_REGEX, CHOICES, SCHEMA, STRICT, Request

REQUEST = Request([1] * 5, {"temperature": 0.0, "max_tokens": 4}, "plain", xargs=STRICT, stream=True)
LIKELY = [{7: -0.1, 8: -0.1 - NEAR_TIE / 2, 9: -3.0}] * 4
REFERENCE = Reference([7, 7, 7, 7], "aaaa", "length", LIKELY)


def answered(token_ids=(7, 7, 7, 7), text="aaaa", finish="length", **more):
    of_choice = {name: more.pop(name) for name in ("logprobs", "prompt_logprobs") if name in more}
    choice = Choice(list(token_ids), text, finish, **of_choice)
    usage = {"num_prompt_tokens": 5, "num_answer_tokens": len(token_ids)}
    return Response(**{"status": 200, "choices": [choice], **usage, **more})


def found(response, request=REQUEST, reference=REFERENCE, **sampling):
    request = dataclasses.replace(request, sampling={**request.sampling, **sampling})
    return [finding.what for finding in check(request, response, reference)]


def test_the_right_answer_is_right():
    assert found(answered()) == []
    assert found(answered((7, 7), "aa", None, disconnected=True, num_answer_tokens=None)) == []
    named = [(-0.1, {"token_id:5": -2.0})] * 4
    assert found(answered(logprobs=named), logprobs=1, logprob_token_ids=[5]) == []


@pytest.mark.parametrize(
    ("what", "response", "sampling"),
    [
        ("lost", Response(), {}),
        ("lost", answered(finish=None), {}),
        ("count", answered(), {"n": 3}),
        ("status", Response(status=500, error="boom"), {}),
        ("status", answered(error="v" * 81), {}),
        ("mismatch", answered((7, 9, 7, 7)), {}),
        ("mismatch", answered((7, 9), "aa", None, disconnected=True, num_answer_tokens=None), {}),
        ("mismatch", answered(text="aaab"), {}),
        ("mismatch", answered(finish="stop"), {}),
        ("near_tie", answered((7, 8, 7, 7)), {}),
        ("count", answered((7, 7, 7), finish="length"), {}),
        ("count", answered((7,) * 5), {}),
        ("count", answered(num_answer_tokens=5), {}),
        ("count", answered(num_prompt_tokens=4), {}),
        ("finish", answered((7, 7), "aa", "abort"), {}),
        ("form", answered(text='{"kind": "text"}', finish="stop"), {"structured_outputs": {"json": SCHEMA}}),
        ("form", answered(text="yes no", finish="stop"), {"structured_outputs": {"regex": CALL_REGEX}}),
        ("form", answered(text="poem", finish="stop"), {"structured_outputs": {"choice": CHOICES}}),
        ("logprobs", answered(), {"logprobs": 1}),
        ("logprobs", answered(logprobs=[(-0.1, {})] * 3), {"logprobs": 1}),
        ("logprobs", answered(logprobs=[(-0.2, {})] * 4), {"logprobs": 1}),
        ("logprobs", answered(logprobs=[(-0.1, {"token_id:5": -2.0})] * 4), {"logprob_token_ids": [5, 6]}),
        ("logprobs", answered(prompt_logprobs=4), {"prompt_logprobs": 1}),
    ],
)
def test_a_wrong_answer_is_found(what, response, sampling):
    assert what in found(response, **sampling)


def test_a_refusal_must_come_and_say_why_and_little_else():
    request = dataclasses.replace(REQUEST, refused_with="min_p")
    assert found(Response(status=400, error="The min_p and logit_bias ..."), request, None) == []
    for wrong in ("something else", "min_p" + "v" * 81):
        assert found(Response(status=400, error=wrong), request, None) == ["status"]
    assert found(answered(), request, None) == ["status"]


def sent(request, answer):
    connection = httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://server")
    return asyncio.run(client.send(connection, request, None))


def streamed(*parts):
    choices = [{"index": 0, "text": "a" * n, "token_ids": [7] * n, "finish_reason": end} for n, end in parts]
    events = [{"choices": [choice]} for choice in choices]
    events.append({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 4}})
    return lambda request: httpx.Response(200, text="".join(f"data: {json.dumps(event)}\n\n" for event in events))


def test_the_events_of_a_stream_are_joined_and_the_client_disconnects_when_the_case_says_so():
    answer = streamed((2, None), (1, None), (1, "length"))
    response = sent(REQUEST, answer)
    assert response.choices[0].token_ids == [7, 7, 7, 7] and found(response) == []
    for after, token_ids in ((1, [[7, 7]]), (0, [])):
        response = sent(dataclasses.replace(REQUEST, disconnect_after=after), answer)
        assert response.disconnected and [choice.token_ids for choice in response.choices] == token_ids
        assert found(response) == []
    called = Choice()
    for part in ({"name": "f", "arguments": "{"}, {"arguments": "}"}):
        client._add_to_choice(called, {"delta": {"tool_calls": [{"index": 0, "function": part}]}})
    assert called.tool_arguments == ["{}"]


def test_a_stream_without_an_end_or_with_an_error_is_found():
    assert found(sent(REQUEST, streamed((2, None)))) != []
    refusal = 'data: {"error": {"message": "The min_p and ...", "code": 400}}\n\n'
    refused = sent(REQUEST, lambda request: httpx.Response(200, text=refusal))
    assert found(refused) == ["status"] and found(refused, dataclasses.replace(REQUEST, refused_with="min_p")) == []
    assert found(sent(REQUEST, lambda request: httpx.Response(200, text="data: {"))) == ["lost"]


def test_the_log_is_searched_for_tracebacks_and_long_values_but_not_of_injected_faults():
    def trace(*errors):
        because = "\n\nThe above exception was the direct cause of the following exception:\n\n"
        text = because.join(f'Traceback (most recent call last):\n  File "x"\n    y\n{error}' for error in errors)
        return "".join(f"(EngineCore pid=7) ERROR 11-26 01:02:03 [a.py:80] {line}\n" for line in text.splitlines())

    injected = trace("aasd_testing.fault_injection.InjectedFault: injected into draft")
    assert check_log(injected) == check_log(trace("ValueError: not allowed", "x.RequestOptionsError: it")) == []
    log = injected + trace("ValueError: of our own") + injected
    assert ["of our own" in finding.detail for finding in check_log(log)] == [True]
    (chained,) = check_log(trace("KeyError: 1", "RuntimeError: 2"))
    assert "KeyError: 1" in chained.detail and "RuntimeError: 2" in chained.detail
    assert len(check_log(f"aasd_alpha={'v' * 81}\naasd_alpha={'v' * 80}")) == 1
