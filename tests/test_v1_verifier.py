"""Our verifier in vLLM's rejection sampler: it takes over only for its own engine, and mends two faults."""

import types

import numpy as np
import pytest
import torch
from vllm.v1.sample import rejection_sampler

from vllm_aasd.config import Settings
from vllm_aasd.counters import Counters
from vllm_aasd.engine import v1_verifier
from vllm_aasd.engine.v1_counting import V1Counting

STOCK = {
    name: getattr(rejection_sampler, name)
    for name in ("rejection_sample", "expand_batch_to_tokens", "apply_sampling_constraints")
}
GREEDY = types.SimpleNamespace(all_greedy=True, all_random=False, temperature=None, generators={})


@pytest.fixture
def installed():
    replacements = v1_verifier.install()
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


def verifier(settings, stop_token_ids=(), **options):
    made = v1_verifier.V1Verifier(settings, 4, torch.device("cpu"), **options)
    params = types.SimpleNamespace(all_stop_token_ids=set(stop_token_ids))
    request = types.SimpleNamespace(sampling_params=params)
    made.begin_step(["a", "b"], {"a": request, "b": request})
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


def test_each_step_is_counted(installed):
    counters = Counters("cpu")
    promises = [np.array([0.9, 0.55, 0.5], np.float32), np.empty(0, np.float32)]
    counting = V1Counting(counters, 4, 3, promises.__getitem__)
    with verifier(Settings(), observe=counting.verified).active():
        rejection_sampler.rejection_sample(**arguments())
        nothing = {"draft_token_ids": torch.empty(0, dtype=torch.int32), "num_draft_tokens": [0, 0]}
        nothing["cu_num_draft_tokens"] = torch.zeros(2, dtype=torch.int32)
        rejection_sampler.rejection_sample(**{**arguments(), **nothing, "target_logits": torch.empty(0, 8)})
    got = {(name, label): value for name, label, value in counters.read()}
    assert got["draft_tokens", ""] == 3 and got["accepted_tokens", ""] == 2
    assert got["relaxed_tokens", ""] == 1 and got["regret_nats", ""] == pytest.approx(0.1, rel=1e-5)
    assert got["survival_accepted", "0.9-1.0"] == got["survival_accepted", "0.5-0.6"] == 1
    assert sum(value for (name, _), value in got.items() if name == "survival_tokens") == 2, "one had no promise"
    assert sum(got["verifier_time_seconds", ""].counts) == 1, "a step without drafts verifies nothing"


def test_another_engine_of_the_process_keeps_vllms_sampler(installed, monkeypatch):
    seen = []

    def stock(*args, **kwargs):
        seen.append(kwargs or args)

    monkeypatch.setattr(rejection_sampler, "rejection_sample", v1_verifier._dispatching(stock))
    rejection_sampler.rejection_sample(**arguments())
    assert len(seen) == 1
    with verifier(Settings()).active():
        rejection_sampler.rejection_sample(**arguments())
    assert len(seen) == 1


def test_state_of_ended_requests_is_dropped():
    made = verifier(Settings())
    made.forget(["a", "never seen"])
    assert list(made._stop_token_ids) == ["b"]


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
