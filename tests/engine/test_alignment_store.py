"""AlignmentStore: entries survive by slot, and stale ones are recognised."""

import pytest
import torch

from aasd_testing.alignment_rows import read
from vllm_aasd.alignment import AlignmentStore


def ids(*values):
    return torch.tensor(values, dtype=torch.int32)


def predictions(*top):
    """Return a row of logits over 10 tokens for each (best, second) pair: probabilities 0.73 and 0.27."""
    logits = torch.full((len(top), 10), -50.0)
    for row, (best, second) in enumerate(top):
        logits[row, best], logits[row, second] = 1.0, 0.0
    return logits


@pytest.fixture
def store():
    return AlignmentStore(num_blocks=3, block_size=4, top_k=2, device="cpu")


def test_a_new_store_holds_nothing(store):
    every_slot = torch.arange(12)
    for token in (0, -1, 5):
        _, probs, fresh = read(store, torch.full((12,), token), every_slot)
        assert not fresh.any() and not probs.any()
    assert store.table.shape == (3, 4, 5)


def test_what_was_written_is_read_back(store):
    store.write(predictions((3, 4), (5, 6), (7, 8)), ids(1, 2, 3), torch.tensor([0, 11, 6]))
    top, probs, fresh = read(store, ids(3, 1, 2), torch.tensor([6, 0, 11]))
    assert fresh.all()
    assert top.tolist() == [[7, 8], [3, 4], [5, 6]]
    torch.testing.assert_close(probs, torch.tensor([[0.7310586, 0.2689414]] * 3))
    assert top.dtype == torch.int32 and probs.dtype == torch.float32


def test_an_entry_of_another_token_is_stale(store):
    store.write(predictions((3, 4)), ids(1), torch.tensor([5]))
    _, probs, fresh = read(store, ids(2, 1), torch.tensor([5, 5]))
    assert fresh.tolist() == [False, True]
    assert not probs[0].any() and probs[1].all()


def test_slot_minus_one_is_neither_written_nor_fresh(store):
    before = store.table.clone()
    store.write(predictions((3, 4)), ids(1), torch.tensor([-1]))
    assert torch.equal(store.table, before)
    store.write(predictions((3, 4)), ids(1), torch.tensor([0]))
    _, probs, fresh = read(store, ids(1), torch.tensor([-1]))
    assert not fresh.any() and not probs.any()


def test_the_numpy_view_shares_memory(store):
    view = store.numpy()
    assert view.shape == (12, 5) and (view[:, 0] == -1).all()
    store.write(predictions((3, 4)), ids(1), torch.tensor([9]))
    assert view[9, :3].tolist() == [1, 3, 4]
    view[9, 0] = 8
    assert read(store, ids(8), torch.tensor([9]))[2].all()


def test_blocks_that_change_hands_are_forgotten_and_no_others(store):
    slots = torch.arange(12)
    store.write(predictions(*[(1, 2)] * 12), ids(*range(12)), slots)
    store.invalidate([2, 0, 2])
    assert read(store, ids(*range(12)), slots)[2].tolist() == [False] * 4 + [True] * 4 + [False] * 4
    store.invalidate([])
    store.write(predictions((7, 8)), ids(9), torch.tensor([9]))
    assert read(store, ids(9), torch.tensor([9]))[0][0].tolist() == [7, 8]
    store.clear()
    assert not read(store, ids(*range(12)), slots)[2].any()


def test_bad_sizes_are_named(store):
    for bad, message in [
        ((0, 4, 2), "^num_blocks is 0"),
        ((3, 0, 2), "^block_size is 0"),
        ((3, 4, 0), r"^top_k is 0, must lie in \[1, 8\]"),
        ((3, 4, 9), r"^top_k is 9, must lie in \[1, 8\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            AlignmentStore(*bad, "cpu")
    with pytest.raises(ValueError, match="slot_mapping"):
        store.write(predictions((3, 4)), ids(1), torch.tensor([12]))
    with pytest.raises(ValueError, match=r"^block_ids holds 0 to 3, must lie in \[0, 3\)"):
        store.invalidate([0, 3])
    with pytest.raises(ValueError, match="numpy view needs 'cpu'"):
        AlignmentStore(1, 1, 1, "meta").numpy()
