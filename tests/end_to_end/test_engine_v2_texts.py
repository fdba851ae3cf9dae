"""Earlier answers on the V2 model runner, its kernels interpreted, through the real engine."""

import pytest

from aasd_testing.engines import drafted_and_accepted, greedy, run_engine, token_ids

pytestmark = pytest.mark.engine

# Their answers repeat little of them.
PROMPTS = ["Write two sentences about the sea.", "Why do cats sleep so much?"]
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def rounds(demo_model, tmp_path_factory):
    """Twice the same, then of two other tenants, then of the first again, who wants nothing of it."""

    def of(salt, **sampling):
        return [{**request, "salt": salt} for request in greedy(PROMPTS, MAX_TOKENS, **sampling)]

    folder = tmp_path_factory.mktemp("texts")
    off = of("one", extra_args={"aasd_memory": "off"})
    requests = [of("one"), of("one"), of("two"), of(None), off]
    plain = run_engine(demo_model, requests[:1], folder / "plain", max_num_seqs=3, block_size=32)
    aasd = {"aasd_verification": "strict", "num_speculative_tokens": 4, "aasd_memory": 4}
    result = run_engine(demo_model, requests, folder / "v2", v2=True, aasd=aasd)
    return plain, result


def test_every_answer_is_what_the_target_says_alone(rounds):
    plain, result = rounds
    assert [token_ids(outputs) for outputs in result["rounds"]] == [token_ids(plain["rounds"][0])] * 5
    assert "aasd: a fault" not in result["log"] and "failed" not in result["log"]


def test_the_second_time_takes_fewer_steps_and_another_tenant_as_many_as_the_first(rounds):
    accepted = [drafted_and_accepted(after)[1] for after in rounds[1]["after"]]
    num_tokens = sum(map(len, token_ids(rounds[1]["rounds"][0])))
    steps = [num_tokens - (now - before) for before, now in zip([0, *accepted], accepted, strict=False)]
    assert steps[1] < 0.6 * steps[0], steps
    # They find no text, and draft from their own context as the first did.
    assert min(steps[2:]) > 0.9 * steps[0], steps
