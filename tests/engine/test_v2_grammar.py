"""The scheduler's drafts beside grammars, on the V2 model runner's device state."""

import types

import pytest
import torch

from vllm_aasd.engine.v2.grammar import V2GrammarDrafts
from vllm_aasd.kernels.count import UNPROMISED


@pytest.fixture
def state():
    """Two requests in slots 2 and 0 of three, for which drafts of up to four tokens were made."""
    req_states = types.SimpleNamespace(
        req_id_to_index={"a": 2, "b": 0}, draft_tokens=torch.arange(10, 22).reshape(3, 4).clone()
    )
    survival = torch.full((3, 4), 0.5)

    num_valid = torch.tensor([4, 4, 3], dtype=torch.int32)
    drafts = V2GrammarDrafts(req_states, num_valid, survival)
    drafts.told(["a", "b"], [[18, 19, 20], [10, 11, 12, 13]])
    return types.SimpleNamespace(drafts=drafts, tokens=req_states.draft_tokens, num_valid=num_valid, survival=survival)


def test_drafts_that_are_as_the_scheduler_was_told_are_left(state):
    before = state.tokens.clone()
    state.drafts.write({"a": [18, 19], "b": [10, 11, 12, 13]})
    assert torch.equal(state.tokens, before) and state.num_valid.tolist() == [4, 4, 3]
    assert (state.survival == 0.5).all()


def test_others_are_written_where_they_are_verified(state):
    state.drafts.write({"a": [18, 7, 8, 9], "b": [10], "gone": [1]})
    assert state.tokens[2].tolist() == [18, 7, 8, 9] and state.tokens[0].tolist() == [10, 11, 12, 13]
    assert state.num_valid.tolist() == [4, 4, 4]
    assert (state.survival[2] == UNPROMISED).all() and (state.survival[0] == 0.5).all()


def test_fillers_are_left(state):
    state.drafts.write({"a": [-1, -1, -1]})
    assert state.tokens[2].tolist() == [18, 19, 20, 21]


def test_nothing_is_accepted_if_they_cannot_be_written(state):
    with pytest.raises(RuntimeError):
        state.drafts.write({"a": [7] * 9})
    assert state.num_valid[2] == 0
