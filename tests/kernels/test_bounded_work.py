"""No context makes a step of the drafter slow: its work is counted where it could grow with the context."""

import numpy as np
import pytest

from aasd_testing import contexts
from vllm_aasd.drafting.drafter import MAX_MATCHES, MAX_NGRAM_SIZE, AlignmentView, Drafter
from vllm_aasd.drafting.suffix_index import SuffixIndex
from vllm_aasd.kernels.common.ngram_hash import HASH_MULTIPLIER as MULTIPLIER
from vllm_aasd.kernels.draft.cpu import NGRAM_SIZES_USED
from vllm_aasd.kernels.draft.index_cpu import MOST_PROBES

LENGTH, VOCAB, K = 3000, 40_000, 8
MOST_MATCHING = K * NGRAM_SIZES_USED * MAX_MATCHES


@pytest.fixture(scope="module", params=contexts.CONTEXTS)
def context(request):
    return request.param, contexts.CONTEXTS[request.param](LENGTH, VOCAB)


def test_matches_of_a_step_are_bounded(context):
    """Each matching position is looked up once in the store: as many are walked to along the chains."""
    name, tokens = context
    view = AlignmentView(np.full((LENGTH, 3), -1, np.int32), np.zeros(1, np.int32), LENGTH)
    lookups = np.zeros(3, np.int64)
    drafter = Drafter(VOCAB, K, 0.0, lookups=lookups)
    most = 0
    for length in range(LENGTH - 20, LENGTH + 1):
        before = lookups.sum()
        drafter.draft("a", tokens[:length], view, K)
        most = max(most, int(lookups.sum() - before))
    assert most <= MOST_MATCHING
    assert name not in ("one token", "short period", "de Bruijn, 2 tokens") or most == MOST_MATCHING, (
        "the bound is reached"
    )


def test_runs_stand_near_their_place_in_the_tables(context):
    """How far a run stands from where its hash points is how many slots are tried for it."""
    name, tokens = context
    index = SuffixIndex(MAX_NGRAM_SIZE, K, LENGTH)
    index.extend(tokens)
    farthest = max(int(distances(index, size).max()) for size in range(1, MAX_NGRAM_SIZE + 1))
    assert farthest < MOST_PROBES
    assert (farthest == MOST_PROBES - 1) == (name == "colliding"), "only on purpose do so many collide"


def distances(index, size):
    """By occupied slot, how many slots it lies after the first that is tried for its n-gram."""
    slots = np.nonzero(index.head[size - 1] >= 0)[0]
    ends = index.head[size - 1, slots]
    hashed = np.zeros(len(ends), np.uint64)
    for back in range(size):
        hashed = (hashed ^ index.tokens[ends - back].astype(np.uint64)) * np.uint64(MULTIPLIER)
    size = index.head.shape[1]
    return (slots - (hashed >> np.uint64(32)).astype(np.int64)) % size


def test_colliding_runs_are_forgotten_not_confused():
    tokens = contexts.colliding(LENGTH, VOCAB)
    index = SuffixIndex(MAX_NGRAM_SIZE, K, LENGTH)
    index.extend(tokens)
    num_found = 0
    for end in range(MAX_NGRAM_SIZE, LENGTH - 1):
        for size in range(1, MAX_NGRAM_SIZE + 1):
            before = index.prev[size - 1, end]
            num_found += before >= 0
            assert before < end
            assert before < 0 or np.array_equal(
                tokens[before - size + 1 : before + 1], tokens[end - size + 1 : end + 1]
            )
    assert num_found > 0


def test_a_token_costs_the_same_where_the_tables_grow():
    tokens = np.random.default_rng(0).integers(0, 1000, 5000).astype(np.int32)
    index = SuffixIndex(MAX_NGRAM_SIZE, K)
    capacities = []
    for place in range(len(tokens)):
        tables, larger = index._tables, index._larger
        entered, cleared = progress(larger)
        index.extend(tokens[place : place + 1])
        now_entered, now_cleared = progress(larger or index._larger)
        # Half of the last eighth of the tokens for each: all positions so far, and four slots a place and order.
        assert now_entered - entered <= 2 * 8 + 2
        assert now_cleared - cleared <= 2 * 8 * 4 * MAX_NGRAM_SIZE + 1
        if index._tables is not tables:
            assert index._tables is larger, "they were begun before they were needed"
            capacities.append(index.prev.shape[1])
    assert capacities == [512, 1024, 2048, 4096, 8192]


def progress(tables):
    """Positions entered and slots cleared."""
    return (tables._entered, tables._cleared) if tables is not None else (0, 0)
