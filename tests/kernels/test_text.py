"""The text index: the compiled path against its reference, what it finds against the texts themselves, its bounds."""

import numpy as np
import pytest

from aasd_testing.texts import Documents, grow, random_known
from vllm_aasd.kernels import text
from vllm_aasd.kernels.text import (
    ANSWERS,
    CORPUS,
    MAX_MATCH,
    NGRAM_SIZES,
    NUM_CELLS,
    PAGE_SIZE,
    cpu,
    new_index,
    new_reliability,
    reference,
    reliability_cpu,
)


def contexts(rng, documents, count, vocab_size=6):
    """Ends of documents' prefixes, and noise, with a namespace each."""
    for _ in range(count):
        namespace, tokens = documents.texts[rng.integers(len(documents.texts))]
        end = int(rng.integers(1, len(tokens) + 1)) if tokens else 0
        context = tokens[max(end - rng.integers(1, 50), 0) : end]
        if rng.random() < 0.2 or not context:
            context = rng.integers(vocab_size, size=5).tolist()
        yield (namespace if rng.random() < 0.8 else int(rng.integers(4))), np.array(context, np.int32)


@pytest.mark.parametrize("num_pages", [1, 13, 16])
@pytest.mark.parametrize("seed", range(4))
def test_the_compiled_path_is_the_reference(seed, num_pages):
    rng = np.random.default_rng(seed)
    documents = Documents(cpu, num_pages), Documents(reference, num_pages)
    for _ in range(4):
        grow(rng, documents, 25)
        for ours, theirs in zip(documents[0].index, documents[1].index, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        for namespace, context in contexts(rng, documents[0], 50):
            asked = namespace, context, len(context) - 1
            assert cpu.lookup(documents[0].index, *asked) == reference.lookup(documents[1].index, *asked)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_found_stands_in_a_text_of_the_namespace(seed):
    """Whatever was overwritten, and however often pages changed owners."""
    rng = np.random.default_rng(seed)
    documents = Documents(cpu, 16)
    num_found = 0
    for _ in range(30):
        grow(rng, (documents,), 10)
        for namespace, context in contexts(rng, documents, 40):
            token, length, _, _ = cpu.lookup(documents.index, namespace, context, len(context) - 1)
            if token < 0:
                continue
            num_found += 1
            wanted = [*context[len(context) - length :].tolist(), token]
            assert any(
                known[at : at + len(wanted)] == wanted
                for of, known in documents.texts
                if of == namespace
                for at in range(len(known))
            )
    assert num_found > 100


def test_the_longest_match_counts_and_of_equals_the_latest():
    documents = Documents(cpu, 16)
    # Next tokens of different classes, so that none displaces another.
    by_class = {reference._way(token): token for token in range(50, 90)}
    first, second, third = list(by_class.values())[:3]
    for tokens in ([9, 1, 2, 3, 4, first], [8, 1, 2, 3, 4, second], [1, 2, 3, 4, third]):
        documents.extend(documents.begin(0), tokens)

    def found(*context):
        return cpu.lookup(documents.index, 0, np.array(context, np.int32), len(context) - 1)

    assert found(9, 1, 2, 3, 4)[:2] == (first, 5)
    assert found(8, 1, 2, 3, 4)[:2] == (second, 5)
    assert found(7, 1, 2, 3, 4)[:2] == (third, 4)
    assert found(3, 3)[:2] == (-1, 0)


def test_an_answer_is_found_again_at_every_position_while_it_is_written_again():
    """The second copy takes places of the first in the tables as it grows, and must not hide it."""
    rng = np.random.default_rng(0)
    documents = Documents(cpu, 64)
    answer = rng.integers(1000, size=300).tolist()
    documents.extend(documents.begin(0), answer)
    again = documents.begin(0)
    for end in range(2, len(answer)):
        documents.extend(again, answer[len(documents.texts[again][1]) : end])
        token, length, _, _ = cpu.lookup(documents.index, 0, np.array(answer[:end], np.int32), end - 1)
        assert (token, length) == (answer[end], min(end, MAX_MATCH))


def test_an_empty_index_finds_nothing():
    assert cpu.lookup(new_index(0), 0, np.array([1, 2], np.int32), 1)[0] == -1
    assert reference.lookup(new_index(0), 0, np.array([1, 2], np.int32), 1)[0] == -1


def test_memory_is_bounded_by_what_was_asked_for():
    for num_bytes in (1 << 20, 3 << 20, 64 << 20):
        index = new_index(text.num_pages_for(num_bytes))
        assert 0.99 * num_bytes < sum(array.nbytes for array in index) <= num_bytes + 8
    assert text.num_pages_for(0) == text.num_pages_for(1000) == 0


@pytest.mark.parametrize("seed", range(5))
def test_stacking_is_the_reference(seed):
    known = [random_known(np.random.default_rng(seed), module, 4) for module in (cpu, reference)]
    rng = np.random.default_rng(seed)
    chosen = set()
    for _ in range(100):
        context = rng.integers(6, size=20).astype(np.int32)
        asked = int(rng.integers(4)), context, 19, int(rng.integers(-1, 6)), np.float32(rng.random())
        ours = reliability_cpu.stack(known[0], *asked)
        theirs = reference.stack(known[1], *asked)
        assert ours[0] == theirs[0]
        assert ours[1] == pytest.approx(theirs[1], abs=1e-6)
        np.testing.assert_array_equal(known[0].cells, known[1].cells)
        np.testing.assert_array_equal(known[0].is_known, known[1].is_known)
        chosen.add(bool(known[0].is_known[asked[0]]))
    assert chosen == {False, True}


def test_cells_are_told_apart_and_every_one_is_within_range():
    cells = {
        reference.cell_of(kind, length, num_equal, num_shorter, is_same, prob): None
        for kind in (CORPUS, ANSWERS, text.PREDICTION)
        for length in range(NGRAM_SIZES[0], MAX_MATCH + 1)
        for num_equal, num_shorter in ((0, 0), (0, 1), (1, 0), (2, 1))
        for is_same in (False, True)
        for prob in (0.0, 0.2, 0.3, 0.5, 0.7, 1.0)
    }
    assert sorted(cells) == list(range(NUM_CELLS))
    for args in (
        (0, 2, 0, 0, True, np.float32(0.1)),
        (1, 32, 1, 2, False, np.float32(0.75)),
        (2, 7, 0, 3, True, np.float32(0.3)),
    ):
        assert reliability_cpu.cell_of(*args) == reference.cell_of(*args)


def test_learning_is_the_reference_and_comes_to_the_rate_that_is_seen():
    rng = np.random.default_rng(0)
    prior = np.stack([rng.random(NUM_CELLS), np.full(NUM_CELLS, 8.0)], axis=1).astype(np.float32)
    ours, theirs = new_reliability(prior), new_reliability(prior)
    cells = np.full((3, 2), -1, np.int32)
    cells[0, 0], cells[1, 1], cells[2, 0] = 5, 5, 7
    tokens = np.array([[1, 9], [9, 2], [3, 9]], np.int32)
    for _ in range(1000):
        truth = np.array([1 if rng.random() < 0.8 else 0, 2 if rng.random() < 0.8 else 0, 9], np.int32)
        reliability_cpu.learn(ours, prior, cells, tokens, truth)
        reference.learn(theirs, prior, cells, tokens, truth)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert ours.value[5] == pytest.approx(0.8, abs=0.05)
    assert ours.value[7] < 0.05
    assert ours.found.max() <= text.MAX_COUNT
    untouched = np.delete(np.arange(NUM_CELLS), [5, 7])
    np.testing.assert_array_equal(ours.value[untouched], prior[untouched, 0])


def test_pages_are_whole():
    assert PAGE_SIZE & (PAGE_SIZE - 1) == 0
    assert text.WAYS & (text.WAYS - 1) == 0
