"""A request's prediction, on its way from the client to the engine and, counted, into the answer's usage.

A client gives it as OpenAI's ``prediction`` parameter of chat completions, or as the request option
``aasd_prediction`` (text or token ids) in ``vllm_xargs`` or ``SamplingParams.extra_args``. The engine gets the option
with a list of token ids, made here by the served model's tokenizer; it is absent where the prediction is empty.

Everything happens in the front end's process, at the narrowest places of vLLM there are: where a chat completion comes
in, since its request keeps fields that vLLM doesn't know; where an engine takes a request, which all other front ends
come through; and around the two functions that answer a chat completion, since they see its output's token ids. It is
installed only where a server or an `LLM` asks for method aasd, and leaves engines with other methods alone.
"""

import asyncio
import contextlib
import copy
import functools
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatCompletionStreamResponse,
)
from vllm.entrypoints.serve.engine.protocol import CompletionTokenUsageInfo, UsageInfo
from vllm.outputs import RequestOutput
from vllm.renderers import TokenizeParams
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.input_processor import InputProcessor

from vllm_aasd.engine import patching
from vllm_aasd.engine.request_options import RequestOptionsError
from vllm_aasd.predicted_tokens import OPTION, PARAMETER, are_token_ids, text_of, usage_of

# The length is checked here, so that the message names the option.
_NOTHING_ADDED = TokenizeParams(max_total_tokens=None, add_special_tokens=False)
# Within a JSON string there would be a backslash before each quote.
_NO_CHOICES = '"choices":[]'
_EVENT, _EVENT_END = "data: ", "\n\n"


def install() -> list[patching.Replacement]:
    """Have this process's front ends take predictions; does nothing if that was done before.

    Returns:
        What was replaced, to be undone.

    Raises:
        UnsupportedVLLMError: if vLLM isn't as we know it; nothing was replaced then.
    """
    return patching.replace(
        {
            patching.CREATE_CHAT_COMPLETION: _patch_create_chat_completion,
            patching.ANSWER_CHAT: _patch_answer_chat,
            patching.STREAM_CHAT: _patch_stream_chat,
            patching.ADD_REQUEST: _patch_add_request,
            patching.ADD_REQUEST_ASYNC: _patch_add_request_async,
        }
    )


def _patch_create_chat_completion(stock: Callable) -> Callable:
    @functools.wraps(stock)
    async def create_chat_completion(
        self: Any, request: ChatCompletionRequest, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[str, None] | Any:
        if _is_served_by_us(self.input_processor):
            await _take_parameter(self.input_processor, request)
        return await stock(self, request, *args, **kwargs)

    return create_chat_completion


async def _take_parameter(processor: InputProcessor, request: ChatCompletionRequest) -> None:
    """Make a chat completion's prediction its option, as token ids."""
    options = dict(request.vllm_xargs or {})
    # vLLM's requests keep what they don't know.
    parameter = (request.model_extra or {}).pop(PARAMETER, None)
    if parameter is None and OPTION not in options:
        return
    if parameter is None:
        name, value = OPTION, options[OPTION]
    elif OPTION in options:
        raise _error(PARAMETER, f"The request's {PARAMETER} is not allowed beside {OPTION}: it takes one of them.")
    else:
        name, value = PARAMETER, text_of(parameter)
    request.vllm_xargs = _with_token_ids(options, await _token_ids_async(processor, name, value))


def _patch_add_request(stock: Callable) -> Callable:
    @functools.wraps(stock)
    def add_request(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> str:
        if _is_to_be_tokenized(self.input_processor, params):
            params = _with_prediction(params, _token_ids(self.input_processor, OPTION, params.extra_args[OPTION]))
        return stock(self, request_id, prompt, params, *args, **kwargs)

    return add_request


def _patch_add_request_async(stock: Callable) -> Callable:
    @functools.wraps(stock)
    async def add_request(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_to_be_tokenized(self.input_processor, params):
            token_ids = await _token_ids_async(self.input_processor, OPTION, params.extra_args[OPTION])
            params = _with_prediction(params, token_ids)
        return await stock(self, request_id, prompt, params, *args, **kwargs)

    return add_request


def _is_served_by_us(processor: InputProcessor) -> bool:
    return getattr(processor.speculative_config, "aasd", None) is not None


def _is_to_be_tokenized(processor: InputProcessor, params: Any) -> bool:
    return isinstance(params, SamplingParams) and OPTION in (params.extra_args or {}) and _is_served_by_us(processor)


def _with_prediction(params: SamplingParams, token_ids: list[int]) -> SamplingParams:
    # A copy, since the caller may give the same to another engine, with another tokenizer.
    params = copy.copy(params)
    params.extra_args = _with_token_ids(params.extra_args or {}, token_ids)
    return params


def _with_token_ids(options: dict[str, Any], token_ids: list[int]) -> dict[str, Any]:
    others = {key: value for key, value in options.items() if key != OPTION}
    return {**others, OPTION: token_ids} if token_ids else others


def _token_ids(processor: InputProcessor, name: str, value: Any) -> list[int]:
    """A prediction's token ids.

    Args:
        processor: of the engine that serves the request.
        name: of the prediction's field, for the message.
        value: text or token ids, as the client gave it; None for what is malformed.

    Raises:
        RequestOptionsError: naming the field, and what is allowed.
    """
    if isinstance(value, str):
        _check_length(processor, name, value)
        (prompt,) = processor.renderer.tokenize_prompts([{"prompt": value}], _NOTHING_ADDED)
        value = prompt["prompt_token_ids"]
    return _checked(processor, name, value)


async def _token_ids_async(processor: InputProcessor, name: str, value: Any) -> list[int]:
    """The same, tokenized in vLLM's own thread for it: a long text takes a while, and a tokenizer isn't thread-safe."""
    if isinstance(value, str):
        _check_length(processor, name, value)
        (prompt,) = await processor.renderer.tokenize_prompts_async([{"prompt": value}], _NOTHING_ADDED)
        value = prompt["prompt_token_ids"]
    return _checked(processor, name, value)


def _check_length(processor: InputProcessor, name: str, text: str) -> None:
    """Refuse a text that can't fit, as vLLM does with prompts, before anything is done with it."""
    longest_token = processor.renderer.get_tokenizer().max_chars_per_token
    if len(text) > processor.model_config.max_model_len * longest_token:
        raise _refusal(processor, name)


def _checked(processor: InputProcessor, name: str, token_ids: Any) -> list[int]:
    model = processor.model_config
    if not are_token_ids(token_ids, model.get_vocab_size(), model.max_model_len):
        raise _refusal(processor, name)
    return token_ids


def _refusal(processor: InputProcessor, name: str) -> RequestOptionsError:
    model = processor.model_config
    allowed = {
        PARAMETER: '{"type": "content", "content": ...} with a text or a list of one or more '
        '{"type": "text", "text": ...}',
        OPTION: f"a text or a list of token ids, integers from 0 to {model.get_vocab_size() - 1}",
    }[name]
    limit = f"of at most {model.max_model_len} tokens"
    return _error(name, f"The request's {name} is not allowed: it takes {allowed}, {limit}.")


def _error(name: str, message: str) -> RequestOptionsError:
    # vLLM's class, which mypy doesn't follow, takes it.
    return RequestOptionsError(message, parameter=name)  # type: ignore[call-arg]


def _patch_answer_chat(stock: Callable) -> Callable:
    @functools.wraps(stock)
    async def chat_completion_full_generator(
        self: Any,
        request: ChatCompletionRequest,
        result_generator: AsyncIterator[RequestOutput],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        prediction = _prediction_of(self.input_processor, request)
        if prediction is None:
            return await stock(self, request, result_generator, *args, **kwargs)
        completions: dict[int, list[int]] = {}
        response = await stock(self, request, _recorded(result_generator, completions), *args, **kwargs)
        if isinstance(response, ChatCompletionResponse):
            await _count(response.usage, prediction, completions)
        return response

    return chat_completion_full_generator


def _patch_stream_chat(stock: Callable) -> Callable:
    @functools.wraps(stock)
    def chat_completion_stream_generator(
        self: Any,
        request: ChatCompletionRequest,
        result_generator: AsyncIterator[RequestOutput],
        *args: Any,
        **kwargs: Any,
    ) -> AsyncGenerator[str, None]:
        prediction = _prediction_of(self.input_processor, request)
        if prediction is None:
            return stock(self, request, result_generator, *args, **kwargs)
        completions: dict[int, list[int]] = {}
        events = stock(self, request, _recorded(result_generator, completions), *args, **kwargs)
        return _with_usage(events, prediction, completions)

    return chat_completion_stream_generator


def _prediction_of(processor: InputProcessor, request: ChatCompletionRequest) -> list[int] | None:
    return (request.vllm_xargs or {}).get(OPTION) if _is_served_by_us(processor) else None


async def _recorded(
    results: AsyncIterator[RequestOutput], completions: dict[int, list[int]]
) -> AsyncGenerator[RequestOutput, None]:
    """The results, whose new tokens are noted by completion: each result has only new ones, or is the only one."""
    async for result in results:
        for output in result.outputs:
            completions.setdefault(output.index, []).extend(output.token_ids)
        yield result


async def _with_usage(
    events: AsyncGenerator[str, None], prediction: list[int], completions: dict[int, list[int]]
) -> AsyncGenerator[str, None]:
    """The events of a streamed answer; the one without choices is the usage that the client asked for."""
    async with contextlib.aclosing(events):
        async for event in events:
            if _NO_CHOICES in event:
                chunk = ChatCompletionStreamResponse.model_validate_json(event.removeprefix(_EVENT))
                if chunk.usage is not None:
                    await _count(chunk.usage, prediction, completions)
                    event = _EVENT + chunk.model_dump_json(exclude_unset=True, exclude_none=True) + _EVENT_END
            yield event


async def _count(usage: UsageInfo, prediction: list[int], completions: dict[int, list[int]]) -> None:
    """Add to a usage what became of the prediction."""
    # In a thread, since it takes a tenth of a second for a hundred thousand tokens.
    counted = await asyncio.to_thread(usage_of, prediction, completions.values())
    details = usage.completion_tokens_details
    usage.completion_tokens_details = CompletionTokenUsageInfo(
        **(details.model_dump(exclude_unset=True) if details is not None else {}),
        accepted_prediction_tokens=counted.accepted,
        rejected_prediction_tokens=counted.rejected,
    )
