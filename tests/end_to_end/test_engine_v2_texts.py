"""Earlier answers on the V2 model runner, its kernels interpreted, through the real engine."""

import pytest

from aasd_testing.engines import engine, greedy, with_options

pytestmark = pytest.mark.engine

# Their answers repeat little of them.
PROMPTS = ["Write two sentences about the sea.", "Why do cats sleep so much?"]
MAX_TOKENS = 24


def of(salt, **options):
    return [{**request, "salt": salt} for request in with_options(greedy(PROMPTS, MAX_TOKENS), **options)]


def test_answers_are_drafted_from_by_their_tenant_alone(demo_model, plain_engine):
    """Twice the same, then for two other tenants, then for the first again, which wants nothing of it."""
    plain = plain_engine.run(greedy(PROMPTS, MAX_TOKENS)).token_ids
    aasd = {"aasd_verification": "strict", "num_speculative_tokens": 4, "aasd_memory": 4}
    requests = [of("one"), of("one"), of("two"), of(None), of("one", aasd_memory="off")]
    with engine(demo_model, v2=True, aasd=aasd) as v2:
        rounds = [v2.run(of_round) for of_round in requests]
        log = v2.log()
    assert [found.token_ids for found in rounds] == [plain] * len(rounds)
    assert all(found.faults == {} for found in rounds) and "failed" not in log
    steps = [sum(map(len, plain)) - found.accepted for found in rounds]
    assert steps[1] < 0.6 * steps[0], steps
    # They find no text, and draft from their own context as the first did.
    assert min(steps[2:]) > 0.9 * steps[0], steps
