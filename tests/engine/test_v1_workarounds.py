"""vLLM's faults that we mend: generators of prompts in chunks, and penalties beside a prompt of embeddings."""

import types

import numpy as np
import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

from vllm_aasd.engine.v1 import sampler_patches
from vllm_aasd.engine.v1.vllm_workarounds import without_discarded_generators

VOCAB = 12
NO_PENALTY, PENALTY = {}, {"repetition_penalty": 2.0}


@pytest.fixture
def installed():
    replacements = sampler_patches.install()
    yield
    for replacement in replacements:
        replacement.undo()


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


def batch_of(*former):
    """vLLM's batch, its rows left by `former` requests: each a prompt and the drafts that were scheduled for it."""
    batch = InputBatch(4, 64, 64, torch.device("cpu"), VOCAB, [16], [4], num_spec_tokens=4)
    for row, (prompt, drafts) in enumerate(former):
        request = add(batch, f"former-{row}", prompt)
        batch.update_req_spec_token_ids(request, {request.req_id: drafts})
    batch.refresh_metadata()
    for row in range(len(former)):
        batch.remove_request(f"former-{row}")
    batch.condense()
    batch.refresh_metadata()
    return batch


def add(batch, req_id, prompt, output=(), embeds=0, is_token_ids=None, **sampling):
    """A request enters, with a prompt of tokens, of so many embeddings, or, with `is_token_ids`, of both."""
    request = CachedRequestState(
        req_id=req_id,
        prompt_token_ids=prompt,
        prompt_embeds=torch.zeros(embeds, 8) if embeds else None,
        prompt_is_token_ids=is_token_ids,
        mm_features=[],
        sampling_params=SamplingParams(temperature=0.0, **sampling),
        generator=None,
        block_ids=([0],),
        num_computed_tokens=0,
        output_token_ids=list(output),
    )
    batch.add_request(request)
    return request


def penalized(batch):
    """By request, the tokens whose logits the penalties of its batch have changed."""
    batch.refresh_metadata()
    metadata = batch.sampling_metadata
    logits = torch.ones(batch.num_reqs, VOCAB)
    logits = Sampler.apply_penalties(logits, metadata, metadata.output_token_ids)
    return {req_id: (row != 1).nonzero().flatten().tolist() for req_id, row in zip(batch.req_ids, logits, strict=True)}


@pytest.mark.parametrize(("of_embeds", "expected"), [(NO_PENALTY, []), (PENALTY, [8])])
def test_penalties_do_not_read_what_a_former_request_has_left_in_the_row_of_embeddings(installed, of_embeds, expected):
    """vLLM's scheduler drafts -1 for a one-token prompt, so that its first step is as wide as the others'."""
    batch = batch_of(([5], [-1] * 4), ([6, 7, 9], []))
    add(batch, "embedded", None, output=[8], embeds=6, **of_embeds)
    add(batch, "longer", None, output=[8], embeds=9, **of_embeds)
    add(batch, "text", [1, 2, 1], output=[3], **PENALTY)
    assert penalized(batch) == {"embedded": expected, "longer": expected, "text": [1, 2, 3]}


def test_a_request_of_embeddings_keeps_its_row_apart_as_rows_move(installed):
    batch = batch_of(([5], [-1] * 4), ([6, 7, 9], []), ([10] * 8, []))
    add(batch, "first", [4, 4])
    add(batch, "text", [1, 2], output=[3], **PENALTY)
    add(batch, "embedded", None, output=[8], embeds=6, **PENALTY)
    batch.refresh_metadata()
    batch.remove_request("first")
    batch.condense()
    assert penalized(batch) == {"embedded": [8], "text": [1, 2, 3]}
    batch.swap_states(0, 1)
    assert penalized(batch) == {"text": [1, 2, 3], "embedded": [8]}


def test_the_tokens_between_embeddings_are_penalized(installed):
    """The ids that stand for embeddings may be any; vLLM replaces them where it embeds a prompt."""
    batch = batch_of()
    is_token_ids = [True, False, False, True]
    add(batch, "mixed", [1, VOCAB + 5, 7, 2], output=[3], embeds=4, is_token_ids=is_token_ids, **PENALTY)
    assert penalized(batch) == {"mixed": [1, 2, 3]}
