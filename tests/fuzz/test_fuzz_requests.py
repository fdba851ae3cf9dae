"""The fuzzer's requests, over HTTP and in a process: what becomes of them is seen. No server and no engine is there."""

import asyncio
import json
import random
import types

import httpx
from vllm.exceptions import VLLMValidationError

from aasd_testing.fuzz import kinds, over_http
from aasd_testing.fuzz.engine_process import Run
from aasd_testing.fuzz.limits import PROFILES
from aasd_testing.judged import STEP, found


def asked_over_http(step, answer):
    async def run():
        transport = httpx.MockTransport(answer)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await over_http.ask(client, step, types.SimpleNamespace(ids=lambda prompt: [1] * prompt["tokens"]))

    return asyncio.run(run())


def streamed(*parts, usage=4):
    events = [
        {"choices": [{"index": 0, "text": text, "token_ids": ids, "finish_reason": end}]} for ids, text, end in parts
    ]
    events.append({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": usage}})
    lines = [f"data: {json.dumps(event)}\n\n" for event in events] + ["data: [DONE]\n\n"]
    return lambda request: httpx.Response(200, text="".join(lines))


def test_a_streamed_answer_is_put_together():
    seen = asked_over_http(STEP, streamed(([7, 7], "aa", None), ([7], "a", None), ([7], "a", "length")))
    assert seen.choices[0].token_ids == [7, 7, 7, 7] and found(seen) == []


def test_a_stream_is_left_when_the_case_says_so():
    answer = streamed(([7, 7], "aa", None), ([7], "a", None), ([7], "a", "length"))
    seen = asked_over_http({**STEP, "leave_after": 1}, answer)
    assert seen.left and seen.choices[0].token_ids == [7, 7] and found(seen) == []
    assert not asked_over_http({**STEP, "leave_after": 4}, answer).left, "it had ended"
    nothing = asked_over_http({**STEP, "leave_after": 0}, answer)
    assert nothing.left and nothing.choices == [] and found(nothing) == []


def test_a_stream_without_an_end_or_with_an_error_is_lost():
    assert found(asked_over_http(STEP, streamed(([7, 7], "aa", None)))) != []
    failed = asked_over_http(STEP, lambda request: httpx.Response(200, text='data: {"error": {"message": "boom"}}\n\n'))
    assert found(failed) == ["lost"]
    refusal = 'data: {"error": {"message": "The min_p and ...", "code": 400}}\n\n'
    refused = asked_over_http(STEP, lambda request: httpx.Response(200, text=refusal))
    assert found(refused) == ["status"] and found(refused, {**STEP, "refused": "min_p"}) == []
    assert found(asked_over_http(STEP, lambda request: httpx.Response(500, text="boom"))) == ["status"]

    def broken(request):
        raise httpx.RemoteProtocolError("gone")

    assert found(asked_over_http(STEP, broken)) == ["lost"]


def test_a_whole_answer_is_read():
    choice = {
        "index": 0,
        "text": "aaaa",
        "token_ids": [7] * 4,
        "finish_reason": "length",
        "prompt_logprobs": [None] * 5,
    }
    choice["logprobs"] = {"token_logprobs": [-0.1] * 4, "top_logprobs": [{"a": -0.1}] * 4}
    usage = {"prompt_tokens": 5, "completion_tokens": 4}
    step = {**STEP, "via": "completions"}
    seen = asked_over_http(step, lambda request: httpx.Response(200, json={"choices": [choice], "usage": usage}))
    assert found(seen, step, logprobs=1, prompt_logprobs=1) == []
    assert seen.choices[0].prompt_logprobs == 5 and seen.choices[0].logprobs == [(-0.1, 1)] * 4


def test_an_engine_in_a_process_goes_on_after_a_request_that_vllm_refuses(demo_model):
    def add_request(*args, **kwargs):
        raise VLLMValidationError("The min_p and logit_bias sampling parameters are not yet supported")

    engine = types.SimpleNamespace(add_request=add_request, has_unfinished_requests=lambda: False, step=list)
    steps = [{**STEP, **kinds.FREE["refused_min_p"].make(random.Random(0), PROFILES["v1"])}] * 2
    assert [seen.status for seen in Run(types.SimpleNamespace(llm_engine=engine), demo_model).run(steps)] == [400, 400]
