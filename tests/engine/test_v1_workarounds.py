"""A seeded request whose prompt comes in chunks: its generator isn't asked before its turn."""

import types

import numpy as np
import pytest
import torch

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
