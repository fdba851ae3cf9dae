"""The alignment store under random operations of a paged KV cache, against what its blocks were written with."""

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from aasd_testing.alignment_rows import read
from vllm_aasd.alignment import AlignmentStore
from vllm_aasd.kernels.align import cpu as align_cpu

BLOCK, NUM_BLOCKS, VOCAB = 4, 9, 3
PREDICTED = 1 << 12
"""Predicted tokens: so many that two contexts hardly share one."""


def prediction(prefix):
    """The target's likeliest token behind a prefix: a function of all of it."""
    code = 1
    for token in prefix:
        code = (code * 31 + token + 7) % 1_000_003
    return code % PREDICTED


class Request:
    """Its tokens, those whose KV is there, and the blocks that hold it."""

    def __init__(self, tokens, num_computed, blocks):
        self.tokens, self.num_computed, self.blocks = tokens, num_computed, blocks

    def slot(self, position):
        return self.blocks[position // BLOCK] * BLOCK + position % BLOCK


class PagedCache(RuleBasedStateMachine):
    """vLLM's KV cache in small, and the store beside it.

    Blocks are counted; full ones of computed tokens can be found by their prefix until somebody else takes them; of the
    free ones, the longest unused is taken. KV is never cleared, so blocks are full of what others left.
    """

    def __init__(self):
        super().__init__()
        self.store = AlignmentStore(NUM_BLOCKS, BLOCK, 2, "cpu")
        self.kv = {}  # by slot, the prefix whose KV it holds
        self.stored = {}  # by slot, the prefix whose prediction was stored last
        self.copied = set()  # slots whose KV was copied, not computed
        self.references = [0] * NUM_BLOCKS
        self.free = list(range(NUM_BLOCKS))
        self.cached = {}  # by prefix, a full block that ends with it
        self.running, self.waiting = [], []

    @initialize(aligns_prompts=st.booleans())
    def configure(self, aligns_prompts):
        self.aligns_prompts = aligns_prompts

    # The cache

    def take(self, block=None):
        """A block for one more request: this one, or the free one that was longest unused."""
        if block is None:
            block = self.free[0]
            self.cached = {prefix: held for prefix, held in self.cached.items() if held != block}
            self.store.invalidate([block])
            self.stored = {slot: prefix for slot, prefix in self.stored.items() if slot // BLOCK != block}
            self.copied = {slot for slot in self.copied if slot // BLOCK != block}
        if block in self.free:
            self.free.remove(block)
        self.references[block] += 1
        return block

    def give_back(self, request):
        # Later blocks first, so that the beginnings of contexts live longest.
        for block in reversed(request.blocks):
            self.references[block] -= 1
            if self.references[block] == 0:
                self.free.append(block)

    def enter(self, tokens):
        """Whatever is found of the beginning is shared; at least one token is left to be run."""
        request = Request(tokens, 0, [])
        while request.num_computed + BLOCK < len(tokens):
            block = self.cached.get(tuple(tokens[: request.num_computed + BLOCK]))
            if block is None:
                break
            request.blocks.append(self.take(block))
            request.num_computed += BLOCK
        self.running.append(request)

    def run(self, request, count, drafts=()):
        """A step over the next `count` tokens and a draft; False if there is no room for them."""
        tokens = request.tokens[: request.num_computed + count] + list(drafts)
        missing = -(-len(tokens) // BLOCK) - len(request.blocks)
        if missing > len(self.free):
            return False
        request.blocks += [self.take() for _ in range(missing)]
        positions = range(request.num_computed, len(tokens))
        is_sampled = [self.aligns_prompts or position >= len(request.tokens) - 1 for position in positions]
        for position, is_stored in zip(positions, is_sampled, strict=True):
            assert self.references[request.blocks[position // BLOCK]] == 1, "nobody writes what others read"
            self.kv[request.slot(position)] = tuple(tokens[: position + 1])
            self.copied.discard(request.slot(position))
            if is_stored:
                self.stored[request.slot(position)] = tuple(tokens[: position + 1])
        logits = torch.zeros(len(positions), PREDICTED)
        for row, position in enumerate(positions):
            logits[row, prediction(tokens[: position + 1])] = 9.0
        slots = [request.slot(position) if kept else -1 for position, kept in zip(positions, is_sampled, strict=True)]
        ids = torch.tensor(tokens[request.num_computed :], dtype=torch.int32)
        self.store.write(logits, ids, torch.tensor(slots, dtype=torch.int64))
        self.computed(request, request.num_computed + count)
        return True

    def computed(self, request, count):
        request.num_computed = count
        for end in range(BLOCK, count + 1, BLOCK):
            self.cached.setdefault(tuple(request.tokens[:end]), request.blocks[end // BLOCK - 1])

    # What happens to requests

    @precondition(lambda self: len(self.running) < 3)
    @rule(tokens=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=18))
    def arrive(self, tokens):
        self.enter(tokens)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), count=st.integers(1, 9))
    def read_prompt(self, data, count):
        request = data.draw(st.sampled_from(self.running))
        self.run(request, min(count, len(request.tokens) - request.num_computed))

    @precondition(lambda self: self.running)
    @rule(
        data=st.data(), drafts=st.lists(st.integers(0, VOCAB - 1), max_size=3), num_accepted=st.integers(0, 3),
        emitted=st.integers(0, VOCAB - 1),
    )  # fmt: skip
    def decode(self, data, drafts, num_accepted, emitted):
        """A step of verification: what was rejected stays where it was written, until it is overwritten."""
        request = data.draw(st.sampled_from(self.running))
        if len(request.tokens) < 30 and self.run(request, len(request.tokens) - request.num_computed, drafts):
            accepted = drafts[:num_accepted]
            request.tokens = [*request.tokens, *accepted]
            self.computed(request, len(request.tokens))
            request.tokens = [*request.tokens, emitted]

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def preempt(self, data):
        request = data.draw(st.sampled_from(self.running))
        self.running.remove(request)
        self.give_back(request)
        self.waiting.append(request.tokens)

    @precondition(lambda self: self.waiting and len(self.running) < 3)
    @rule()
    def resume(self):
        self.enter(self.waiting.pop(0))

    @precondition(lambda self: self.running and len(self.running) < 3 and self.free)
    @rule(data=st.data())
    def fork(self, data):
        """Another request goes on from the same tokens: full blocks are shared, the last one is copied."""
        parent = data.draw(st.sampled_from(self.running))
        num_full = parent.num_computed // BLOCK
        child = Request(
            list(parent.tokens), parent.num_computed, [self.take(block) for block in parent.blocks[:num_full]]
        )
        if parent.num_computed % BLOCK:
            source, copy = parent.blocks[num_full], self.take()
            child.blocks.append(copy)
            for offset in range(BLOCK):
                self.kv[copy * BLOCK + offset] = self.kv.get(source * BLOCK + offset)
                self.copied.add(copy * BLOCK + offset)
        self.running.append(child)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data):
        """It is done or aborted, at any moment."""
        request = data.draw(st.sampled_from(self.running))
        self.running.remove(request)
        self.give_back(request)

    @rule()
    def reset_prefix_cache(self):
        self.cached.clear()

    # What must hold

    @invariant()
    def every_block_has_its_owners(self):
        owned = [block for request in self.running for block in request.blocks]
        assert self.references == [owned.count(block) for block in range(NUM_BLOCKS)]
        assert sorted(self.free) == [block for block in range(NUM_BLOCKS) if not self.references[block]]

    @invariant()
    def what_is_read_is_what_was_written_for_the_token(self):
        for request in self.running:
            positions = range(request.num_computed)
            slots = torch.tensor([request.slot(position) for position in positions], dtype=torch.int64)
            tokens = torch.tensor(request.tokens[: request.num_computed], dtype=torch.int32)
            ids, probs, fresh = read(self.store, tokens, slots)
            drafters = (self.store.numpy(), np.array([*request.blocks, 0], np.int32), BLOCK)
            for position, slot in zip(positions, slots.tolist(), strict=True):
                prefix = tuple(request.tokens[: position + 1])
                assert self.kv[slot] == prefix, "the model of the cache itself"
                last = self.stored.get(slot)
                assert bool(fresh[position]) == (last is not None and last[-1] == prefix[-1])
                assert (align_cpu.aligned_slot(tokens.numpy(), position, *drafters) == slot) == bool(fresh[position])
                if fresh[position]:
                    assert last == prefix, "whoever has the block now has computed it, or shares it"
                    assert int(ids[position, 0]) == prediction(last) and probs[position, 0] > 0.5
                else:
                    assert not probs[position].any()
                if self.aligns_prompts and slot not in self.copied:
                    assert last == prefix, "whoever has computed or shares the KV has the prediction"


@pytest.mark.parametrize("part", range(3))
def test_store(part):
    """In parts, so that Hypothesis begins anew with short examples."""
    run_state_machine_as_test(PagedCache, settings=settings(max_examples=400, stateful_step_count=25, deadline=None))
