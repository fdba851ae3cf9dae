"""Our verifier in vLLM's rejection sampler: it takes over only for its own engine, and mends two faults."""

import types

import numpy as np
import pytest
import torch
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.sample import rejection_sampler

from aasd_testing import fake_v1
from vllm_aasd.config import Settings
from vllm_aasd.counters import Counters
from vllm_aasd.engine.failsafe import Faults
from vllm_aasd.engine.v1 import rejection_sampler as v1_verifier
from vllm_aasd.engine.v1 import sampler_patches
from vllm_aasd.engine.v1.counting import V1Counting
from vllm_aasd.engine.v1.requests import V1Requests
from vllm_aasd.kernels.verify import policies

STOCK = {
    name: getattr(rejection_sampler, name)
    for name in ("rejection_sample", "expand_batch_to_tokens", "apply_sampling_constraints")
}
GREEDY = types.SimpleNamespace(all_greedy=True, all_random=False, temperature=None, generators={})


@pytest.fixture
def installed():
    replacements = sampler_patches.install()
    yield
    for replacement in replacements:
        replacement.undo()
    assert all(getattr(rejection_sampler, name) is function for name, function in STOCK.items())


def arguments():
    """Two greedy requests: the second draft of the first is a near-tie that only a relaxed bar accepts."""
    logits = torch.full((3, 8), -20.0)
    logits[0, 1] = logits[1, 2] = logits[2, 5] = 5.0
    logits[1, 3] = 4.9
    return {
        "draft_token_ids": torch.tensor([1, 3, 6], dtype=torch.int32),
        "num_draft_tokens": [2, 1],
        "max_spec_len": 2,
        "cu_num_draft_tokens": torch.tensor([2, 3], dtype=torch.int32),
        "draft_probs": None,
        "target_logits": logits,
        "bonus_token_ids": torch.tensor([[7], [7]]),
        "sampling_metadata": GREEDY,
    }


def verifier(settings, stop_token_ids=(), options=None, counting=None, **asked):
    """A verifier of requests "a", which brings stop tokens and `options`, and "b", which brings none."""
    requests = V1Requests(settings, Faults())
    counting = counting or V1Counting(Counters("cpu"), Faults(), 4, 3)
    made = v1_verifier.V1Verifier(requests, 4, torch.device("cpu"), Faults(), counting)
    params = (
        SamplingParams(temperature=0.0, stop_token_ids=list(stops), extra_args=extra, **asked)
        for stops, extra in ((stop_token_ids, options), ((), None))
    )
    states = {req_id: types.SimpleNamespace(sampling_params=of) for req_id, of in zip("ab", params, strict=True)}
    requests.admit(states, states)
    made.begin_step(list(states))
    return made


@pytest.mark.parametrize(
    ("settings", "stop_token_ids", "first"),
    [
        (Settings(verification="strict"), (), [1, 2, -1]),
        (Settings(), (), [1, 3, 7]),
        # Never copied on where the target would rather stop.
        (Settings(), (2,), [1, 2, -1]),
    ],
)
def test_the_policy_decides(installed, settings, stop_token_ids, first):
    with verifier(settings, stop_token_ids).active():
        output = rejection_sampler.rejection_sample(**arguments())
    assert output.tolist() == [first, [5, -1, -1]]


GRAMMAR = StructuredOutputsParams(regex="a*")


@pytest.mark.parametrize(
    ("settings", "asked", "relaxes"),
    [
        ({}, {}, True),
        ({}, {"structured_outputs": GRAMMAR}, False),
        ({}, {"logprobs": 0}, False),
        ({}, {"logprob_token_ids": [3]}, False),
    ],
)
def test_nothing_is_relaxed_under_a_grammar_or_where_logprobs_are_wanted(installed, settings, asked, relaxes):
    with verifier(Settings(**settings), **asked).active():
        output = rejection_sampler.rejection_sample(**arguments())
    assert output[0].tolist() == ([1, 3, 7] if relaxes else [1, 2, -1])


@pytest.mark.parametrize(("num_stops", "relaxes"), [(64, True), (65, False), (32768, False)])
def test_a_long_list_of_stop_tokens_costs_its_own_request_alone(installed, monkeypatch, num_stops, relaxes):
    """Beyond the bound the request is strict, and its drafts still count; what the kernel is given stays as it was."""
    given, verify = [], v1_verifier.verify_op.verify
    monkeypatch.setattr(v1_verifier.verify_op, "verify", lambda *args: given.append(args) or verify(*args))
    batch = arguments()
    batch["target_logits"] = batch["target_logits"][[0, 1, 0, 1]]
    batch["draft_token_ids"] = batch["draft_token_ids"][[0, 1, 0, 1]]
    batch.update(num_draft_tokens=[2, 2], cu_num_draft_tokens=torch.tensor([2, 4], dtype=torch.int32))
    with verifier(Settings(), stop_token_ids=range(100, 100 + num_stops)).active():
        output = rejection_sampler.rejection_sample(**batch).tolist()
    assert output == [[1, 3, 7] if relaxes else [1, 2, -1], [1, 3, 7]]
    assert given[0][0].stop_token_ids.shape == (2, policies.MAX_STOP_TOKEN_IDS)


def test_a_budget_goes_by_the_request_id(installed):
    """A pays for one near-tie in its life, wherever it stands in the batch; B pays for its own."""
    made = verifier(Settings(verification="budget", budget_nats=0.15))

    def step(*req_ids):
        made.begin_step(list(req_ids))
        with made.active():
            return rejection_sampler.rejection_sample(**arguments())[0].tolist()

    assert step("a", "b") == [1, 3, 7]
    assert step("a", "b") == [1, 2, -1], "0.1 of 0.15 nats are spent"
    assert step("b", "a") == [1, 3, 7]
    made.forget(["a"])
    assert step("a", "b") == [1, 3, 7], "the same id again is another request"


def test_each_step_is_counted(installed):
    counters = Counters("cpu")
    counting = V1Counting(counters, Faults(), 4, 3)
    promises = {"a": np.array([0.9, 0.55, 0.5], np.float32), "b": np.empty(0, np.float32)}
    counting.drafter = types.SimpleNamespace(predicted_survival=promises.__getitem__)
    with verifier(Settings(), counting=counting).active():
        rejection_sampler.rejection_sample(**arguments())
        nothing = {"draft_token_ids": torch.empty(0, dtype=torch.int32), "num_draft_tokens": [0, 0]}
        nothing["cu_num_draft_tokens"] = torch.zeros(2, dtype=torch.int32)
        rejection_sampler.rejection_sample(**{**arguments(), **nothing, "target_logits": torch.empty(0, 8)})
    got = {(name, *labels.values()): value for name, labels, value in counters.read()}
    assert got["relaxed_tokens",] == 1 and got["regret_nats",] == pytest.approx(0.1, rel=1e-5)
    assert got["survival_accepted", "0.9-1.0"] == got["survival_accepted", "0.5-0.6"] == 1
    assert sum(value for (name, *_), value in got.items() if name == "survival_tokens") == 2, "one had no promise"


def test_another_engine_of_the_process_keeps_vllms_sampler(installed, monkeypatch):
    seen = []

    def stock(*args, **kwargs):
        seen.append(kwargs or args)

    monkeypatch.setattr(rejection_sampler, "rejection_sample", sampler_patches.patch_rejection_sample(stock))
    rejection_sampler.rejection_sample(**arguments())
    assert len(seen) == 1
    with verifier(Settings()).active():
        rejection_sampler.rejection_sample(**arguments())
    assert len(seen) == 1


def test_each_request_is_verified_by_what_it_asked_for(installed):
    """Both get the same near-tie as their second draft."""
    batch = arguments()
    batch["target_logits"] = batch["target_logits"][[0, 1, 0, 1]]
    batch["draft_token_ids"] = batch["draft_token_ids"][[0, 1, 0, 1]]
    batch.update(num_draft_tokens=[2, 2], cu_num_draft_tokens=torch.tensor([2, 4], dtype=torch.int32))
    with verifier(Settings(), options={"aasd_verification": "strict"}).active():
        assert rejection_sampler.rejection_sample(**batch).tolist() == [[1, 2, -1], [1, 3, 7]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64])
def test_parameters_are_expanded_to_their_rows(installed, dtype):
    x, counts = torch.tensor([3, 0, 5], dtype=dtype), torch.tensor([2, 2, 5], dtype=torch.int32)
    expanded = rejection_sampler.expand_batch_to_tokens(x, counts, 5, replace_from=5, replace_to=1)
    assert expanded.tolist() == [3, 3, 1, 1, 1] and expanded.dtype == dtype


def test_a_step_without_drafts_survives_top_k(installed):
    metadata = types.SimpleNamespace(
        all_greedy=False,
        temperature=torch.tensor([0.7]),
        top_k=torch.tensor([5], dtype=torch.int32),
        top_p=None,
    )
    empty = torch.empty(0, 8)
    result = rejection_sampler.apply_sampling_constraints(empty, torch.zeros(1, dtype=torch.int32), metadata)
    assert result.shape == (0, 8)


@pytest.mark.parametrize(("verification", "may_be_plain"), [("strict", True), ("conditional", False)])
def test_strict_steps_without_drafts_are_sampled_as_without_speculation(verification, may_be_plain):
    """Relaxed policies watch all tokens."""
    runner = fake_v1.FakeRunner({"a": [1, 2, 3, 1, 2], "b": [4, 5, 6]}, verification=verification)
    plain = drafted = 0
    for _ in range(30):
        has_drafts = any(runner.drafts.values())
        runner.step()
        assert runner.is_plain is (may_be_plain and not has_drafts)
        plain, drafted = plain + runner.is_plain, drafted + has_drafts
    assert drafted and bool(plain) is may_be_plain
    assert set(runner.proposer.faults.counts.values()) == {0}


@pytest.mark.parametrize(
    ("settings", "temperature", "is_plain"),
    [({}, 0.7, True), ({}, 0.0, False), ({"relax_sampling": True}, 0.7, False)],
)
def test_a_sampled_request_is_strict_unless_sampling_is_relaxed(settings, temperature, is_plain):
    runner = fake_v1.FakeRunner({}, max_num_reqs=1, **settings)
    runner.add("a", [1, 2, 3], temperature=temperature)
    runner.step()
    assert runner.is_plain is is_plain


def test_one_relaxed_request_keeps_the_whole_batch_with_the_verifier():
    """The server's rule is relaxed; only the first request asks for strict verification."""
    runner = fake_v1.FakeRunner({}, max_num_reqs=2)
    runner.add("a", [1, 2, 3], extra_args={"aasd_verification": "strict"})
    runner.step()
    assert runner.is_plain
    runner.add("b", [4, 5, 6])
    runner.drafts = {"a": [], "b": []}
    runner.step()
    assert not runner.is_plain
