"""The drafter's indexes under random operations, against a scan of each request's own context."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from aasd_testing.drafts import assert_same_drafts
from vllm_aasd.drafting.drafter import DEFAULT_WEIGHTS, MAX_MATCHES, MAX_NGRAM_SIZE, NO_ALIGNMENT, Drafter
from vllm_aasd.kernels.draft import index_cpu, no_prior
from vllm_aasd.kernels.draft import reference as draft_reference

K = 4
VOCAB = 12
IDS = st.sampled_from("abcd")
SEEDS = st.integers(0, 2**32 - 1)
# Around 224 tokens larger tables are begun, at 256 they are needed; 448 and 512 are the next.
STARTS = st.sampled_from([1, 2, 5, 30, 221, 254, 446])


def random_tokens(seed, length):
    """Text of few tokens in which some spans are copies, so that long runs recur."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, rng.integers(1, VOCAB + 1), length)
    for _ in range(length // 20):
        span, source, target = rng.integers(1, 15), rng.integers(0, length), rng.integers(0, length)
        span = min(span, length - source, length - target)
        tokens[target : target + span] = tokens[source : source + span].copy()
    return tokens.tolist()


def occurrences(context, size):
    """Earlier ends of the run of `order` tokens that ends the context, latest first."""
    if size > len(context):
        return []
    windows = np.lib.stride_tricks.sliding_window_view(np.array(context), size)
    return (np.nonzero((windows[:-1] == windows[-1]).all(axis=1))[0] + size - 1)[::-1].tolist()


def chain(index, size):
    """What the index says of the same."""
    hashed = np.uint64(0)
    for back in range(size):
        hashed = np.uint64(index_cpu.hash_with(hashed, index.tokens[index.length - 1 - back]))
    _, position = index_cpu.find(index.tokens, index.head, size, index.length - 1, hashed)
    found = []
    while position >= 0:
        found.append(int(position))
        position = index.prev[size - 1, position]
    return found


def references_draft(context, limit):
    """What the reference drafts, which scans, and its survival."""
    ids, survival = np.empty(limit, np.int32), np.empty(limit, np.float32)
    constants = *DEFAULT_WEIGHTS, *no_prior()[:2], None, MAX_MATCHES, np.float32(0)
    scratch = np.zeros(VOCAB, np.float32), None, None
    tokens = np.array(context, np.int32)
    count = draft_reference.draft(
        tokens, None, None, len(tokens), *NO_ALIGNMENT, *constants, *scratch, ids, survival, np.zeros(3, np.int64)
    )
    return ids[:count], survival[:count]


class Indexes(RuleBasedStateMachine):
    """A drafter, and the contexts of the requests that it should know."""

    def __init__(self):
        super().__init__()
        self.drafter = Drafter(VOCAB, K, 0.0)
        self.contexts = {}
        self.waiting = {}

    def begin(self, req_id, context):
        before = self.waiting.pop(req_id, None) or self.contexts.get(req_id, [])
        last_eight = slice(max(len(before) - 8, 0), len(before))
        if context[last_eight] == before[last_eight] and context[: len(before)] != before:
            # No more than those are compared, so such a one isn't told apart; vLLM says when a request has ended.
            self.drafter.forget([req_id])
        self.contexts[req_id] = context
        self.draft(req_id)

    def draft(self, req_id, limit=K):
        context = self.contexts[req_id]
        drafts, survival = self.drafter.draft(req_id, np.array(context, np.int32), NO_ALIGNMENT, limit)
        reference, estimated = references_draft(context, limit)
        # The only other thing that the survival depends on is a factor learned for the request.
        expected = self.drafter._requests[req_id].calibration.apply(estimated, np.zeros(K, np.bool_))
        assert_same_drafts(
            (drafts.tolist(), survival.tolist()), (reference.tolist(), expected.tolist()), min_survival=0
        )
        assert np.all(np.diff(survival) <= 0) and self.drafter.predicted_survival(req_id) is survival
        return drafts.tolist()

    @rule(req_id=IDS, length=STARTS, seed=SEEDS)
    def arrive(self, req_id, length, seed):
        """A request's prompt; the id may be one that another context had, without an end in between."""
        self.begin(req_id, random_tokens(seed, length))

    @precondition(lambda self: self.contexts)
    @rule(data=st.data(), num_accepted=st.integers(0, K), seed=SEEDS)
    def step(self, data, num_accepted, seed):
        """A draft, of which some tokens are accepted; those that aren't must leave nothing behind."""
        req_id = data.draw(st.sampled_from(sorted(self.contexts)))
        drafts = self.draft(req_id)
        accepted = drafts[:num_accepted]
        self.drafter.verified(req_id, len(drafts), len(accepted))
        self.contexts[req_id] += [*accepted, seed % VOCAB]
        self.draft(req_id, limit=seed % (K + 1))

    @precondition(lambda self: self.contexts)
    @rule(data=st.data(), count=st.sampled_from([1, 9, 40, 300]), seed=SEEDS)
    def go_on_without_drafts(self, data, count, seed):
        """Steps in which nothing is asked of the drafter, and then one in which it hears of all that was missed."""
        req_id = data.draw(st.sampled_from(sorted(self.contexts)))
        self.contexts[req_id] += random_tokens(seed, count)
        self.draft(req_id)

    @precondition(lambda self: self.contexts)
    @rule(data=st.data())
    def preempt(self, data):
        """The drafter isn't told; the request comes back with the same context."""
        req_id = data.draw(st.sampled_from(sorted(self.contexts)))
        self.waiting[req_id] = self.contexts.pop(req_id)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def resume(self, data):
        req_id = data.draw(st.sampled_from(sorted(self.waiting)))
        self.contexts[req_id] = self.waiting.pop(req_id)
        self.draft(req_id)

    @precondition(lambda self: self.contexts)
    @rule(data=st.data(), other=IDS)
    def fork(self, data, other):
        """Another request with the same context so far."""
        req_id = data.draw(st.sampled_from(sorted(self.contexts)))
        self.begin(other, list(self.contexts[req_id]))

    @rule(req_id=IDS, is_fault=st.booleans())
    def end(self, req_id, is_fault):
        self.drafter.abandon(req_id) if is_fault else self.drafter.forget([req_id, "never seen"])
        self.contexts.pop(req_id, None)
        self.waiting.pop(req_id, None)

    @invariant()
    def look_ups_are_those_of_a_scan(self):
        assert set(self.drafter._requests) == {*self.contexts, *self.waiting}
        assert not self.drafter._scores.any()
        for req_id, context in (self.contexts | self.waiting).items():
            index = self.drafter._requests[req_id].index
            assert index.tokens[: index.length].tolist() == context
            found = [chain(index, size) for size in range(1, min(MAX_NGRAM_SIZE, len(context)) + 1)]
            assert found == [occurrences(context, size) for size in range(1, len(found) + 1)]

    def teardown(self):
        self.drafter.forget({**self.contexts, **self.waiting})
        assert self.drafter.num_requests == 0


class TestIndexes(Indexes.TestCase):
    settings = settings(max_examples=100, stateful_step_count=20, deadline=None)


@pytest.mark.long
class TestIndexesForLong(Indexes.TestCase):
    settings = settings(max_examples=2000, stateful_step_count=20, deadline=None)
