"""The fuzzer against real servers, shortly; `make soak` does it for an hour.

A failure found here is made small by ``python -m aasd_testing.fuzz.soak --replay FILE --shrink``.
"""

import functools
import types

import pytest

from aasd_testing.fuzz import cases, soak
from aasd_testing.fuzz.observed import failures
from aasd_testing.fuzz.server_target import ServerTarget, references

pytestmark = pytest.mark.engine

SEED = 8


@pytest.fixture(scope="module")
def known_of(demo_model):
    """The references of a profile's questions, which are asked once."""
    return functools.cache(lambda profile: references(demo_model, profile, questions(profile)))


def questions(profile):
    return cases.questions(SEED, profile, 28)


def run(demo_model, profile, known, num_rounds, size, mutant=""):
    """Findings with their cases, and what the rounds add up to."""
    tally, found = soak.Tally(), []
    with ServerTarget(demo_model, profile, mutant=mutant) as target:
        for number in range(num_rounds):
            case = cases.generate(SEED, number, profile, size, questions(profile))
            seen, findings, look = soak.run_round(target, case, known)
            tally.add(case, seen, findings, look)
            found += [(case, findings)] if failures(findings) else []
    return found, tally.result()


@pytest.mark.parametrize(
    ("profile", "num_rounds", "size"),
    [
        ("server", 2, 45),
        pytest.param("v1", 3, 60, marks=pytest.mark.long),
        pytest.param("v2", 2, 50, marks=pytest.mark.long),
    ],
)
def test_a_server_survives_a_storm_of_everything_with_nothing_lost(
    profile, num_rounds, size, demo_model, known_of, tmp_path
):
    found, result = run(demo_model, profile, known_of(profile), num_rounds, size)
    paths = [soak.keep(types.SimpleNamespace(folder=tmp_path), *one) for one in found]
    assert not found, f"{paths}: {found[0][1]}"
    assert result["compared"] > 15 and result["left"] > 5 and result["refused"] > 0
    assert result["num_preemptions"] > 0 and result["faults"] > 0 and result["accepted_tokens"] > 10


@pytest.mark.long
@pytest.mark.parametrize(("mutant", "what"), [("wrong_token", {"mismatch", "form", "count"}), ("leak", {"leftover"})])
def test_what_is_broken_on_purpose_is_found(mutant, what, demo_model, known_of):
    found, _ = run(demo_model, "v1", known_of("v1"), 2, 60, mutant)
    assert what & {finding.what for _, findings in found for finding in findings}
