"""The other modes through the real engine: the defaults, constrained output, and the loosest bar."""

import json
import re

import pytest

from aasd_testing.engines import engine, greedy, with_options
from aasd_testing.prompts import real_prompts

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("V1 engines")]

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
REQUEST = "Describe this text as JSON with its name, its kind and its number of lines.\n\n"
QUESTIONS = [REQUEST + prompt for prompt in PROMPTS[:4]]
CONSTRAINED = [
    *greedy(QUESTIONS, 80, structured_outputs={"json": SCHEMA}),
    *greedy(QUESTIONS, 80, structured_outputs={"json": SCHEMA}, temperature=1.0, seed=7),
]
STRICT = {"aasd_verification": "strict"}
LOOSEST = {"aasd_alpha": 10.0, "aasd_beta": 0.0, "aasd_relax_sampling": True, "aasd_collapse_guard": False}


def test_by_default_it_says_what_is_in_force_and_what_it_measured(demo_model):
    with engine(demo_model, aasd={}) as started:
        assert_valid(started.run(CONSTRAINED).outputs)
        log = started.log()
    (line,) = [line for line in log.splitlines() if "is live" in line]
    assert "V1 model runner" in line and "aasd_verification=conditional" in line
    assert re.search(r"aasd: step times relative to one token: 1:1\.00 2:\d\.\d\d .*\(timed in \d\.\d s\)", log)


def test_constrained_output_stays_valid_and_the_bar_matters(aasd_engine):
    """Free and constrained requests, greedy and sampled, in one batch."""
    strict, loosest = (
        aasd_engine.run(with_options(CONSTRAINED + greedy(PROMPTS), **options)) for options in (STRICT, LOOSEST)
    )
    for found in (strict, loosest):
        assert_valid(found.outputs[: len(CONSTRAINED)])
    assert loosest.accepted > strict.accepted
    assert loosest.token_ids != strict.token_ids


def assert_valid(constrained):
    finished = [output for output in constrained if output["finish_reason"] == "stop"]
    assert len(finished) >= 4, "most must get to the end of the object"
    for output in finished:
        value = json.loads(output["text"])
        assert value.keys() == {"name", "kind", "lines"} and value["kind"] in SCHEMA["properties"]["kind"]["enum"]
