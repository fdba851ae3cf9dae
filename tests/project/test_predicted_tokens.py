"""How much of a prediction an answer took up, and what a prediction may look like."""

import random
import time

import pytest

from vllm_aasd.predicted_tokens import MIN_RUN, accepted_tokens, are_token_ids, text_of, usage_of


def tokens(count, seed=0, vocabulary=30_000):
    generator = random.Random(seed)
    return [generator.randrange(vocabulary) for _ in range(count)]


@pytest.mark.parametrize("length", [1, 2, MIN_RUN, MIN_RUN + 1, 50, 1000])
def test_an_identical_text_is_all_accepted(length):
    text = tokens(length)
    assert usage_of(text, [text]) == (length, 0)
    assert usage_of(text, [[-1, -2, *text, -3]]) == (length, 0), "wherever it stands"


def test_an_unrelated_text_has_none():
    assert usage_of(tokens(500), [[token + 30_000 for token in tokens(500)]]) == (0, 500)
    assert usage_of(tokens(500), [[]]) == (0, 500)
    assert usage_of(tokens(5), [tokens(5)[: MIN_RUN - 1]]) == (0, 5), "too short a run"


def test_an_edit_loses_what_it_replaces():
    text = tokens(100)
    replaced = [*text[:40], -1, -2, -3, *text[45:]]
    inserted = [*text[:40], -1, *text[40:]]
    deleted = [*text[:40], *text[50:]]
    assert usage_of(text, [replaced]) == (95, 5)
    assert usage_of(text, [inserted]) == (100, 0)
    assert usage_of(text, [deleted]) == (90, 10)


def test_a_block_that_moved_is_accepted():
    text = tokens(90)
    assert accepted_tokens(text, text[60:] + text[:30] + text[30:60]) == 90


def test_no_token_counts_twice():
    text = tokens(20)
    assert accepted_tokens(text, text * 3) == 20, "of the prediction"
    assert accepted_tokens(text * 3, text) == 20, "of the completion"


def test_of_equal_places_the_next_one_is_taken():
    header, first, second = tokens(5, 1), tokens(5, 2), tokens(5, 3)
    end = tokens(MIN_RUN - 1, 4)
    prediction = [*header, *first, *second, -1, *header, *end]
    assert accepted_tokens(prediction, [*second, *header, *end]) == 10 + len(end)


def test_a_run_ends_before_tokens_that_are_taken():
    first, second, third = tokens(5, 1), tokens(5, 2), tokens(5, 3)
    prediction = [*first, *second, *third, *second]
    assert accepted_tokens(prediction, [*second, -1, *first, *second]) == 15


def test_behind_the_last_place_the_first_free_one_is_taken():
    one, other = tokens(MIN_RUN, 1), tokens(MIN_RUN, 2)
    prediction = [token for number in range(20) for token in (*one, -1 - number)]
    prediction += [token for number in range(20) for token in (*other, -100 - number)]
    assert accepted_tokens(prediction, [*other, *one] * 20) == 40 * MIN_RUN


def test_completions_add_up():
    text = tokens(30)
    assert usage_of(text, [text, [], text[:10]]) == (40, 50)
    assert usage_of([], [text]) == (0, 0)


@pytest.mark.parametrize("seed", range(200))
def test_the_counts_are_those_of_any_alignment(seed):
    """Over a small vocabulary, where everything repeats."""
    generator = random.Random(seed)
    vocabulary = generator.choice([1, 2, 3, 8])
    prediction = tokens(generator.randrange(40), seed, vocabulary)
    completion = tokens(generator.randrange(40), seed + 1000, vocabulary)
    accepted, rejected = usage_of(prediction, [completion])
    assert accepted + rejected == len(prediction) and accepted >= 0 and rejected >= 0
    in_common = sum(min(prediction.count(token), completion.count(token)) for token in range(vocabulary))
    assert accepted <= in_common
    runs = {tuple(completion[at : at + MIN_RUN]) for at in range(len(completion) - MIN_RUN + 1)}
    has_common_run = any(tuple(prediction[at : at + MIN_RUN]) in runs for at in range(len(prediction) - MIN_RUN + 1))
    if len(prediction) >= MIN_RUN:
        assert (accepted >= MIN_RUN) == (accepted > 0) == has_common_run


NUM_TOKENS = 100_000


@pytest.mark.parametrize(
    ("prediction", "completion"),
    [
        ([7] * NUM_TOKENS, [7] * NUM_TOKENS),
        ([7] * NUM_TOKENS, [7, 7, 7, 8] * (NUM_TOKENS // 4)),
        ([7, 7, 7, 8] * (NUM_TOKENS // 4), [7] * NUM_TOKENS),
        ([1, 2, 3, 4] * (NUM_TOKENS // 4), [3, 4, 1, 9] * (NUM_TOKENS // 4)),
        # One run of the completion has many places, and each is taken once.
        ([1, 1, 1, 2] * (NUM_TOKENS // 4), [1, 1, 1, 1, 1] * (NUM_TOKENS // 5)),
        (tokens(NUM_TOKENS, 1, 2), tokens(NUM_TOKENS, 2, 2)),
        (tokens(NUM_TOKENS, 1, 100), tokens(NUM_TOKENS, 2, 100)),
    ],
)
def test_time_is_bounded_however_much_repeats(prediction, completion):
    began = time.process_time()
    usage = usage_of(prediction, [completion])
    assert time.process_time() - began < 5, "half a second at most here; a quadratic search takes minutes"
    assert sum(usage) == NUM_TOKENS


def test_the_text_of_openais_parameter():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": ""}, {"type": "text", "text": "b"}]
    assert text_of({"type": "content", "content": "some text"}) == "some text"
    assert text_of({"type": "content", "content": ""}) == ""
    assert text_of({"type": "content", "content": parts}) == "ab"


@pytest.mark.parametrize(
    "parameter",
    [
        "text",
        [],
        {},
        {"content": "text"},
        {"type": "text", "content": "text"},
        {"type": "content"},
        {"type": "content", "content": None},
        {"type": "content", "content": 3},
        {"type": "content", "content": []},
        {"type": "content", "content": ["text"]},
        {"type": "content", "content": [{"type": "text", "text": 1}]},
        {"type": "content", "content": [{"type": "image", "text": "x"}]},
        {"type": "content", "content": [{"type": "text", "text": "x"}, {"type": "text"}]},
    ],
)
def test_a_malformed_parameter_has_no_text(parameter):
    assert text_of(parameter) is None


@pytest.mark.parametrize("value", [None, "12", 5, (1, 2), [1.0], ["1"], [True], [-1], [100], [1] * 11, [[1]]])
def test_what_are_no_token_ids(value):
    assert not are_token_ids(value, vocab_size=100, max_tokens=10)


def test_token_ids():
    assert are_token_ids([0, 99] * 5, vocab_size=100, max_tokens=10)
    assert are_token_ids([], vocab_size=100, max_tokens=10)
