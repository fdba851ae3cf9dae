"""Drafts from text that other requests left: who sees it, what it is worth, and when it is forgotten."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from vllm_aasd.drafting.drafter import NO_ALIGNMENT, Drafter
from vllm_aasd.drafting.known_text import KnownTexts, prior_reliability
from vllm_aasd.kernels.text import CELL_SHAPE

VOCAB_SIZE = 1000
NUM_DRAFT_TOKENS = 8
PROMPT, ANSWER = [901, 902, 903, 904], [*range(100, 160)]


@pytest.fixture
def drafter():
    return Drafter(VOCAB_SIZE, NUM_DRAFT_TOKENS, 0.02, texts=KnownTexts(1 << 20, NUM_DRAFT_TOKENS))


def serve(drafter, request_id, prompt, answer):
    """Decode an answer with verified drafts, and return how many steps that takes."""
    length, steps = len(prompt) + 1, 0
    context = np.array([*prompt, *answer], np.int32)
    while length < len(context):
        drafted, _ = drafter.draft(request_id, context[:length], NO_ALIGNMENT, NUM_DRAFT_TOKENS)
        wanted = context[length : length + len(drafted)]
        right = drafted[: len(wanted)] == wanted
        num_accepted = int(right.argmin()) if not right.all() else len(right)
        drafter.verified(request_id, len(drafted), num_accepted)
        length, steps = length + num_accepted + 1, steps + 1
    drafter.draft(request_id, context, NO_ALIGNMENT, 0)
    return steps


def served(drafter, request_id, namespace, prompt=PROMPT, answer=ANSWER, prediction=None):
    drafter.admit(request_id, namespace, prediction)
    return serve(drafter, request_id, prompt, answer)


def test_an_answer_that_was_given_before_is_drafted_from_it(drafter):
    assert served(drafter, "a", 1) == len(ANSWER) - 1, "nothing in it repeats"
    drafter.forget(["a"])
    assert served(drafter, "b", 1) < 15


@pytest.mark.parametrize("namespace", [2, None])
def test_another_namespace_sees_nothing_of_it(drafter, namespace):
    served(drafter, "a", 1)
    assert served(drafter, "b", namespace) == len(ANSWER) - 1


def test_who_shares_nothing_leaves_nothing(drafter):
    served(drafter, "a", None)
    assert served(drafter, "b", 1) == len(ANSWER) - 1
    assert served(drafter, "c", 1) < 15


def test_a_sibling_sees_an_answer_while_it_is_written(drafter):
    for request_id in ("a", "b"):
        drafter.admit(request_id, 1)
    context = np.array([*PROMPT, *ANSWER], np.int32)
    for length in range(len(PROMPT) + 1, len(PROMPT) + 21):
        drafter.draft("a", context[:length], NO_ALIGNMENT, 0)
    drafted, _ = drafter.draft("b", context[: len(PROMPT) + 1], NO_ALIGNMENT, 4)
    assert drafted.tolist() == ANSWER[1:5]


def test_a_prediction_is_drafted_from_by_its_request_alone(drafter):
    prediction = np.array(ANSWER, np.int32)
    assert served(drafter, "a", None, prediction=prediction) < 15
    assert served(drafter, "b", None) == len(ANSWER) - 1
    assert served(drafter, "c", 1) == len(ANSWER) - 1


def test_what_is_cleared_is_gone_and_requests_go_on(drafter):
    drafter.admit("a", 1)
    context = np.array([*PROMPT, *ANSWER], np.int32)
    drafter.draft("a", context[:30], NO_ALIGNMENT, 0)
    drafter.clear_memory()
    assert (drafter._texts._indexes[0].tokens < 0).all()
    serve(drafter, "a", context[:30].tolist(), ANSWER[26:])
    assert served(drafter, "b", 1) == len(ANSWER) - 1


def test_a_request_that_begins_again_begins_a_new_document(drafter):
    served(drafter, "a", 1)
    other = [*range(200, 260)]
    assert serve(drafter, "a", PROMPT, other) > 50
    assert served(drafter, "b", 1, answer=other) < 20


def test_text_that_is_always_wrong_is_soon_worth_nothing():
    """An unrelated prediction: each pair of tokens stands in it, and goes on otherwise."""
    drafter = Drafter(VOCAB_SIZE, NUM_DRAFT_TOKENS, 0.02, texts=KnownTexts(1 << 20, NUM_DRAFT_TOKENS))
    rng = np.random.default_rng(0)
    num_drafted = []
    for number in range(12):
        answer = rng.permutation(300)[:60].tolist()
        wrong = [token for pair in itertools.pairwise(answer) for token in (*pair, 900)]
        drafter.admit(f"{number}", None, np.array(wrong, np.int32))
        drafted = 0
        context = np.array([*PROMPT, *answer], np.int32)
        for length in range(len(PROMPT) + 2, len(context)):
            tokens, _ = drafter.draft(f"{number}", context[:length], NO_ALIGNMENT, NUM_DRAFT_TOKENS)
            drafter.verified(f"{number}", len(tokens), 0)
            drafted += len(tokens)
        num_drafted.append(drafted)
    assert num_drafted[0] > 5 * num_drafted[-1]


def test_reliability_begins_as_what_longer_matches_deserve():
    expected = prior_reliability()[:, 0].reshape(CELL_SHAPE)
    assert ((expected > 0) & (expected < 1)).all()
    assert (np.diff(expected, axis=1) >= 0).all(), "of longer matches"
    assert (expected[:, :, :, 1] > expected[:, :, :, 0]).all(), "where the own context says the same"


_SERVED = """
import numpy as np
from vllm_aasd.drafting.drafter import AlignmentView, Drafter, warm_up
from vllm_aasd.drafting.corpora import Corpora
from vllm_aasd.drafting.known_text import KnownTexts
from vllm_aasd.kernels.draft import Prior, cpu, index_cpu
from vllm_aasd.kernels.text import cpu as text_cpu, reliability_cpu

compiled = [cpu.draft, index_cpu.extend_index, text_cpu.append, reliability_cpu.learn]
warm_up()
before = [len(function.signatures) for function in compiled]
prior = Prior(np.zeros((50, 3), np.int32), np.full((50, 3), 0.1, np.float32))
corpora = Corpora({"a": np.array([1, 2, 3, -1], np.int32)})
drafter = Drafter(50, 8, 0.02, prior, texts=KnownTexts(1 << 20, 8, corpora))
view = AlignmentView(np.full((32, 9), -1, np.int32), np.zeros(2, np.int32), 16)
context = np.array([1, 2, 3] * 5, np.int32)
for number, (namespace, prediction) in enumerate([(None, None), (3, None), (3, np.array([1, 2, 3], np.int32))]):
    drafter.admit(f"{number}", namespace, prediction, ["a"])
    for length in (6, 7, 9):
        drafter.draft(f"{number}", context[:length], view, 5)
        drafter.verified(f"{number}", 1, 0)
assert before == [1] * len(compiled), before
assert [len(function.signatures) for function in compiled] == before
"""


def test_no_request_waits_for_a_compilation():
    """In a process of its own, where nothing else has compiled anything."""
    subprocess.run([sys.executable, "-c", _SERVED], check=True, capture_output=True)


def test_without_room_for_text_there_is_none():
    drafter = Drafter(VOCAB_SIZE, NUM_DRAFT_TOKENS, 0.02, texts=KnownTexts(0, NUM_DRAFT_TOKENS))
    assert served(drafter, "a", 1, prediction=np.array(ANSWER, np.int32)) == len(ANSWER) - 1
