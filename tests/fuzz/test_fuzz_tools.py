"""The fuzzer's cases, its hold on a worker (a fake runner), and what it makes of both. No engine is started."""

import json
import types

import numpy as np
import pytest

from aasd_testing import fake_v1
from aasd_testing.fake_v2 import next_token, scheduled
from aasd_testing.fuzz import cases, hooks, kinds
from aasd_testing.fuzz.limits import PROFILES
from aasd_testing.fuzz.observed import Finding, Observation
from aasd_testing.fuzz.oracle import in_log
from aasd_testing.fuzz.prompts_of_tokens import CANARIES, Prompts
from aasd_testing.fuzz.seams import SEAMS
from aasd_testing.fuzz.soak import Tally, shrink
from vllm_aasd.drafting.drafter import Drafter
from vllm_aasd.engine.failsafe import COMPONENTS

PROMPTS = {"cmpl-a": [1, 2, 4, 1, 2, 6, 1], "cmpl-b": [3, 3, 5, 6, 0, 2, 1, 3, 3]}


@pytest.mark.parametrize("profile", PROFILES)
def test_cases_hold_all_that_the_profile_can_and_nothing_else(profile):
    limits = PROFILES[profile]
    pool = cases.questions(1, profile, 56)
    case = cases.generate(1, 2, profile, 60, pool)
    assert json.loads(json.dumps(cases.generate(1, 2, profile, 60, cases.questions(1, profile, 56)))) == case
    steps = [step for number in range(40) for step in cases.generate(1, number, profile, 60, pool)["steps"]]
    asked = [step for step in steps if step["do"] == "ask"]
    assert {step["kind"] for step in asked} == set(kinds.possible({**kinds.FREE, **kinds.QUESTIONS}, limits))
    events = {step["do"] for step in steps} - {"ask"}
    assert ("sleep" in events, "load_adapter" in events) == ("sleep" in limits.features, "lora" in limits.features)
    assert {"fault", "off", "on", "clear_memory", "reset_prefix_cache"} <= events
    known = {cases.key(step) for step in pool}
    assert all(cases.key(step) in known for step in asked if step["compared"]), "a reference for each"


def test_prompts_are_as_long_as_they_say(demo_model):
    prompts = Prompts(demo_model)
    for shape in ("text", "repeat", "period", "noise", "canary"):
        described = {"shape": shape, "seed": 3, "tokens": 255, "period": 5}
        assert len(prompts.ids(described)) == 255 and prompts.ids(described) == prompts.ids(described)
        assert bool(set(prompts.ids(described)) & set(CANARIES)) == (shape == "canary")
        assert len(prompts.ids({**described, "think": True})) == 256


class Worker(hooks.FuzzHooks):
    """What the hooks need of vLLM's worker, around a fake runner."""

    def __init__(self, mutant=""):
        self.runner = fake_v1.FakeRunner(PROMPTS, verification="strict")
        self._adapter = self.runner.proposer
        self.vllm_config = types.SimpleNamespace(scheduler_config=types.SimpleNamespace(max_num_seqs=len(PROMPTS)))
        self.fuzz("begin", mutant)

    def serve(self, num_steps=20):
        for _ in range(num_steps):
            self.runner.step()

    def is_right(self):
        """Whether every request has the target's own tokens."""
        return all(
            tokens[at] == next_token(tokens[at - 2], tokens[at - 1])
            for req_id, tokens in self.runner.tokens.items()
            for at in range(len(PROMPTS[req_id]), len(tokens))
        )


def test_what_a_worker_holds_of_requests_that_have_ended_shows(monkeypatch):
    monkeypatch.setattr(Drafter, "forget", Drafter.forget)
    for mutant, held in (("", {}), ("leak", {"V1Adapter._drafter._requests": 1})):
        worker = Worker(mutant)
        worker.serve()
        assert worker.fuzz("look")["held"] and worker.is_right() and worker.runner.num_accepted > 20
        worker._adapter.begin_step(scheduled([], set(PROMPTS)))
        assert (worker.fuzz("look")["held"], worker.fuzz("look")["problems"]) == (held, [])


@pytest.mark.parametrize(("where", "place"), SEAMS["V1"].items())
def test_as_many_faults_are_counted_as_were_injected(where, place):
    worker = Worker()
    worker.serve(1 if place == "requests" else 6)
    if place == "requests":
        worker._adapter._requests.forget(PROMPTS)
    worker.fuzz("inject", where, place, "1")
    worker.serve()
    worker.fuzz("calm")
    look = worker.fuzz("look")
    assert (look["faults"], look["problems"]) == ({place: 1}, []) and worker.is_right() and place in COMPONENTS


def test_another_requests_token_in_a_draft_and_a_table_as_wide_as_a_list_show():
    worker = Worker()
    worker._adapter._rows = np.zeros((len(PROMPTS), hooks._MAX_COLUMNS + 1))
    worker._fuzz._propose = lambda *args: [[CANARIES[0]], [CANARIES[1]]]
    contexts = np.array([[5, CANARIES[0], 0], [5, 6, 0]])
    worker._adapter._runner.input_batch.is_token_ids = np.ones_like(contexts, dtype=bool)
    worker._adapter.propose([[5], [6]], [2, 2], contexts)
    assert [what for what, _ in worker.fuzz("look")["problems"]] == ["wide", "leak"]


def test_the_log_is_searched_for_tracebacks_and_long_values_but_not_of_injected_faults():
    def trace(*errors):
        because = "\n\nThe above exception was the direct cause of the following exception:\n\n"
        text = because.join(f'Traceback (most recent call last):\n  File "x"\n    y\n{error}' for error in errors)
        return "".join(f"(EngineCore pid=7) ERROR 11-26 01:02:03 [a.py:80] {line}\n" for line in text.splitlines())

    injected = trace("aasd_testing.fuzz.hooks.InjectedFault: injected into draft")
    assert in_log(injected) == in_log(trace("ValueError: not allowed", "x.RequestOptionsError: it")) == []
    assert ["of our own" in finding.detail for finding in in_log(injected + trace("ValueError: of our own"))] == [True]
    (chained,) = in_log(trace("KeyError: 1", "RuntimeError: 2"))
    assert "KeyError: 1" in chained.detail and "RuntimeError: 2" in chained.detail
    assert len(in_log(f"aasd_alpha={'v' * 81}\naasd_alpha={'v' * 80}")) == 1


def test_a_tally_goes_on_over_a_lost_engine():
    tally, case = Tally(), {"steps": [{"do": "ask", "kind": "plain", "compared": True}, {"do": "on"}]}
    look = {"mib": 100.0, "faults": {"draft": 2}, "metrics": {"vllm:num_preemptions_total": 3.0}}
    tally.add(case, [Observation(200), None], [Finding("dead", None, "boom")], look)
    tally.looks.append({})
    tally.add(case, [None, None], [Finding("near_tie", 0, "")], look)
    expected = {"requests": 1, "num_preemptions": 6, "faults": 4, "engines_lost": 1, "failures": 1, "near_ties": 1}
    assert {name: tally.result()[name] for name in expected} == expected


def test_shrinking_finds_the_two_steps_that_matter():
    assert shrink(list(range(70)), lambda trial: {5, 66} <= set(trial)) == [5, 66]
