"""Draft lengths by load, learned on a simulated device: never worse than no drafts, and near the best that there is."""

import numpy as np
import pytest

from aasd_testing.device import Device
from vllm_aasd.drafting.batch_draft_length import BatchDraftLength

MAX_REQUESTS = 256
WIDTHS = (0, 1, 3, 7)
BY_REQUESTS = [0] + [next((w for last, w in ((4, 7), (16, 3), (128, 1)) if n <= last), 0) for n in range(1, 257)]
MANY_TOKENS = 1 << 20


def learner(by_requests=BY_REQUESTS, max_tokens=MANY_TOKENS):
    return BatchDraftLength(by_requests, max_tokens)


class Run:
    """Steps of a full batch in the order of asynchronous scheduling: the next width is chosen before a step is done."""

    def __init__(self, widths, num_requests, answer=200):
        self._widths, self._num_requests = widths, num_requests
        self._remaining = np.full(num_requests, answer)
        self._answer = answer
        self._num_new = num_requests
        self._width = widths.choose(num_requests)
        self.chosen = []

    def speed_up(self, device, num_steps):
        """Over no drafts on the same device."""
        tokens = seconds = 0.0
        for _ in range(num_steps):
            following = self._widths.choose(self._num_requests)
            accepted = device.accepted(self._num_requests, self._width)
            took = device.seconds(self._num_requests, self._width)
            self._widths.observe(self._num_requests, self._num_new, self._width, accepted, took)
            emitted = 1 + np.array(accepted or [0] * self._num_requests)
            self._remaining -= emitted
            self._num_new = int((self._remaining <= 0).sum())
            self._remaining[self._remaining <= 0] = self._answer
            tokens, seconds = tokens + emitted.sum(), seconds + took
            self.chosen.append(self._width)
            self._width = following
        plain = 1e-2 * (1 + 2 * device.hiccups)
        return tokens / seconds / (self._num_requests / plain)


@pytest.mark.parametrize("num_requests", [1, 4, 5, 16, 17, 128, 129, 256])
def test_begins_with_what_it_is_given(num_requests):
    assert learner().choose(num_requests) == BY_REQUESTS[num_requests]


@pytest.mark.parametrize("num_requests", [1, 8, 64, 256])
@pytest.mark.parametrize("accepts", [(0.0, 0.0), (0.1, 0.4), (0.34, 0.7), (0.7, 0.85)])
@pytest.mark.parametrize("cost", [0.0005, 0.005, 0.05])
def test_near_the_best_width_and_never_worse_than_none(num_requests, accepts, cost):
    device = Device(*accepts, cost)
    run = Run(learner(), num_requests)
    run.speed_up(device, 800)
    found = run.speed_up(device, 1000)
    best = max(device.speed_up(num_requests, width) for width in WIDTHS)
    assert found > 0.97
    assert found > 0.93 * best


def test_what_it_begins_with_costs_little_where_drafts_are_of_no_use():
    # Everything is rejected, and the first widths would take 1.4 to 3.2 times as long for ever.
    for num_requests in (4, 16, 49, 64, 128):
        assert Run(learner(), num_requests).speed_up(Device(0.0, 0.0, 0.035), 300) > 0.9


@pytest.mark.parametrize(("answer", "num_steps"), [(200, 600), (10**6, 1500)])
def test_another_kind_of_answers_is_noticed(answer, num_steps):
    """By what begins, and in what goes on."""
    rejecting, copying = Device(0.02, 0.1, 0.02), Device(0.9, 0.95, 0.02)
    run = Run(learner(), 8, answer)
    run.speed_up(rejecting, num_steps)
    assert np.mean(run.chosen[-100:]) < 0.5
    run.speed_up(copying, num_steps)
    assert np.mean(run.chosen[-100:]) > 6
    run.speed_up(rejecting, num_steps)
    assert np.mean(run.chosen[-100:]) < 0.5


def test_probes_are_rare_and_rarer_where_they_cost():
    shares = []
    for cost in (0.002, 0.2):
        run = Run(learner(), 16)
        # Without hiccups, which can make a length look cheap for a while.
        device = Device(0.0, 0.0, cost, hiccups=0.0)
        run.speed_up(device, 500)
        run.chosen.clear()
        run.speed_up(device, 3000)
        shares.append(np.count_nonzero(run.chosen) / 3000)
    assert 0 < shares[1] < shares[0] / 2
    assert shares[0] < 1 / 33


def step(widths, width, seconds, num_requests=8, accepted=(), num_new=0):
    widths.observe(num_requests, num_new, width, accepted, seconds)


def dear(widths, **kwargs):
    """Have it see a first draft token that takes as long as a step, twice."""
    for width in (0, 1, 0):
        step(widths, width, 0.01 * (1 + width), **kwargs)


def settled(widths, num_requests=8):
    """The width that it keeps to, probes aside."""
    return max(set(found := [widths.choose(num_requests) for _ in range(7)]), key=found.count)


def test_a_price_is_learned_from_neighbours_alone():
    by_requests = [0] + [1] * MAX_REQUESTS
    assert settled(learner(by_requests)) == 1
    widths = learner(by_requests)
    dear(widths)
    assert settled(widths) == 0
    assert settled(widths, 64) == 1, "other loads have their own prices"
    widths = learner(by_requests)
    for width in (0, 1, 0):
        step(widths, width, 0.01 * (1 + width))
        # A prompt was read in between.
        step(widths, 1, None)
    assert settled(widths) == 1
    widths = learner(by_requests)
    for num_requests, width in ((8, 0), (15, 1), (8, 0)):
        step(widths, width, 0.01 * (1 + width), num_requests)
    assert settled(widths) == 1, "of another batch"
    widths = learner(by_requests)
    for _ in range(6):
        dear(widths, num_requests=64)
        dear(widths, num_requests=67)
    assert settled(widths, 64) == 0, "a few more or less are the same"


def test_no_single_step_says_much():
    widths = learner([0] + [1] * MAX_REQUESTS)
    for width in (0, 1) * 8 + (0,):
        step(widths, width, 0.01)
    step(widths, 1, 10.0)
    assert settled(widths) == 1


def test_all_requests_find_room():
    widths = learner(max_tokens=20)
    assert settled(widths, 4) == 3, "five positions each"
    widths = learner(max_tokens=32)
    assert settled(widths, 4) == 7
    widths = learner([0, *[7] * MAX_REQUESTS], max_tokens=256)
    assert [settled(widths, n) for n in (32, 33, 256)] == [7, 0, 0]
    run = Run(learner(max_tokens=40), 8)
    run.speed_up(Device(0.9, 0.95, 0.0), 300)
    assert max(run.chosen) == 3


def test_lengths_that_it_does_not_begin_with_are_found():
    run = Run(BatchDraftLength([0] + [1] * MAX_REQUESTS, MANY_TOKENS, (7, 3)), 4)
    run.speed_up(Device(0.9, 0.95, 0.0), 800)
    assert run.chosen[1] == 1 and np.mean(run.chosen[-100:]) > 6


def test_who_begins_brings_what_is_usual():
    widths = learner()
    usual = widths.survival()
    for _ in range(20):
        step(widths, 7, 0.01, 4, [0, 0, 0, 0])
    rejected = widths.survival()
    assert rejected[0] < 0.1 < usual[0]
    step(widths, 7, None, 4, [], num_new=1)
    assert rejected[0] < widths.survival()[0] < usual[0]
    step(widths, 7, None, 1, [], num_new=1)
    again = widths.survival()
    assert again[0] > 0.1
    for _ in range(2000):
        step(widths, 7, 0.01, 4, [0, 0, 0, 0])
    step(widths, 7, None, 1, [], num_new=1)
    assert widths.survival()[0] < 0.02, "what is usual is learned too"
    assert np.isfinite(widths.survival()).all()


def test_survival_is_the_share_that_got_so_far():
    widths = learner()
    device = Device(0.6, 0.5, 0.0)
    for _ in range(400):
        step(widths, 3, 0.01, 32, device.accepted(32, 3))
    expected = [0.6 * 0.5**at for at in range(3)]
    assert widths.survival()[:3] == pytest.approx(expected, abs=0.05)
    assert (np.diff(widths.survival()) <= 0).all()
