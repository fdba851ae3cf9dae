"""A real `vllm serve`, from its command line to an OpenAI client."""

import concurrent.futures
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
from prompts import real_prompts

from vllm_aasd.counters import METRICS

pytestmark = pytest.mark.engine

PROMPTS = real_prompts(6, max_chars=700)
VLLM = pathlib.Path(sys.executable).parent / "vllm"


def start(model, log, speculative_config, port):
    command = [VLLM, "serve", model, "--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "8", "--enforce-eager"]
    command += ["--per-request-spec-decode-metrics", "summary", "--speculative-config", json.dumps(speculative_config)]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOG_STATS_INTERVAL": "2", **os.environ}
    with log.open("w") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server(demo_model, tmp_path_factory):
    """A strict server; yields its address and its log.

    Strict, since answers are compared here: what `conditional` accepts depends on what is drafted, and that on time.
    """
    log, port = tmp_path_factory.mktemp("server") / "log", free_port()
    process = start(demo_model, log, {"method": "aasd", "aasd_verification": "strict"}, port)
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
        yield address, log
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server[0] + "/v1", api_key="none", timeout=300, max_retries=0) as client:
        yield client


def ask(client, prompt, **options):
    options = {"temperature": 0, "max_tokens": 32, **options}
    return client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": prompt}], **options
    )


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


def scraped(address):
    """Every sample of the server's page, by name and labels."""
    page = urllib.request.urlopen(address + "/metrics", timeout=10).read().decode()
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def test_the_servers_page_shows_our_figures_and_they_agree_with_vllms(client, server):
    ask(client, PROMPTS[0])
    # Figures are at most a second old.
    time.sleep(3)
    samples = scraped(server[0])
    labels = ("engine", "0"), ("model_name", "demo")
    for ours, vllms in (
        ("aasd:draft_tokens_total", "vllm:spec_decode_num_draft_tokens_total"),
        ("aasd:accepted_tokens_total", "vllm:spec_decode_num_accepted_tokens_total"),
        ("aasd:draft_length_count", "vllm:spec_decode_num_drafts_total"),
    ):
        assert samples[ours, *labels] == samples[vllms, *labels] > 0, ours
    assert samples["aasd:relaxed_tokens_total", *labels] == 0, "the server is strict"
    names = {sample[0] for sample in samples if sample[0].startswith("aasd:")}
    for metric in METRICS:
        wanted = f"aasd:{metric.name}" + ("_bucket" if metric.bounds else "_total")
        assert wanted in names or metric.name == "faults", f"{wanted}: none of it without a fault"
    assert samples["aasd:store_lookups_total", labels[0], labels[1], ("result", "hit")] > 0


def test_the_log_has_a_line_now_and_then(client, server):
    for _ in range(30):
        ask(client, PROMPTS[1])
        if "AASD metrics: Drafted: " in server[1].read_text():
            return
        time.sleep(0.5)
    pytest.fail(server[1].read_text()[-2000:])


def test_vllms_figures_of_each_request_come_with_the_answer(client):
    answer = ask(client, PROMPTS[0])
    assert answer.metrics["speculative_decoding"]["num_accepted_draft_tokens"] > 0


def test_a_bad_setting_stops_the_server_with_its_reason(demo_model, tmp_path):
    process = start(demo_model, tmp_path / "log", {"method": "aasd", "aasd_floor": -1}, free_port())
    try:
        assert process.wait(timeout=180) != 0
    finally:
        process.kill()
    assert "aasd_floor=-1 is not allowed: it takes a number from 0.0001 to 1." in (tmp_path / "log").read_text()
