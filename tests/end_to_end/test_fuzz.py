"""The fuzzer against real servers, shortly; `make soak` does it for an hour."""

import functools

import pytest

from aasd_testing.fuzz.checks import failures
from aasd_testing.fuzz.soak import Fuzzer

pytestmark = pytest.mark.engine

SEED = 28


@pytest.fixture(scope="module")
def fuzzer_of(demo_model, tmp_path_factory):
    """Of a profile, whose references are answered once."""
    return functools.cache(lambda profile: Fuzzer(demo_model, profile, SEED, 28, tmp_path_factory.mktemp("adapters")))


def run(fuzzer, num_rounds, size, mutant=""):
    """Everything that was wrong in some rounds, whose counts the fuzzer then has."""
    fuzzer.counts.clear()
    with fuzzer.server(mutant) as server:
        return [finding for number in range(num_rounds) for finding in fuzzer.run(server, fuzzer.case(number, size))]


@pytest.mark.parametrize(
    ("profile", "num_rounds", "size"),
    [
        ("v1", 1, 60),
        pytest.param("v1", 4, 60, marks=pytest.mark.long),
        pytest.param("lora", 3, 60, marks=pytest.mark.long),
        pytest.param("v2", 2, 50, marks=pytest.mark.long),
    ],
)
def test_a_server_survives_random_requests_events_and_faults(profile, num_rounds, size, fuzzer_of):
    fuzzer = fuzzer_of(profile)
    assert failures(run(fuzzer, num_rounds, size)) == []
    counts, metrics = fuzzer.counts, fuzzer.state["metrics"]
    assert counts["compared"] > 15 and counts["disconnected"] > 2 and counts["refused"] > 0
    assert sum(fuzzer.state["faults"].values()) > 0
    assert metrics["vllm:num_preemptions_total"] > 0 and metrics["vllm:spec_decode_num_accepted_tokens_total"] > 10


@pytest.mark.long
@pytest.mark.parametrize(("mutant", "what"), [("wrong_token", {"mismatch", "form", "count"}), ("leak", {"leftover"})])
def test_what_is_broken_on_purpose_is_found(mutant, what, fuzzer_of):
    assert what & {finding.what for finding in run(fuzzer_of("v1"), 2, 60, mutant)}
