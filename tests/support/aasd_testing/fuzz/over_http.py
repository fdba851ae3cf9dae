"""One request of a case over HTTP: sent, read, perhaps left in the midst."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx

from aasd_testing.fuzz.cases import Step
from aasd_testing.fuzz.observed import Choice, Observation
from aasd_testing.fuzz.prompts_of_tokens import Prompts

TIMEOUT = 180.0
"""Seconds after which an answer counts as lost."""


async def ask(client: httpx.AsyncClient, step: Step, prompts: Prompts) -> Observation:
    """Send a request and see what becomes of it; never raises for what the server does.

    Args:
        client: of the server.
        step: the request.
        prompts: of the served model.
    """
    seen, began = Observation(), time.monotonic()
    try:
        async with asyncio.timeout(TIMEOUT):
            if step["via"] == "stream":
                await _stream(client, step, prompts, seen, began)
            else:
                await _whole(client, step, prompts, seen)
    except (httpx.HTTPError, TimeoutError, OSError, ValueError) as error:
        seen.status, seen.error = None, f"{type(error).__name__}: {error}"
    now = time.monotonic() - began
    seen.seconds = (seen.seconds[0] or now, now)
    return seen


def body_of(step: Step, prompts: Prompts) -> dict[str, Any]:
    """The request as the API takes it."""
    body = {"model": step.get("adapter") or "model", "priority": step["priority"], **step["sampling"]}
    if step.get("xargs"):
        body["vllm_xargs"] = step["xargs"]
    if step["via"] == "chat":
        body["messages"] = [{"role": "user", "content": prompts.text(step["prompt"])}]
        body["logprobs"] = "logprobs" in step["sampling"]
        if body["logprobs"]:
            body["top_logprobs"] = step["sampling"]["logprobs"]
        body.update({name: step[name] for name in ("tools", "tool_choice") if name in step})
    else:
        body["prompt"] = prompts.ids(step["prompt"])
        body["echo"] = bool(step.get("echo"))
        body["use_beam_search"] = step["via"] == "beam"
        body["return_tokens_as_token_ids"] = True
    body["return_token_ids"] = True
    if step["via"] == "stream":
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return body


async def _whole(client: httpx.AsyncClient, step: Step, prompts: Prompts, seen: Observation) -> None:
    path = "/v1/chat/completions" if step["via"] == "chat" else "/v1/completions"
    answer = await client.post(path, json=body_of(step, prompts))
    seen.status = answer.status_code
    if answer.status_code != 200:
        seen.error = answer.text
        return
    told = answer.json()
    seen.num_prompt_tokens = told["usage"]["prompt_tokens"]
    seen.num_answer_tokens = told["usage"]["completion_tokens"]
    seen.choices = [_choice(choice, step) for choice in told["choices"]]


def _choice(told: dict[str, Any], step: Step) -> Choice:
    choice = Choice(token_ids=told.get("token_ids"), finish_reason=told["finish_reason"])
    choice.stop_reason = told.get("stop_reason")
    if step["via"] == "chat":
        message = told["message"]
        choice.text = message["content"] or ""
        choice.tool_arguments = [call["function"]["arguments"] for call in message.get("tool_calls") or ()]
        if told.get("logprobs"):
            choice.logprobs = [(row["logprob"], len(row["top_logprobs"])) for row in told["logprobs"]["content"]]
        return choice
    choice.text = told["text"]
    choice.logprobs = _logprobs(told.get("logprobs"))
    if told.get("prompt_logprobs") is not None:
        choice.prompt_logprobs = len(told["prompt_logprobs"])
    return choice


def _logprobs(told: dict[str, Any] | None) -> list[tuple[float | None, int]] | None:
    if told is None:
        return None
    tops = told["top_logprobs"] or [None] * len(told["token_logprobs"])
    return [(value, len(top or ())) for value, top in zip(told["token_logprobs"], tops, strict=True)]


async def _stream(client: httpx.AsyncClient, step: Step, prompts: Prompts, seen: Observation, began: float) -> None:
    leave_after, last = step.get("leave_after"), began
    choices: dict[int, Choice] = {}
    async with client.stream("POST", "/v1/completions", json=body_of(step, prompts)) as answer:
        seen.status = answer.status_code
        if answer.status_code != 200:
            seen.error = (await answer.aread()).decode()
            return
        if leave_after == 0:
            seen.left = True
            return
        async for told in _events(answer):
            if "error" in told:
                # The head of a stream is sent before vLLM looks at the request.
                seen.status, seen.error = told["error"].get("code"), json.dumps(told["error"])
                return
            now = time.monotonic()
            if not choices:
                seen.seconds = (now - began, 0.0)
            else:
                seen.longest_gap = max(seen.longest_gap, now - last)
            last = now
            if told.get("usage"):
                seen.num_prompt_tokens = told["usage"]["prompt_tokens"]
                seen.num_answer_tokens = told["usage"]["completion_tokens"]
            for part in told["choices"]:
                _add(choices.setdefault(part["index"], Choice(token_ids=[])), part)
            seen.choices = [choices[index] for index in sorted(choices)]
            if leave_after and sum(len(choice.token_ids or ()) for choice in seen.choices) >= leave_after:
                seen.left = any(choice.finish_reason is None for choice in seen.choices)
                if seen.left:
                    return


def _add(choice: Choice, part: dict[str, Any]) -> None:
    choice.token_ids += part.get("token_ids") or []
    choice.text += part["text"]
    choice.finish_reason = part.get("finish_reason") or choice.finish_reason
    choice.stop_reason = part.get("stop_reason") if part.get("stop_reason") is not None else choice.stop_reason
    rows = _logprobs(part.get("logprobs"))
    if rows is not None:
        choice.logprobs = (choice.logprobs or []) + rows


async def _events(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in answer.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))
