"""The fuzzer's cases, and its hooks in a worker with a fake model runner. No engine is started."""

import types

import numpy as np
import pytest

from aasd_testing import fake_v1
from aasd_testing.fake_v2 import scheduled, target_alone
from aasd_testing.fault_injection import FAULT_POINTS
from aasd_testing.fuzz import hooks
from aasd_testing.fuzz.cases import Event, generate, referenced_requests
from aasd_testing.fuzz.profiles import PROFILES
from aasd_testing.fuzz.prompts import CANARIES, Prompts
from aasd_testing.fuzz.request_types import OTHER, REFERENCED, Request, possible
from aasd_testing.fuzz.soak import shrink
from vllm_aasd.drafting.drafter import Drafter

PROMPTS = {"cmpl-a": [1, 2, 4, 1, 2, 6, 1], "cmpl-b": [3, 3, 5, 6, 0, 2, 1, 3, 3]}


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_cases_hold_all_that_the_profile_can_and_are_the_same_for_the_same_seed(profile, demo_model):
    prompts = Prompts(demo_model)
    pool = referenced_requests(1, profile, prompts, 56)
    assert pool == referenced_requests(1, profile, prompts, 56)
    assert generate(1, 2, profile, prompts, 60, pool) == generate(1, 2, profile, prompts, 60, pool)
    steps = [step for number in range(40) for step in generate(1, number, profile, prompts, 60, pool)]
    requests = [step for step in steps if isinstance(step, Request)]
    assert {request.type for request in requests} == set(possible({**OTHER, **REFERENCED}, profile))
    events = {step.name for step in steps if isinstance(step, Event)}
    assert {*("inject", "turn_off", "recover", "clear_memory", "reset_prefix_cache"), "add_corpus"} <= events
    assert ("sleep" in events) == ("sleep" in profile.features)
    for request in requests:
        assert request.reference is None or request.prompt == pool[request.reference].prompt
        assert (request.adapter is not None) == ("lora" in profile.features)
        assert bool(set(request.prompt) & set(CANARIES)) == (request.type == "canary")


class Worker(hooks.FuzzHooks):
    """What the hooks need of vLLM's worker, around a fake runner."""

    def __init__(self, mutant=""):
        self.runner = fake_v1.FakeRunner(PROMPTS, verification="strict")
        self._adapter = self.runner.proposer
        self.fuzz("begin", mutant)

    def serve(self, num_steps=20):
        for _ in range(num_steps):
            self.runner.step()

    def is_right(self):
        """Whether every request has the target's own tokens."""
        return all(
            tokens == PROMPTS[req_id] + target_alone(PROMPTS[req_id], len(tokens) - len(PROMPTS[req_id]))
            for req_id, tokens in self.runner.tokens.items()
        )


def test_what_a_worker_holds_of_requests_that_have_ended_shows(monkeypatch):
    monkeypatch.setattr(Drafter, "forget", Drafter.forget)
    for mutant, held in (("", {}), ("leak", {"V1Adapter._drafter._requests": 1, "V1Adapter._drafter._admitted": 1})):
        worker = Worker(mutant)
        worker.serve()
        assert worker.fuzz("inspect")["held"] and worker.is_right() and worker.runner.num_accepted > 20
        worker._adapter.begin_step(scheduled([], set(PROMPTS)))
        state = worker.fuzz("inspect")
        assert (state["held"], state["problems"]) == (held, [])


@pytest.mark.parametrize(("function", "component"), FAULT_POINTS["V1"].items())
def test_as_many_faults_are_counted_as_were_injected(function, component):
    worker = Worker()
    is_of_new_requests = component == "requests" or "Corpora" in function
    worker.serve(1 if is_of_new_requests else 6)
    if is_of_new_requests:
        worker._adapter._requests.forget(PROMPTS)
    worker.fuzz("inject", function, "1")
    worker.serve()
    worker.fuzz("recover")
    state = worker.fuzz("inspect")
    assert (state["faults"], state["problems"]) == ({component: 1}, []) and worker.is_right()


def test_another_requests_token_in_a_draft_shows():
    worker = Worker()
    worker._fuzz._propose = lambda *args: [[CANARIES[0]], [CANARIES[1]]]
    contexts = np.array([[5, CANARIES[0], 0], [5, 6, 0]])
    worker._adapter._runner = types.SimpleNamespace(
        input_batch=types.SimpleNamespace(is_token_ids=np.ones_like(contexts, dtype=bool))
    )
    worker._adapter.propose([[5], [6]], [2, 2], contexts)
    assert worker.fuzz("inspect")["problems"] == [("leak", "1 drafts hold a token of another request's")]


def test_shrinking_finds_the_two_steps_that_matter():
    assert shrink(list(range(70)), lambda trial: {5, 66} <= set(trial)) == [5, 66]
