"""Models of other kinds and several ranks, on both model runners: tokens as without speculation."""

import pytest

from aasd_testing.engines import drafted_and_accepted, greedy, run_engine, token_ids
from aasd_testing.prompts import real_prompts
from aasd_testing.tiny_models import WINDOW, image_model, lora_adapter, sliding_window_model

pytestmark = [pytest.mark.engine, pytest.mark.long]

STRICT = {"aasd_verification": "strict", "num_speculative_tokens": 4}
PROMPTS = real_prompts(3, max_chars=140)
RUNNERS = pytest.mark.parametrize("v2", [False, True], ids=["V1", "V2"])


def run(model, rounds, out, v2, **options):
    common = {"max_num_seqs": 3, "block_size": 32, "max_model_len": 512}
    return run_engine(model, rounds, out, v2=v2, **{**common, **options})


def accepted(result):
    return drafted_and_accepted(result)[1]


@RUNNERS
@pytest.mark.parametrize("hybrid", [False, True], ids=["sliding", "hybrid"])
def test_sliding_windows(demo_model, tmp_path, v2, hybrid):
    model = sliding_window_model(tmp_path / "model", demo_model, hybrid)
    # Longer than the window, and with something to copy.
    prompt = list(range(300, 330)) * 4
    assert len(prompt) > WINDOW
    rounds = [greedy([prompt, prompt[7:]], 24, ignore_eos=True), greedy([prompt], 24, ignore_eos=True)]
    plain = run(model, rounds, tmp_path / "plain", v2)
    ours = run(model, rounds, tmp_path / "ours", v2, aasd={**STRICT, "aasd_alignment": True})
    assert [token_ids(one) for one in plain["rounds"]] == [token_ids(one) for one in ours["rounds"]]
    assert accepted(ours) > 0
    assert ("no full-attention KV cache group" in ours["log"]) is not hybrid


@RUNNERS
def test_an_adapter(demo_model, tmp_path, v2):
    # On V2 the lm_head must be left alone; on V1 it is wrapped, as by default.
    options = {"enable_lora": True} | ({"lora_target_modules": ["q_proj", "v_proj"]} if v2 else {})
    bare = greedy(PROMPTS[:2], 16)
    adapter = lora_adapter(tmp_path / "adapter", demo_model)
    adapted = [{**request, "adapter": adapter} for request in bare]
    plain = run(demo_model, [bare, adapted], tmp_path / "plain", v2, **options)
    ours = run(demo_model, [adapted], tmp_path / "ours", v2, aasd={**STRICT, "aasd_alignment": True}, **options)
    assert accepted(ours) > 0
    assert token_ids(plain["rounds"][1]) == token_ids(ours["rounds"][0]) != token_ids(plain["rounds"][0])
    assert "with LoRA, predictions are stored for generated tokens only" in ours["log"]


@RUNNERS
def test_prompts_with_images(demo_model, tmp_path, v2):
    model, image = image_model(tmp_path / "model", demo_model)
    text = list(range(300, 330)) * 2
    asked = greedy([[*text, image], [*text, image], [image, *text, image, *text[:20]]], 40, ignore_eos=True)
    requests = [{**one, "images": seeds} for one, seeds in zip(asked, ([1], [2], [1, 2]), strict=True)]
    rounds = [requests, requests[:1], greedy([text], 24, ignore_eos=True)]
    plain = run(model, rounds, tmp_path / "plain", v2)
    ours = run(model, rounds, tmp_path / "ours", v2, aasd={**STRICT, "aasd_alignment": True})
    assert [token_ids(one) for one in plain["rounds"]] == [token_ids(one) for one in ours["rounds"]]
    seen, *_ = token_ids(plain["rounds"][0])
    assert seen not in token_ids(plain["rounds"][0])[1:], "the image matters"
    assert accepted(ours["after"][0]) > 0, "behind images, too"
    assert ours["rounds"][1][0]["num_cached_tokens"] > 0


@pytest.fixture(scope="module")
def one_rank(demo_model, tmp_path_factory):
    return run(demo_model, [greedy(PROMPTS, 16)], tmp_path_factory.mktemp("one") / "out", False)


@pytest.mark.parametrize(
    ("v2", "options"),
    [(False, {}), (True, {}), (True, {"enable_batch_sharded_sampling": True, "gloo": True})],
    ids=["V1", "V2", "V2-sharded-sampling"],
)
def test_several_ranks(demo_model, tmp_path, one_rank, v2, options):
    aasd = {**STRICT, "aasd_alignment": True}
    # The demo model has 9 heads of attention and 3 of keys, so 3 ranks share them, and 2 don't.
    options = {"tensor_parallel_size": 3, **options}
    ours = run(demo_model, [greedy(PROMPTS, 16)], tmp_path / "ours", v2, aasd=aasd, **options)
    assert token_ids(ours["rounds"][0]) == token_ids(one_rank["rounds"][0])
    assert accepted(ours) > 0
    assert "gather whole rows" not in ours["log"]
