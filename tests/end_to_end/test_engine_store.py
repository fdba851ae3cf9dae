"""The alignment store of the real engine holds what vLLM itself reports as the prompt's log-probabilities."""

import math

import pytest

from aasd_testing.engines import engine, greedy
from aasd_testing.prompts import real_prompts

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("V1 engines")]

# float32 throughout; what is left is the shape of the matrix product: a chunk here, all rows there.
PROBABILITY_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def rounds(aasd_engine):
    """One prompt with vLLM's prompt log-probabilities (which bypass the prefix cache), then again from the cache."""
    prompt = real_prompts(1, max_chars=2000)
    return [aasd_engine.run(greedy(prompt, 2, **more), record="store") for more in ({"prompt_logprobs": 4}, {})]


@pytest.mark.parametrize("round_index", [0, 1], ids=["cold", "prefix hit"])
def test_entries_equal_prompt_logprobs(rounds, round_index):
    want = rounds[0].outputs[0]["prompt_logprobs"]
    got = rounds[round_index].records[0]
    num_prompt_tokens = len(want)
    assert num_prompt_tokens > 256, "several chunks and several blocks"
    assert all(got["fresh"][: num_prompt_tokens - 1])
    for position in range(num_prompt_tokens - 1):
        # vLLM reports at p + 1 what the target predicts at p, and adds the prompt's own token to the top 4.
        expected = max(want[position + 1].items(), key=lambda item: item[1])
        ids, probs = got["ids"][position], got["probs"][position]
        assert ids[0] == expected[0]
        for token, prob in zip(ids, probs, strict=True):
            assert prob == pytest.approx(math.exp(want[position + 1][token]), abs=PROBABILITY_TOLERANCE)


def test_the_second_round_came_from_the_prefix_cache(rounds):
    assert rounds[1].outputs[0]["num_cached_tokens"] >= 256
    assert rounds[1].token_ids == rounds[0].token_ids


@pytest.mark.parametrize("v2", [False, pytest.param(True, marks=pytest.mark.long)], ids=["V1", "V2"])
def test_what_lies_in_blocks_of_other_contexts_is_not_read(v2, demo_model):
    """Until a prefix-cache hit shares them. Two contexts of the same tokens but the first, in blocks full of entries of
    this token; the second one twice."""
    # What is planted has only generated positions written, so that what is found elsewhere is another's.
    aasd = {"aasd_alignment": True, "num_speculative_tokens": 4}
    options = {"block_size": 32, "max_model_len": 192, "num_gpu_blocks_override": 8}
    with engine(demo_model, aasd=aasd, v2=v2, **options) as started:
        started.run(greedy([[501, *[500] * 120]], 6))
        started.plant(500, 777)
        first = started.run(greedy([[502, *[500] * 120]], 6), record="store")
        started.plant(500, 777)
        again = started.run(greedy([[502, *[500] * 120]], 6), record="store")
    assert sum(first.records[0]["fresh"]) == 1, "where the first token was sampled"
    assert again.outputs[0]["num_cached_tokens"] == 96
    assert again.records[0]["fresh"] == [False, *[True] * 95, *[False] * 24, True]
    assert again.token_ids == first.token_ids
