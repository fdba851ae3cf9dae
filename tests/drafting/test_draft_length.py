"""Draft lengths by load: against a search over all lengths, and the curve of step times that they rest on."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aasd_testing import fake_v1
from vllm_aasd.drafting.calibration import AcceptanceCalibration, UsualAcceptance
from vllm_aasd.drafting.draft_length import LengthsByLoad, lengths_and_gain, reproducible_lengths
from vllm_aasd.drafting.drafter import GREEDY, NO_ALIGNMENT, SAMPLED, SEEDED, Drafter
from vllm_aasd.drafting.step_time import StepTimeModel, knots

K = 3


def draft_lengths(survival, step_times):
    return lengths_and_gain(survival, step_times)[0]


def survivals(num_requests):
    conditional = st.lists(
        st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9, 1.0]), min_size=num_requests * K, max_size=num_requests * K
    )
    return conditional.map(lambda values: np.cumprod(np.array(values, np.float32).reshape(num_requests, K), axis=1))


@settings(max_examples=150, deadline=None)
@given(
    survival=st.integers(1, 3).flatmap(survivals),
    costs=st.lists(st.floats(0.0, 1.0), min_size=12, max_size=12),
    overhead=st.sampled_from([1.0, 1.1, 2.0]),
)
def test_no_other_lengths_emit_more_tokens_a_second(survival, costs, overhead):
    step_times = 1 + np.cumsum([0.0, *costs])
    num_requests = len(survival)

    def rate(lengths):
        expected = num_requests + sum(survival[row, :length].sum() for row, length in enumerate(lengths))
        return expected / step_times[num_requests + sum(lengths)] / (overhead if sum(lengths) else 1.0)

    chosen, gain = lengths_and_gain(survival, step_times, overhead)
    assert chosen.shape == (num_requests,)
    best = max(rate(lengths) for lengths in itertools.product(range(K + 1), repeat=num_requests))
    assert rate(chosen) == pytest.approx(best, rel=1e-5)
    assert gain == pytest.approx(rate(chosen) / rate([0] * num_requests), rel=1e-5)


def test_reproducible_lengths_are_each_rows_own():
    survival = np.array([[0.9, 0.2, 0.1, 0.05], [0.09, 0.0, 0.0, 0.0]], np.float32)
    assert reproducible_lengths(survival).tolist() == [3, 0]
    assert reproducible_lengths(survival[:1]).tolist() == [3]
    assert reproducible_lengths(survival[:0]).tolist() == []


def test_nothing_is_drafted_beyond_the_curve_or_behind_a_drafts_end():
    free = np.ones(5)
    assert draft_lengths(np.array([[0.9, 0.8, 0.7, 0.6, 0.5]], np.float32), free).tolist() == [3]
    assert draft_lengths(np.array([[0.9, 0.0, 0.0]], np.float32), free).tolist() == [1]
    assert draft_lengths(np.zeros((2, 3), np.float32), free).tolist() == [0, 0]


def device(num_tokens):
    """Seconds of a step: flat up to 16 tokens, then linear."""
    return 0.01 * max(1.0, num_tokens / 16)


def test_the_curve_is_learnt_from_steps_alone():
    model = StepTimeModel(64)
    assert model.relative().tolist() == [1.0] * 65
    rng = np.random.default_rng(0)
    for _ in range(30000):
        num_tokens = int(rng.integers(1, 65))
        model.observe(num_tokens, device(num_tokens) * rng.lognormal(0, 0.1))
    for num_tokens in (1, 8, 16, 32, 64):
        assert model.relative()[num_tokens] == pytest.approx(device(num_tokens) / device(1), rel=0.1)


def warm():
    model = StepTimeModel(64)
    model.warm_start([(count, device(count) * slow) for count in (1, 8, 16, 32, 64) for slow in (1.0, 1.5)])
    return model


def test_a_warm_start_takes_the_fastest_of_each_size():
    for num_tokens in (1, 8, 16, 32, 64):
        assert warm().relative()[num_tokens] == pytest.approx(device(num_tokens) / device(1))


def test_beyond_the_largest_profiled_size_time_grows_with_the_tokens():
    model = StepTimeModel(256)
    model.warm_start([(count, device(count)) for count in (1, 16, 32, 64)])
    assert model.relative()[256] == pytest.approx(device(256) / device(1), rel=0.01)


def test_a_slower_machine_does_not_bend_the_curve():
    model = warm()
    before = model.relative().copy()
    for num_tokens in [4, 20, 40] * 20:
        model.observe(num_tokens, 3 * device(num_tokens))
    np.testing.assert_allclose(model.relative(), before, rtol=0.06)


def test_one_accident_moves_the_curve_by_a_percent_at_most():
    model = warm()
    before = model.relative().copy()
    for _ in range(16):
        model.observe(1, device(1))
    model.observe(32, 1e6)
    for _ in range(16):
        model.observe(1, device(1))
    assert np.max(np.abs(model.relative() / before - 1)) < 0.02


def rising_and_falling(num_tokens):
    """Seconds of a step where matrices of three to six rows have the best kernel, as seen on a CPU in bfloat16."""
    return 0.01 * {1: 1.0, 2: 1.1}.get(num_tokens, 0.85 if num_tokens <= 6 else 1.06 + 0.05 * (num_tokens - 7))


def test_drafts_fill_the_fastest_kernel_and_go_on_only_if_that_pays():
    chooser = LengthsByLoad(32)
    chooser.step_time.warm_start([(int(count), rising_and_falling(count)) for count in knots(32)])
    never = np.zeros(1, np.bool_)
    for conditional, length in ((0.3, 5), (0.6, 5), (0.95, 16)):
        survival = np.cumprod(np.full((1, 16), conditional, np.float32), axis=1)
        assert chooser.choose(survival, never).tolist() == [length]


@pytest.mark.parametrize(("num_requests", "least"), [(1, 2), (2, 1), (3, 0), (6, 0), (32, 0), (40, 0)])
def test_drafts_are_filled_up_to_the_fastest_kernel(num_requests, least):
    chooser = LengthsByLoad(32)
    assert chooser.min_draft_tokens(num_requests) == 0, "nothing is known yet"
    chooser.step_time.warm_start([(int(count), rising_and_falling(count)) for count in knots(32)])
    assert chooser.min_draft_tokens(num_requests) == least


@pytest.mark.parametrize(("draft_length", "length"), [("adaptive", 2), (4, 0)])
def test_v1_fills_drafts_whose_length_follows_the_load(draft_length, length, monkeypatch):
    monkeypatch.setattr(LengthsByLoad, "min_draft_tokens", lambda self, num_requests: 2 if num_requests == 1 else 0)
    runner = fake_v1.FakeRunner(
        {"a": [1, 2, 3, 1, 2]}, verification="strict", min_survival=1.0, draft_length=draft_length
    )
    lengths = []
    for _ in range(20):
        runner.step()
        lengths.append(len(runner.drafts["a"]))
    assert max(lengths) == length and (length == 0 or runner.num_accepted > 0)


def test_what_can_not_be_a_step_is_passed_over():
    model = warm()
    before = model.relative().copy()
    for num_tokens, seconds in [(0, 1.0), (65, 1.0), (3, 0.0), (3, -1.0)] * 20:
        model.observe(num_tokens, seconds)
    assert (model.relative() == before).all()


def served(chooser, overhead, survival, steps, seed=0):
    """Serve steps that take `device`'s time, `overhead` times as long with drafts; returns how many had drafts."""
    rng = np.random.default_rng(seed)
    never = np.zeros(len(survival), np.bool_)
    num_drafted = 0
    for _ in range(steps):
        num_drafts = int(chooser.choose(survival, never).sum())
        seconds = device(len(survival) + num_drafts) * (overhead if num_drafts else 1.0)
        chooser.observe(len(survival) + num_drafts, seconds * rng.lognormal(0, 0.05), num_drafts > 0)
        num_drafted += num_drafts > 0
    return num_drafted


def chooser():
    made = LengthsByLoad(64)
    made.step_time.warm_start([(count, device(count)) for count in (1, 2, 4, 8, 16, 32, 64)])
    return made


WEAK = np.tile(np.cumprod(np.full(2, 0.1, np.float32)), (8, 1))


def test_drafts_that_their_steps_overhead_outweighs_are_found_out():
    """Eight tokens more are free on this device and gain 11 %; what the curve can't see costs 30 %."""
    made = chooser()
    assert served(made, 1.3, WEAK, 100) > 0, "nobody knows yet"
    assert served(made, 1.3, WEAK, 400) < 40


def test_drafts_that_pay_are_made_but_for_a_look_now_and_then():
    made = chooser()
    served(made, 1.0, WEAK, 100)
    assert 0.9 * 400 < served(made, 1.0, WEAK, 400) < 400


def test_drafting_comes_back_when_the_overhead_is_gone():
    made = chooser()
    served(made, 1.3, WEAK, 400)
    served(made, 1.0, WEAK, 600)
    assert served(made, 1.0, WEAK, 400) > 300


def test_the_overhead_does_not_bend_the_curve():
    made = chooser()
    before = made.step_time.relative().copy()
    rng = np.random.default_rng(2)
    for _ in range(3000):
        num_tokens, has_drafts = int(rng.integers(8, 33)), bool(rng.integers(2))
        made.observe(num_tokens, device(num_tokens) * (1.3 if has_drafts else 1.0), has_drafts)
    np.testing.assert_allclose(made.step_time.relative(), before, rtol=0.05)


def test_steps_on_both_sides_of_a_prompt_are_no_neighbours():
    made = StepTimeModel(64)
    made.observe(8, 0.01, has_drafts=False)
    made.skip()
    made.observe(8, 0.1, has_drafts=True)
    assert made.overhead() == 1.0
    made.observe(8, 0.01, has_drafts=False)
    assert made.overhead() > 1.1


def test_a_request_with_a_seed_is_drafted_for_whatever_is_probed():
    made, drafted = chooser(), []
    for _ in range(200):
        lengths = made.choose(WEAK, np.arange(8) == 3)
        drafted.append(int(lengths[3]))
        made.observe(8 + int(lengths.sum()), device(8 + int(lengths.sum())), bool(lengths.any()))
    assert set(drafted) == {1}


@pytest.mark.parametrize("is_known", [False, True])
def test_a_request_whose_drafts_fail_stops_paying_and_is_tried_again(is_known):
    estimate = np.cumprod(np.full(8, 0.5, np.float32))
    price = 1 + 0.25 * np.arange(20)
    calibration, known = AcceptanceCalibration(), np.full(8, is_known)

    def length(known=known):
        return int(draft_lengths(calibration.apply(estimate, known)[None], price)[0])

    assert length() > 0
    steps = 0
    while length():
        calibration.observe(calibration.apply(estimate, known)[: length()], known, 0)
        steps += 1
        assert steps < 200, "it must stop"
    assert steps > 3, "one failure is no reason to stop"
    assert length(~known) > 0, "drafts of the other kind may be better"
    quiet = 0
    while not length():
        calibration.observe(np.empty(0, np.float32), known, 0)
        quiet += 1
        assert quiet < 200, "it must be tried again"


def test_scales_stay_where_estimates_hold():
    rng = np.random.default_rng(1)
    estimate = np.cumprod(np.full(4, 0.6, np.float32))
    calibration, scales = AcceptanceCalibration(), []
    for _ in range(4000):
        is_known = rng.random(4) < 0.5
        survival = calibration.apply(estimate, is_known)
        rejected = np.flatnonzero(rng.random(4) > 0.6)
        calibration.observe(survival, is_known, int(rejected[0]) if len(rejected) else 4)
        scales.append(list(calibration.scales))
    assert np.mean(scales, axis=0) == pytest.approx([1.0, 1.0], abs=0.05)


def test_what_requests_have_in_common_is_known_of_the_next():
    """Half as many tokens are accepted as estimated, but nearly all that are nearly certain, as at a temperature."""
    rng = np.random.default_rng(1)
    usual, own, true = UsualAcceptance(), np.zeros(4, np.bool_), 2.0
    for _ in range(300):
        calibration = AcceptanceCalibration(usual)
        for _ in range(10):
            conditional = rng.choice([0.4, 0.7, 0.98], 4)
            survival = calibration.apply(np.cumprod(conditional, dtype=np.float32), own)
            rejected = np.flatnonzero(rng.random(4) > conditional**true)
            calibration.observe(survival, own, int(rejected[0]) if len(rejected) else 4)
    assert usual.exponents == [pytest.approx(true, abs=0.3), 1.0]
    likely, certain = (AcceptanceCalibration(usual).apply(np.array([p], np.float32), own)[0] for p in (0.7, 0.98))
    assert likely == pytest.approx(0.7**true, abs=0.06) and certain > 0.95


def test_a_seeded_request_depends_on_no_other():
    def drafted(sampling, failures):
        drafter, context = Drafter(64, 4, 0.02), np.array([1, 2, 3, 4, 5, 6, 1, 2], np.int32)
        for number in range(failures):
            drafter.admit(str(number), None, sampling=sampling)
            count = len(drafter.draft(str(number), context, NO_ALIGNMENT, 4)[0])
            drafter.verified(str(number), count, 0)
        drafter.admit("last", None, sampling=sampling)
        return drafter.draft("last", context, NO_ALIGNMENT, 4)[1].tolist()

    assert drafted(SEEDED, 30) == drafted(SEEDED, 0) == drafted(GREEDY, 0)
    assert drafted(SAMPLED, 30)[0] < 0.95 * drafted(SAMPLED, 0)[0]


def test_scaled_survival_is_still_a_survival():
    calibration = AcceptanceCalibration()
    calibration.scales = [1.1, 0.5]
    survival = calibration.apply(np.array([1.0, 0.99, 0.5, 0.4], np.float32), np.array([False, False, False, True]))
    assert survival.tolist() == pytest.approx([1.0, 1.0, 0.5 / 0.99 * 1.1, 0.5 / 0.99 * 1.1 * 0.8 * 0.5])


@pytest.mark.parametrize(("survival", "length"), [(0.09, 0), (0.12, 0), (0.14, 1), (0.5, 1)])
def test_drafts_that_pay_by_a_hair_are_not_made(survival, length):
    """One more token takes a tenth longer."""
    lengths = LengthsByLoad(8)
    lengths.step_time.warm_start([(n, 0.9 + 0.1 * n) for n in range(1, 9)])
    assert lengths.choose(np.array([[survival]]), np.zeros(1, bool)).tolist() == [length]
