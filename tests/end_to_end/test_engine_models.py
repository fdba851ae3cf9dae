"""Models of other kinds and several ranks, on both model runners: tokens as without speculation."""

import pytest

from aasd_testing.engines import engine, greedy
from aasd_testing.prompts import real_prompts
from aasd_testing.tiny_models import WINDOW, image_model, lora_adapter, sliding_window_model

pytestmark = [pytest.mark.engine, pytest.mark.long]

ALIGNED = {"aasd_verification": "strict", "num_speculative_tokens": 4, "aasd_alignment": True}
PROMPTS = real_prompts(3, max_chars=140)
RUNNERS = pytest.mark.parametrize("v2", [False, True], ids=["V1", "V2"])


def run(model, rounds, v2, **options):
    """The rounds, and what the engine has logged."""
    with engine(model, v2=v2, **{"max_num_seqs": 3, "block_size": 32, "max_model_len": 512, **options}) as started:
        return [started.run(requests) for requests in rounds], started.log()


@RUNNERS
@pytest.mark.parametrize("hybrid", [False, True], ids=["sliding", "hybrid"])
def test_sliding_windows(demo_model, tmp_path, v2, hybrid):
    model = sliding_window_model(tmp_path / "model", demo_model, hybrid)
    # Longer than the window, and with something to copy.
    prompt = list(range(300, 330)) * 4
    assert len(prompt) > WINDOW
    rounds = [greedy([prompt, prompt[7:]], 24, ignore_eos=True), greedy([prompt], 24, ignore_eos=True)]
    plain, _ = run(model, rounds, v2)
    ours, log = run(model, rounds, v2, aasd=ALIGNED)
    assert [found.token_ids for found in plain] == [found.token_ids for found in ours]
    assert ours[0].accepted > 0
    assert ("no full-attention KV cache group" in log) is not hybrid


@RUNNERS
def test_an_adapter(demo_model, tmp_path, v2):
    # On V2 the lm_head must be left alone; on V1 it is wrapped, as by default.
    options = {"enable_lora": True} | ({"lora_target_modules": ["q_proj", "v_proj"]} if v2 else {})
    bare = greedy(PROMPTS[:2], 16)
    adapter = lora_adapter(tmp_path / "adapter", demo_model)
    adapted = [{**request, "adapter": adapter} for request in bare]
    (without, plain), _ = run(demo_model, [bare, adapted], v2, **options)
    (ours,), log = run(demo_model, [adapted], v2, aasd=ALIGNED, **options)
    assert ours.accepted > 0
    assert plain.token_ids == ours.token_ids != without.token_ids
    assert "with LoRA, predictions are stored for generated tokens only" in log


@RUNNERS
def test_prompts_with_images(demo_model, tmp_path, v2):
    model, image = image_model(tmp_path / "model", demo_model)
    text = list(range(300, 330)) * 2
    asked = greedy([[*text, image], [*text, image], [image, *text, image, *text[:20]]], 40, ignore_eos=True)
    requests = [{**one, "images": seeds} for one, seeds in zip(asked, ([1], [2], [1, 2]), strict=True)]
    rounds = [requests, requests[:1], greedy([text], 24, ignore_eos=True)]
    plain, _ = run(model, rounds, v2)
    ours, _ = run(model, rounds, v2, aasd=ALIGNED)
    assert [found.token_ids for found in plain] == [found.token_ids for found in ours]
    assert plain[0].token_ids[0] not in plain[0].token_ids[1:], "the image matters"
    assert ours[0].accepted > 0, "behind images, too"
    assert ours[1].outputs[0]["num_cached_tokens"] > 0


@pytest.mark.parametrize(
    ("v2", "options"),
    [(False, {}), (True, {}), (True, {"enable_batch_sharded_sampling": True, "gloo": True})],
    ids=["V1", "V2", "V2-sharded-sampling"],
)
def test_several_ranks(demo_model, plain_engine, v2, options):
    # The demo model has 9 heads of attention and 3 of keys, so 3 ranks share them, and 2 don't.
    (ours,), log = run(demo_model, [greedy(PROMPTS, 16)], v2, aasd=ALIGNED, tensor_parallel_size=3, **options)
    assert ours.token_ids == plain_engine.run(greedy(PROMPTS, 16)).token_ids
    assert ours.accepted > 0
    assert "gather whole rows" not in log
