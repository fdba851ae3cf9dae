"""What a worker measures before it serves, on a clock of our own."""

import types

import pytest
import torch

from vllm_aasd.engine import startup


class Device:
    """A target whose forward pass takes 1 ms and 0.1 ms a token, times `slow`, its lm_head half of that."""

    def __init__(self, slow, monkeypatch):
        self.now = 0.0
        self.slow = slow
        monkeypatch.setattr(startup, "time", types.SimpleNamespace(perf_counter=lambda: self.now))

    def forward(self, num_tokens):
        self.now += self.slow * (1e-3 + 1e-4 * num_tokens)
        return torch.zeros(num_tokens + 3, 2)

    def compute_logits(self, hidden_states):
        self.now += self.slow * 0.5 * (1e-3 + 1e-4 * len(hidden_states))

    def profile(self, max_tokens=64, agree=lambda answer: answer):
        return startup.profile_steps(self.forward, self.compute_logits, max_tokens, agree)


def test_steps_of_up_to_128_tokens_are_timed_with_their_lm_head(monkeypatch):
    samples = Device(1, monkeypatch).profile(max_tokens=100_000)
    for num_tokens, seconds in samples:
        assert seconds == pytest.approx(1.5 * (1e-3 + 1e-4 * num_tokens))
    sizes = [num_tokens for num_tokens, _ in samples]
    assert {1, 2, 3, 64} <= set(sizes) and max(sizes) == 128
    assert sizes.count(3) == sizes.count(128) > 1, "what a first step sets up isn't part of the fastest"


@pytest.mark.parametrize("slow", [1, 30, 300, 10_000])
def test_timing_steps_delays_the_start_by_a_bounded_time(slow, monkeypatch):
    """Where time is short, powers of two are timed; always one step at least, without which there is no curve."""
    device = Device(slow, monkeypatch)
    samples = device.profile(128)
    first = samples[0][1]
    assert device.now <= max(first, startup.PROFILE_SECONDS + slow * 2e-3)
    sizes = [num_tokens for num_tokens, _ in samples]
    assert sizes[:3] == [1, 2, 4][: len(sizes)] and (slow < 10_000) == (len(sizes) > 2), sizes


def test_the_first_ranks_clock_decides(monkeypatch):
    """With tensor parallelism, ranks that ran different numbers of steps would wait for each other for ever."""
    asked = []

    def agree(answer):
        asked.append(answer)
        return len(asked) <= 5

    assert len(Device(10_000, monkeypatch).profile(agree=agree)) == 6
    assert not any(asked), "this rank would have stopped"


@pytest.mark.parametrize("has_adapters", [False, True])
def test_rows_of_a_dummy_step_have_no_adapter(has_adapters):
    """It leaves vLLM's dummy adapters of as many rows as requests, fewer than are asked for here."""
    mapped = []
    runner = types.SimpleNamespace(
        lora_config=object() if has_adapters else None,
        _dummy_run=lambda num_tokens: (torch.zeros(num_tokens, 2), None),
        _set_active_loras=lambda *mapping: mapped.append(mapping),
    )
    assert startup.dummy_forward(runner, 5).shape == (5, 2)
    assert mapped == [((0,) * 5, (0,) * 5, set())] * has_adapters


@pytest.mark.parametrize(
    ("max_num_seqs", "batched_tokens", "num_rows"), [(1024, 8192, 910 * 8), (64, 8192, 64 * 8), (1, 2048, 8)]
)
def test_what_vllms_warm_up_makes(max_num_seqs, batched_tokens, num_rows):
    config = types.SimpleNamespace(
        scheduler_config=types.SimpleNamespace(max_num_seqs=max_num_seqs, max_num_batched_tokens=batched_tokens),
        model_config=types.SimpleNamespace(dtype=torch.bfloat16),
        num_speculative_tokens=7,
    )
    num_logits = num_rows * 152000
    assert startup.warm_up_bytes(config, 152000) == 2 * num_logits + min(4 * num_logits, 2**30)
