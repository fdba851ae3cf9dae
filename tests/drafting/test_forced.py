"""Drafts beside xgrammar's grammars: forced text in the target's own tokens, and the drafter's between."""

import json
import types

import numpy as np
import pytest
import xgrammar
from transformers import AutoTokenizer

from vllm_aasd.drafting.forced import GrammarSteering
from vllm_aasd.drafting.json_style import JSONReader, JSONStyle
from vllm_aasd.drafting.steered_draft import CONTEXT, END, FORCED, NUM_SOURCES, STYLE, Drafted
from vllm_aasd.engine.grammar.drafts import TokenTexts
from vllm_aasd.engine.grammar.matchers import XgrammarMatcher

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["city", "unit", "days", "tags"],
    "additionalProperties": False,
}
VALUE = {"city": "New York", "unit": "celsius", "days": 12, "tags": ["wet", "cold"]}
LAYOUTS = ({}, {"indent": 2}, {"indent": 4}, {"separators": (",", ":")})


@pytest.fixture(scope="module")
def target(demo_model):
    """A tokenizer, and what compiles grammars for it."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    compiler = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo.from_huggingface(tokenizer), max_threads=1)
    return types.SimpleNamespace(
        tokenizer=tokenizer,
        texts=TokenTexts(tokenizer),
        schema=lambda schema, **options: compiler.compile_json_schema(json.dumps(schema), **options),
        regex=compiler.compile_regex,
        ebnf=compiler.compile_grammar,
        end=tokenizer.eos_token_id,
        before=tokenizer.encode("\n", add_special_tokens=False)[-1],
    )


NOTHING = Drafted([], [])


def at(prob, token_ids):
    """A draft of which each token has this probability."""
    return Drafted(token_ids, [prob] * len(token_ids))


class Answer:
    """An answer under way, that the target is known to give.

    Args:
        target: see above.
        grammar: compiled.
        text: of the answer.
        style: of the target.
    """

    def __init__(self, target, grammar, text, style=None):
        self.target = target
        self.token_ids = [*target.texts.encode(text), target.end]
        self.matcher = xgrammar.GrammarMatcher(grammar)
        self.reader = JSONReader(JSONStyle(style or JSONStyle()))
        self.num_emitted = 0

    def emit(self, count):
        for token_id in self.token_ids[self.num_emitted : self.num_emitted + count]:
            assert self.matcher.accept_token(token_id)
            self.reader.read(self.target.texts.text_of(token_id))
        self.num_emitted += count

    def draft(self, steering, own=NOTHING, limit=32):
        before = self.token_ids[self.num_emitted - 1] if self.num_emitted else self.target.before
        matcher = XgrammarMatcher(types.SimpleNamespace(matcher=self.matcher))
        drafted = steering.draft(matcher, self.reader, before, 0, own, limit, self.target.end)
        assert len(drafted.token_ids) <= limit
        assert len(drafted.token_ids) == len(drafted.sources) == len(drafted.probs)
        return drafted

    def allowed(self, token_ids):
        """How many of the tokens the grammar allows."""
        fork = self.matcher.fork()
        return next((at for at, one in enumerate(token_ids) if not fork.accept_token(one)), len(token_ids))

    def num_right(self, token_ids):
        rest = self.token_ids[self.num_emitted :]
        same = (at for at, pair in enumerate(zip(token_ids, rest, strict=False)) if pair[0] != pair[1])
        return next(same, min(len(token_ids), len(rest)))

    def follow(self, steering):
        """Draft and emit to the end; returns the steps, and by source the tokens that were drafted and accepted."""
        found, steps = np.zeros((2, NUM_SOURCES), int), 0
        while self.num_emitted < len(self.token_ids):
            drafted = self.draft(steering)
            assert self.allowed(drafted.token_ids) == len(drafted.token_ids)
            count = self.num_right(drafted.token_ids)
            np.add.at(found[0], drafted.sources, 1)
            np.add.at(found[1], drafted.sources[:count], 1)
            if count < len(drafted.sources):
                assert drafted.sources[count] != FORCED, "the target writes forced text in other tokens"
            emitted = self.token_ids[self.num_emitted : self.num_emitted + count + 1]
            steering.verified(drafted, len(drafted.sources), emitted)
            self.emit(len(emitted))
            steps += 1
        return steps, *found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_once_the_style_is_known_all_but_values_is_drafted(target, layout):
    grammar, style, steering = target.schema(SCHEMA), JSONStyle(), GrammarSteering(target.texts)
    text = json.dumps(VALUE, **layout)
    steps = [Answer(target, grammar, text, style).follow(steering)[0] for _ in range(4)]
    assert steps[-1] < steps[0] and steps[-1] <= 0.6 * len(target.texts.encode(text))
    _, drafted, accepted = Answer(target, grammar, text, style).follow(steering)
    assert accepted[FORCED] >= 6 and accepted[STYLE] >= 6
    assert accepted.sum() >= 0.6 * drafted.sum()


def test_without_free_white_space_the_grammar_alone_forces_it(target):
    grammar = target.schema(SCHEMA, any_whitespace=False)
    steps, drafted, accepted = Answer(target, grammar, json.dumps(VALUE)).follow(GrammarSteering(target.texts))
    assert drafted[STYLE] <= 2 and accepted[FORCED] >= 10 and steps < 20


def test_text_of_regular_expressions_and_ebnf_is_forced(target):
    steering = GrammarSteering(target.texts)
    for grammar, text in (
        (target.regex(r"The answer is (yes|not known to me)\."), "The answer is not known to me."),
        (target.ebnf('root ::= "first " [a-z]+ ", then the end of the story"'), "first a, then the end of the story"),
    ):
        steps, drafted, accepted = Answer(target, grammar, text).follow(steering)
        assert accepted[FORCED] >= 6 and accepted[FORCED] == drafted[FORCED] and steps <= 6


def test_the_end_is_forced_where_nothing_else_may_come(target):
    answer = Answer(target, target.regex("Done: yes"), "Done: yes")
    answer.emit(1)
    assert answer.draft(GrammarSteering(target.texts)).token_ids == answer.token_ids[1:]
    answer = Answer(target, target.regex("Done: yes.*"), "Done: yes")
    assert target.end not in answer.draft(GrammarSteering(target.texts)).token_ids


def test_a_last_token_that_may_become_another_is_left_out(target):
    """`"unit` may be followed by `"`, or by more letters."""
    encode = target.texts.encode
    grammar = target.regex("The uni(versity|t|on)s")
    drafted = Answer(target, grammar, "The units").draft(GrammarSteering(target.texts))
    assert encode("The university")[:1] == encode("The")
    assert drafted.token_ids == encode("The")


@pytest.mark.parametrize("prob", [0.8, 0.95])
def test_the_drafters_tokens_are_cut_and_what_is_forced_comes_after(target, prob):
    """Its text goes on otherwise than the grammar does after the first value."""
    answer = Answer(target, target.schema(SCHEMA, any_whitespace=False), json.dumps(VALUE))
    answer.emit(len(target.texts.encode('{"city": "')))
    own = target.texts.encode('New York and Boston", "state')
    drafted = answer.draft(GrammarSteering(target.texts), at(prob, own), limit=64)
    text = target.tokenizer.decode(drafted.token_ids)
    assert text.startswith('New York and Boston", "unit": "'), text
    first = drafted.sources.index(FORCED)
    assert set(drafted.sources[:first]) == {CONTEXT} and CONTEXT not in drafted.sources[first + 2 :]


def test_a_value_ends_where_the_text_does_that_it_is_copied_from(target):
    answer = Answer(target, target.schema(SCHEMA, any_whitespace=False), json.dumps(VALUE))
    answer.emit(len(target.texts.encode('{"city": "')))
    drafted = answer.draft(GrammarSteering(target.texts), at(0.5, target.texts.encode("New York. It")), limit=64)
    assert answer.num_right(drafted.token_ids) == len(drafted.token_ids) and END in drafted.sources
    assert target.tokenizer.decode(drafted.token_ids).startswith('New York", "unit": "')


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_draft_that_the_drafter_is_sure_of_is_left_as_it_is(target, layout):
    """As of an earlier answer: in its layout and its tokens, whatever the style was so far."""
    steering, style = GrammarSteering(target.texts), JSONStyle()
    Answer(target, target.schema(SCHEMA), json.dumps(VALUE, indent=3), style).follow(steering)
    answer = Answer(target, target.schema(SCHEMA), json.dumps(VALUE, **layout), style)
    answer.emit(1)
    rest = answer.token_ids[1:]
    drafted = answer.draft(steering, at(0.95, rest), limit=len(rest) - 2)
    assert drafted.token_ids == rest[:-2]
    assert answer.draft(steering, at(0.95, rest), limit=len(rest) + 2).token_ids == rest
    probs = np.array(drafted.probs)[np.array(drafted.sources) == FORCED]
    assert len(probs) > 3 and (probs > 0.95).all()


def test_what_the_grammar_forbids_is_never_drafted(target):
    rng = np.random.default_rng(0)
    steering, style, num_drafted = GrammarSteering(target.texts), JSONStyle(), 0
    grammar = target.schema(SCHEMA)
    for layout in LAYOUTS:
        answer = Answer(target, grammar, json.dumps(VALUE, **layout), style)
        while answer.num_emitted < len(answer.token_ids):
            right = answer.token_ids[answer.num_emitted :][:8]
            own = [one if rng.random() < 0.8 else int(rng.integers(len(target.tokenizer))) for one in right]
            drafted = answer.draft(steering, Drafted(own, rng.random(len(own)).tolist()), limit=int(rng.integers(0, 9)))
            assert answer.allowed(drafted.token_ids) == len(drafted.token_ids)
            num_drafted += len(drafted.token_ids)
            answer.emit(1)
    assert num_drafted > 300


def test_the_matcher_ends_as_it_began_even_after_a_failure(target):
    answer = Answer(target, target.schema(SCHEMA), json.dumps(VALUE))
    matcher = XgrammarMatcher(types.SimpleNamespace(matcher=answer.matcher))

    with pytest.raises(IndexError):
        GrammarSteering(target.texts).draft(
            matcher, answer.reader, target.before, 0, Drafted(answer.token_ids, [0.95]), 8, None
        )
    assert matcher.accept_text("{")
    assert answer.matcher.accept_token(answer.token_ids[0])


def test_a_source_that_fails_is_trusted_less(target):
    steering = GrammarSteering(target.texts)
    answer = Answer(target, target.regex("Done: yes"), "Done: yes")
    answer.emit(1)
    first = answer.draft(steering)
    for _ in range(20):
        steering.verified(first, len(first.sources), [target.before])
    failing = answer.draft(steering).probs[0]
    assert failing < first.probs[0] - 0.2
    for _ in range(60):
        steering.verified(first, len(first.sources), [*first.token_ids, target.before])
    assert answer.draft(steering).probs[0] > failing + 0.2


def test_text_that_the_target_writes_in_other_tokens_is_drafted_so_the_next_time(target):
    steering, grammar = GrammarSteering(target.texts), target.regex(r'<call>\{"full_name": "x"\}')
    tokens = [
        *target.texts.encode("<"),
        *map(target.tokenizer.convert_tokens_to_ids, ("c", "all")),
        *target.texts.encode('>{"full_name": "x"}'),
    ]
    steps = []
    for _ in range(3):
        answer = Answer(target, grammar, "<")
        answer.token_ids = [*tokens, target.end]
        steps.append(0)
        while answer.num_emitted < len(answer.token_ids):
            drafted = answer.draft(steering) if answer.num_emitted else None
            count = answer.num_right(drafted.token_ids) if drafted else 0
            emitted = answer.token_ids[answer.num_emitted : answer.num_emitted + count + 1]
            if drafted:
                steering.verified(drafted, len(drafted.sources), emitted)
            answer.emit(len(emitted))
            steps[-1] += 1
    assert steps[0] >= 4 and steps[-1] == 2


def test_after_a_token_that_the_target_would_not_write_nothing_is_drafted(target):
    answer = Answer(target, target.regex("reference"), "reference")
    answer.token_ids = [*target.texts.encode("re"), *target.texts.encode("ference")]
    answer.emit(1)
    assert answer.draft(GrammarSteering(target.texts)).token_ids == []
