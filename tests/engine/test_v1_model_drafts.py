"""The draft model beside text on the V1 runner: who drafts, what is read before, and what a failure costs."""

import numpy as np
import pytest
from vllm.sampling_params import StructuredOutputsParams

from aasd_testing.fake_v1 import MAX_LEN, FakeRunner
from aasd_testing.fake_v2 import BLOCK, next_token
from aasd_testing.stand_in_draft_model import StandInDraftModel
from vllm_aasd.drafting.drafter import Drafter
from vllm_aasd.engine.failsafe import MAX_FAULTS
from vllm_aasd.engine.v1.draft_model import DraftModel
from vllm_aasd.engine.v1.model_drafts import agreement

PROMPT = [1, 2, 4, 1, 2, 6, 1, 7, 8, 9, 2, 2, 5]


def target_alone(prompt, count):
    tokens = list(prompt)
    while len(tokens) < count:
        tokens.append(next_token(*tokens[-2:]))
    return tokens


def served(prompts=None, wrong=0.0, price=0.05, **settings):
    """A runner whose target takes 1 s per step of any size, and whose draft model takes `price` per pass."""
    prompts = {"a": PROMPT} if prompts is None else prompts
    num_reqs = max(len(prompts), 1)
    model = StandInDraftModel(num_reqs * MAX_LEN // BLOCK, BLOCK, wrong)
    runner = FakeRunner(prompts, draft_model=model, max_num_reqs=num_reqs, **{"verification": "strict", **settings})
    adapter = runner.proposer
    # What is measured on this machine doesn't matter.
    for known, seconds in ((adapter._lengths.by_load.step_time, 1.0), (adapter._model_drafts._router.passes, price)):
        known.warm_start([(1, seconds)])
        known.observe = lambda *_: None
    return runner, model


def emit(runner, count, req_id="a"):
    """Serve until a request has some tokens; how many were accepted in that time."""
    before = runner.num_accepted
    while len(runner.tokens[req_id]) < count:
        runner.step()
    assert runner.tokens[req_id] == target_alone(runner.tokens[req_id][: len(PROMPT)], len(runner.tokens[req_id]))
    return runner.num_accepted - before


def test_the_model_alone_reads_the_prompt_and_drafts_what_the_target_says():
    runner, model = served(drafter="model")
    assert emit(runner, 100) > 60
    assert model.passes[0] == len(PROMPT) and max(model.passes[1:]) <= 2, "each token is read once"
    assert runner.proposer.faults.counts["draft_model"] == 0


@pytest.mark.parametrize("seed", range(3))
def test_whatever_was_skipped_and_rejected_the_model_reads_it_after_its_own_context(monkeypatch, seed):
    rng = np.random.default_rng(seed)
    prompts = {name: [int(t) for t in rng.integers(8, size=13)] for name in "ab"}
    runner, model = served(prompts, wrong=0.4)
    requests = runner.proposer._requests
    drafter_of = type(runner.proposer)._drafter_of
    monkeypatch.setattr(
        runner.proposer, "_drafter_of", lambda row: drafter_of(runner.proposer, row) and rng.choice(["text", "model"])
    )
    for number in range(60):
        runner.step()
        if number % 17 == 16:
            runner.preempt("a")
            runner.step()
            runner.resume("a")
    assert len(requests) == 2 and len(model.passes) > 30
    assert all(tokens == target_alone(tokens[:13], len(tokens)) for tokens in runner.tokens.values())
    assert not any(runner.proposer.faults.counts.values())


def test_text_that_is_good_leaves_the_model_out(monkeypatch):
    runner, model = served()
    monkeypatch.setattr(Drafter, "draft", lambda self, *_: (np.empty(0, np.int32), np.empty(0, np.float32)))
    emit(runner, 60)
    num_passes = len(model.passes)
    assert num_passes > 20, "without text, the model drafts"
    monkeypatch.undo()
    emit(runner, 100)
    runner, model = served(price=0.4)
    emit(runner, 200)
    assert len(model.passes) < num_passes / 2, "the walk comes back, so text knows it"


def test_a_model_that_is_always_wrong_is_soon_not_asked():
    runner, model = served(wrong=1.0, price=0.2)
    emit(runner, 60)
    before = len(model.passes)
    emit(runner, 200)
    assert len(model.passes) - before < 5


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0, "seed": 3},
        {"structured_outputs": StructuredOutputsParams(regex="a+")},
        {"extra_args": {"aasd_drafter": "text"}},
        {"extra_args": {"aasd_enabled": False}},
    ],
)
def test_requests_that_may_not_or_want_not_have_no_draft_of_the_models(params):
    runner, model = served(prompts={}, drafter="model")
    runner.add("a", PROMPT, **params)
    emit(runner, 40)
    assert model.passes == []


def test_drafts_end_with_the_blocks_that_the_request_has(monkeypatch):
    runner, model = served(drafter="model")
    monkeypatch.setattr(model, "num_slots", lambda row: len(runner.tokens["a"]) + 2)
    emit(runner, 60)
    assert max(len(draft) for draft in runner.drafts.values()) <= 3
    monkeypatch.setattr(model, "num_slots", lambda row: len(runner.tokens["a"]) - 1)
    runner.step()
    runner.step()
    assert runner.drafts == {"a": []}


@pytest.mark.parametrize("name", ["predict", "num_read", "begin_step"])
def test_a_model_that_fails_leaves_text(monkeypatch, caplog, name):
    runner, model = served()

    def failing(*_):
        raise RuntimeError("out of order")

    monkeypatch.setattr(model, name, failing)
    assert emit(runner, 200) > 40
    faults = runner.proposer.faults
    assert faults.counts["draft_model"] > 0 and faults.counts["draft"] == 0
    assert sum("'draft_model' failed" in record.message for record in caplog.records) == 1
    if name != "begin_step":
        assert faults.counts["draft_model"] <= MAX_FAULTS


def test_text_that_fails_leaves_the_model(monkeypatch):
    runner, model = served()

    def failing(*_):
        raise RuntimeError("out of order")

    monkeypatch.setattr(Drafter, "draft", failing)
    assert emit(runner, 150) > 60
    assert runner.proposer.faults.counts["draft"] == 1, "it isn't tried again for this request"
    assert model.passes


def test_the_survival_that_is_counted_is_of_whoever_drafted():
    runner, _ = served(drafter="model")
    emit(runner, 150)
    totals = {value.name: 0.0 for value in runner.proposer.counters.read()}
    for value in runner.proposer.counters.read():
        totals[value.name] += value.value
    assert totals["survival_tokens"] > 60
    assert totals["survival_accepted"] == totals["survival_tokens"]
    assert totals["survival_promised"] > 0.8 * totals["survival_tokens"]


def test_a_draft_is_judged_by_the_tokens_in_its_place():
    assert agreement([1, 2, 3], [1, 2, 9, 9]) == (3, 2)
    assert agreement([1, 2, 3], [1, 2]) == (2, 2), "of the third, nothing is known"
    assert agreement([5], [1]) == (1, 0)
    assert agreement([], [1]) == (0, 0)


def test_the_stand_in_has_what_the_adapter_calls():
    public = {name for name in vars(DraftModel) if not name.startswith("_")}
    assert public <= set(dir(StandInDraftModel))
