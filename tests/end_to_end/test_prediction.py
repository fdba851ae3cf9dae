"""Predictions through a real `vllm serve` with an OpenAI client, and through an `LLM`."""

import json
import os
import subprocess
import sys
import time
import urllib.request

import openai
import pytest
from transformers import AutoTokenizer

from aasd_testing.server import Server

pytestmark = pytest.mark.engine

MAX_TOKENS = 512
QUESTION = "Write a short poem about the sea."
ALLOWED_PARAMETER = (
    'The request\'s prediction is not allowed: it takes {"type": "content", "content": ...} with a text or a list '
    'of one or more {"type": "text", "text": ...}, of at most 512 tokens.'
)
ALLOWED_OPTION = (
    "The request's aasd_prediction is not allowed: it takes a text or a list of token ids, integers from 0 to 49151, "
    "of at most 512 tokens."
)
SECRET = "xylographquux"


def serving(model, *options):
    arguments = ["--dtype", "float32", "--max-model-len", str(MAX_TOKENS), "--max-num-seqs", "4", "--enforce-eager"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    return Server(model, [*arguments, *options], environment)


@pytest.fixture(scope="module")
def server(demo_model):
    settings = {"aasd_verification": "strict", "aasd_allow_request_override": "no", "aasd_prior": "off"}
    config = json.dumps({"method": "aasd", **settings})
    with serving(demo_model, "--speculative-config", config, "--enable-log-requests") as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", timeout=300, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(demo_model):
    return AutoTokenizer.from_pretrained(demo_model)


@pytest.fixture(scope="module")
def answer(client):
    """What the model says anyway."""
    return ask(client).choices[0].message.content


def ask(client, **options):
    options = {"temperature": 0, "max_tokens": 40, **options}
    return client.chat.completions.create(model="model", messages=[{"role": "user", "content": QUESTION}], **options)


def counted(usage):
    details = usage.completion_tokens_details
    return details.accepted_prediction_tokens, details.rejected_prediction_tokens


def content(text):
    return {"type": "content", "content": text}


def test_the_usage_counts_a_prediction(client, tokenizer, answer):
    length = len(tokenizer.encode(answer, add_special_tokens=False))
    whole = ask(client, prediction=content(answer))
    assert whole.choices[0].message.content == answer
    assert counted(whole.usage) == (length, 0)
    edited = answer[: len(answer) // 2] + " 12345 67890 " + answer[len(answer) // 2 :]
    accepted, rejected = counted(ask(client, prediction=content(edited)).usage)
    assert accepted + rejected == len(tokenizer.encode(edited, add_special_tokens=False))
    assert 0 < rejected < 20 < accepted
    accepted, rejected = counted(ask(client, prediction=content("0123456789" * 4)).usage)
    assert accepted == 0 < rejected


def test_a_prediction_in_parts(client, answer):
    parts = [{"type": "text", "text": answer[:10]}, {"type": "text", "text": answer[10:]}]
    whole = ask(client, prediction=content(answer))
    assert counted(ask(client, prediction=content(parts)).usage) == counted(whole.usage)


def test_a_streamed_answer_ends_with_the_same_usage(client, answer):
    whole = ask(client, prediction=content(answer))
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *pieces, last = ask(client, prediction=content(answer), **options)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == answer
    assert all(piece.usage is None for piece in pieces) and last.choices == []
    assert counted(last.usage) == counted(whole.usage)
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.model_extra.keys() == list(ask(client, **options))[-1].model_extra.keys()
    pieces = list(ask(client, prediction=content(answer), stream=True))
    assert all(piece.usage is None and piece.choices for piece in pieces), "unless it isn't asked for"


def test_several_completions_add_up(client, tokenizer, answer):
    length = len(tokenizer.encode(answer, add_special_tokens=False))
    several = {"n": 2, "temperature": 0.7, "seed": 1, "prediction": content(answer)}
    *_, last = ask(client, **several, stream=True, stream_options={"include_usage": True})
    assert sum(counted(last.usage)) == sum(counted(ask(client, **several).usage)) == 2 * length


def test_the_option_of_a_request(client, tokenizer, answer):
    token_ids = tokenizer.encode(answer, add_special_tokens=False)
    for value in (answer, token_ids):
        extra = {"extra_body": {"vllm_xargs": {"aasd_prediction": value}}}
        assert counted(ask(client, **extra).usage) == (len(token_ids), 0)
        completion = client.completions.create(model="model", prompt=QUESTION, max_tokens=3, **extra)
        assert completion.usage.completion_tokens > 0


def test_an_empty_prediction_is_none(client):
    assert ask(client, prediction=content("")).usage.completion_tokens_details is None
    for value in ("", []):
        extra = {"extra_body": {"vllm_xargs": {"aasd_prediction": value}}}
        assert ask(client, **extra).usage.completion_tokens_details is None


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(
    "prediction",
    [
        SECRET,
        {"type": "text", "content": SECRET},
        content([]),
        content([{"type": "text", "text": 5}]),
        content(f"{SECRET} " * MAX_TOKENS),
        content(SECRET * 1_000_000),
    ],
)
def test_a_bad_parameter_is_answered_with_status_400(client, server, prediction, is_streamed):
    with pytest.raises(openai.BadRequestError) as refusal:
        ask(client, prediction=prediction, stream=is_streamed)
    assert ALLOWED_PARAMETER in refusal.value.message and SECRET not in refusal.value.message
    assert SECRET not in server.log()


@pytest.mark.parametrize("value", [5, [49152], [-1], ["1"], [1.5], [1] * (MAX_TOKENS + 1), f"{SECRET} " * MAX_TOKENS])
def test_a_bad_option_is_answered_with_status_400(client, server, value):
    extra = {"extra_body": {"vllm_xargs": {"aasd_prediction": value}}}
    for refused in (
        lambda: ask(client, **extra),
        lambda: client.completions.create(model="model", prompt=QUESTION, max_tokens=3, **extra),
    ):
        with pytest.raises(openai.BadRequestError) as refusal:
            refused()
        assert ALLOWED_OPTION in refusal.value.message and SECRET not in refusal.value.message
    assert SECRET not in server.log()


def test_both_at_once_are_refused(client):
    with pytest.raises(openai.BadRequestError, match="is not allowed beside aasd_prediction"):
        ask(client, prediction=content("a"), extra_body={"vllm_xargs": {"aasd_prediction": "b"}})


def test_no_log_holds_a_prediction(client, server, tokenizer):
    """Not even where requests are logged."""
    extra = {"extra_body": {"vllm_xargs": {"aasd_prediction": SECRET, "mine": "shown"}}}
    ask(client, prediction=content(SECRET))
    ask(client, **extra)
    client.completions.create(model="model", prompt=QUESTION, max_tokens=3, **extra)
    log = server.log()
    assert "'mine': 'shown'" in log and "'aasd_prediction': '...'" in log
    assert SECRET not in log and str(tokenizer.encode(SECRET))[1:-1] not in log


def test_a_client_that_leaves_ends_its_request(client, server, answer):
    with ask(client, prediction=content(answer), stream=True, max_tokens=400) as stream:
        next(iter(stream))
    for _ in range(50):
        page = urllib.request.urlopen(server.url + "/metrics", timeout=10).read().decode()
        (running,) = [line for line in page.splitlines() if line.startswith("vllm:num_requests_running{")]
        if running.endswith(" 0.0"):
            break
        time.sleep(0.1)
    assert running.endswith(" 0.0") and "Exception" not in server.log()


@pytest.mark.long
def test_another_method_takes_no_notice(demo_model):
    """Whatever the prediction is."""
    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    with (
        serving(demo_model, "--speculative-config", json.dumps(ngram)) as server,
        openai.OpenAI(base_url=server.url + "/v1", api_key="none", timeout=300, max_retries=0) as client,
    ):
        for prediction in (content("The sea"), "malformed"):
            assert ask(client, prediction=prediction, max_tokens=3).usage.completion_tokens_details is None
            *_, last = ask(client, prediction=prediction, stream=True, stream_options={"include_usage": True})
            assert last.usage.completion_tokens_details is None


OFFLINE = """
import json, sys
from vllm import LLM, SamplingParams

settings = {"method": "aasd", "aasd_verification": "strict", "aasd_prior": "off"}
llm = LLM(sys.argv[1], dtype="float32", max_model_len=512, enforce_eager=True, speculative_config=settings)
core, taken = llm.llm_engine.engine_core.engine_core, []
stock = core.add_request

def add_request(request, *args):
    taken.append((request.sampling_params.extra_args or {}).get("aasd_prediction"))
    return stock(request, *args)

core.add_request = add_request
said = llm.generate("The sea", SamplingParams(temperature=0, max_tokens=20), use_tqdm=False)[0].outputs[0]
texts, refusals, kept = [], [], []
for value in (said.text, list(said.token_ids), "", [49152], None, said.text * 100):
    params = SamplingParams(temperature=0, max_tokens=20, extra_args={"aasd_prediction": value})
    try:
        texts.append(llm.generate("The sea", params, use_tqdm=False)[0].outputs[0].text)
    except ValueError as error:
        refusals.append(str(error))
    kept.append(params.extra_args["aasd_prediction"] is value)
result = {"said": said.text, "token_ids": list(said.token_ids), "texts": texts, "refusals": refusals}
print("RESULT" + json.dumps(result | {"taken": taken, "kept": kept}))
"""


def test_an_llm(demo_model, tokenizer):
    # The engine in that process, where what it is given can be seen.
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    process = subprocess.run(
        [sys.executable, "-c", OFFLINE, demo_model],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, **environment},
    )
    assert process.returncode == 0, process.stdout + process.stderr
    result = json.loads(process.stdout.split("RESULT")[1])
    encoded = tokenizer.encode(result["said"], add_special_tokens=False)
    assert result["taken"] == [None, encoded, result["token_ids"], None]
    assert result["texts"] == [result["said"]] * 3
    assert len(result["refusals"]) == 3 and all(text.startswith(ALLOWED_OPTION) for text in result["refusals"])
    assert all(result["kept"]), "the caller's parameters stay the caller's"
