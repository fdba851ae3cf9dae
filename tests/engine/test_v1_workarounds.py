"""A seeded request whose prompt comes in chunks: its generator isn't asked before its turn."""

import types

import numpy as np
import pytest
import torch

from aasd_testing.engines import run_engine
from aasd_testing.prompts import real_prompts
from vllm_aasd.engine.v1.vllm_workarounds import without_discarded_generators


def runner_of(generators, discarded):
    mask = types.SimpleNamespace(np=np.array(discarded))
    return types.SimpleNamespace(input_batch=types.SimpleNamespace(generators=generators), discard_request_mask=mask)


def test_only_the_generators_of_unfinished_prompts_rest():
    generators = {0: torch.Generator().manual_seed(1), 2: torch.Generator().manual_seed(2)}
    whole = dict(generators)
    with without_discarded_generators(runner_of(generators, [True, True, False, True])):
        assert generators == {2: whole[2]}
    assert generators == whole
    with (
        pytest.raises(ZeroDivisionError),
        without_discarded_generators(runner_of(generators, [True, False, True, False])),
    ):
        assert generators == {}
        raise ZeroDivisionError
    assert generators == whole, "whatever happens"


def test_other_devices_generators_are_the_runners():
    generators = {0: types.SimpleNamespace(device=torch.device("cuda"))}
    with without_discarded_generators(runner_of(generators, [True])):
        assert list(generators) == [0]


@pytest.mark.engine
@pytest.mark.long
def test_a_seeded_request_is_served_in_chunks_as_in_one(demo_model, tmp_path):
    prompt = real_prompts(1, max_chars=400)[0]
    params = {"temperature": 0.9, "seed": 3, "max_tokens": 12, "extra_args": {"aasd_enabled": False}}
    round_of_one = [[{"prompt": prompt, "sampling": params}]]
    whole, chunked = (
        run_engine(demo_model, round_of_one, tmp_path / f"{size}.json", aasd={}, max_num_batched_tokens=size)
        for size in (2048, 32)
    )
    (of_whole,), (of_chunked,) = whole["rounds"][0], chunked["rounds"][0]
    assert len(of_whole["prompt_token_ids"]) > 64, "more than two chunks"
    assert of_chunked["token_ids"] == of_whole["token_ids"]
