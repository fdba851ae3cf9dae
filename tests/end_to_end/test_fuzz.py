"""The fuzzer against real engines, shortly: the server, and in the long tests both model runners in a process.

`make soak` does it for an hour; a failure found here is made small by ``python -m aasd_testing.fuzz.soak --replay FILE --shrink``.
"""

import functools
import json
import types

import pytest

from aasd_testing.fuzz import cases, soak
from aasd_testing.fuzz.engine_target import run_cases
from aasd_testing.fuzz.judging import judge_case
from aasd_testing.fuzz.oracle import failures
from aasd_testing.fuzz.prompts_of_tokens import Prompts
from aasd_testing.fuzz.references import references
from aasd_testing.fuzz.server_target import ServerTarget
from aasd_testing.fuzz.tally import Tally

pytestmark = pytest.mark.engine

SEED = 8


@pytest.fixture(scope="module")
def known_of(demo_model, tmp_path_factory):
    """The references of a profile's questions, which are asked once."""
    return functools.cache(
        lambda profile: references(demo_model, profile, questions(profile), tmp_path_factory.mktemp(profile))
    )


def questions(profile):
    return cases.questions(SEED, profile, 17)


def run_in_process(demo_model, profile, known, tmp_path, num_cases, size, mutant=""):
    """Findings and tally of some cases on one engine."""
    chosen = [cases.generate(SEED, number, profile, size, questions(profile)) for number in range(num_cases)]
    prompts, tally, found = Prompts(demo_model), Tally(), []
    runs = run_cases(demo_model, profile, chosen, tmp_path, mutant)
    for case, (seen, findings, look) in zip(chosen, runs, strict=False):
        findings = findings + judge_case(case, seen, known, prompts)
        tally.add(case, seen, findings, look, 0.0)
        found += findings
    return failures(found), tally.result()


def test_a_server_survives_a_storm_of_everything_with_nothing_lost(demo_model, known_of, tmp_path):
    rounds = [cases.generate(SEED, number, "server", 45, questions("server")) for number in range(2)]
    known, tally = known_of("server"), Tally()
    arguments = types.SimpleNamespace(folder=tmp_path)
    with ServerTarget(demo_model, "server") as target:
        for case in rounds:
            seen, findings, look = soak.run_round(target, case, known)
            tally.add(case, seen, findings, look, 0.0)
            if failures(findings):
                path = soak.keep(arguments, case, findings)
                pytest.fail(f"{path}:\n" + "\n".join(map(str, findings)) + target.log()[-3000:])
    result = tally.result()
    assert result["compared"] > 25 and result["left"] > 5 and result["refused"] > 0, json.dumps(result)
    assert result["preemptions"] > 0 and sum(result["faults_injected"].values()) > 0
    assert result["accepted_tokens"] > 20


@pytest.mark.long
@pytest.mark.parametrize(("profile", "num_cases", "size"), [("v1", 3, 60), ("v2", 2, 50)])
def test_an_engine_in_a_process_survives_it(profile, num_cases, size, demo_model, known_of, tmp_path):
    found, result = run_in_process(demo_model, profile, known_of(profile), tmp_path, num_cases, size)
    assert found == []
    assert result["compared"] > 8 and result["accepted_tokens"] > 0 and result["preemptions"] > 0
    assert sum(result["faults_injected"].values()) > 0


@pytest.mark.long
@pytest.mark.parametrize(
    ("mutant", "found_as", "saying"),
    [
        ("wrong_token", {"mismatch", "form", "count"}, ""),
        ("accept_all", {"mismatch"}, ""),
        ("leak", {"leftover"}, "_requests"),
        ("uncontained", {"dead"}, "InjectedFault"),
        ("garbage_store", set(), ""),
    ],
)
def test_what_is_broken_on_purpose_is_found(mutant, found_as, saying, demo_model, known_of, tmp_path):
    found, result = run_in_process(demo_model, "v1", known_of("v1"), tmp_path, 2, 60, mutant)
    if found_as:
        assert any(finding.what in found_as and saying in finding.detail for finding in found), found
    else:
        assert found == [] and result["compared"] > 8
