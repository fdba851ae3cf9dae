"""The compiled drafter against its reference, and the index against a scan of the context."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aasd_testing.drafts import assert_same_drafts
from aasd_testing.texts import no_known, random_known
from vllm_aasd.drafting.drafter import DEFAULT_WEIGHTS, MAX_NGRAM_SIZE, NO_ALIGNMENT, AlignmentView, Drafter
from vllm_aasd.drafting.suffix_index import SuffixIndex
from vllm_aasd.kernels.draft import Prior, no_prior
from vllm_aasd.kernels.draft import cpu as draft_op
from vllm_aasd.kernels.draft import reference as draft_reference
from vllm_aasd.kernels.text import cpu as text_cpu

K = 8
BLOCK_SIZE = 16

contexts = st.one_of(
    # Few different tokens: every order has matches.
    st.lists(st.integers(0, 2), min_size=1, max_size=120),
    st.lists(st.integers(0, 9), min_size=1, max_size=120),
    # Periodic: long matches, drafts that leave the context's end.
    st.builds(
        lambda period, times: period * times,
        st.lists(st.integers(0, 4), min_size=1, max_size=20),
        st.integers(1, 6),
    ),
)


def index_of(context, pieces=1):
    index = SuffixIndex(MAX_NGRAM_SIZE, K)
    for piece in np.array_split(np.array(context, np.int32), pieces):
        index.extend(piece)
    return index


def aligned_store(context, seed, vocab_size, top_k=2, stale_share=0.2):
    """A paged table for the context, blocks in random order, some entries stale."""
    rng = np.random.default_rng(seed)
    num_blocks = -(-len(context) // BLOCK_SIZE)
    block_table = rng.permutation(num_blocks + 3)[:num_blocks].astype(np.int32)
    table = np.full(((num_blocks + 3) * BLOCK_SIZE, 1 + 2 * top_k), -1, np.int32)
    for position, token in enumerate(context):
        slot = block_table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        probs = np.sort(rng.dirichlet(np.ones(top_k + 1)).astype(np.float32)[:top_k])[::-1]
        table[slot, 0] = token if rng.random() > stale_share else token + 1
        table[slot, 1 : 1 + top_k] = rng.permutation(vocab_size)[:top_k]
        table[slot, 1 + top_k :] = probs.copy().view(np.int32)
    return AlignmentView(table, block_table, BLOCK_SIZE)


def run(op, index, view, prior, known, max_matches, min_survival, vocab_size):
    scores, seen = np.zeros(vocab_size, np.float32), np.empty(4096, np.int32)
    starts = np.empty(MAX_NGRAM_SIZE, np.int32)
    draft_token_ids, survival = np.full(K, -7, np.int32), np.full(K, np.nan, np.float32)
    request = index.tokens.copy(), index.prev, index.head, index.length
    constants = *DEFAULT_WEIGHTS, prior.ids, prior.probs, known, max_matches, np.float32(min_survival)
    lookups = np.full(3, 100, np.int64)
    count = op(*request, *view, *constants, scores, seen, starts, draft_token_ids, survival, lookups)
    assert not scores.any(), "the scratch must be left clean"
    return draft_token_ids[:count].tolist(), survival[:count], (lookups - 100).tolist()


@settings(max_examples=300, deadline=None)
@given(
    context=contexts,
    seed=st.integers(0, 2**31),
    aligned=st.booleans(),
    with_prior=st.booleans(),
    with_text=st.booleans(),
    max_matches=st.sampled_from([1, 3, 32]),
    min_survival=st.sampled_from([0.0, 0.05, 0.3]),
)
def test_compiled_path_drafts_what_the_twin_drafts(
    context, seed, aligned, with_prior, with_text, max_matches, min_survival
):
    vocab_size = 11
    rng = np.random.default_rng(seed)
    index = index_of(context, pieces=rng.integers(1, 5))
    view = aligned_store(context, seed, vocab_size) if aligned else NO_ALIGNMENT
    prior = no_prior()
    if with_prior:
        prior = Prior(
            rng.integers(-1, vocab_size, (vocab_size, 3)).astype(np.int32),
            rng.dirichlet(np.ones(4), vocab_size).astype(np.float32)[:, :3],
        )
    known = [
        random_known(np.random.default_rng(seed), text_cpu, K, vocab_size) if with_text else no_known(K)
        for _ in range(2)
    ]
    limits = max_matches, min_survival, vocab_size
    got_ids, got_survival, got_lookups = run(draft_op.draft, index, view, prior, known[0], *limits)
    want_ids, want_survival, want_lookups = run(draft_reference.draft, index, view, prior, known[1], *limits)
    if assert_same_drafts((got_ids, got_survival), (want_ids, want_survival), min_survival):
        assert got_lookups == want_lookups


@settings(max_examples=200, deadline=None)
@given(context=contexts, pieces=st.integers(1, 9))
def test_index_chains_are_the_earlier_occurrences_latest_first(context, pieces):
    index = index_of(context, pieces)
    for end in range(len(context) - 1):
        for size in range(1, min(MAX_NGRAM_SIZE, end + 1) + 1):
            gram = context[end - size + 1 : end + 1]
            earlier = [e for e in range(size - 1, end) if context[e - size + 1 : e + 1] == gram]
            assert index.prev[size - 1, end] == (earlier[-1] if earlier else -1)


def test_index_is_the_same_however_the_context_arrives():
    context = np.random.default_rng(0).integers(0, 5, 3000).astype(np.int32)
    whole, grown = SuffixIndex(MAX_NGRAM_SIZE, K, len(context)), SuffixIndex(MAX_NGRAM_SIZE, K)
    whole.extend(context)
    for token in context:
        grown.extend(np.array([token], np.int32))
    assert grown.prev.shape[1] > 2048, "the context must make the index grow"
    np.testing.assert_array_equal(whole.prev[:, :2999], grown.prev[:, :2999])
    drafts = [
        run(draft_op.draft, index, NO_ALIGNMENT, no_prior(), no_known(K), 32, 0.0, 5)[0] for index in (whole, grown)
    ]
    assert drafts[0] == drafts[1]


def test_a_copied_span_is_drafted_on():
    span = [5, 6, 7, 8, 9, 10, 11, 12]
    drafter = Drafter(vocab_size=20, max_draft_tokens=4, min_survival=0.0)
    context = np.array([*span, 1, 2, *span[:3]], np.int32)
    draft_token_ids, survival = drafter.draft("a", context, NO_ALIGNMENT, 4)
    assert draft_token_ids.tolist() == [8, 9, 10, 11]
    assert np.all(np.diff(survival) < 0)


def test_the_stored_distribution_outweighs_a_token_seen_once():
    context = np.array([1, 2, 3, 4, 1], np.int32)
    table = np.full((5, 3), -1, np.int32)
    table[0] = [1, 9, np.array([0.99], np.float32).view(np.int32)[0]]
    view = AlignmentView(table, np.zeros(1, np.int32), 5)
    lookups = np.zeros(3, np.int64)
    drafter = Drafter(vocab_size=10, max_draft_tokens=1, min_survival=0.0, lookups=lookups)
    assert drafter.draft("a", context, view, 1)[0].tolist() == [9]
    assert lookups.tolist() == [1, 0, 0]
    table[0, 0] = 7
    assert drafter.draft("b", context, view, 1)[0].tolist() == [2], "a stale entry must not count"
    assert lookups.tolist() == [1, 0, 1]
    table[0, 0] = -1
    drafter.draft("c", context, view, 1)
    assert lookups.tolist() == [1, 1, 1]
    drafter.draft("d", context, NO_ALIGNMENT, 1)
    assert lookups.tolist() == [1, 1, 1], "without a store nothing is looked up"


def test_survival_stops_the_draft():
    context = np.array([1, 2, 3, 4, 1], np.int32)
    lengths = [
        len(Drafter(10, 8, min_survival).draft("a", context, NO_ALIGNMENT, 8)[0]) for min_survival in (0.0, 0.2, 0.99)
    ]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == 8 and lengths[2] == 0


@pytest.mark.parametrize("least", range(6))
def test_the_least_is_drafted_whatever_its_survival(least):
    context = np.array([1, 2, 3, 4, 1], np.int32)
    drafts, survival = Drafter(10, 8, 0.0).draft("a", context, NO_ALIGNMENT, 8)
    bar = float(survival[1] + survival[2]) / 2
    drafter = Drafter(10, 8, bar)
    found, expected = drafter.draft("b", context, NO_ALIGNMENT, 8, least)
    assert found.tolist() == drafts[: max(least, 2)].tolist()
    assert expected.tolist() == survival[: max(least, 2)].tolist()
    # What was promised of them is judged like any other.
    before = drafter.draft("b", context, NO_ALIGNMENT, 8, least)[1].copy()
    drafter.verified("b", len(before), 0)
    after = drafter.draft("b", context, NO_ALIGNMENT, 8, least)[1]
    assert len(after) >= least and (after[:least] < before[:least]).all()


def test_the_least_is_no_more_than_the_limit_and_what_is_known():
    context = np.array([1, 2, 3, 4, 1], np.int32)
    assert len(Drafter(10, 8, 0.99).draft("a", context, NO_ALIGNMENT, 3, min_draft_tokens=5)[0]) == 3
    assert len(Drafter(10, 8, 0.99).draft("a", context[:4], NO_ALIGNMENT, 8, min_draft_tokens=5)[0]) == 0


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_the_limit_of_a_call_holds(limit):
    context = np.array([1, 2, 3] * 5, np.int32)
    assert len(Drafter(10, 8, 0.0).draft("a", context, NO_ALIGNMENT, limit)[0]) == limit


def test_another_context_under_the_same_id_is_not_mixed_with_the_first():
    drafter, fresh = Drafter(50, 4, 0.0), Drafter(50, 4, 0.0)
    drafter.draft("a", np.array([1, 2, 3, 4, 5, 1], np.int32), NO_ALIGNMENT, 4)
    other = np.array([1, 7, 8, 9, 1, 7, 1], np.int32)
    want = fresh.draft("a", other, NO_ALIGNMENT, 4)[0].tolist()
    assert drafter.draft("a", other, NO_ALIGNMENT, 4)[0].tolist() == want


def test_forgotten_requests_leave_nothing():
    drafter = Drafter(10, 4, 0.0)
    for request_id in "abc":
        drafter.draft(request_id, np.array([1, 2, 1], np.int32), NO_ALIGNMENT, 4)
    drafter.forget(["a", "c", "never seen"])
    assert drafter.num_requests == 1


def test_token_ids_outside_the_vocabulary_are_never_drafted():
    # Placeholders of images and the like stand in the context, and must not reach the target as a draft.
    drafter = Drafter(vocab_size=4, max_draft_tokens=4, min_survival=0.0)
    assert drafter.draft("a", np.array([1, 900, 2, 1], np.int32), NO_ALIGNMENT, 4)[0].tolist() == []
