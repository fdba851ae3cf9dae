"""What the V1 adapter stores of a step: the predictions at the positions of the context, and nothing else."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from aasd_testing import fake_v1
from aasd_testing.fake_v2 import VOCAB, next_token
from vllm_aasd.alignment import AlignmentStore
from vllm_aasd.engine.failsafe import Faults
from vllm_aasd.engine.v1.alignment import V1Alignment, is_of_context

BLOCK = 4


class Step:
    """Two requests in one step of a worker: one drafted three tokens, the other reads its prompt.

    Rows of the batch: the first request's last token and drafts at positions 5 to 8 (block 1 and 2 of the store), the
    second's prompt positions 0 to 2 (block 3).
    """

    def __init__(self):
        self.store = AlignmentStore(4, BLOCK, 2, torch.device("cpu"))
        tables = SimpleNamespace(
            block_table=SimpleNamespace(np=np.array([[0, 1, 2], [3, 0, 0]], np.int32)),
            block_size=BLOCK,
            slot_mapping=SimpleNamespace(gpu=torch.tensor([5, 6, 7, 8, 12, 13, 14])),
        )
        self.runner = SimpleNamespace(
            input_ids=SimpleNamespace(gpu=torch.arange(20, 27, dtype=torch.int32)),
            input_batch=SimpleNamespace(block_table=[tables]),
        )
        self.faults = Faults()
        model = SimpleNamespace(compute_logits=lambda hidden_states: hidden_states)
        self.alignment = V1Alignment(self.runner, self.store, 0, model, self.faults)
        hidden = 8.0 * torch.nn.functional.one_hot(torch.arange(7), 30).float()
        rows = torch.tensor([0, 1, 2, 3, 6])
        self.state = SimpleNamespace(
            scheduler_output=SimpleNamespace(total_num_scheduled_tokens=7),
            spec_decode_metadata=SimpleNamespace(logits_indices=rows, num_draft_tokens=[3, 0]),
            hidden_states=hidden,
            logits=hidden[rows],
        )

    def held(self):
        """The row of the batch that each written slot's likeliest token names."""
        written = self.store.slots[:, 0] >= 0
        return {int(slot): int(self.store.slots[slot, 1]) for slot in written.nonzero()}


PROMPT = {12: 4, 13: 5, 14: 6}
"""What a prompt of three tokens leaves."""


@pytest.mark.parametrize(
    ("num_emitted", "expected"),
    [
        ([1, 0], {5: 0, **PROMPT}),
        ([3, 0], {5: 0, 6: 1, 7: 2, **PROMPT}),
        ([4, 1], {5: 0, 6: 1, 7: 2, 8: 3, **PROMPT}),
        # Its tokens were thrown away, as after a preemption: its own last token is real all the same.
        ([0, 0], {5: 0, **PROMPT}),
        (None, {5: 0, 6: 1, 7: 2, 8: 3, **PROMPT}),
    ],
)
def test_rejected_draft_tokens_are_not_stored(num_emitted, expected):
    step = Step()
    step.alignment.take_up(step.state)
    step.alignment.write(num_emitted)
    assert step.held() == expected
    assert set(step.faults.counts.values()) == {0}


def test_a_step_is_written_once():
    step = Step()
    step.alignment.write([4, 1])
    assert step.held() == {}
    step.alignment.take_up(step.state)
    step.alignment.write([1, 0])
    step.alignment.write()
    assert step.held() == {5: 0, **PROMPT}


@pytest.mark.parametrize("is_after", [False, True])
def test_what_a_former_owner_of_a_block_left_is_not_drafted_from(is_after):
    """Its entries lie under the same tokens: they can be told by the block's change of hands alone."""
    # The target says 1, after which anything may follow.
    prompt = [1, 6, 1, 7, 1, 8, 1, 9, 0, 0]
    runner = fake_v1.FakeRunner({"a": prompt}, verification="strict", min_survival=0.0)
    if is_after:
        # What such an entry does to a draft.
        runner._entered.clear()
        runner.proposer._alignment.write = lambda *_: None
    says = 8.0 * torch.nn.functional.one_hot(torch.full((len(prompt),), 31), VOCAB).float()
    store = runner.proposer._alignment._store
    store.write(says, torch.tensor(prompt, dtype=torch.int32), torch.arange(len(prompt)))
    runner.step()
    runner.step()
    assert (31 in runner.drafts["a"]) is is_after and runner.drafts["a"]


def test_which_rows_are_of_the_context():
    assert is_of_context([2, 0, 3], [2, 0, 1]).tolist() == [1, 1, 0, 1, 1, 0, 0, 0]
    assert is_of_context([], []).tolist() == []


@pytest.mark.parametrize("is_masked", [False, True])
def test_what_is_stored_of_a_whole_context_is_what_the_target_says(is_masked):
    """A grammar's mask comes in place, between the moment that a step is taken up and that of its drafts."""
    runner = fake_v1.FakeRunner({"a": [1, 2, 4, 1, 2, 6, 1]}, verification="strict")
    runner.masks = is_masked
    for _ in range(30):
        runner.step()
    assert runner.num_accepted > 3
    tokens, view = runner.tokens["a"], runner.proposer._alignment.view(0)
    positions = np.arange(len(tokens) - 1)
    slots = view.block_table[positions // view.block_size] * view.block_size + positions % view.block_size
    assert view.table[slots, 0].tolist() == tokens[:-1]
    says = [next_token(tokens[at - 1] if at else 0, tokens[at]) for at in positions]
    assert view.table[slots, 1].tolist() == says
    assert len(set(says)) > 2 and max(says) < VOCAB


@pytest.mark.parametrize("is_on", [True, False])
def test_predictions_are_stored_at_every_position_or_at_none(is_on):
    runner = fake_v1.FakeRunner({"a": [1, 2, 4, 1, 2, 6, 1]}, verification="strict", alignment=is_on)
    alignment = runner.proposer._alignment
    for _ in range(20):
        runner.step()
    written = 0 if alignment is None else int((alignment._store.table[:, :, 0] >= 0).sum())
    # The last token has not been run.
    assert written == (len(runner.tokens["a"]) - 1 if is_on else 0)
    assert runner.num_accepted > 3
