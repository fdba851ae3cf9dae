"""What a worker measures before it serves, on a clock of our own."""

import types

import pytest
import torch

from vllm_aasd.engine import startup


class Device:
    """A target whose forward pass takes 1 ms and 0.1 ms a token, its lm_head a given share of that."""

    def __init__(self, lm_head_share, monkeypatch):
        self.now = 0.0
        self.sizes = []
        self.lm_head_share = lm_head_share
        monkeypatch.setattr(startup, "time", types.SimpleNamespace(perf_counter=lambda: self.now))

    def forward(self, num_tokens):
        self.sizes.append(num_tokens)
        self.now += 1e-3 + 1e-4 * num_tokens
        return torch.zeros(num_tokens + 3, 2)

    def compute_logits(self, hidden_states):
        self.now += self.lm_head_share * (1e-3 + 1e-4 * len(hidden_states))
        return torch.zeros(len(hidden_states), 10)

    def profile(self, max_tokens=64):
        return startup.profile_steps(self.forward, self.compute_logits, max_tokens, 16, 4)


@pytest.mark.parametrize("share", [0.01, 0.5])
def test_steps_of_up_to_128_tokens_are_timed_with_their_lm_head(share, monkeypatch):
    profile = Device(share, monkeypatch).profile(max_tokens=100_000)
    for num_tokens, seconds in profile.samples:
        assert seconds == pytest.approx((1 + share) * (1e-3 + 1e-4 * num_tokens))
    sizes = {num_tokens for num_tokens, _ in profile.samples}
    assert {1, 2, 64} <= sizes and max(sizes) == 128
    assert profile.alignment_share == pytest.approx(share)


def test_what_is_run_does_not_depend_on_the_clock(monkeypatch):
    """With tensor parallelism, ranks that ran different numbers of steps would wait for each other for ever."""
    sizes = []
    for share in (0.1, 1e6):
        device = Device(share, monkeypatch)
        device.profile()
        sizes.append(device.sizes)
    assert sizes[0] == sizes[1]


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
