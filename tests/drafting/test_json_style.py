"""How a model's white space in JSON is learned, and expected again."""

import json

import pytest

from vllm_aasd.drafting.json_style import JSONReader, JSONStyle

VALUE = {"a": [1, {"b": 'x, {y: ["'}], "c": {"d": "e"}}
LAYOUTS = ({}, {"indent": 2}, {"indent": 4}, {"indent": "\t"}, {"separators": (",", ":")})


def read(style, text):
    reader = JSONReader(style)
    reader.read(text)
    return reader


def signs(text):
    """Where each sign outside of strings stands, and the white space before it."""
    reader, begin = JSONReader(JSONStyle()), 0
    for at, sign in enumerate(text):
        was_in_string = reader.in_string
        reader.read(sign)
        if was_in_string:
            begin = at + 1
        elif not sign.isspace():
            yield begin, at
            begin = at + 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_one_answer_shows_is_expected_in_the_next(layout):
    usual, text = JSONStyle(), json.dumps(VALUE, **layout)
    for _ in range(2):
        read(JSONStyle(usual), text)
    places = list(signs(text))
    assert len(places) > 20
    for begin, at in places[1:]:
        assert read(JSONStyle(usual), text[:begin]).gap_before(text[at]) == text[begin:at]


def test_what_stands_there_already_is_not_expected_again():
    style = JSONStyle(JSONStyle())
    read(style, '{\n  "a": 1,\n  "b"')
    reader = read(style, '{\n  "a": 1,\n ')
    assert reader.gap_before('"') == " "
    assert read(style, '{\n  "a": 1, ').gap_before('"') == "", "another habit than before, and nothing to add"


def test_deeper_places_are_indented_further():
    style = JSONStyle(JSONStyle())
    read(style, '{\n  "a": 1')
    assert read(style, '{\n  "a": {').gap_before('"') == "\n    "


def test_nothing_is_expected_before_anything_was_seen_or_where_habits_differ():
    usual = JSONStyle()
    assert read(JSONStyle(usual), '{"a":').gap_before("1") is None
    read(JSONStyle(usual), '{"a": 1}')
    assert read(JSONStyle(usual), '{"a":').gap_before("1") is None, "one answer is no habit of a model"
    read(JSONStyle(usual), '{"a": 1, "b":2, "c":3}')
    assert read(JSONStyle(usual), '{"a":').gap_before("1") is None
    assert read(JSONStyle(usual), '{"a":1, "b":').gap_before("1") == "", "but the answer's own is"


def test_reading_ahead_teaches_nothing():
    usual = JSONStyle()
    reader = read(JSONStyle(usual), "{")
    for _ in range(8):
        reader.ahead().read('"a": 1}')
    assert read(JSONStyle(usual), '{"a":').gap_before("1") is None
    assert not reader.in_string and reader.last == "{"


def test_other_text_does_no_harm():
    style = JSONStyle()
    reader = read(style, 'He said: "well}}]]\n\\" {\'' + 50 * " " + "x\n" + '{"a": 1}')
    assert not reader.in_string and reader.last == "}"
