"""Earlier answers on the V2 model runner, its kernels interpreted, through the real engine."""

import pytest

from aasd_testing.engines import engine, greedy, with_options
from aasd_testing.prompts import real_prompts

pytestmark = pytest.mark.engine

PROMPTS = real_prompts(2, max_chars=140)
MAX_TOKENS = 24


def of(salt, **options):
    return [{**request, "salt": salt} for request in with_options(greedy(PROMPTS, MAX_TOKENS), **options)]


def test_answers_are_drafted_from_by_their_tenant_alone(demo_model, plain_engine):
    """Twice the same, then for two other tenants, then for the first again, which wants nothing of it."""
    plain = plain_engine.run(greedy(PROMPTS, MAX_TOKENS)).token_ids
    aasd = {"aasd_verification": "strict", "num_speculative_tokens": 4, "aasd_memory": 4}
    with engine(demo_model, v2=True, aasd=aasd) as v2:
        rounds = [
            v2.run(requests) for requests in (of("one"), of("one"), of("two"), of(None), of("one", aasd_memory="off"))
        ]
        log = v2.log()
    assert [found.token_ids for found in rounds] == [plain] * len(rounds)
    assert all(found.faults == {} for found in rounds) and "failed" not in log
    first, second, *others = (found.accepted for found in rounds)
    # Of five tokens a step, one isn't drafted.
    assert second > 0.6 * sum(map(len, plain)) > 1.5 * first
    # What was found reliable in one namespace is expected of all: drafts may differ, but little.
    assert max(others) < 0.5 * second
