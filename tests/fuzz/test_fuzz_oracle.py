"""The fuzzer's oracle: what is wrong with an answer is found, and nothing else is."""

import dataclasses

import pytest

from aasd_testing.fuzz import kinds
from aasd_testing.fuzz.observed import Choice, Observation
from aasd_testing.fuzz.oracle import failures, first_difference, judge
from aasd_testing.judged import REFERENCE, STEP, answered, found


def test_the_right_answer_is_right():
    assert found(answered()) == []
    assert found(answered((7, 7), "aa", None, left=True, num_answer_tokens=None)) == []
    assert found(answered((7, 7), "aa", "abort", disturbed={"abort"})) == []
    assert found(Observation(status=200, disturbed={"abort"})) == []


def test_an_aborted_stream_may_lack_the_choices_that_had_no_token_yet():
    ended = Choice([7, 7, 7, 7], "aaaa", "length")
    one_of_three = Observation(status=200, choices=[ended], num_answer_tokens=4)
    aborted = dataclasses.replace(one_of_three, disturbed={"abort"})
    assert found(aborted, n=3) == []
    assert found(one_of_three, n=3) == ["count"]
    assert found(aborted, {**STEP, "via": "completions"}, n=3) == ["count"]


@pytest.mark.parametrize(
    ("what", "seen", "sampling"),
    [
        ("lost", Observation(), {}),
        ("lost", answered(finish=None), {}),
        ("count", Observation(status=200), {}),
        ("status", Observation(status=500, error="boom"), {}),
        ("status", Observation(status=400, error="no"), {}),
        ("status", Observation(status=404, error="no"), {}),
        ("mismatch", answered((7, 9, 7, 7)), {}),
        ("mismatch", answered((7, 300, 7, 7)), {}),
        ("mismatch", answered((7, 7, 7), finish="stop"), {}),
        ("mismatch", answered((7, 9), "aa", None, left=True, num_answer_tokens=None), {}),
        ("mismatch", answered(text="aaab"), {}),
        ("mismatch", answered(finish="stop"), {}),
        ("near_tie", answered((7, 8, 7, 7)), {}),
        ("count", answered((7, 7, 7), finish="length"), {}),
        ("count", answered((7,) * 5), {}),
        ("count", answered(num_answer_tokens=5), {}),
        ("count", answered(num_prompt_tokens=6), {}),
        ("count", answered((7, 7), "aa", "stop"), {"min_tokens": 3}),
        ("finish", answered((7, 7), "aa", "abort"), {}),
        ("finish", answered(finish="error"), {}),
        ("finish", answered((7, 7), "aa", "stop"), {"ignore_eos": True}),
        ("finish", answered((7, 7), "a.a", "stop"), {"stop": ["."]}),
        ("form", answered((7, 3, 4, 7)), {"bad_words": ["no"]}),
        ("form", answered(), {"allowed_token_ids": [8]}),
        ("form", answered(text='{"kind": "text", "n": 100}', finish="stop"), {"structured_outputs": {"json": kinds.SCHEMA}}),
        ("form", answered(text="yes no", finish="stop"), {"structured_outputs": {"regex": kinds.REGEX}}),
        ("form", answered(text="poem", finish="stop"), {"structured_outputs": {"choice": kinds.CHOICES}}),
        ("logprobs", answered(), {"logprobs": 1}),
        ("logprobs", answered(logprobs=[(-0.1, 2)] * 3), {"logprobs": 1}),
        ("logprobs", answered(logprobs=[(None, 2)] * 4), {"logprobs": 1}),
        ("logprobs", answered(prompt_logprobs=4), {"prompt_logprobs": 1}),
    ],
)  # fmt: skip
def test_a_wrong_answer_is_found(what, seen, sampling):
    assert what in found(seen, **sampling)
    assert found(answered()) == []


def test_a_refusal_must_come_and_say_why():
    step = {**STEP, "refused": "min_p", "compared": False}
    assert found(Observation(status=400, error="The min_p and logit_bias ..."), step, None) == []
    assert found(Observation(status=400, error="something else"), step, None) == ["status"]
    assert found(answered(), step, None) == ["status"]


def test_sequences_part_where_they_differ():
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2], [1, 3]) == 1
    assert first_difference([1], [1, 3]) == 1


def test_only_failures_fail():
    step, seen = STEP, answered((7, 8, 7, 7))
    assert failures(judge(0, step, seen, REFERENCE, 5, 256, lambda word: [])) == []
