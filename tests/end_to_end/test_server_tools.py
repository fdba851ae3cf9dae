"""Tool calls and JSON through a real `vllm serve`: what a client gets is what it gets without speculation."""

import json

import jsonschema
import openai
import pytest

from aasd_testing.server import Server

pytestmark = [pytest.mark.engine, pytest.mark.long]

PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "temperature_unit": {"enum": ["celsius", "fahrenheit"]},
    },
    "required": ["city", "days", "temperature_unit"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": text, "parameters": PARAMETERS, "strict": True}}
    for name, text in (
        ("get_weather_forecast", "Get the weather forecast for a city."),
        ("get_climate_statistics", "Get the average temperatures of a city."),
    )
]
QUESTIONS = [f"What will the weather in {city} be like in the next 3 days?" for city in ("Paris", "New York")]
CHOICES = {
    "auto": "auto",
    "required": "required",
    "named": {"type": "function", "function": {"name": "get_weather_forecast"}},
}
STRICT, WITHOUT = {"aasd_verification": "strict"}, {"aasd_enabled": False}


# vLLM's parser of this model's family brings a grammar of its own; without one, required and named calls are JSON.
@pytest.fixture(scope="module", params=["hermes", "pythonic"])
def server(request, demo_model):
    arguments = ["--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "8", "--enforce-eager"]
    arguments += ["--enable-auto-tool-choice", "--tool-call-parser", request.param]
    arguments += ["--speculative-config", json.dumps({"method": "aasd", "aasd_draft_length": 8, "aasd_prior": "off"})]
    with Server(demo_model, arguments, {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", timeout=600, max_retries=0) as client:
        yield client


def ask(client, question, xargs, **options):
    return client.chat.completions.create(
        model="model",
        messages=[{"role": "user", "content": question}],
        max_tokens=100,
        # Greedy, but vLLM gives several answers only where it samples.
        temperature=1,
        extra_body={"vllm_xargs": xargs, "top_k": 1},
        **options,
    )


def whole(client, *asked, **options):
    """Per answer: its text, the names and arguments of its calls, and why it ended."""
    return [
        (
            choice.message.content or "",
            [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []],
            choice.finish_reason,
        )
        for choice in ask(client, *asked, **options).choices
    ]


def streamed(client, *asked, **options):
    """The same, put together from its pieces."""
    text, calls, reason = "", {}, None
    for piece in ask(client, *asked, stream=True, **options):
        for choice in piece.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
            for call in choice.delta.tool_calls or []:
                name, arguments = calls.get(call.index, ("", ""))
                calls[call.index] = name + (call.function.name or ""), arguments + (call.function.arguments or "")
    return [(text, [calls[index] for index in sorted(calls)], reason)]


def num_forced(server):
    """How many forced tokens were accepted so far; its page is at most a second late."""
    return sum(
        value
        for (name, *labels), value in server.metrics().items()
        if name == "aasd:grammar_accepted_tokens_total" and ("source", "forced") in labels
    )


@pytest.mark.parametrize("get", [whole, streamed])
@pytest.mark.parametrize("choice", CHOICES)
def test_tool_calls(client, choice, get):
    for question in QUESTIONS:
        plain, ours = (
            get(client, question, xargs, tools=TOOLS, tool_choice=CHOICES[choice]) for xargs in (WITHOUT, STRICT)
        )
        assert ours == plain
        for _, calls, reason in ours if choice != "auto" else ():
            assert calls or reason == "length"
            for name, arguments in calls if reason != "length" else ():
                assert name in [tool["function"]["name"] for tool in TOOLS]
                jsonschema.validate(json.loads(arguments), PARAMETERS)


def test_several_answers_and_stop_strings(client):
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": PARAMETERS}}
    for options in ({"n": 3}, {"stop": ["days"]}, {"stop": ['",']}):
        plain, ours = (
            whole(client, QUESTIONS[0], xargs, response_format=form, **options) for xargs in (WITHOUT, STRICT)
        )
        assert ours == plain and len(ours) == options.get("n", 1)


def test_forced_tokens_were_among_them(client, server):
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": PARAMETERS}}
    for question in QUESTIONS:
        ask(client, question, STRICT, response_format=form)
    assert num_forced(server) > 10
    assert all(value == 0 for (name, *_), value in server.metrics().items() if name == "aasd:faults_total")
