"""Sends one request over HTTP and reads the response."""

import asyncio
import base64
import dataclasses
import io
import json
from typing import Any

import httpx
import torch

from aasd_testing.fuzz.prompts import Prompts
from aasd_testing.fuzz.request_types import Request

TIMEOUT = 600.0
"""Seconds after which a response counts as lost."""


@dataclasses.dataclass
class Choice:
    """One of a response's choices.

    Attributes:
        token_ids: None where the server returns none.
        logprobs: for each token, the token's own, and by name those of others.
        prompt_logprobs: for how many positions of the prompt there are some.
        tool_arguments: of each tool call.
    """

    token_ids: list[int] | None = None
    text: str = ""
    finish_reason: str | None = None
    logprobs: list[tuple[float | None, dict[str, float]]] | None = None
    prompt_logprobs: int | None = None
    tool_arguments: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Response:
    """A response, as far as it came.

    Attributes:
        status: HTTP's; None if there was no response.
        error: the message, if the request failed.
        num_answer_tokens: of all choices.
        disconnected: whether the client disconnected before the end, as the case says.
    """

    status: int | None = None
    error: str = ""
    choices: list[Choice] = dataclasses.field(default_factory=list)
    num_prompt_tokens: int | None = None
    num_answer_tokens: int | None = None
    disconnected: bool = False


async def send(client: httpx.AsyncClient, request: Request, prompts: Prompts) -> Response:
    """Send a request and return the response; never raises for what the server does."""
    response = Response()
    path = "/v1/chat/completions" if request.message else "/v1/completions"
    try:
        async with (
            asyncio.timeout(TIMEOUT),
            client.stream("POST", path, json=_body(request, prompts)) as answer,
        ):
            response.status = answer.status_code
            if answer.status_code != 200:
                response.error = (await answer.aread()).decode()
            elif request.stream:
                await _read_stream(answer, request, response)
            else:
                _add(response, json.loads(await answer.aread()), request)
    except (httpx.HTTPError, TimeoutError, OSError, ValueError) as error:
        response.status, response.error = None, f"{type(error).__name__}: {error}"
    return response


def _body(request: Request, prompts: Prompts) -> dict[str, Any]:
    body = {"model": request.adapter or "model", **request.sampling, **request.body, "return_token_ids": True}
    if request.xargs:
        body["vllm_xargs"] = request.xargs
    if request.stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if request.message:
        body["messages"] = [{"role": "user", "content": request.message}]
        if "logprobs" in body:
            body |= {"logprobs": True, "top_logprobs": body["logprobs"]}
        return body
    body["return_tokens_as_token_ids"] = True
    if request.embeds:
        file = io.BytesIO()
        torch.save(prompts.embed(request.prompt), file)
        body["prompt_embeds"] = base64.b64encode(file.getvalue()).decode()
    else:
        body["prompt"] = request.prompt
    return body


async def _read_stream(answer: httpx.Response, request: Request, response: Response) -> None:
    response.disconnected = request.disconnect_after == 0
    if response.disconnected:
        return
    async for line in answer.aiter_lines():
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            # vLLM sends the head of a stream before it looks at the request.
            response.status, response.error = event["error"].get("code"), json.dumps(event["error"])
            return
        _add(response, event, request)
        emitted = sum(len(choice.token_ids or choice.text) for choice in response.choices)
        if request.disconnect_after and emitted >= request.disconnect_after:
            response.disconnected = any(choice.finish_reason is None for choice in response.choices)
            if response.disconnected:
                return


def _add(response: Response, event: dict[str, Any], request: Request) -> None:
    """Add an event of a stream, or a whole answer."""
    if event.get("usage"):
        response.num_prompt_tokens = event["usage"]["prompt_tokens"]
        response.num_answer_tokens = event["usage"]["completion_tokens"]
    for part in event["choices"]:
        while len(response.choices) <= part["index"]:
            # The parser of streamed tool calls may hold a piece back, with its ids.
            has_ids = not (request.stream and "tools" in request.body)
            response.choices.append(Choice(token_ids=[] if has_ids else None))
        _add_to_choice(response.choices[part["index"]], part)


def _add_to_choice(choice: Choice, part: dict[str, Any]) -> None:
    if choice.token_ids is not None:
        choice.token_ids += part.get("token_ids") or []
    message = part.get("delta") or part.get("message") or part
    choice.text += message.get("text") or message.get("content") or ""
    for number, call in enumerate(message.get("tool_calls") or ()):
        at = call.get("index", number)
        choice.tool_arguments += [""] * (at + 1 - len(choice.tool_arguments))
        choice.tool_arguments[at] += call["function"].get("arguments") or ""
    choice.finish_reason = part.get("finish_reason") or choice.finish_reason
    if part.get("prompt_logprobs") is not None:
        choice.prompt_logprobs = len(part["prompt_logprobs"])
    logprobs = part.get("logprobs")
    if logprobs is None:
        return
    if "content" in logprobs:
        rows = logprobs["content"] or ()
        found = [(row["logprob"], {top["token"]: top["logprob"] for top in row["top_logprobs"]}) for row in rows]
    else:
        values = logprobs["token_logprobs"]
        tops = logprobs["top_logprobs"] or [None] * len(values)
        found = [(value, top or {}) for value, top in zip(values, tops, strict=True)]
    choice.logprobs = (choice.logprobs or []) + found
