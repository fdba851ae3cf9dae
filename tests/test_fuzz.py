"""The fuzzer against real engines, shortly: the server, and in the long tests both model runners in a process.

`make soak` does it for an hour; a failure found here is made small by ``python -m fuzz.soak --replay FILE --shrink``.
"""

import json
import types

import pytest
from fuzz import cases, soak
from fuzz.engine_target import run_cases
from fuzz.judging import judge_case
from fuzz.oracle import failures
from fuzz.prompts_of_tokens import Prompts
from fuzz.references import references
from fuzz.server_target import ServerTarget
from fuzz.tally import Tally

pytestmark = pytest.mark.engine

SEED = 8


def run_in_process(demo_model, profile, tmp_path, num_cases, size, mutant=""):
    """Findings and tally of some cases on one engine, and all that was kept of them."""
    pool = cases.questions(SEED, profile, 17)
    chosen = [cases.generate(SEED, number, profile, size, pool) for number in range(num_cases)]
    compared = [step for case in chosen for step in cases.compared(case)]
    known, prompts, tally = references(demo_model, profile, compared, tmp_path), Prompts(demo_model), Tally()
    found = []
    runs = run_cases(demo_model, profile, chosen, tmp_path, mutant)
    for case, (seen, findings, look) in zip(chosen, runs, strict=False):
        findings = findings + judge_case(case, seen, known, prompts)
        tally.add(case, seen, findings, look, 0.0)
        found += findings
    return failures(found), tally.result()


def test_a_server_survives_a_storm_of_everything_with_nothing_lost(demo_model, tmp_path):
    pool = cases.questions(SEED, "server", 17)
    rounds = [cases.generate(SEED, number, "server", 45, pool) for number in range(2)]
    compared = [step for case in rounds for step in cases.compared(case)]
    known, tally = references(demo_model, "server", compared, tmp_path), Tally()
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
@pytest.mark.parametrize(("profile", "num_cases", "size"), [("v1", 3, 60), ("v2", 1, 40)])
def test_an_engine_in_a_process_survives_it(profile, num_cases, size, demo_model, tmp_path):
    found, result = run_in_process(demo_model, profile, tmp_path, num_cases, size)
    assert found == []
    assert result["compared"] > 8 and result["accepted_tokens"] > 0 and result["preemptions"] > 0
    assert sum(result["faults_injected"].values()) > 0


@pytest.mark.long
@pytest.mark.parametrize(
    ("mutant", "found_as"),
    [
        ("wrong_token", {"mismatch", "form", "count"}),
        ("accept_all", {"mismatch"}),
        ("leak", {"leftover"}),
        ("uncontained", {"dead"}),
        ("garbage_store", set()),
    ],
)
def test_what_is_broken_on_purpose_is_found(mutant, found_as, demo_model, tmp_path):
    found, _ = run_in_process(demo_model, "v1", tmp_path, 2, 60, mutant)
    what = {finding.what for finding in found}
    assert what & found_as if found_as else what == set(), found
