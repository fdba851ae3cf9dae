"""What a draft model has read: never a token after another context, whatever was drafted, skipped or given away."""

import numpy as np
import pytest

from vllm_aasd.drafting.computed_tokens import ComputedTokens

BLOCK, NUM_BLOCKS = 4, 24


class Reader:
    """A draft model whose KV cache is the context that each slot was read after."""

    def __init__(self):
        self.computed = ComputedTokens(NUM_BLOCKS, BLOCK)
        self.read_after = {}

    def read(self, tokens, blocks, start, end):
        """Read positions of a context as a draft model does; all before must have been read after the same context."""
        blocks = np.array(blocks, np.int32)
        slots = self.computed.slots(blocks, start, end)
        for position, slot in zip(self.computed.slots(blocks, 0, start), range(start), strict=True):
            assert self.read_after[int(position)] == tuple(tokens[: slot + 1])
        for position, slot in enumerate(slots, start):
            self.read_after[int(slot)] = tuple(tokens[: position + 1])
        self.computed.note(np.array(tokens[start:end], np.int32), slots)

    def num_read(self, tokens, blocks):
        return self.computed.num_read(np.array(tokens, np.int32), np.array(blocks, np.int32))


def test_a_rejected_draft_is_read_again_and_all_after_it():
    reader = Reader()
    reader.read([5, 6, 7, 8, 9], [3, 0], 0, 5)
    assert reader.num_read([5, 6, 7, 8, 9, 1], [3, 0]) == 5
    # The same last token as that of the rejected draft, but after another one.
    assert reader.num_read([5, 6, 2, 8, 9], [3, 0]) == 2
    reader.read([5, 6, 2, 8, 9], [3, 0], 2, 3)
    assert reader.num_read([5, 6, 2, 8, 9], [3, 0]) == 3


def test_what_is_shared_is_read_once_and_what_is_given_away_is_forgotten():
    reader = Reader()
    reader.read(list(range(8)), [2, 7], 0, 8)
    assert reader.num_read([0, 1, 2, 3, 9], [2, 5]) == 4
    reader.computed.invalidate([2])
    assert reader.num_read(list(range(8)), [2, 7]) == 0
    reader.read(list(range(8)), [2, 7], 0, 8)
    reader.computed.clear()
    assert reader.num_read(list(range(8)), [2, 7]) == 0


def test_a_context_longer_than_its_blocks_is_read_as_far_as_they_go():
    reader = Reader()
    reader.read([1, 1, 1, 1], [0], 0, 4)
    assert reader.num_read([1] * 9, [0]) == 4
    assert reader.num_read([], [0]) == 0


@pytest.mark.parametrize("seed", range(20))
def test_nothing_counts_as_read_that_was_read_after_another_context(seed):
    """Requests of few different tokens draft, are rejected, are skipped, catch up in parts, and are preempted."""
    rng = np.random.default_rng(seed)
    reader = Reader()
    free = list(rng.permutation(NUM_BLOCKS))
    requests = [{"tokens": [int(t) for t in rng.integers(3, size=5)], "blocks": []} for _ in range(3)]
    num_reused = 0
    for _ in range(300):
        request = requests[rng.integers(3)]
        tokens, blocks = request["tokens"], request["blocks"]
        if rng.random() < 0.03 or len(tokens) > 24:
            # Preempted, or ended: its blocks are another's next, and are forgotten when they become that.
            free += blocks
            request["blocks"] = blocks = []
            if len(tokens) > 24:
                request["tokens"] = tokens = [int(t) for t in rng.integers(3, size=5)]
        drafts = [int(t) for t in rng.integers(3, size=rng.integers(4))]
        while len(blocks) * BLOCK < len(tokens) + len(drafts):
            blocks.append(free.pop(0))
            reader.computed.invalidate(blocks[-1:])
        if rng.random() < 0.6:
            start = reader.num_read(tokens[:-1], blocks)
            num_reused += start
            if rng.random() < 0.4:
                reader.read(tokens, blocks, start, min(start + int(rng.integers(1, 4)), len(tokens)))
            else:
                reader.read(tokens + drafts, blocks, start, len(tokens) + len(drafts))
        request["tokens"] = tokens + [int(t) for t in rng.integers(3, size=rng.integers(1, 4))]
    assert num_reused > 500
