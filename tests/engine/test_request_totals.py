"""What relaxed acceptance came to, from the verifier of a step to the answer of a request."""

import dataclasses
import math
import pickle
from types import SimpleNamespace

import msgspec
import pytest
import torch
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.stats import RequestSpecDecodeMetrics
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from vllm_aasd.engine import request_totals, scheduler, startup
from vllm_aasd.engine.failsafe import Faults
from vllm_aasd.engine.request_totals import StepTotals, Totals
from vllm_aasd.engine.unsupported import SCHEDULER


def runner_output(*req_ids):
    return ModelRunnerOutput(list(req_ids), {req_id: row for row, req_id in enumerate(req_ids)})


def added(totals):
    """Three requests with 3, 0 and 2 rows; of the first two drafts are accepted, of the last one."""
    totals.add(
        torch.tensor([0, 3, 3, 5], dtype=torch.int32),
        torch.tensor([3, 0, 2], dtype=torch.int32),
        # The third of the first and the second of the last weren't accepted.
        torch.tensor([True, True, True, True, True]),
        torch.tensor([0.25, 0.5, 8.0, 1.0, math.inf]),
    )
    return totals


def test_a_step_is_added_up_by_request():
    totals = added(StepTotals(Faults()))
    output = totals.beside(runner_output("a", "b", "c"))
    assert request_totals.by_request(output) == {"a": Totals(2, 0.75), "c": Totals(1, 1.0)}
    # As between two processes.
    assert request_totals.by_request(pickle.loads(pickle.dumps(output))) == request_totals.by_request(output)
    assert request_totals.by_request(totals.beside(runner_output("a", "b", "c"))) == {}, "a step is told once"


def test_what_is_not_relaxed_costs_nothing():
    totals = StepTotals(Faults())
    totals.add(torch.tensor([0, 2]), torch.tensor([3]), torch.tensor([False, True]), torch.tensor([math.nan, 0.5]))
    assert request_totals.by_request(totals.beside(runner_output("a"))) == {"a": Totals(1, 0.5)}


def test_a_step_without_output_is_not_told_of_the_next():
    totals = added(StepTotals(Faults()))
    assert totals.beside(None) is None
    assert request_totals.by_request(totals.beside(runner_output("a", "b", "c"))) == {}


def test_an_output_that_comes_later():
    class Later(AsyncModelRunnerOutput):
        def get_output(self):
            return runner_output("a", "b", "c")

    later = added(StepTotals(Faults())).beside(Later())
    assert isinstance(later, AsyncModelRunnerOutput)
    assert request_totals.by_request(later.get_output())["a"] == Totals(2, 0.75)


def test_rows_of_another_batch_are_nobodys():
    faults = Faults()
    assert request_totals.by_request(added(StepTotals(faults)).beside(runner_output("a", "b"))) == {}
    assert not any(faults.counts.values())


class FakeScheduler:
    """Stands for vLLM's: every request in `ends` has its last output."""

    def __init__(self, **kwargs):
        self.requests, self.ends = {}, ()

    def update_from_output(self, scheduler_output, model_runner_output):
        for req_id in self.ends:
            self.requests.pop(req_id)
        return {0: EngineCoreOutputs(outputs=[last_output(req_id) for req_id in self.ends])}


class Summing(scheduler._WithTotals, FakeScheduler):
    pass


def last_output(req_id, params=None):
    metrics = RequestSpecDecodeMetrics.new(4)
    metrics.observe(3, 2)
    return EngineCoreOutput(
        req_id, [1], finish_reason=FinishReason.STOP, spec_decode_metrics=metrics, kv_transfer_params=params
    )


def request(stale=0, is_dropped=False, is_finished=False):
    return SimpleNamespace(num_stale_output_tokens=stale, drop_stale_output=is_dropped, is_finished=lambda: is_finished)


def stepped(summing, totals, finished=(), ends=()):
    output = runner_output(*totals)
    setattr(output, request_totals._BESIDE, totals)
    summing.ends = ends
    outputs = summing.update_from_output(SimpleNamespace(finished_req_ids=set(finished)), output)
    return {one.request_id: one.kv_transfer_params[request_totals._BESIDE] for one in outputs[0].outputs}


def test_steps_are_added_up_until_the_last_output():
    summing = Summing()
    summing.requests = {name: request() for name in ("a", "b", "aborted")} | {
        "preempted": request(stale=2, is_dropped=True),
        "resumed": request(stale=2),
        "over": request(is_finished=True),
    }
    step = {name: Totals(1, 0.5) for name in (*summing.requests, "unknown")}
    assert stepped(summing, step) == {}
    assert set(summing._totals) == {"a", "b", "aborted", "resumed"}
    assert stepped(summing, {"a": Totals(2, 0.25)}, ["aborted"], ["a"]) == {"a": [3, 0.75]}
    assert set(summing._totals) == {"b", "resumed"}
    summing.requests["plain"] = request()
    assert stepped(summing, {}, ["a"], ["b", "plain", "resumed"]) == {
        "b": [1, 0.5], "plain": [0, 0.0], "resumed": [1, 0.5],
    }  # fmt: skip
    assert not summing._totals, "nothing is kept of requests that have ended"


def test_a_fault_costs_the_totals_and_no_output(monkeypatch):
    summing = Summing()
    summing.requests = {"a": request()}

    def failing(output):
        raise RuntimeError("injected")

    monkeypatch.setattr(request_totals, "by_request", failing)
    assert stepped(summing, {"a": Totals(1, 1.0)}, [], ["a"]) == {"a": [0, 0.0]}


@pytest.mark.parametrize("is_async", [True, False])
def test_the_scheduler_is_vllms_own_kind(is_async, monkeypatch):
    for kind in (scheduler._Scheduler, scheduler._AsyncScheduler):
        monkeypatch.setattr(kind, "__init__", lambda self, **kwargs: None)
    config = SimpleNamespace(scheduler_config=SimpleNamespace(async_scheduling=is_async))
    made = scheduler.AASDScheduler(vllm_config=config)
    assert isinstance(made, Scheduler) and isinstance(made, AsyncScheduler) == is_async
    assert f"{scheduler.AASDScheduler.__module__}.AASDScheduler" == SCHEDULER


@pytest.mark.parametrize("params", [None, {"remote": 1}])
def test_the_front_end_joins_them_to_vllms_own(params):
    output = last_output("a", params)
    request_totals.send(output, Totals(3, 0.75))
    received = msgspec.msgpack.decode(msgspec.msgpack.encode(output), type=EngineCoreOutput)
    request_totals.receive(received)
    assert received.kv_transfer_params == params
    found = received.spec_decode_metrics.to_dict()
    assert found == last_output("a").spec_decode_metrics.to_dict() | {
        "aasd_relaxed_tokens": 3,
        "aasd_regret_nats": 0.75,
    }
    assert dataclasses.asdict(received.spec_decode_metrics)["num_draft_tokens"] == 3


def test_the_front_end_is_given_nothing_that_vllm_does_not_know(monkeypatch):
    seen = []
    ours = request_totals._receiving(lambda self, outputs, *rest, **more: seen.append((outputs, rest, more)))
    theirs, sent = last_output("b", {"remote": 1}), last_output("a")
    request_totals.send(sent, Totals(1, 0.5))
    ours(None, [sent, theirs, EngineCoreOutput("c", [1])], 1.0, iteration_stats=None)
    ((outputs, rest, more),) = seen
    assert [one.kv_transfer_params for one in outputs] == [None, {"remote": 1}, None]
    assert outputs[0].spec_decode_metrics.to_dict()["aasd_relaxed_tokens"] == 1
    assert "aasd_relaxed_tokens" not in outputs[1].spec_decode_metrics.to_dict()
    assert (rest, more) == ((1.0,), {"iteration_stats": None})


def test_install_and_undo():
    request_totals.install()
    patched = OutputProcessor.process_outputs
    assert request_totals.install() == [] and OutputProcessor.process_outputs is patched
    assert patched.__wrapped__.__module__ == "vllm.v1.engine.output_processor"


@pytest.mark.parametrize(
    ("level", "scheduler_cls", "is_told"),
    [
        ("none", SCHEDULER, False),
        ("summary", SCHEDULER, True),
        ("detailed", SCHEDULER, True),
        ("summary", "other.Class", False),
    ],
)
def test_only_who_asks_is_told(level, scheduler_cls, is_told):
    config = SimpleNamespace(
        observability_config=SimpleNamespace(per_request_spec_decode_metrics=level),
        scheduler_config=SimpleNamespace(scheduler_cls=scheduler_cls),
    )
    assert (startup.step_totals(config, Faults()) is not None) == is_told
