"""The alignment store of the real engine holds what vLLM itself reports as the prompt's log-probabilities."""

import math

import pytest

from aasd_testing.engines import greedy, run_engine
from aasd_testing.prompts import real_prompts

pytestmark = pytest.mark.engine

# float32 throughout; what is left is the shape of the matrix product: a chunk here, all rows there.
PROBABILITY_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def result(demo_model, tmp_path_factory):
    """One prompt with vLLM's prompt log-probabilities (which bypass the prefix cache), then again from the cache."""
    prompt = real_prompts(1, max_chars=2000)
    rounds = [greedy(prompt, 2, prompt_logprobs=4), greedy(prompt, 2)]
    out = tmp_path_factory.mktemp("store") / "out.json"
    return run_engine(
        demo_model,
        rounds,
        out,
        aasd={"aasd_alignment": True},
        record_store=True,
        block_size=32,
        max_num_batched_tokens=128,
    )


@pytest.mark.parametrize("round_index", [0, 1], ids=["cold", "prefix hit"])
def test_entries_equal_prompt_logprobs(result, round_index):
    want = result["rounds"][0][0]["prompt_logprobs"]
    got = result["store"][0 if round_index == 0 else len(result["store"]) // 2]
    num_prompt_tokens = len(want)
    assert num_prompt_tokens > 256, "several chunks and several blocks"
    assert all(got["fresh"][: num_prompt_tokens - 1])
    for position in range(num_prompt_tokens - 1):
        # vLLM reports at p + 1 what the target predicts at p, and adds the prompt's own token to the top 4.
        expected = sorted(want[position + 1].items(), key=lambda item: -item[1])
        ids, probs = got["ids"][position], got["probs"][position]
        assert ids[0] == int(expected[0][0])
        for token, prob in zip(ids, probs, strict=True):
            assert prob == pytest.approx(math.exp(want[position + 1][str(token)]), abs=PROBABILITY_TOLERANCE)


def test_the_second_round_came_from_the_prefix_cache(result):
    assert result["rounds"][1][0]["num_cached_tokens"] >= 256
    assert result["rounds"][1][0]["token_ids"] == result["rounds"][0][0]["token_ids"]


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.long)], ids=["V1", "V2"])
def planted(request, demo_model, tmp_path_factory):
    """Two contexts of the same tokens but the first, in blocks full of entries of this token; the second one twice."""
    prompts = [[first, *[500] * 120] for first in (501, 502, 502)]
    out = tmp_path_factory.mktemp("planted") / "out.json"
    return run_engine(
        demo_model,
        [greedy([prompt], 6) for prompt in prompts],
        out,
        v2=request.param,
        # What is planted has only generated positions written, so that what is found elsewhere is another's.
        aasd={"aasd_alignment": True, "aasd_prior": False, "num_speculative_tokens": 4},
        record_store=True,
        plant=[500, 777],
        block_size=32,
        max_model_len=192,
        num_gpu_blocks_override=8,
    )


def test_what_lies_in_blocks_of_other_contexts_is_not_read(planted):
    """Until a prefix-cache hit shares them, which is the case in the last round."""
    of = {number: [at for at in planted["store"] if at["round"] == number] for number in (1, 2)}
    assert sum(of[1][0]["fresh"]) == 1, "where the first token was sampled"
    assert planted["rounds"][2][0]["num_cached_tokens"] == 96
    assert of[2][0]["fresh"] == [False, *[True] * 95, *[False] * 24, True]
    assert planted["rounds"][2][0]["token_ids"] == planted["rounds"][1][0]["token_ids"]
