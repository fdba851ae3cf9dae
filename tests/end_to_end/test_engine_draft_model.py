"""A draft model in the real engine: exact answers, and a KV cache that is right whatever was skipped."""

import pytest

from aasd_testing.engines import engine, greedy, with_options
from aasd_testing.prompts import real_prompts
from aasd_testing.tiny_models import without_layers

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("V1 engines")]

PROMPTS = real_prompts(10, max_chars=700)
MAX_TOKENS = 16
STRICT = {"aasd_verification": "strict", "aasd_allow_request_override": "any"}
# Too few blocks for the batch, and prompts in chunks.
CROWDED = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 128,
    "max_model_len": 1024,
    "block_size": 32,
    "num_gpu_blocks_override": 34,
}


@pytest.fixture(scope="module")
def plain(plain_engine):
    return plain_engine.run(greedy(PROMPTS, MAX_TOKENS)).token_ids


def test_a_model_that_drafts_for_itself_is_always_right(plain, demo_model):
    with engine(demo_model, aasd={**STRICT, "model": demo_model, "aasd_draft_length": 4}, **CROWDED) as started:
        # Text alone leaves blocks in the prefix cache that the draft model has read nothing of.
        text = started.run(with_options(greedy(PROMPTS[:4], MAX_TOKENS), aasd_drafter="text"))
        assert text.token_ids == plain[:4]
        found = started.run(with_options(greedy(PROMPTS, MAX_TOKENS), aasd_drafter="model"))
        assert found.token_ids == plain
        assert found.metrics["vllm:num_preemptions"] > 0
        assert any(output["num_cached_tokens"] for output in found.outputs)
        assert found.drafted > 20
        assert found.accepted == found.drafted, "its KV cache is the target's"
        sampled = [
            {"prompt": prompt, "sampling": {"temperature": 0.8, "max_tokens": 8, "seed": seed}}
            for seed, prompt in enumerate(PROMPTS[:2])
        ]
        mixed = [*greedy(PROMPTS[2:6], MAX_TOKENS), *sampled]
        both = started.run(mixed)
        assert both.token_ids[:4] == plain[2:6]
        assert not (found.faults or text.faults or both.faults)
        assert "aasd: a pass of the draft model takes" in started.log()
        with pytest.raises(Exception, match="aasd_drafter"):
            started.run(with_options(greedy(PROMPTS[:1], 1), aasd_drafter="eagle"))


@pytest.mark.long
def test_a_model_that_is_often_wrong_costs_no_token(plain, demo_model, tmp_path):
    draft = without_layers(tmp_path, demo_model, {18, 22})
    with engine(demo_model, aasd={**STRICT, "model": draft}, **CROWDED) as started:
        for drafter in ("model", "both", "text"):
            found = started.run(with_options(greedy(PROMPTS, MAX_TOKENS), aasd_drafter=drafter))
            assert found.token_ids == plain and not found.faults, drafter
            if drafter == "model":
                assert 0.3 * found.drafted < found.accepted < 0.95 * found.drafted
        failing = started.run(
            with_options(greedy(PROMPTS[:4], MAX_TOKENS), aasd_drafter="model"),
            fault="vllm_aasd.engine.v1.draft_model:DraftModel.predict",
        )
        assert failing.token_ids == plain[:4] and set(failing.faults) == {"draft_model"}
