"""A real `vllm serve`, from its command line to an OpenAI client."""

import concurrent.futures
import json
import time
import urllib.error
import urllib.request

import openai
import pytest

from aasd_testing.engines import greedy
from aasd_testing.prompts import real_prompts
from aasd_testing.server import Server
from vllm_aasd.counters import METRICS, PREFIX
from vllm_aasd.engine.failsafe import COMPONENTS

pytestmark = pytest.mark.engine

PROMPTS = real_prompts(6, max_chars=700)
# Without earlier answers, from which drafts would be the target's own tokens.
LOOSEST = {"aasd_draft_length": 8, "aasd_alignment": True, "aasd_memory": "off", "aasd_alpha": 10.0, "aasd_beta": 0.0}
LOOSEST |= {"aasd_corpora": {}, "aasd_prior": "off"}
STRICT = {"aasd_verification": "strict"}
LABELS = ("engine", "0"), ("model_name", "model")


def serving(model, speculative_config, *options):
    """A server from `__enter__` to `__exit__`."""
    arguments = ["--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "8", "--enforce-eager", *options]
    arguments += ["--speculative-config", json.dumps({"method": "aasd", **speculative_config})]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOG_STATS_INTERVAL": "2"}
    environment["VLLM_SERVER_DEV_MODE"] = "1"
    return Server(model, arguments, environment)


@pytest.fixture(scope="module")
def server(demo_model):
    """A server with the loosest bar there is. Requests ask for what they want."""
    with serving(demo_model, LOOSEST) as server:
        yield server


@pytest.fixture(scope="module")
def plain(plain_engine):
    """What the target alone says to each prompt."""
    return [output["text"] for output in plain_engine.run(greedy(PROMPTS, 32)).outputs]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", timeout=300, max_retries=0) as client:
        yield client


def ask(client, prompt, xargs=STRICT, **options):
    """Strict by default, since answers are compared: what `conditional` accepts depends on what is drafted."""
    options = {"temperature": 0, "max_tokens": 32, "extra_body": {}, **options}
    options["extra_body"] = {**options["extra_body"], "vllm_xargs": xargs}
    return client.chat.completions.create(model="model", messages=[{"role": "user", "content": prompt}], **options)


def text_of(answer):
    return answer.choices[0].message.content


def drafted_and_accepted(server):
    samples = server.metrics()
    return tuple(samples[f"vllm:spec_decode_num_{name}_tokens_total", *LABELS] for name in ("draft", "accepted"))


def test_an_operator_adds_and_drops_a_corpus_over_http(server, client, plain, tmp_path):
    """The front end, another process than the worker, knows its name from then on."""
    (tmp_path / "answers").write_text("\n".join(plain))
    named = {**STRICT, "aasd_corpora": ["answers"]}

    def call(method, *args):
        body = json.dumps({"method": method, "args": args}).encode()
        request = urllib.request.Request(f"{server.url}/collective_rpc", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["results"]

    def refused():
        with pytest.raises(openai.BadRequestError, match="aasd_corpora is not allowed.*Known: none"):
            ask(client, PROMPTS[0], named)

    refused()
    with pytest.raises(urllib.error.HTTPError):
        call("aasd_add_corpus", "answers", str(tmp_path / "missing"))
    assert call("aasd_add_corpus", "answers", str(tmp_path)) == [["answers"]]
    shares = []
    for xargs in (STRICT, named):
        _, accepted = drafted_and_accepted(server)
        assert [text_of(ask(client, prompt, xargs)) for prompt in PROMPTS] == plain
        shares.append((drafted_and_accepted(server)[1] - accepted) / (32 * len(PROMPTS)))
    assert shares[1] > 0.7 and shares[0] < 0.6, shares
    assert call("aasd_drop_corpus", "answers") == [[]]
    refused()


def test_streamed_and_whole_answers_agree(client):
    for prompt in PROMPTS[:3]:
        whole = ask(client, prompt)
        pieces = list(ask(client, prompt, stream=True, stream_options={"include_usage": True}))
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
        assert text == whole.choices[0].message.content != ""
        assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens == 32


def by_label(samples, name):
    """The values of a metric's series, by its own label."""
    return {labels[-1][1]: value for (metric, *labels), value in samples.items() if metric == f"{PREFIX}{name}_total"}


def test_the_servers_page_shows_our_metrics_and_they_agree_with_vllms(client, server):
    ask(client, PROMPTS[0])
    ask(client, PROMPTS[0], {})
    # Ours are at most a second old.
    time.sleep(3)
    samples = server.metrics()
    assert all(by_label(samples, metric.name) for metric in METRICS)
    drafted, accepted = drafted_and_accepted(server)
    assert sum(by_label(samples, "survival_tokens").values()) == drafted
    assert sum(by_label(samples, "survival_accepted").values()) == accepted
    assert accepted > samples["aasd:relaxed_tokens_total", *LABELS] > 0
    assert samples["aasd:regret_nats_total", *LABELS] > 0
    assert by_label(samples, "store_lookups")["hit"] > 0
    assert by_label(samples, "faults") == dict.fromkeys(COMPONENTS, 0)


def test_neither_log_nor_page_holds_what_was_asked_or_answered(client, server):
    marker = "zanzibarquux"
    answer = text_of(ask(client, f"Repeat this word: {marker} {marker} {marker}", {}))
    time.sleep(2)
    for text in (str(server.metrics()), server.log()):
        assert marker not in text and answer not in text


def test_the_log_has_a_line_now_and_then(client, server):
    line = "AASD metrics: Survival promised: "
    for _ in range(30):
        ask(client, PROMPTS[1])
        if line in server.log():
            break
        time.sleep(0.5)
    log = server.log()
    assert line in log, log[-2000:]
    assert log.count("is live: vLLM") == 1


def test_requests_at_once_get_what_each_asked_for(client, plain):
    kinds = {"strict": STRICT, "off": {"aasd_enabled": False}, "the server's own": {}}
    jobs = [(prompt, xargs) for prompt in PROMPTS for xargs in kinds.values()]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda job: text_of(ask(client, *job)), jobs))
    strict, off, own = (answers[number::3] for number in range(3))
    assert strict == plain and off == plain
    assert own != plain, "the loosest bar must show"


def test_a_request_that_wants_no_speculation_has_nothing_drafted(client, server):
    for switch, is_drafted in ((False, False), ("false", False), (0, False), (True, True)):
        before = drafted_and_accepted(server)
        ask(client, PROMPTS[0], {"aasd_enabled": switch})
        assert (drafted_and_accepted(server) > before) == is_drafted


@pytest.mark.parametrize(
    ("xargs", "message"),
    [
        ({"aasd_beta": 3}, "The request's aasd_beta is not allowed: it takes a number from 0 to 2."),
        ({"aasd_verification": [1]}, "The request's aasd_verification is not allowed: it takes 'strict' or"),
        ({"aasd_verifcation": "strict"}, "Did you mean 'aasd_verification'?"),
        ({**STRICT, "aasd_alpha": 0.1}, "it takes effect only with aasd_verification='conditional'."),
        ({"aasd_relax_sampling": True}, "it is looser than the server's own False"),
    ],
)
def test_a_bad_option_is_answered_with_status_400(client, xargs, message):
    with pytest.raises(openai.BadRequestError) as refusal:
        ask(client, PROMPTS[0], xargs)
    assert message in refusal.value.message
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="model", prompt="x", extra_body={"vllm_xargs": xargs})
    assert ask(client, "Hello", max_tokens=1).usage.completion_tokens == 1, "the server goes on"


def test_what_a_bad_option_holds_is_not_logged(client, server):
    """vLLM logs what a streamed request is refused with, and a traceback."""
    option = {"aasd_beta": "my secret"}
    with pytest.raises(openai.APIError, match="The request's aasd_beta is not allowed"):
        list(ask(client, PROMPTS[0], option, stream=True))
    with pytest.raises(openai.APIError, match="The request's aasd_beta is not allowed"):
        list(client.completions.create(model="model", prompt="x", stream=True, extra_body={"vllm_xargs": option}))
    log = server.log()
    assert "The request's aasd_beta is not allowed" in log and "my secret" not in log


@pytest.mark.long
def test_data_parallel_replicas(demo_model, plain):
    """Of a dense model: engines that share nothing but their front door."""
    with (
        serving(demo_model, LOOSEST, "--data-parallel-size", "2") as server,
        openai.OpenAI(base_url=server.url + "/v1", api_key="none", timeout=300, max_retries=0) as client,
        concurrent.futures.ThreadPoolExecutor(len(PROMPTS)) as pool,
    ):
        answers = list(pool.map(lambda prompt: text_of(ask(client, prompt)), PROMPTS))
        time.sleep(3)
        samples, log = server.metrics(), server.log()
    assert answers == plain
    assert log.count("is live: vLLM") == 2
    # vLLM starts as many API servers as replicas by default; whichever answers shows both engines.
    for name in ("vllm:spec_decode_num_accepted_tokens_total", "aasd:store_lookups_total"):
        for engine in ("0", "1"):
            assert sum(samples[key] for key in samples if key[0] == name and ("engine", engine) in key) > 0, name
