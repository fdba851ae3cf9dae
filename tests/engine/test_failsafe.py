"""What of speculation fails costs speculation, never an answer: faults injected at every place of both adapters."""

import logging
import types

import pytest
import torch
from vllm.sampling_params import SamplingParams

from aasd_testing import fake_v1, fake_v2
from aasd_testing.fake_v2 import VOCAB, WIDTH, next_token
from vllm_aasd.alignment import AlignmentStore
from vllm_aasd.config import Settings
from vllm_aasd.counters import Counters
from vllm_aasd.drafting import draft_length
from vllm_aasd.drafting.drafter import Drafter
from vllm_aasd.drafting.step_time import StepTimeModel
from vllm_aasd.engine.failsafe import COMPONENTS, MAX_FAULTS, Faults
from vllm_aasd.engine.v1 import counting as v1_counting
from vllm_aasd.engine.v1 import rejection_sampler as v1_verifier
from vllm_aasd.engine.v1 import requests as v1_requests
from vllm_aasd.engine.v1 import sampler_patches
from vllm_aasd.engine.v1.counting import V1Counting
from vllm_aasd.engine.v1.rejection_sampler import V1Verifier
from vllm_aasd.engine.v1.requests import V1Requests
from vllm_aasd.engine.v2 import rejection_sampler as v2_verifier
from vllm_aasd.engine.v2 import requests as v2_requests
from vllm_aasd.engine.v2 import speculator as v2_speculator
from vllm_aasd.kernels.verify.policies import CONDITIONAL, STRICT

PROMPTS = {"a": [1, 2, 4, 1, 2, 6, 1], "b": [3, 3, 5, 6, 0, 2, 1, 3, 3]}
NUM_TOKENS = 24


@pytest.fixture(autouse=True)
def _no_pinned_memory(monkeypatch):
    """vLLM takes a CPU for a device with memory that the host can pin; its own fallback does without."""
    monkeypatch.setattr("vllm.v1.worker.gpu.buffer_utils.is_uva_available", lambda: False)


class Fault(Exception):
    """Raised by an injected fault, and by nothing else."""


def inject(monkeypatch, owner, name, times=1000):
    """Have a function fail the first `times` times; a list of the calls that failed."""
    real, failed = getattr(owner, name), []

    def failing(*args, **kwargs):
        if len(failed) < times:
            failed.append(name)
            raise Fault(name)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    return failed


def target_alone(prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens[-2] if len(tokens) > 1 else 0, tokens[-1]))
    return tokens


def serve_v1(runner):
    for _ in range(200):
        if all(len(tokens) >= len(PROMPTS[req_id]) + NUM_TOKENS for req_id, tokens in runner.tokens.items()):
            break
        runner.step()
    for req_id, tokens in runner.tokens.items():
        assert tokens == target_alone(PROMPTS[req_id], len(tokens) - len(PROMPTS[req_id]))
        assert len(tokens) >= len(PROMPTS[req_id]) + NUM_TOKENS


def accepted_v1():
    runner = fake_v1.FakeRunner(PROMPTS, verification="strict")
    serve_v1(runner)
    assert set(runner.proposer.faults.counts.values()) == {0} and runner.num_accepted > NUM_TOKENS / 2
    return runner.num_accepted


# By place: the function that fails, on the V1 runner.
V1_SEAMS = {
    "admission": ("requests", v1_requests, "settings_of"),
    "drafting": ("draft", Drafter, "draft"),
    "calibration": ("draft", Drafter, "verified"),
    "store": ("store", AlignmentStore, "write"),
    "length": ("step_time", draft_length, "lengths_and_gain"),
    "step time": ("step_time", StepTimeModel, "observe"),
    "curve": ("step_time", StepTimeModel, "relative"),
    "filling": ("step_time", draft_length.LengthsByLoad, "min_draft_tokens"),
    "verifier": ("verify", v1_verifier.verify_op, "verify"),
    "policies": ("verify", v1_verifier.PolicyBatch, "fill"),
    "end of requests": ("requests", Drafter, "forget"),
    "counting": ("metrics", v1_counting, "count_arrays"),
    "promises": ("metrics", Drafter, "predicted_survival"),
}


@pytest.mark.parametrize("times", [1, 1000])
@pytest.mark.parametrize("seam", V1_SEAMS)
def test_v1_serves_the_targets_tokens_whatever_fails(seam, times, monkeypatch, caplog):
    place, owner, name = V1_SEAMS[seam]
    unharmed = accepted_v1() if place == "metrics" else None
    runner = fake_v1.FakeRunner(PROMPTS, verification="strict")
    failed = inject(monkeypatch, owner, name, times)
    with caplog.at_level(logging.ERROR, "vllm.aasd"):
        serve_v1(runner)
    counts = runner.proposer.faults.counts
    assert counts[place] == len(failed) >= 1
    assert sum(counts.values()) == counts[place], "nothing else was harmed"
    tracebacks = [record for record in caplog.records if record.exc_info]
    assert len(tracebacks) == 1 and tracebacks[0].exc_info[0] is Fault and f"'{place}'" in caplog.text
    assert place != "metrics" or runner.num_accepted == unharmed, "metrics are all that it costs"
    if times == 1:
        assert counts[place] == 1 and runner.num_accepted > 0, "one fault isn't the end of speculation"
    elif place == "draft":
        assert counts[place] == len(PROMPTS), "a request whose draft has failed isn't tried again"
    elif place != "requests":
        assert MAX_FAULTS <= counts[place] <= MAX_FAULTS + len(PROMPTS), "what is off isn't tried again"


def test_v1_a_request_whose_draft_fails_has_none_from_then_on_and_others_have(monkeypatch):
    runner = fake_v1.FakeRunner(PROMPTS, verification="strict")
    real = Drafter.draft

    def draft(self, request_id, *args):
        if request_id == "a":
            self._scores.fill(7.0)  # as a fault in the midst of it may leave them
            raise Fault
        return real(self, request_id, *args)

    monkeypatch.setattr(Drafter, "draft", draft)
    serve_v1(runner)
    drafter = runner.proposer._drafter
    assert runner.proposer.faults.counts["draft"] == 1 and drafter.num_requests == 1
    assert not runner.drafts["a"] and runner.num_accepted > 0
    assert float(abs(drafter._scores).sum()) == 0


def test_v1_a_fault_of_one_rank_never_changes_how_often_logits_are_asked_for(monkeypatch):
    """Logits are made by all ranks together: one that stops asking leaves the others waiting for ever."""
    calls = []
    for times in (0, 1, 1000):
        runner = fake_v1.FakeRunner(PROMPTS, num_ranks=2, verification="strict", draft_length=WIDTH)
        with monkeypatch.context() as patch:
            inject(patch, AlignmentStore, "write", times)
            for _ in range(20):
                runner.step()
        calls.append(runner.num_logits_calls)
        assert (runner.proposer.faults.counts["store"] > 0) == (times > 0)
    assert calls[0] == calls[1] == calls[2] > 0


@pytest.mark.parametrize("seam", ["admission", "verifier"])
def test_v1_ranks_that_could_part_end_instead(seam, monkeypatch):
    place, owner, name = V1_SEAMS[seam]
    runner = fake_v1.FakeRunner(PROMPTS, num_ranks=2, verification="strict")
    inject(monkeypatch, owner, name)
    with pytest.raises(Fault):
        serve_v1(runner)
    assert runner.proposer.faults.counts[place] == 1


def test_v1_logits_that_fail_with_other_ranks_end_the_engine(monkeypatch):
    for num_ranks in (1, 2):
        runner = fake_v1.FakeRunner(PROMPTS, num_ranks=num_ranks, verification="strict")
        inject(monkeypatch, runner.proposer._model, "compute_logits")
        if num_ranks == 1:
            serve_v1(runner)
        else:
            with pytest.raises(Fault):
                runner.step()


def test_v1_vllms_sampler_draws_what_it_would_have_drawn_without_us(monkeypatch):
    """A verifier that fails when all its random numbers are drawn leaves the generators as they were."""
    faults = Faults()
    requests = V1Requests(Settings(verification="strict"), faults)
    states = {req_id: types.SimpleNamespace(sampling_params=SamplingParams(temperature=1.0, seed=1)) for req_id in "ab"}
    requests.admit(states, states)
    counting = V1Counting(Counters("cpu"), faults, 2, 3)
    verifier = V1Verifier(requests, 2, torch.device("cpu"), faults, counting)
    verifier.begin_step(list(states))
    drawn = []

    def stock(*args):
        drawn.append([torch.rand(3, generator=generator).tolist() for generator in args[7].generators.values()])
        return "vLLM's"

    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    cu_num_drafts, bonus = torch.tensor([2, 3], dtype=torch.int32), torch.tensor([[1], [1]])
    for active in (False, True):
        generators = {row: torch.Generator().manual_seed(row) for row in range(2)}
        metadata = types.SimpleNamespace(
            all_greedy=False, all_random=True, temperature=torch.ones(2), generators=generators
        )
        arguments = [torch.tensor([1, 2, 3]).int(), [2, 1], 2, cu_num_drafts, None, logits, bonus, metadata]
        sample = sampler_patches.patch_rejection_sample(stock)
        if not active:
            assert sample(*arguments) == "vLLM's"
            continue
        inject(monkeypatch, v1_verifier.verify_op, "verify")
        with verifier.active():
            assert sample(*arguments) == "vLLM's"
    assert drawn[0] == drawn[1] and faults.counts["verify"] == 1


def test_v1_gives_a_step_that_it_can_not_verify_to_vllm_at_once(monkeypatch):
    faults, calls, counted = Faults(), [], []
    verifier = v1_verifier.V1Verifier({}, 1, torch.device("cpu"), faults, None)
    monkeypatch.setattr(verifier, "count_stock", lambda *step: counted.append(step))

    def broken(*args):
        calls.append(args)
        raise RuntimeError

    monkeypatch.setattr(verifier, "rejection_sample", broken)
    monkeypatch.setattr(sampler_patches, "_is_argmax", lambda metadata: True)
    sample = sampler_patches.patch_rejection_sample(lambda *args: "vLLM's")
    nothing = types.SimpleNamespace(generators={}, logprob_token_ids=None, thinking_budget_state_holder=None)
    forward = sampler_patches.patch_rejection_sampler_forward(
        lambda *args: sample(None, [1], 1, None, None, None, None, nothing)
    )
    rows = types.SimpleNamespace(
        draft_token_ids=None, num_draft_tokens=[1], max_spec_len=1, cu_num_draft_tokens=None,
        target_logits_indices=torch.tensor([0]), bonus_logits_indices=torch.tensor([1]),
    )  # fmt: skip
    for step in (1, 2):
        verifier.begin_step(["a"])
        with verifier.active():
            assert forward(None, rows, None, torch.zeros(2, 8), nothing) == "vLLM's"
        assert len(calls) == len(counted) == faults.counts["verify"] == step
    assert forward(None, rows, None, torch.zeros(2, 8), nothing) == "vLLM's"
    assert len(calls) == 2, "another engine's step isn't ours"
    monkeypatch.setattr(sampler_patches, "_is_argmax", lambda metadata: False)
    verifier.begin_step(["a"])
    with verifier.active():
        forward(None, rows, None, torch.zeros(2, 8), nothing)
    assert len(calls) == 3, "the next step is tried again"


def greedy_v2(
    target_logits,
    draft_logits,
    draft_sampled,
    cu_num_logits,
    pos,
    idx_mapping,
    expanded_idx_mapping,
    expanded_local_pos,
    temperature,
    seed,
    num_speculative_steps,
    synthetic_conditional_rates=None,
    use_fp64=False,
):
    """vLLM's V2 ``rejection_sample`` for greedy requests, in plain torch."""
    sampled = torch.full((len(cu_num_logits) - 1, WIDTH + 1), -1, dtype=torch.int64)
    num_sampled = torch.zeros(len(sampled), dtype=torch.int32)
    for request, (start, end) in enumerate(zip(cu_num_logits[:-1].tolist(), cu_num_logits[1:].tolist(), strict=True)):
        says = target_logits[start:end].argmax(-1)
        agreed = 0
        while agreed < end - start - 1 and draft_sampled[start + 1 + agreed] == says[agreed]:
            agreed += 1
        sampled[request, : agreed + 1] = says[: agreed + 1]
        num_sampled[request] = agreed + 1
    return sampled, num_sampled


def serve_v2(runner):
    runner.rejection_sample = v2_verifier.patch_rejection_sample(greedy_v2)
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS)
    emitted = {}
    for slot, prompt in enumerate(PROMPTS.values()):
        runner.add(slot, prompt, NUM_TOKENS, params)
        emitted[slot] = []
    for _ in range(100):
        running = [slot for slot, tokens in emitted.items() if len(tokens) < NUM_TOKENS]
        if not running:
            break
        for slot, tokens in runner.step(running, chunk=4).items():
            emitted[slot] += tokens
    for slot, prompt in enumerate(PROMPTS.values()):
        assert emitted[slot] == target_alone(prompt, NUM_TOKENS)[len(prompt) :]


# By place: what holds the function that fails, of the fake runner, and its name.
V2_SEAMS = {
    "admission": ("requests", lambda runner: v2_requests, "settings_of"),
    "staged writes": ("requests", lambda runner: runner.speculator.requests._pools["rule"], "copy_to_gpu"),
    "drafting": ("draft", lambda runner: v2_speculator, "draft_batch"),
    "store": ("store", lambda runner: AlignmentStore, "write"),
    "prompts' store": ("store", lambda runner: runner.speculator._prompt_logits, "store"),
    "verifier": ("verify", lambda runner: v2_verifier, "verify_seeded"),
}


@pytest.mark.parametrize("fillers", [False, True])
@pytest.mark.parametrize("times", [1, 1000])
@pytest.mark.parametrize("seam", V2_SEAMS)
def test_v2_serves_the_targets_tokens_whatever_fails(seam, times, fillers, monkeypatch, caplog):
    place, owner, name = V2_SEAMS[seam]
    runner = fake_v2.FakeRunner(max_num_reqs=2, fillers=fillers, alignment=True, verification="strict")
    failed = inject(monkeypatch, owner(runner), name, times)
    with caplog.at_level(logging.ERROR, "vllm.aasd"):
        serve_v2(runner)
    counts = runner.speculator.faults.counts
    assert counts[place] == len(failed) >= 1 and sum(counts.values()) == counts[place]
    tracebacks = [record for record in caplog.records if record.exc_info]
    assert len(tracebacks) == 1 and tracebacks[0].exc_info[0] is Fault
    if times == 1:
        assert sum(runner.accepted) > 0, "one fault isn't the end of speculation"
    elif seam in ("drafting", "store", "verifier"):
        assert runner.speculator.faults.is_off(place) and counts[place] <= MAX_FAULTS + 1


def test_steps_that_vllms_sampler_verifies_are_counted(monkeypatch):
    """On V1: what ours would have counted."""

    def survival(counters, name):
        return sum(value for metric, _, value in counters.read() if metric == name)

    runner = fake_v1.FakeRunner(PROMPTS, verification="strict")
    inject(monkeypatch, v1_verifier.verify_op, "verify")
    serve_v1(runner)
    counters = runner.proposer.counters
    assert survival(counters, "survival_tokens") > survival(counters, "survival_accepted") == runner.num_accepted > 0


def test_v2_a_failed_draft_leaves_fillers_that_nothing_can_accept(monkeypatch):
    """By the loosest bar, which would take any token for a draft."""
    loosest = {"alpha": 10.0, "beta": 0.0, "floor": 1e-4, "min_survival": 0.0}
    runner = fake_v2.FakeRunner(max_num_reqs=2, **loosest)
    undecided = torch.zeros(VOCAB)
    undecided[1] = 0.5
    runner.model.head.forward = lambda pairs: undecided.repeat(len(pairs), 1)
    runner.add(0, [1, 2, 1, 2, 1, 2], 40, SamplingParams(temperature=0.0, max_tokens=40))
    runner.step([0])
    assert runner.speculator._num_drafts[0] > 0
    inject(monkeypatch, v2_speculator, "draft_batch")
    runner.step([0])
    assert runner.speculator._num_drafts[0] == 0 and runner.counts[0] == WIDTH
    assert runner.step([0]) == {0: [1]}


def test_v2_stale_policies_are_never_verified_by(monkeypatch):
    """The slot's former request was relaxed; its successor is strict, and the device hasn't heard of it."""
    runner = fake_v2.FakeRunner(max_num_reqs=2, allow_request_override="any")
    requests = runner.speculator.requests
    requests.add_request(0, SamplingParams(temperature=0.0))
    requests.apply_staged_writes()
    requests.add_request(0, SamplingParams(temperature=0.0, extra_args={"aasd_verification": "strict"}))
    inject(monkeypatch, requests._pools["rule"], "copy_to_gpu", times=1)
    requests.apply_staged_writes()
    assert requests.policies.rule[0] == CONDITIONAL and not runner.speculator.verifier.is_on
    requests.apply_staged_writes()
    assert requests.policies.rule[0] == STRICT and runner.speculator.verifier.is_on


@pytest.mark.parametrize("seam", ["admission", "drafting", "store", "prompts' store", "verifier"])
def test_v2_ranks_that_could_part_end_instead(seam, monkeypatch):
    """Each rank drafts for itself there, so what one of them fails to draft the others would go on to verify."""
    runner = fake_v2.FakeRunner(max_num_reqs=2, num_ranks=2, alignment=True, verification="strict")
    place, owner, name = V2_SEAMS[seam]
    inject(monkeypatch, owner(runner), name)
    with pytest.raises(Fault):
        serve_v2(runner)
    assert runner.speculator.faults.counts[place] == 1


def test_faults_are_counted_by_place_and_switch_it_off(caplog):
    faults = Faults()
    with caplog.at_level(logging.ERROR, "vllm.aasd"):
        for number in range(MAX_FAULTS + 3):
            assert faults.is_off("metrics") == (number >= MAX_FAULTS)
            with faults.contained("metrics"):
                raise Fault
    assert faults.counts == {**dict.fromkeys(COMPONENTS, 0), "metrics": MAX_FAULTS + 3}
    assert [bool(record.exc_info) for record in caplog.records] == [True, False]
    assert "'metrics' has failed 8 times and is off" in caplog.text and not faults.is_off("draft")


def test_what_failed_before_the_first_request_turns_nothing_off(caplog):
    faults = Faults()
    for _ in range(MAX_FAULTS):
        with faults.contained("draft"):
            raise Fault
    with caplog.at_level(logging.ERROR, "vllm.aasd"):
        caplog.clear()
        faults.clear()
        assert "before the first request, by part: {'draft': 8}" in caplog.text
        caplog.clear()
        faults.clear()
    assert not faults.is_off("draft") and not caplog.records


def test_what_is_meant_for_the_process_goes_on():
    faults = Faults()
    for error in (KeyboardInterrupt, SystemExit):
        with pytest.raises(error), faults.contained("draft"):
            raise error
    with faults.contained("draft"):
        pass
    assert faults.counts["draft"] == 0


@pytest.mark.parametrize(("num_ranks", "shared", "goes_on"), [(1, True, False), (2, True, True), (2, False, False)])
def test_only_shared_faults_go_on_and_only_with_other_ranks(num_ranks, shared, goes_on):
    faults = Faults(num_ranks)
    try:
        with faults.contained("store", shared=shared):
            raise Fault
    except Fault:
        assert goes_on
    else:
        assert not goes_on
    assert faults.counts["store"] == 1
