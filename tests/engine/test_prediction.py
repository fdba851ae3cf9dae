"""A request's prediction in the front end: who takes it, what the engine gets, and what is logged."""

import asyncio
import inspect
import types

import pytest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.exceptions import VLLMValidationError
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.llm_engine import LLMEngine

from vllm_aasd.config import Settings
from vllm_aasd.engine import prediction, request_options
from vllm_aasd.engine.patching import UnsupportedVLLMError

REPLACED = [
    (OpenAIServingChat, "create_chat_completion"),
    (OpenAIServingChat, "chat_completion_full_generator"),
    (OpenAIServingChat, "chat_completion_stream_generator"),
    (LLMEngine, "add_request"),
    (AsyncLLM, "add_request"),
]
MAX_TOKENS = 8


class Renderer:
    """A tokenizer that makes a token of each character."""

    def get_tokenizer(self):
        return types.SimpleNamespace(max_chars_per_token=2)

    def tokenize_prompts(self, prompts, params):
        assert not params.add_special_tokens and params.get_encode_kwargs()["max_length"] is None
        return [{"prompt_token_ids": [ord(char) for char in one["prompt"]]} for one in prompts]

    async def tokenize_prompts_async(self, prompts, params):
        return self.tokenize_prompts(prompts, params)


@pytest.fixture(params=["add_request", "add_request_async"])
def add(request):
    """How an engine takes a request: ours, over one that tells its parameters."""

    def added(params, aasd=True):
        model = types.SimpleNamespace(max_model_len=MAX_TOKENS, get_vocab_size=lambda: 128)
        config = types.SimpleNamespace(aasd=Settings()) if aasd else types.SimpleNamespace(method="ngram")
        processor = types.SimpleNamespace(model_config=model, renderer=Renderer(), speculative_config=config)
        engine = types.SimpleNamespace(input_processor=processor)
        if request.param == "add_request":
            return prediction._patch_add_request(lambda self, _id, _prompt, params: params)(engine, "1", "x", params)

        async def stock(self, _id, _prompt, params):
            return params

        return asyncio.run(prediction._patch_add_request_async(stock)(engine, "1", "x", params))

    return added


@pytest.fixture
def stock(monkeypatch):
    """vLLM as it is, whatever another test of this process has had replaced."""
    for owner, name in REPLACED:
        monkeypatch.setattr(owner, name, inspect.unwrap(getattr(owner, name)))
    return [getattr(owner, name) for owner, name in REPLACED]


def test_replaced_once_and_undone(stock):
    replacements = prediction.install()
    assert len(replacements) == len(REPLACED) and prediction.install() == []
    for replacement in replacements:
        replacement.undo()
    assert [getattr(owner, name) for owner, name in REPLACED] == stock


def test_a_vllm_that_changed_is_refused_and_left_as_it_is(stock, monkeypatch):
    monkeypatch.setattr(AsyncLLM, "add_request", lambda self, request: None)
    with pytest.raises(UnsupportedVLLMError, match="AsyncLLM.add_request of vLLM takes"):
        prediction.install()
    assert [getattr(owner, name) for owner, name in REPLACED[:-1]] == stock[:-1]


@pytest.mark.parametrize("value", ["ab", [97, 98]])
def test_the_engine_gets_token_ids_and_the_caller_keeps_what_it_gave(add, value):
    params = SamplingParams(extra_args={"aasd_prediction": value, "mine": 1})
    assert add(params).extra_args == {"aasd_prediction": [97, 98], "mine": 1}
    assert params.extra_args == {"aasd_prediction": value, "mine": 1}


@pytest.mark.parametrize("value", ["", []])
def test_an_empty_prediction_is_none(add, value):
    assert add(SamplingParams(extra_args={"aasd_prediction": value, "mine": 1})).extra_args == {"mine": 1}


@pytest.mark.parametrize(
    "value", [None, 5, {"type": "content"}, [128], [-1], ["a"], [True], [1] * 9, "a" * 9, "a" * 17, "\x80"]
)
def test_a_bad_prediction_is_the_clients_error(add, value):
    message = (
        "The request's aasd_prediction is not allowed: it takes a text or a list of token ids, integers from 0 to "
        "127, of at most 8 tokens."
    )
    with pytest.raises(ValueError) as refusal:
        add(SamplingParams(extra_args={"aasd_prediction": value}))
    assert isinstance(refusal.value, VLLMValidationError) and refusal.value.parameter == "aasd_prediction"
    assert str(refusal.value).startswith(message) and (not isinstance(value, str) or value not in str(refusal.value))


def test_a_text_that_cannot_fit_is_not_tokenized(add, monkeypatch):
    monkeypatch.setattr(Renderer, "tokenize_prompts", lambda *args: pytest.fail("tokenized"))
    with pytest.raises(ValueError, match="of at most 8 tokens"):
        add(SamplingParams(extra_args={"aasd_prediction": "a" * 17}))


def test_other_requests_pass_as_they_are(add):
    for params in (SamplingParams(), SamplingParams(extra_args={"mine": 1}), PoolingParams()):
        assert add(params) is params
    params = SamplingParams(extra_args={"aasd_prediction": {"any": "thing"}})
    assert add(params, aasd=False) is params, "of an engine with another method"


def test_what_vllm_logs_of_parameters_holds_no_prediction(monkeypatch):
    for name in ("__repr__", "verify"):
        monkeypatch.setattr(SamplingParams, name, inspect.unwrap(getattr(SamplingParams, name)))
    params = SamplingParams(extra_args={"aasd_prediction": [1234], "mine": 5678})
    others = SamplingParams(extra_args={"mine": 5678})
    shown = repr(others)
    assert "1234" in repr(params)
    request_options.install()
    assert "1234" not in repr(params) and "5678" in repr(params)
    assert repr(others) == shown
    assert params.extra_args["aasd_prediction"] == [1234]
