"""The router asks the draft model where it is expected to pay, and the survival of its tokens is learned."""

import numpy as np
import pytest

from vllm_aasd.drafting.model_survival import ModelSurvival
from vllm_aasd.drafting.router import LONGEST_DRAFT, MAX_PASS_TOKENS, Candidate, DraftModelRouter
from vllm_aasd.drafting.step_time import StepTimeModel

WIDTH = 8
POOR, GOOD = 0.0, 0.95


def router(price=0.1, per_token=0.02, max_tokens=64):
    """One whose target takes 1 s for a token, and whose draft model takes `price` of that."""
    target = StepTimeModel(max_tokens)
    target.warm_start([(count, 1 + per_token * (count - 1)) for count in (1, max_tokens)])
    made = DraftModelRouter(target)
    made.passes.warm_start([(count, price * (1 + 0.02 * (count - 1))) for count in (1, MAX_PASS_TOKENS)])
    return made


def candidate(row=0, expected=0.8, num_unread=1, num_emitted=0, max_tokens=200, limit=LONGEST_DRAFT, **more):
    return Candidate(row, f"r{row}", expected, num_unread, num_emitted, max_tokens, limit, **more)


def text(*probs):
    """The survival of each request's draft from text, by the probability of each of its tokens."""
    return np.array([np.cumprod(np.full(WIDTH, prob)) for prob in probs], np.float32)


def test_a_cheap_model_drafts_where_text_is_poor_and_not_where_it_is_good():
    assert router().plan([candidate()], text(POOR)).drafted == [candidate()]
    assert router().plan([candidate()], text(GOOD)).drafted == []
    both = [candidate(0), candidate(1)]
    assert router(price=0.03).plan(both, text(GOOD, POOR)).drafted == [candidate(1)]
    assert router().plan(both, text(GOOD, POOR)).drafted == [], "the other's tokens would wait for the passes"


def test_a_model_that_takes_too_long_or_is_always_wrong_is_not_asked():
    assert router(price=0.9).plan([candidate()], text(POOR)).drafted == []
    assert router().plan([candidate(expected=0.05)], text(POOR)).drafted == []
    unknown = router()
    unknown.passes = StepTimeModel(MAX_PASS_TOKENS)
    assert unknown.plan([candidate(), candidate(1, num_unread=99)], text(POOR, POOR))[:2] == ([], [])


def test_the_rate_is_that_of_the_choice():
    # One token without drafts, a step of one token: the draft model gives 1 + .8 + ... for 1 + .1 each, and width.
    expected = max(
        sum(0.8**n for n in range(length + 1)) / (1 + 0.02 * length + 0.1 * length) for length in range(1, 17)
    )
    assert router().plan([candidate()], text(POOR)).rate == pytest.approx(expected, rel=1e-3)
    assert router(price=5).plan([candidate()], text(POOR)).rate == pytest.approx(1.0, rel=1e-3)


def test_a_request_catches_up_only_if_enough_of_it_is_to_come():
    made, long = router(), candidate(num_unread=600, max_tokens=1000)
    first = made.plan([long], text(POOR))
    assert first.drafted == [], "what it hasn't read, it can't go on from"
    for _ in range(20):
        plan = made.plan([long], text(POOR))
    assert plan.catching_up == [long] and plan.drafted == []
    assert made.plan([long._replace(max_tokens=2)], text(POOR)).catching_up == []
    for _ in range(20):
        plan = made.plan([long], text(GOOD))
    assert plan.catching_up == [], "text has become good"


def test_a_few_unread_tokens_are_read_on_the_way():
    plan = router().plan([candidate(num_unread=5)], text(POOR))
    assert plan.drafted == [candidate(num_unread=5)] and plan.catching_up == []


def test_whoever_asks_for_the_model_gets_it_at_any_price():
    pinned = candidate(expected=0.01, is_pinned=True)
    assert router(price=3).plan([pinned], text(GOOD)).drafted == [pinned]
    unread = pinned._replace(num_unread=5000, max_tokens=1)
    assert router(price=3).plan([unread], text(GOOD)).catching_up == [unread]


def test_requests_that_have_ended_leave_only_their_length():
    made = router()
    made.plan([candidate(num_emitted=1000)], text(POOR))
    before = made._mean_length
    made.forget(["r0", "unknown"])
    assert made._mean_length > before and not made._requests


def test_a_draft_ends_where_a_token_is_not_worth_its_time():
    made = router()
    rate = made.plan([candidate()], text(POOR)).rate
    assert made.goes_on(0.9, 0.9, 1, 2, rate)
    assert not made.goes_on(0.1, 0.5, 1, 2, rate)
    assert made.goes_on(0.3, 0.8, 4, 2, rate) and not made.goes_on(0.3, 0.5, 1, 2, rate), "a pass is shared"
    assert not made.goes_on(1.0, 1.0, 1, 64, rate), "no step is that long"


def test_survival_follows_what_became_of_tokens_with_that_confidence():
    rng = np.random.default_rng(0)
    known = ModelSurvival()
    truth = {0.97: 0.99, 0.55: 0.85, 0.25: 0.2}
    for number in range(1500):
        confidence = rng.choice(list(truth))
        known.observe(f"r{number % 50}", [confidence], int(rng.random() < truth[confidence]))
    for confidence, share in truth.items():
        assert known.survival("new", [confidence])[0] == pytest.approx(share, abs=0.08)
    first, second = known.survival("new", [0.97, 0.55])
    assert second == pytest.approx(first * known.survival("new", [0.55])[0], rel=1e-3)


def test_a_request_that_goes_badly_is_expected_to_go_on_so_and_recovers():
    known = ModelSurvival()
    start = known.expected("bad")
    for _ in range(40):
        known.observe("bad", [0.9, 0.9], 0)
    bad = known.expected("bad")
    assert bad < 0.1 < known.expected("other") < start
    assert known.survival("bad", [0.9])[0] < known.survival("other", [0.9])[0]
    for _ in range(30000):
        known.observe("bad", [], 0)
    assert known.expected("bad") == pytest.approx(start, abs=0.05)
    known.forget(["bad", "unknown"])
    assert set(known._requests) == {"other"}
