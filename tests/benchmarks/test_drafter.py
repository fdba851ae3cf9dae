"""Replaying recorded answers: the counts, the reliability, and the search of the constants."""

import itertools
import math

import numpy as np
import pytest

from benchmarks import drafter, replay, results
from vllm_aasd.drafting.drafter import DEFAULT_WEIGHTS, Drafter
from vllm_aasd.kernels.draft import Prior

SPAN = list(range(10, 30))


def trace(prompt, answer, category="copy"):
    """An answer whose every token the target was nearly sure of."""
    logprobs = [{str(token): math.log(0.9), "1": math.log(0.1)} for token in answer]
    given = {"token_ids": answer, "logprobs": logprobs, "prompt_logprobs": [None] * len(prompt)}
    return replay.trace(category, prompt, given)


def empty_prior():
    return Prior(np.full((40, 1), -1, np.int32), np.zeros((40, 1), np.float32))


def test_predictions_stand_where_the_server_stores_them():
    found = trace([5, 6, 7], [8, 9])
    assert found.token_ids.tolist() == [5, 6, 7, 8, 9] and found.num_prompt_tokens == 3
    assert found.table[:, 0].tolist() == [-1, -1, 7, 8, -1]
    assert found.table[2, 1:3].tolist() == [8, 1]
    assert found.table[2, 5:7].view(np.float32) == pytest.approx([0.9, 0.1])
    whole = found._replace(table=np.ones_like(found.table))
    assert (replay.generated_only(whole).table[:2] == -1).all() and (replay.generated_only(whole).table[2:] == 1).all()


def test_a_copy_is_replayed_in_few_steps_and_counted():
    copied = trace([*SPAN, 1, *SPAN[:2]], SPAN[2:])
    found = replay.replay([copied], Drafter(40, 8, 0.0), 8, price=0.01)
    # 18 tokens: one comes from the prompt, two steps of 8 drafts and one token of their own would do.
    assert found.emitted == 17 == found.steps + found.accepted.sum() and found.steps <= 4
    assert found.drafted == len(found.accepted)
    assert found.seconds == pytest.approx(found.steps + 0.01 * found.drafted) and found.speed > 4
    dear = replay.replay([copied], Drafter(40, 8, 0.0), 8, price=2.0)
    assert dear.drafted == 0 and dear.steps == 17 and dear.speed == 1.0
    whole = replay.replay([copied], Drafter(40, 8, 0.0), 8, price=2.0, lengths=replay.whole_drafts)
    assert whole.drafted >= found.drafted and whole.speed < 1
    # A wrong draft costs its price.
    found = replay.replay([trace([2, 3, 4, 2], [3, 7, 8, 9])], Drafter(10, 2, 0.0), 2, price=0.01)
    assert found.drafted > 0 == found.accepted.sum() and found.steps == found.emitted == 3


def test_reliability_is_the_mean_gap_by_bin():
    predicted, accepted = np.array([0.05, 0.05, 0.95, 0.95, 1.0]), np.array([True, False, True, True, True])
    found = replay.reliability(predicted, accepted)
    assert [count for count, _, _ in found["bins"]] == [2, 3]
    assert found["ece"] == pytest.approx((2 * 0.45 + 3 * (1 - 2.9 / 3)) / 5)


def test_the_search_ends_no_worse_than_it_began_and_the_served_constants_are_those_found():
    constants = drafter.pack(DEFAULT_WEIGHTS)
    np.testing.assert_allclose(drafter.pack(drafter.unpack(constants)), constants)
    served = results.read(results.RESULTS / "fit.json")["fit"]["found"]["weights"]
    np.testing.assert_allclose(constants, served, rtol=1e-3)
    rng = np.random.default_rng(0)
    # Matches of one token mislead, longer ones don't: the fit must come to trust the former less.
    traces = [
        trace([*SPAN, *rng.integers(0, 9, 20).tolist(), *SPAN[:3]], [*SPAN[3:9], *rng.integers(0, 9, 12).tolist()])
        for _ in range(4)
    ]
    found = drafter.fit(traces, empty_prior())

    def worth(entry):
        values = [math.log(figures["speed"]) - 0.5 * figures["ece"] for figures in entry["figures"].values()]
        return sum(values) / len(values)

    assert worth(found["found"]) > worth(found["start"]) + 0.01


def test_every_stage_is_replayed_at_every_price_and_a_gain_is_over_the_stage_before():
    traces = [trace([*SPAN, 1, *SPAN[:2]], SPAN[2:], category) for category in "ab"]
    found = drafter.ablation(traces, empty_prior())
    assert list(found) == list(drafter.STAGES)
    for price in map(str, drafter.PRICES):
        speeds = [of[price]["speed"]["value"] for of in found.values()]
        gains = [of[price]["gain"]["value"] for of in found.values()]
        assert gains == pytest.approx([1, *(b / a for a, b in itertools.pairwise(speeds))])
    assert set(drafter.calibration(traces, empty_prior())) == {"a", "b", "all"}


def test_the_served_drafter_is_calibrated():
    """The bound that the docs state, on prompts that the constants were not fitted on."""
    assert results.read(results.RESULTS / "calibration.json")["calibration"]["all"]["ece"] <= 0.05
