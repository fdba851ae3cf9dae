"""The fuzzer's hold on a worker, on a fake runner: faults are counted where they are raised, and what is broken shows."""

import types

import pytest
import torch
from vllm.lora.ops.torch_ops import lora_ops

from aasd_testing import fake_v1
from aasd_testing.fake_v2 import next_token, scheduled
from aasd_testing.fuzz import mutants
from aasd_testing.fuzz.cpu_lora import without_adapter_nothing
from aasd_testing.fuzz.hooks import FuzzHooks, InjectedFault
from aasd_testing.fuzz.seams import SEAMS
from vllm_aasd.drafting.drafter import Drafter
from vllm_aasd.engine.failsafe import _Contained
from vllm_aasd.engine.v1 import rejection_sampler as v1_verifier

PROMPTS = {"cmpl-a": [1, 2, 4, 1, 2, 6, 1], "cmpl-b": [3, 3, 5, 6, 0, 2, 1, 3, 3]}


class Worker(FuzzHooks):
    """What the hooks need of vLLM's worker, around a fake runner."""

    def __init__(self):
        self.runner = fake_v1.FakeRunner(PROMPTS, verification="strict")
        self._adapter = self.runner.proposer

    def execute_model(self, scheduled):
        pass

    def sample_tokens(self, grammar):
        self.runner.step()


def serve(worker, num_steps=20):
    for _ in range(num_steps):
        worker.execute_model(types.SimpleNamespace(total_num_scheduled_tokens=3))
        worker.sample_tokens(None)


def end(worker):
    worker._adapter.begin_step(scheduled(finished=PROMPTS))


def is_right(worker):
    """Whether every request has the target's own tokens."""
    for req_id, prompt in PROMPTS.items():
        tokens = list(prompt)
        while len(tokens) < len(worker.runner.tokens[req_id]):
            tokens.append(next_token(tokens[-2], tokens[-1]))
        if tokens != worker.runner.tokens[req_id]:
            return False
    return True


def begun(mutant=""):
    worker = Worker()
    worker.fuzz_begin(mutant)
    return worker


def test_an_unharmed_worker_serves_and_holds_what_it_serves():
    worker = begun()
    serve(worker)
    look = worker.fuzz_look()
    assert look["held"] and is_right(worker) and worker.runner.num_accepted > 20
    assert look["injected"] == {} and look["steps"]["count"] == 20 and look["steps"]["slowest_tokens"] == 3
    end(worker)
    assert worker.fuzz_look()["held"] == {}


@pytest.mark.parametrize(("where", "place"), SEAMS["V1"].items())
def test_as_many_faults_are_counted_as_were_injected(where, place):
    worker = begun()
    serve(worker, 1 if place == "requests" else 6)
    if place == "requests":
        worker._adapter._requests.forget(PROMPTS)
    worker.fuzz_inject(where, place, "1")
    serve(worker)
    look = worker.fuzz_look()
    worker.fuzz_calm()
    assert look["injected"] == {place: 1} and is_right(worker)
    assert {name: count for name, count in look["faults"].items() if count} == {place: 1}


def test_a_place_is_off_until_it_is_calm():
    worker = begun()
    worker.fuzz_off("draft")
    serve(worker, 12)
    assert worker.runner.num_accepted == 0 and is_right(worker)
    worker.fuzz_calm()
    serve(worker, 12)
    assert worker.runner.num_accepted > 0 and is_right(worker)


def test_what_is_calmed_fails_no_more():
    worker, real = begun(), Drafter.draft
    worker.fuzz_inject("vllm_aasd.drafting.drafter:Drafter.draft", "draft", "5")
    worker.fuzz_inject("vllm_aasd.drafting.drafter:Drafter.draft", "draft", "7")
    worker.fuzz_calm()
    assert Drafter.draft is real
    serve(worker, 10)
    assert worker.fuzz_look()["injected"] == {}


def test_a_wrong_token_shows(monkeypatch):
    monkeypatch.setattr(v1_verifier.V1Verifier, "rejection_sample", v1_verifier.V1Verifier.rejection_sample)
    monkeypatch.setattr(mutants, "WRONG_TOKEN", 0)
    monkeypatch.setattr(mutants, "EVERY", 5)
    worker = begun("wrong_token")
    serve(worker)
    assert not is_right(worker)


def test_a_request_that_is_kept_shows(monkeypatch):
    monkeypatch.setattr(Drafter, "forget", Drafter.forget)
    worker = begun("leak")
    serve(worker, 10)
    end(worker)
    assert worker.fuzz_look()["held"] == {"AASDProposer._drafter._requests": 1}


def test_a_fault_that_is_not_contained_shows(monkeypatch):
    monkeypatch.setattr(_Contained, "__exit__", _Contained.__exit__)
    worker = begun("uncontained")
    serve(worker, 6)
    worker.fuzz_inject("vllm_aasd.drafting.drafter:Drafter.draft", "draft", "1")
    with pytest.raises(InjectedFault):
        serve(worker, 1)
    worker.fuzz_calm()


def test_a_token_without_an_adapter_gets_nothing_of_one_once_vllm_is_mended():
    generator = torch.Generator().manual_seed(2)
    inputs, weights = torch.randn(3, 5, generator=generator), torch.randn(2, 1, 4, 5, generator=generator)
    indices = torch.tensor([1, -1, 0])

    def shrunk(bgmv_shrink):
        output = torch.zeros(3, 4)
        bgmv_shrink(inputs, weights, output, indices, 2.0)
        return output

    stock, mended = shrunk(lora_ops.bgmv_shrink), shrunk(without_adapter_nothing(lora_ops.bgmv_shrink))
    assert stock[1].any(), "vLLM has mended it itself: leave fuzz.cpu_lora out"
    assert not mended[1].any() and torch.equal(mended[[0, 2]], stock[[0, 2]]) and stock[0].any()
