"""Requests come, are preempted, come back, end and are aborted at random: their tokens are the target's, and nothing of
them is left behind."""

import numpy as np
import pytest
from vllm.sampling_params import SamplingParams

from aasd_testing import fake_v1, fake_v2
from aasd_testing.fake_v2 import VOCAB, target_alone
from aasd_testing.held import reachable

SEEDS = range(100)
MAX_NUM_REQS = 3

OPTIONS = [
    {},
    {"aasd_enabled": False},
    {"aasd_verification": "strict"},
    {"aasd_beta": 0.75},
    {"aasd_nonsense": 1},
]


@pytest.fixture(autouse=True)
def _no_pinned_memory(monkeypatch):
    """vLLM takes a CPU for a device with memory that the host can pin; its own fallback does without."""
    monkeypatch.setattr("vllm.v1.worker.gpu.buffer_utils.is_uva_available", lambda: False)


def random_prompt(rng, longest):
    return rng.integers(0, rng.choice([2, 7, VOCAB]), rng.integers(1, longest)).tolist()


def test_v1_drains():
    num_accepted = num_sequences = 0
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        runner = fake_v1.FakeRunner({}, max_num_reqs=MAX_NUM_REQS, verification="conditional", floor=0.4)
        prompts, preempted = {}, []
        batch = runner.input_batch.req_ids
        for number in range(40):
            if len(batch) < MAX_NUM_REQS and rng.random() < 0.5:
                if preempted and rng.random() < 0.7:
                    runner.resume(preempted.pop(0))
                else:
                    # An id comes again, with another context, once its request has ended.
                    req_id = next(name for name in ("req 1", "req 2", f"req {number + 3}") if name not in prompts)
                    prompts[req_id] = random_prompt(rng, 40)
                    runner.add(req_id, prompts[req_id], extra_args=dict(rng.choice(OPTIONS)))
            if batch and rng.random() < 0.1:
                preempted.append(str(rng.choice(batch)))
                runner.preempt(preempted[-1])
            ending = [req_id for req_id in prompts if rng.random() < 0.05 or len(runner.tokens[req_id]) > 200]
            for req_id in ending:
                check(prompts.pop(req_id), runner.end(req_id), seed)
                preempted = [other for other in preempted if other != req_id]
                num_sequences += 1
            runner.step()
            for req_id, held in runner.proposer._drafter._requests.items():
                own = runner.tokens[req_id][: held.index.length]
                assert held.index.tokens[: held.index.length].tolist() == own, "drafts come from nobody else's context"
        for req_id in list(prompts):
            check(prompts.pop(req_id), runner.end(req_id), seed)
        runner.step()
        assert not request_ids_in(runner.proposer), seed
        assert len(runner.proposer._requests) == runner.proposer._drafter.num_requests == 0
        assert all_rows_are_free(runner.proposer._verifier._policies), seed
        assert set(runner.proposer.faults.counts.values()) == {0}, seed
        num_accepted += runner.num_accepted
    assert num_accepted > num_sequences > 300, "the drafts are worth something"


@pytest.mark.parametrize("fillers", [False, True])
def test_v2_drains(fillers):
    num_accepted = num_sequences = 0
    for seed in SEEDS[:40]:
        rng = np.random.default_rng(seed)
        runner = fake_v2.FakeRunner(MAX_NUM_REQS, fillers, verification="conditional", floor=0.4, alignment=True)
        running, preempted, ended, prompts = {}, [], set(), {}
        for number in range(25):
            free = [slot for slot in range(MAX_NUM_REQS) if slot not in running]
            if free and rng.random() < 0.6:
                slot = int(rng.choice(free))
                if preempted and rng.random() < 0.7:
                    req_id, tokens, params = preempted.pop(0)
                else:
                    req_id = next(name for name in ("req 1", "req 2", f"req {number + 3}") if name not in prompts)
                    tokens = prompts[req_id] = random_prompt(rng, 20)
                    params = SamplingParams(temperature=0.0, max_tokens=40, extra_args=dict(rng.choice(OPTIONS)))
                runner.add(slot, tokens, fake_v2.MAX_LEN - len(tokens), params, req_id)
                running[slot] = req_id, params
            for slot, (req_id, params) in list(running.items()):
                tokens = runner.tokens[slot, : int(runner.total_len[slot])].tolist()
                if len(tokens) > 50 or rng.random() < 0.05:
                    del running[slot], runner.req_ids[slot]
                    check(prompts.pop(req_id), tokens, seed)
                    ended.add(req_id)
                    num_sequences += 1
                elif rng.random() < 0.05:
                    del running[slot], runner.req_ids[slot]
                    preempted.append((req_id, tokens, params))
            runner.speculator.begin_step(fake_v2.scheduled(finished=ended))
            ended = set()
            if running:
                runner.step(rng.permutation(list(running)).tolist(), chunk=int(rng.integers(1, 8)))
        runner.speculator.begin_step(fake_v2.scheduled(finished=prompts))
        runner.req_ids.clear()
        assert not request_ids_in(runner.speculator), seed
        assert all_rows_are_free(runner.speculator.requests._table), seed
        assert set(runner.speculator.faults.counts.values()) == {0}, seed
        num_accepted += sum(runner.accepted)
    assert num_accepted > num_sequences > 100


def request_ids_in(value):
    return [text for _, text in reachable(value) if text.startswith("req ")]


def all_rows_are_free(table):
    return not table._state_rows and sorted(table._free) == list(range(len(table.state)))


def check(prompt, tokens, seed):
    assert tokens[: len(prompt)] == prompt
    assert tokens == prompt + target_alone(prompt, len(tokens) - len(prompt)), seed
