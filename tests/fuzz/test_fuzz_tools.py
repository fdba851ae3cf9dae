"""The fuzzer's own tools: cases from seeds, what they add up to, shrinking. No engine is started; test_fuzz.py does."""

import collections
import copy
import json

import pytest

from aasd_testing.fuzz import cases, kinds, references
from aasd_testing.fuzz.hooks import held
from aasd_testing.fuzz.limits import PROFILES
from aasd_testing.fuzz.oracle import Finding
from aasd_testing.fuzz.prompts_of_tokens import Prompts
from aasd_testing.fuzz.seams import OFF_PLACES, SEAMS
from aasd_testing.fuzz.server_target import tracebacks
from aasd_testing.fuzz.shrink import shrink
from aasd_testing.fuzz.tally import Tally, slope
from aasd_testing.judged import STEP, answered
from vllm_aasd.engine.failsafe import PLACES

POOL = cases.questions(1, "server", 34)


def test_a_case_is_the_same_from_the_same_seed_and_another_from_another():
    one = cases.generate(1, 2, "server", 60, POOL)
    assert one == cases.generate(1, 2, "server", 60, cases.questions(1, "server", 34))
    assert one == json.loads(json.dumps(one))
    others = [cases.generate(2, 2, "server", 60, POOL), cases.generate(1, 3, "server", 60, POOL)]
    assert one not in others and others[0] != others[1]


@pytest.mark.parametrize("profile", PROFILES)
def test_cases_hold_all_that_the_profile_can_and_nothing_else(profile):
    pool = cases.questions(1, profile, 34)
    steps = [step for number in range(40) for step in cases.generate(1, number, profile, 60, pool)["steps"]]
    asked = [step for step in steps if step["do"] == "ask"]
    features = PROFILES[profile].features
    free = {name for name, kind in kinds.FREE.items() if kind.needs <= features}
    assert {step["kind"] for step in asked} == free | set(kinds.QUESTIONS)
    events = {step["do"] for step in steps} - {"ask"}
    assert ("sleep" in events, "load_adapter" in events) == ("sleep" in features, "lora" in features)
    assert {"fault", "off", "on", "clear_memory", "reset_prefix_cache"} <= events
    assert any("leave_after" in step for step in asked)
    assert ({step.get("via") for step in asked} == {None}) == ("http" not in features)
    prompts_scored = [step for step in asked if step.get("echo") or "prompt_logprobs" in step["sampling"]]
    assert bool(prompts_scored) == ("prompt_logprobs" in features)
    known = {references.key(step) for step in pool}
    assert all(references.key(step) in known for step in asked if step["compared"]), "a reference for each"
    limit = PROFILES[profile].max_model_len
    assert all(step["prompt"]["tokens"] + step["sampling"]["max_tokens"] <= limit for step in asked if step["compared"])


def test_the_faults_places_are_the_products():
    assert {place for seams in SEAMS.values() for place in seams.values()} | set(OFF_PLACES) <= set(PLACES)


def test_prompts_are_as_long_as_they_say(demo_model):
    prompts = Prompts(demo_model)
    for shape in ("text", "repeat", "period", "noise"):
        for tokens in (1, 7, 255):
            described = {"shape": shape, "seed": 3, "tokens": tokens, "period": 5}
            assert len(prompts.ids(described)) == tokens and prompts.ids(described) == prompts.ids(described)
    chat = prompts.ids({"shape": "chat", "seed": 3, "tokens": 20})
    assert 20 < len(chat) < 100


# What is seen of a worker and a log, and what it adds up to


def test_the_log_is_searched_for_tracebacks_but_those_of_injected_faults():
    def trace(*errors):
        prefix = "(EngineCore pid=7) ERROR 11-26 01:02:03 [containment.py:80] "
        lines = []
        for error in errors:
            lines += ["Traceback (most recent call last):", '  File "x"', "    y", error, ""]
            lines += ["The above exception was the direct cause of the following exception:", ""]
        return "".join(f"{prefix}{line}\n" for line in lines[:-2])

    assert tracebacks(trace("aasd_testing.fuzz.hooks.InjectedFault: injected into draft")) == []
    log = trace("aasd_testing.fuzz.hooks.InjectedFault: injected into draft") + trace("ValueError: of our own")
    assert len(tracebacks(log)) == 1 and "of our own" in tracebacks(log)[0]
    assert (
        tracebacks(trace("ValueError: not allowed", "vllm_aasd.engine.request_options.RequestOptionsError: it")) == []
    )
    chained = tracebacks(trace("KeyError: 1", "RuntimeError: 2"))
    assert len(chained) == 1 and "KeyError: 1" in chained[0] and "RuntimeError: 2" in chained[0]
    assert len(tracebacks(trace("KeyError: 1") + trace("RuntimeError: 2"))) == 2


def test_request_ids_that_an_object_of_ours_holds_are_found():
    from vllm_aasd.drafting.drafter import Drafter

    drafter = Drafter(16, 4, 0.0)
    assert held(drafter) == {}
    drafter._requests["cmpl-1-0"] = drafter._requests["0_fuzz-3"] = None
    drafter._other = collections.deque(["chatcmpl-2", "something else"])
    assert held(drafter) == {"Drafter._requests": 2, "Drafter._other": 1}


def test_the_slope_is_of_an_hour():
    assert slope([(minute, 100 + minute / 60 * 5) for minute in range(10, 40)]) == pytest.approx(5)
    assert slope([(minute, 100.0) for minute in range(5)]) is None


def test_a_tally_goes_on_over_a_lost_engine():
    tally, case = Tally(), {"steps": [STEP, {"do": "on"}]}
    look = {"rss_mib": 100.0, "injected": {"draft": 2}, "metrics": {"vllm:num_preemptions_total": 3.0}, "steps": {}}
    tally.add(case, [answered(), None], [], look, 1.0)
    tally.add(case, [None, None], [Finding("dead", None, "boom")], {}, 2.0)
    tally.restarted()
    tally.add(case, [answered((7, 8, 7, 7)), None], [Finding("near_tie", 0, "")], look, 3.0)
    result = tally.result()
    assert (result["requests"], result["compared"], result["rounds"]) == (2, 2, 3)
    assert (result["preemptions"], result["faults_injected"], result["engines_lost"]) == (6, {"draft": 4}, 1)
    assert (result["failures"], result["near_ties"], result["events"]) == (1, 1, {"on": 3})


# Shrinking


def test_shrinking_finds_the_two_steps_that_matter_and_simplifies_them():
    case = cases.generate(3, 0, "server", 70, POOL)
    asks = [at for at, step in enumerate(case["steps"]) if step["do"] == "ask"]
    first, second = asks[5], asks[-4]
    case["steps"][first]["marked"], case["steps"][second]["marked"] = 1, 2
    original = copy.deepcopy(case)
    trials = []

    def fails(trial):
        trials.append(trial)
        marks = [step.get("marked") for step in trial["steps"] if step.get("marked")]
        return marks == [1, 2]

    small, count = shrink(case, fails)
    assert [step["marked"] for step in small["steps"]] == [1, 2]
    assert all(step["wait"] == 0 and step["priority"] == 0 for step in small["steps"])
    assert count == len(trials) < 80 and fails(small) and case == original
    assert all(references.key(step) in {references.key(one) for one in POOL} for step in cases.compared(small))


def test_shrinking_ends_after_so_many_trials_with_what_fails():
    case = cases.generate(3, 0, "server", 70, POOL)
    small, count = shrink(case, lambda trial: len(trial["steps"]) > 20, 5)
    assert count == 5 and 20 < len(small["steps"]) < len(case["steps"])
