"""The prefill benchmark: its figures against known answers, and no figure of another first token."""

import pytest

from benchmarks import prefill


class FakeEngine:
    """Takes so long for a prompt's first token, which is its answer to everything."""

    def __init__(self, seconds, token=7):
        self.seconds, self.token, self.asked = seconds, token, []

    def forget(self):
        self.asked.append("forget")

    def run(self, requests, concurrency):
        (request,) = requests
        self.asked.append(tuple(request["prompt_token_ids"]))
        return [{"sent": 1.0, "first_token": 1.0 + self.seconds, "token_ids": [self.token, 0]}], self.seconds


PROMPTS = {2: [[1, 2], [3, 4]], 3: [[5, 6, 7], [8, 9, 10]]}


def test_every_engine_is_asked_every_prompt_in_every_round():
    engines = {"none": FakeEngine(0.5), "ours": FakeEngine(0.75)}
    seconds = prefill.measure(engines, PROMPTS, 3)
    assert seconds == {
        length: {"none": [pytest.approx([0.5] * 3)] * 2, "ours": [pytest.approx([0.75] * 3)] * 2}
        for length in ("2", "3")
    }
    one_round = ["forget", (1, 2), (3, 4), (5, 6, 7), (8, 9, 10)]
    assert all(engine.asked == 3 * one_round for engine in engines.values())


def test_another_first_token_stops_it():
    engines = {"none": FakeEngine(0.5), "ours": FakeEngine(0.5, token=8)}
    with pytest.raises(ValueError, match="ours: another first token than none's, on prompt 0 of 2 tokens"):
        prefill.measure(engines, PROMPTS, 1)


def test_overhead_in_percent_by_the_faster_half_of_the_rounds():
    seconds = {"none": [[0.1, 0.1, 9.0, 5.0]] * 4, "ours": [[7.0, 0.103, 0.103, 8.0]] * 4}
    found = prefill.figures(seconds, "none")
    assert found["none"] == {"median_ms": 100.0, "overhead_percent": {"value": 0.0, "low": 0.0, "high": 0.0}}
    assert found["ours"]["median_ms"] == 103.0
    assert found["ours"]["overhead_percent"] == {"value": 3.0, "low": 3.0, "high": 3.0}


def test_the_interval_covers_how_prompts_differ():
    seconds = {"none": [[1.0]] * 6, "ours": [[1.0], [1.2], [1.0], [1.2], [1.0], [1.2]]}
    overhead = prefill.figures(seconds, "none")["ours"]["overhead_percent"]
    assert overhead["value"] == pytest.approx(10.0)
    assert 0 <= overhead["low"] < 7 and 13 < overhead["high"] <= 20


def test_prompts_have_their_length_and_share_nothing(demo_model):
    prompts = prefill.prompts_of(demo_model, [50, 200], 3)
    assert {length: [len(prompt) for prompt in members] for length, members in prompts.items()} == {
        50: [50] * 3,
        200: [200] * 3,
    }
    assert len({tuple(prompt[:20]) for members in prompts.values() for prompt in members}) == 6
    with pytest.raises(ValueError, match="3 prompts of each length take"):
        prefill.prompts_of(demo_model, [10**8], 3)
