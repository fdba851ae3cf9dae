"""vLLM's grammars as our drafts ask them: copies, whichever backend they are of."""

import json
import logging
import types

import pytest
from transformers import AutoTokenizer
from vllm.v1.structured_output.backend_guidance import GuidanceBackend
from vllm.v1.structured_output.backend_types import StructuredOutputOptions
from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

from vllm_aasd.engine.grammar import matchers
from vllm_aasd.engine.grammar.matchers import matcher_of

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", params=[XgrammarBackend, GuidanceBackend])
def compiled(request, demo_model):
    """From a constraint to a new grammar, and the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    options = types.SimpleNamespace(disable_any_whitespace=False, disable_additional_properties=False)
    config = types.SimpleNamespace(structured_outputs_config=options, model_config=None, speculative_config=None)
    backend = request.param(config, tokenizer, len(tokenizer))
    return types.SimpleNamespace(
        tokenizer=tokenizer,
        schema=lambda: backend.compile_grammar(
            StructuredOutputOptions.JSON, json.dumps(SCHEMA), stop_token_ids={tokenizer.eos_token_id}
        ),
    )


def test_text_is_forced_where_there_is_no_choice(compiled):
    matcher = matcher_of(compiled.schema())
    assert matcher.accept_text('{"')
    assert matcher.forced_text() in ('city"', 'city":'), "white space may come before the colon, or not"
    assert not matcher.accept_text("town") and matcher.accept_text('city": "x", "unit": "c')
    assert matcher.forced_text() == 'elsius"'
    assert not matcher.is_complete()
    assert matcher.accept_text('elsius"}') and matcher.is_complete()
    assert not matcher.accept_text(",")


def test_steps_are_undone(compiled):
    matcher = matcher_of(compiled.schema())
    for token_id in compiled.tokenizer.encode('{"city": "Rome'):
        assert matcher.accept(token_id)
    assert matcher.accept_text('", "unit": "f') and matcher.forced_text() == 'ahrenheit"'
    matcher.rollback(1)
    assert matcher.accept_text("ulus") and not matcher.accept_text("\n")
    matcher.rollback(1)
    matcher.rollback(0)
    assert matcher.accept_text('",')


def test_the_requests_own_grammar_is_never_touched(compiled):
    grammar = compiled.schema()
    token_ids = compiled.tokenizer.encode('{"city": "Rome", "unit": "celsius"}')
    grammar.accept_tokens("a", token_ids[:3])
    for _ in range(2):
        matcher = matcher_of(grammar)
        assert all(matcher.accept(token_id) for token_id in token_ids[3:])
        assert not matcher.accept(token_ids[0])
    assert grammar.validate_tokens(token_ids[3:]) == token_ids[3:]
    assert grammar.accept_tokens("a", token_ids[3:])


def test_other_backends_are_named_once(caplog):
    matchers._say_once.cache_clear()
    with caplog.at_level(logging.INFO, "vllm.aasd"):
        assert matcher_of(object()) is None and matcher_of(object()) is None
    assert len(caplog.records) == 1 and "object can't say what it forces" in caplog.text
