"""The other modes through the real engine: the defaults, constrained output, vLLM's own n-grams, refusals."""

import json
import re

import pytest

from aasd_testing.engines import drafted_and_accepted, greedy, run_engine, token_ids
from aasd_testing.prompts import real_prompts

pytestmark = pytest.mark.engine

PROMPTS = real_prompts(8, max_chars=700)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "kind": {"enum": ["statement", "expression", "type"]},
        "lines": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "kind", "lines"],
    "additionalProperties": False,
}
# Drafts of the same length on every machine, so that only the bar differs.
FIXED = {"aasd_draft_length": 8}
BAR = {"aasd_alpha": 10.0, "aasd_beta": 0.0}
LOOSEST = {**FIXED, **BAR, "aasd_relax_sampling": True, "aasd_collapse_guard": False}


@pytest.fixture(scope="module")
def runs(demo_model, tmp_path_factory):
    """Each mode on free and on constrained requests, greedy and sampled, in one batch; strict where the server has the
    loosest bar."""
    request = "Describe this text as JSON with its name, its kind and its number of lines.\n\n"
    constrained = [request + prompt for prompt in PROMPTS[:4]]
    batch = [
        *greedy(PROMPTS),
        *greedy(constrained, 80, structured_outputs={"json": SCHEMA}),
        *greedy(constrained, 80, structured_outputs={"json": SCHEMA}, temperature=1.0, seed=7),
    ]
    folder = tmp_path_factory.mktemp("modes")
    strict = [
        {**request, "sampling": {**request["sampling"], "extra_args": {"aasd_verification": "strict"}}}
        for request in batch
    ]
    default = run_engine(demo_model, [batch], folder / "default", aasd={})
    both = run_engine(demo_model, [strict, batch], folder / "both", aasd=LOOSEST)
    accepted = [drafted_and_accepted(after)[1] for after in both["after"]]
    return {
        "default": {"outputs": default["rounds"][0], "log": default["log"]},
        "strict": {"outputs": both["rounds"][0], "accepted": accepted[0]},
        "loosest": {"outputs": both["rounds"][1], "accepted": accepted[1] - accepted[0]},
    }


def test_each_worker_says_what_is_in_force(runs):
    lines = [line for line in runs["default"]["log"].splitlines() if "is live" in line]
    assert len(lines) == 1
    assert "V1 model runner" in lines[0] and "aasd_verification=conditional" in lines[0]


def test_the_default_says_what_it_measured_and_that_it_has_no_prior(runs):
    log = runs["default"]["log"]
    assert re.search(r"aasd: step times relative to one token: 1:1\.00 2:\d\.\d\d ", log)
    assert re.search(r"at prompt positions would take \d+\.\d % of a prompt's time and are not stored", log)
    assert "aasd: no prior for " in log


@pytest.mark.parametrize("mode", ["strict", "default", "loosest"])
def test_constrained_output_stays_valid(runs, mode):
    constrained = runs[mode]["outputs"][8:]
    finished = [output for output in constrained if output["finish_reason"] == "stop"]
    assert len(finished) >= 4, "most must get to the end of the object"
    for output in finished:
        value = json.loads(output["text"])
        assert value.keys() == {"name", "kind", "lines"} and value["kind"] in SCHEMA["properties"]["kind"]["enum"]


def test_the_bar_matters(runs):
    assert runs["loosest"]["accepted"] > runs["strict"]["accepted"]
    assert token_ids(runs["loosest"]["outputs"]) != token_ids(runs["strict"]["outputs"])
