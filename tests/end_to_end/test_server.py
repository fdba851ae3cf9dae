"""A real `vllm serve`, from its command line to an OpenAI client."""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
import urllib.request

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from aasd_testing.engines import greedy, run_engine
from aasd_testing.prompts import real_prompts
from vllm_aasd.counters import METRICS, PREFIX
from vllm_aasd.engine.failsafe import COMPONENTS

pytestmark = pytest.mark.engine

PROMPTS = real_prompts(6, max_chars=700)
LOOSEST = {"aasd_draft_length": 8, "aasd_alignment": False, "aasd_alpha": 10.0, "aasd_beta": 0.0}
STRICT = {"aasd_verification": "strict"}
LABELS = ("engine", "0"), ("model_name", "demo")
VLLM = pathlib.Path(sys.executable).parent / "vllm"


def start(model, log, speculative_config, port, *options):
    command = [VLLM, "serve", model, "--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "8", "--enforce-eager"]
    command += ["--speculative-config", json.dumps(speculative_config), *options]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOG_STATS_INTERVAL": "2", **os.environ}
    with log.open("w") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(model, log, speculative_config, *options):
    """A server while it is up; gives its address."""
    port = free_port()
    process = start(model, log, speculative_config, port, *options)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            assert process.poll() is None, log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"{address}/health", timeout=2)
                break
            except OSError:
                time.sleep(1)
        else:
            pytest.fail("the server did not come up in 300 s\n" + log.read_text()[-4000:])
        yield address
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.fixture(scope="module")
def server(demo_model, tmp_path_factory):
    """A server with the loosest bar there is; yields its address and its log. Requests ask for what they want."""
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(demo_model, log, {"method": "aasd", **LOOSEST}) as address:
        yield address, log


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server[0] + "/v1", api_key="none", timeout=300, max_retries=0) as client:
        yield client


def ask(client, prompt, xargs=STRICT, **options):
    """Strict by default, since answers are compared: what `conditional` accepts depends on what is drafted."""
    options = {"temperature": 0, "max_tokens": 32, "extra_body": {}, **options}
    options["extra_body"] = {**options["extra_body"], "vllm_xargs": xargs}
    return client.chat.completions.create(model="demo", messages=[{"role": "user", "content": prompt}], **options)


def text_of(answer):
    return answer.choices[0].message.content


def scraped(address):
    """Every sample of the server's page, by name and labels."""
    page = urllib.request.urlopen(address + "/metrics", timeout=10).read().decode()
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def drafted_and_accepted(server):
    samples = scraped(server[0])
    return tuple(samples[f"vllm:spec_decode_num_{name}_tokens_total", *LABELS] for name in ("draft", "accepted"))


def test_the_worker_says_that_it_is_live(server):
    assert server[1].read_text().count("is live: vLLM") == 1


def test_streamed_and_whole_answers_agree(client):
    for prompt in PROMPTS[:3]:
        whole = ask(client, prompt)
        pieces = list(ask(client, prompt, stream=True, stream_options={"include_usage": True}))
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
        assert text == whole.choices[0].message.content != ""
        assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens == 32


def test_many_at_once_get_what_each_gets_alone(client):
    alone = [ask(client, prompt).choices[0].message.content for prompt in PROMPTS]
    with concurrent.futures.ThreadPoolExecutor(len(PROMPTS)) as pool:
        together = list(pool.map(lambda prompt: ask(client, prompt).choices[0].message.content, PROMPTS))
    assert together == alone


def test_seeds_and_sampling_parameters(client):
    options = {"temperature": 0.9, "top_p": 0.9, "extra_body": {"top_k": 20}, "seed": 5}
    first, second = (ask(client, PROMPTS[0], **options).choices[0].message.content for _ in range(2))
    other = ask(client, PROMPTS[0], **{**options, "seed": 6}).choices[0].message.content
    assert first == second != other


def test_logprobs_of_every_token(client):
    answer = ask(client, PROMPTS[1], logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    assert all(len(token.top_logprobs) >= 2 and token.logprob <= 0 for token in content)


def by_label(samples, name):
    """The values of a metric's series, by its own label."""
    return {labels[-1][1]: value for (metric, *labels), value in samples.items() if metric == f"{PREFIX}{name}_total"}


def test_the_servers_page_shows_our_metrics_and_they_agree_with_vllms(client, server):
    ask(client, PROMPTS[0])
    ask(client, PROMPTS[0], {})
    # Ours are at most a second old.
    time.sleep(3)
    samples = scraped(server[0])
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
    page = urllib.request.urlopen(server[0] + "/metrics", timeout=10).read().decode()
    for text in (page, server[1].read_text()):
        assert marker not in text and answer not in text


def test_the_log_has_a_line_now_and_then(client, server):
    log, line = server[1], "AASD metrics: Survival promised: "
    for _ in range(30):
        ask(client, PROMPTS[1])
        if line in log.read_text():
            break
        time.sleep(0.5)
    assert line in log.read_text(), log.read_text()[-2000:]


def test_requests_at_once_get_what_each_asked_for(client, demo_model, tmp_path):
    plain = run_engine(demo_model, [greedy(PROMPTS[:4], 32)], tmp_path / "plain")
    plain = [output["text"] for output in plain["rounds"][0]]
    kinds = {"strict": STRICT, "off": {"aasd_enabled": False}, "the server's own": {}}
    jobs = [(prompt, xargs) for prompt in PROMPTS[:4] for xargs in kinds.values()]
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
        ({"aasd_beta": "0.5"}, "The request's aasd_beta is not allowed: it takes a number from 0 to 2."),
        ({"aasd_enabled": "maybe"}, "The request's aasd_enabled is not allowed: it takes true or false."),
        (
            {"aasd_verification": [1]},
            "The request's aasd_verification is not allowed: it takes 'strict' or 'conditional' or",
        ),
        ({"aasd_verifcation": "strict"}, "Did you mean 'aasd_verification'?"),
        ({"aasd_prior": False}, "Unknown request option 'aasd_prior'."),
        ({**STRICT, "aasd_alpha": 0.1}, "it takes effect only with aasd_verification='conditional'."),
        ({"aasd_relax_sampling": True}, "it is looser than the server's own False"),
    ],
)
def test_a_bad_option_is_answered_with_status_400(client, xargs, message):
    with pytest.raises(openai.BadRequestError) as refusal:
        ask(client, PROMPTS[0], xargs)
    assert message in refusal.value.message
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="demo", prompt="x", extra_body={"vllm_xargs": xargs})
    assert ask(client, "Hello", max_tokens=1).usage.completion_tokens == 1, "the server goes on"


def test_what_a_bad_option_holds_is_not_logged(client, server):
    """vLLM logs what a streamed request is refused with, and a traceback."""
    option = {"aasd_floor": "my secret"}
    with pytest.raises(openai.APIError, match="The request's aasd_floor is not allowed"):
        list(ask(client, PROMPTS[0], option, stream=True))
    with pytest.raises(openai.APIError, match="The request's aasd_floor is not allowed"):
        list(client.completions.create(model="demo", prompt="x", stream=True, extra_body={"vllm_xargs": option}))
    assert "The request's aasd_floor is not allowed" in server[1].read_text()
    assert "my secret" not in server[1].read_text()


@pytest.mark.long
def test_data_parallel_replicas(demo_model, tmp_path):
    """Of a dense model: engines that share nothing but their front door."""
    plain = run_engine(demo_model, [greedy(PROMPTS, 32)], tmp_path / "plain")
    log = tmp_path / "log"
    replicas = ("--data-parallel-size", "2")
    with (
        serving(demo_model, log, {"method": "aasd", **LOOSEST}, *replicas) as address,
        openai.OpenAI(base_url=address + "/v1", api_key="none", timeout=300, max_retries=0) as client,
        concurrent.futures.ThreadPoolExecutor(len(PROMPTS)) as pool,
    ):
        answers = list(pool.map(lambda prompt: text_of(ask(client, prompt)), PROMPTS))
        time.sleep(3)
        page = urllib.request.urlopen(address + "/metrics", timeout=10).read().decode()
    assert answers == [output["text"] for output in plain["rounds"][0]]
    assert log.read_text().count("is live: vLLM") == 2
    # vLLM starts as many API servers as replicas by default; whichever answers shows both engines.
    for name in ("vllm:spec_decode_num_accepted_tokens_total", "aasd:store_lookups_total"):
        series = [line for line in page.splitlines() if line.startswith(name)]
        for engine in ("0", "1"):
            assert sum(float(line.rsplit(" ", 1)[1]) for line in series if f'engine="{engine}"' in line) > 0, name


def test_a_bad_setting_stops_the_server_with_its_reason(demo_model, tmp_path):
    process = start(demo_model, tmp_path / "log", {"method": "aasd", "aasd_beta": -1}, free_port())
    try:
        assert process.wait(timeout=180) != 0
    finally:
        process.kill()
    assert "aasd_beta=-1 is not allowed: it takes a number from 0 to 2." in (tmp_path / "log").read_text()
