"""The fuzzer's cases, its hold on a worker (a fake runner), and what it makes of both. No engine is started."""

import collections
import copy
import json
import types

import numpy as np
import pytest
import torch
from vllm.lora.ops.torch_ops import lora_ops

from aasd_testing import fake_v1
from aasd_testing.fake_v2 import next_token
from aasd_testing.fuzz import cases, hooks, kinds
from aasd_testing.fuzz.limits import MAX_MODEL_LEN, PROFILES
from aasd_testing.fuzz.observed import Finding, Observation
from aasd_testing.fuzz.prompts_of_tokens import CANARIES, Prompts
from aasd_testing.fuzz.seams import OFF_PLACES, SEAMS
from aasd_testing.fuzz.server_target import in_log
from aasd_testing.fuzz.soak import Tally, shrink
from vllm_aasd.drafting.drafter import Drafter
from vllm_aasd.engine.failsafe import PLACES
from vllm_aasd.engine.v1.rejection_sampler import V1Verifier

POOL = cases.questions(1, "server", 54)
PROMPTS = {"cmpl-a": [1, 2, 4, 1, 2, 6, 1], "cmpl-b": [3, 3, 5, 6, 0, 2, 1, 3, 3]}


def test_a_case_is_the_same_from_the_same_seed_and_another_from_another():
    one = cases.generate(1, 2, "server", 60, POOL)
    assert one == cases.generate(1, 2, "server", 60, cases.questions(1, "server", 54))
    assert one == json.loads(json.dumps(one))
    assert one not in (cases.generate(2, 2, "server", 60, POOL), cases.generate(1, 3, "server", 60, POOL))


@pytest.mark.parametrize("profile", PROFILES)
def test_cases_hold_all_that_the_profile_can_and_nothing_else(profile):
    limits = PROFILES[profile]
    pool = cases.questions(1, profile, 54)
    steps = [step for number in range(40) for step in cases.generate(1, number, profile, 60, pool)["steps"]]
    asked = [step for step in steps if step["do"] == "ask"]
    assert {step["kind"] for step in asked} == {
        *kinds.possible(kinds.FREE, limits),
        *kinds.possible(kinds.QUESTIONS, limits),
    }
    events = {step["do"] for step in steps} - {"ask"}
    assert ("sleep" in events, "load_adapter" in events) == ("sleep" in limits.features, "lora" in limits.features)
    assert {"fault", "off", "on", "clear_memory", "reset_prefix_cache"} <= events
    assert any("leave_after" in step for step in asked) and any("salt" in step for step in asked)
    known = {cases.key(step) for step in pool}
    assert all(cases.key(step) in known for step in asked if step["compared"]), "a reference for each"
    sizes = [s["prompt"]["tokens"] + s["sampling"]["max_tokens"] for s in asked if s["compared"]]
    assert max(sizes) <= MAX_MODEL_LEN


def test_the_faults_places_are_the_products():
    assert {place for seams in SEAMS.values() for place in seams.values()} | set(OFF_PLACES) <= set(PLACES)


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
        self.fuzz_begin(mutant)

    def serve(self, num_steps=20):
        for _ in range(num_steps):
            self.runner.step()

    def end(self):
        self._adapter.begin_step(types.SimpleNamespace(scheduled_new_reqs=(), finished_req_ids=set(PROMPTS)))

    def is_right(self):
        """Whether every request has the target's own tokens."""
        for req_id, prompt in PROMPTS.items():
            tokens = list(prompt)
            while len(tokens) < len(self.runner.tokens[req_id]):
                tokens.append(next_token(tokens[-2], tokens[-1]))
            if tokens != self.runner.tokens[req_id]:
                return False
        return True


def test_an_unharmed_worker_serves_and_holds_what_it_serves():
    worker = Worker()
    worker.serve()
    assert worker.fuzz_look()["held"] and worker.is_right() and worker.runner.num_accepted > 20
    worker.end()
    assert (worker.fuzz_look()["held"], worker.fuzz_look()["problems"]) == ({}, [])


@pytest.mark.parametrize(("where", "place"), SEAMS["V1"].items())
def test_as_many_faults_are_counted_as_were_injected(where, place):
    worker = Worker()
    worker.serve(1 if place == "requests" else 6)
    if place == "requests":
        worker._adapter._requests.forget(PROMPTS)
    worker.fuzz_inject(where, place, "1")
    worker.serve()
    worker.fuzz_calm()
    look = worker.fuzz_look()
    assert (look["faults"], look["problems"]) == ({place: 1}, []) and worker.is_right()


def test_a_place_is_off_until_it_is_calm():
    worker = Worker()
    worker.fuzz_off("draft")
    worker.serve(12)
    assert worker.runner.num_accepted == 0 and worker.is_right()
    worker.fuzz_calm()
    worker.serve(12)
    assert worker.runner.num_accepted > 0 and worker.is_right()


def test_what_is_broken_on_purpose_shows(monkeypatch):
    monkeypatch.setattr(V1Verifier, "rejection_sample", V1Verifier.rejection_sample)
    monkeypatch.setattr(hooks, "WRONG_TOKEN", 0)
    monkeypatch.setattr(hooks, "EVERY", 5)
    worker = Worker("wrong_token")
    worker.serve()
    assert not worker.is_right()
    monkeypatch.setattr(Drafter, "forget", Drafter.forget)
    worker = Worker("leak")
    worker.serve(10)
    worker.end()
    assert worker.fuzz_look()["held"] == {"AASDProposer._drafter._requests": 1}


def test_another_requests_token_in_a_draft_and_a_table_as_wide_as_a_list_show():
    worker = Worker()
    worker._adapter._rows = np.zeros((len(PROMPTS), hooks._MAX_COLUMNS + 1))
    worker.fuzz._propose = lambda *args: [[CANARIES[0]], [CANARIES[1]]]
    contexts = np.array([[5, CANARIES[0], 0], [5, 6, 0]])
    worker._adapter._runner.input_batch.is_token_ids = np.ones_like(contexts, dtype=bool)
    worker._adapter.propose([[5], [6]], [2, 2], contexts)
    assert [what for what, _ in worker.fuzz_look()["problems"]] == ["wide", "leak"]


def test_a_token_without_an_adapter_gets_nothing_of_one_once_vllm_is_mended():
    generator = torch.Generator().manual_seed(2)
    inputs, weights = torch.randn(3, 5, generator=generator), torch.randn(2, 1, 4, 5, generator=generator)

    def shrunk(bgmv_shrink):
        output = torch.zeros(3, 4)
        bgmv_shrink(inputs, weights, output, torch.tensor([1, -1, 0]), 2.0)
        return output

    stock, mended = shrunk(lora_ops.bgmv_shrink), shrunk(hooks.without_adapter_nothing(lora_ops.bgmv_shrink))
    assert stock[1].any(), "vLLM has mended it itself: leave fuzz_mend_lora out"
    assert not mended[1].any() and torch.equal(mended[[0, 2]], stock[[0, 2]]) and stock[0].any()


def test_the_log_is_searched_for_tracebacks_and_long_values_but_not_of_injected_faults():
    def trace(*errors):
        prefix = "(EngineCore pid=7) ERROR 11-26 01:02:03 [containment.py:80] "
        lines = []
        for error in errors:
            lines += ["Traceback (most recent call last):", '  File "x"', "    y", error, ""]
            lines += ["The above exception was the direct cause of the following exception:", ""]
        return "".join(f"{prefix}{line}\n" for line in lines[:-2])

    injected = trace("aasd_testing.fuzz.hooks.InjectedFault: injected into draft")
    assert in_log(injected) == in_log(trace("ValueError: not allowed", "x.RequestOptionsError: it")) == []
    assert ["of our own" in finding.detail for finding in in_log(injected + trace("ValueError: of our own"))] == [True]
    chained = in_log(trace("KeyError: 1", "RuntimeError: 2"))
    assert len(chained) == 1 and "KeyError: 1" in chained[0].detail and "RuntimeError: 2" in chained[0].detail
    assert len(in_log(f"aasd_alpha={'v' * 81}\naasd_alpha={'v' * 80}")) == 1


def test_request_ids_that_an_object_of_ours_holds_are_found():
    drafter = Drafter(16, 4, 0.0)
    assert hooks.held(drafter) == {}
    drafter._requests["cmpl-1-0"] = drafter._requests["0_cmpl-3"] = None
    drafter._other = collections.deque(["chatcmpl-2", "something else"])
    assert hooks.held(drafter) == {"Drafter._requests": 2, "Drafter._other": 1}


def test_a_tally_goes_on_over_a_lost_engine():
    tally, case = Tally(), {"steps": [POOL[0] | {"do": "ask", "compared": True}, {"do": "on"}]}
    look = {"mib": 100.0, "faults": {"draft": 2}, "metrics": {"vllm:num_preemptions_total": 3.0}}
    tally.add(case, [Observation(200), None], [], look)
    tally.add(case, [None, None], [Finding("dead", None, "boom")], {})
    tally.restarted()
    tally.add(case, [Observation(200), None], [Finding("near_tie", 0, "")], look)
    result = tally.result()
    assert (result["requests"], result["preemptions"], result["faults"], result["engines_lost"]) == (2, 6, 4, 1)
    assert (result["failures"], result["near_ties"], result["events"]) == (1, 1, {"on": 3})


def test_shrinking_finds_the_two_steps_that_matter():
    steps = cases.generate(3, 0, "server", 70, POOL)["steps"]
    original, wanted = copy.deepcopy(steps), [steps[5], steps[-4]]
    assert shrink(steps, lambda trial: all(step in trial for step in wanted)) == wanted and steps == original
