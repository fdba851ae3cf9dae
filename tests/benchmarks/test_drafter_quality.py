"""Replaying recorded answers: the counts, the reliability, and the search of the constants."""

import math

import numpy as np
import pytest

from benchmarks import drafter_quality, figures, replay, results
from benchmarks.builtin import builtin_tasks
from benchmarks.fitting_tasks import fitting_tasks
from vllm_aasd.drafting.drafter import DEFAULT_WEIGHTS, Drafter
from vllm_aasd.kernels.draft import Prior

SPAN = list(range(10, 30))


def trace(prompt, answer, category="copy"):
    """An answer whose every token the target was nearly sure of."""
    logprobs = [{str(token): math.log(0.9), "1": math.log(0.1)} for token in answer]
    given = {"token_ids": answer, "logprobs": logprobs, "prompt_logprobs": [None] * len(prompt)}
    return replay._trace(category, prompt, given)


def test_predictions_stand_where_the_server_stores_them_for_free():
    found = trace([5, 6, 7], [8, 9])
    assert found.token_ids.tolist() == [5, 6, 7, 8, 9] and found.num_prompt_tokens == 3
    assert found.table[:, 0].tolist() == [-1, -1, 7, 8, -1]
    assert found.table[2, 1:3].tolist() == [8, 1]
    assert found.table[2, 5:7].view(np.float32) == pytest.approx([0.9, 0.1])


def test_a_copy_is_replayed_in_few_steps_and_counted():
    copied = trace([*SPAN, 1, *SPAN[:2]], SPAN[2:])
    found = replay.replay([copied], Drafter(40, 8, 0.0), 8, price=0.01)
    # 18 tokens: one comes from the prompt, two steps of 8 drafts and one token of their own would do.
    assert found.emitted == 17
    assert found.steps <= 4
    assert found.drafted == len(found.predicted) == len(found.accepted)
    assert found.emitted == found.steps + found.accepted.sum()
    assert found.seconds == pytest.approx(found.steps + 0.01 * found.drafted)
    assert found.speed > 4


def test_nothing_is_drafted_at_a_price_beyond_every_gain():
    copied = trace([*SPAN, 1, *SPAN[:2]], SPAN[2:])
    found = replay.replay([copied], Drafter(40, 8, 0.0), 8, price=2.0)
    assert found.drafted == 0 and found.steps == found.emitted == 17 and found.speed == 1.0


def test_a_wrong_draft_costs_its_price():
    misled = trace([2, 3, 4, 2], [3, 7, 8, 9])
    found = replay.replay([misled], Drafter(10, 2, 0.0), 2, price=0.01)
    assert found.drafted > 0 and found.accepted.sum() == 0
    assert found.steps == found.emitted == 3


def test_reliability_is_the_mean_gap_by_bin():
    predicted = np.array([0.05, 0.05, 0.95, 0.95, 1.0])
    accepted = np.array([True, False, True, True, True])
    found = replay.reliability(predicted, accepted)
    assert [entry["count"] for entry in found["bins"]] == [2, 3]
    assert found["ece"] == pytest.approx((2 * 0.45 + 3 * (1 - 2.9 / 3)) / 5)
    assert replay.reliability(np.array([0.5] * 4), np.array([True, False] * 2))["ece"] == 0


def test_constants_survive_being_searched():
    vector = drafter_quality.pack(DEFAULT_WEIGHTS)
    for got, want in zip(drafter_quality.unpack(vector), DEFAULT_WEIGHTS, strict=True):
        np.testing.assert_allclose(got, want)


def test_the_served_constants_are_those_that_were_found():
    found = results.read(results.RESULTS / "fit.json")["fit"]["found"]["weights"]
    np.testing.assert_allclose(drafter_quality.pack(DEFAULT_WEIGHTS), found, rtol=1e-6)


def test_the_search_ends_no_worse_than_it_began():
    rng = np.random.default_rng(0)
    # Matches of one token mislead, longer ones don't: the fit must come to trust the former less.
    traces = [
        trace([*SPAN, *rng.integers(0, 9, 20).tolist(), *SPAN[:3]], [*SPAN[3:9], *rng.integers(0, 9, 12).tolist()])
        for _ in range(4)
    ]
    found = drafter_quality.fit(traces, Prior(np.full((40, 1), -1, np.int32), np.zeros((40, 1), np.float32)))

    def worth(entry):
        values = [math.log(figures["speed"]) - 0.5 * figures["ece"] for figures in entry["figures"].values()]
        return sum(values) / len(values)

    assert worth(found["found"]) > worth(found["start"]) + 0.01


def test_nothing_is_fitted_on_what_is_measured():
    measured = {}
    for task in builtin_tasks():
        measured.setdefault(task.category, []).append(task.text)
    measured = {text for texts in measured.values() for text in texts[:32]}
    fitted = {task.text for task in fitting_tasks()}
    assert len(fitted) == 140
    assert not measured & fitted
    assert [task.text for task in fitting_tasks()] == [task.text for task in fitting_tasks()]


def test_the_figure_shows_every_category_with_its_error():
    result = results.read(results.RESULTS / "calibration.json")
    reliability = result["calibration"]["reliability"]
    titles = [axis.get_title() for axis in figures.calibration(result).axes if axis.get_visible()]
    assert titles == [f"{category}, ECE {entry['ece']:.3f}" for category, entry in reliability.items()]


def test_the_served_drafter_is_calibrated():
    """The bound that the README states, on prompts that the constants were not fitted on."""
    reliability = results.read(results.RESULTS / "calibration.json")["calibration"]["reliability"]
    assert reliability["all"]["ece"] <= 0.05
