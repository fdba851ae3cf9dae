"""One request of a case over HTTP: sent, read, perhaps left in the midst."""

import asyncio
import base64
import io
import json
import math
from collections.abc import AsyncIterator
from typing import Any

import httpx
import torch

from aasd_testing.fuzz.cases import Step
from aasd_testing.fuzz.observed import Choice, Observation
from aasd_testing.fuzz.prompts_of_tokens import Prompts, expanded, options_of

TIMEOUT = 600.0
"""Seconds after which an answer counts as lost."""

_PATHS = {"chat": "/v1/chat/completions", "chat_stream": "/v1/chat/completions", "scoring": "/generative_scoring"}


async def ask(client: httpx.AsyncClient, step: Step, prompts: Prompts) -> Observation:
    """Send a request and see what becomes of it; never raises for what the server does."""
    seen = Observation()
    path, body = _PATHS.get(step["via"], "/v1/completions"), body_of(step, prompts)
    try:
        async with asyncio.timeout(TIMEOUT):
            if step["via"].endswith("stream"):
                await _stream(client, path, body, step, seen)
            else:
                await _whole(client, path, body, step, seen)
    except (httpx.HTTPError, TimeoutError, OSError, ValueError) as error:
        seen.status, seen.error = None, f"{type(error).__name__}: {error}"
    return seen


def body_of(step: Step, prompts: Prompts) -> dict[str, Any]:
    """The request as the API takes it."""
    common = {"model": step.get("adapter") or "model", "priority": step["priority"]}
    if "salt" in step:
        common["cache_salt"] = step["salt"]
    if step["via"] == "scoring":
        ids = prompts.ids(step["prompt"])
        return {**common, "query": ids[:-1], "items": [ids[-1:]], "label_token_ids": [260, 28], "apply_softmax": False}
    body = {**common, **expanded(step["sampling"]), "return_token_ids": True}
    options = options_of(step)
    if options:
        body["vllm_xargs"] = options
    if step["via"].startswith("chat"):
        body["messages"] = [{"role": "user", "content": prompts.text(step["prompt"])}]
        body["logprobs"] = "logprobs" in step["sampling"]
        if body["logprobs"]:
            body["top_logprobs"] = step["sampling"]["logprobs"]
        body.update({name: step[name] for name in ("tools", "tool_choice") if name in step})
    else:
        if step.get("embeds"):
            held = io.BytesIO()
            torch.save(prompts.embeddings(step["prompt"]), held)
            body["prompt_embeds"] = base64.b64encode(held.getvalue()).decode()
        else:
            body["prompt"] = prompts.ids(step["prompt"])
        body["echo"] = bool(step.get("echo"))
        body["use_beam_search"] = step["via"] == "beam"
        body["return_tokens_as_token_ids"] = True
    if step["via"].endswith("stream"):
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return body


async def _whole(client: httpx.AsyncClient, path: str, body: dict[str, Any], step: Step, seen: Observation) -> None:
    answer = await client.post(path, json=body)
    seen.status = answer.status_code
    if answer.status_code != 200:
        seen.error = answer.text
        return
    told = answer.json()
    seen.num_prompt_tokens = told["usage"]["prompt_tokens"]
    seen.num_answer_tokens = told["usage"]["completion_tokens"]
    if step["via"] == "scoring":
        value = math.log(told["data"][0]["score"] or math.inf)
        seen.choices = [Choice(None, "", "length", None, [(value, {})])]
        return
    for part in told["choices"]:
        choice = Choice(token_ids=[] if part.get("token_ids") is not None else None)
        _add(choice, part)
        if part.get("prompt_logprobs") is not None:
            choice.prompt_logprobs = len(part["prompt_logprobs"])
        seen.choices.append(choice)


async def _stream(client: httpx.AsyncClient, path: str, body: dict[str, Any], step: Step, seen: Observation) -> None:
    leave_after = step.get("leave_after")
    choices: dict[int, Choice] = {}
    async with client.stream("POST", path, json=body) as answer:
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
            if told.get("usage"):
                seen.num_prompt_tokens = told["usage"]["prompt_tokens"]
                seen.num_answer_tokens = told["usage"]["completion_tokens"]
            for part in told["choices"]:
                # A tool's parser may hold a piece back, with its ids.
                new = Choice(token_ids=None if "tools" in step else [])
                _add(choices.setdefault(part["index"], new), part)
            seen.choices = [choices[index] for index in sorted(choices)]
            if leave_after and sum(len(choice.token_ids or choice.text) for choice in seen.choices) >= leave_after:
                seen.left = any(choice.finish_reason is None for choice in seen.choices)
                if seen.left:
                    return


def _add(choice: Choice, part: dict[str, Any]) -> None:
    """Add a piece of a stream, or a whole answer, to a choice."""
    if choice.token_ids is not None:
        choice.token_ids += part.get("token_ids") or []
    message = part.get("delta") or part.get("message") or part
    choice.text += message.get("text") or message.get("content") or ""
    for number, call in enumerate(message.get("tool_calls") or ()):
        at = call.get("index", number)
        choice.tool_arguments += [""] * (at + 1 - len(choice.tool_arguments))
        choice.tool_arguments[at] += call["function"].get("arguments") or ""
    choice.finish_reason = part.get("finish_reason") or choice.finish_reason
    choice.stop_reason = part.get("stop_reason") if part.get("stop_reason") is not None else choice.stop_reason
    told = part.get("logprobs")
    if told is None:
        return
    if "content" in told:
        tops = [{top["token"]: top["logprob"] for top in row["top_logprobs"]} for row in told["content"] or ()]
        values = [row["logprob"] for row in told["content"] or ()]
    else:
        tops = told["top_logprobs"] or [None] * len(told["token_logprobs"])
        values = told["token_logprobs"]
    choice.logprobs = (choice.logprobs or []) + [(value, top or {}) for value, top in zip(values, tops, strict=True)]


async def _events(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in answer.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))
