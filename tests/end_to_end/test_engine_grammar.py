"""Drafts beside grammars, through real engines: the output is the target's own, and forced tokens are drafted."""

import contextlib
import json
import os
import pathlib
import random

import jsonschema
import pytest
import xgrammar
from vllm.v1.structured_output.backend_xgrammar import has_xgrammar_unsupported_json_features

from aasd_testing.engines import engine, greedy, with_options
from aasd_testing.tiny_models import lora_adapter, sliding_window_model

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("V1 engines")]

PERSON = {
    "type": "object",
    "properties": {
        "full_name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "occupation": {"enum": ["baker", "carpenter", "physicist"]},
        "hobbies": {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 1, "maxItems": 2},
    },
    "required": ["full_name", "age", "occupation", "hobbies"],
    "additionalProperties": False,
}
PEOPLE = [
    f"{name} is {age} years old and works as a {work}. {name} likes {hobby}. Answer with a JSON object."
    for name, age, work, hobby in (
        ("Anna Smith", 31, "baker", "chess"),
        ("Bob Jones", 44, "carpenter", "fishing"),
        ("Carla Gomez", 27, "physicist", "running"),
    )
]
ARITHMETIC = """root ::= "result = " term " + " term " ;"
term ::= [0-9] | "(" term " * " term ")"
"""
CALL = json.dumps(
    {
        "type": "structural_tag",
        "format": {
            "type": "triggered_tags",
            "triggers": ["<call>"],
            "tags": [{"begin": "<call>", "content": {"type": "json_schema", "json_schema": PERSON}, "end": "</call>"}],
            "at_least_one": True,
            "stop_after_first": True,
        },
    }
)
CONSTRAINTS = (
    {"json": PERSON},
    {"json_object": True},
    {"regex": r"Order (pending|perhaps delivered) on \d{4}-\d{2}-\d{2}, reference [A-Z]{3}"},
    {"choice": ["physicist of the university", "physicist of the industry", "baker"]},
    {"grammar": ARITHMETIC},
    {"structural_tag": CALL},
)

# Greedily, vLLM gives one answer.
SEVERAL = {"n": 2, "temperature": 1.0, "top_k": 1}


def requests(**sampling):
    """Every constraint with every person."""
    params = {"max_tokens": 90, **sampling}
    return [one for constraint in CONSTRAINTS for one in greedy(PEOPLE, structured_outputs=constraint, **params)]


@pytest.fixture(scope="module")
def plain(plain_engine):
    return plain_engine.run(requests())


@pytest.fixture(scope="module")
def speculated(aasd_engine):
    return aasd_engine.run(with_options(requests(), aasd_verification="strict"))


def test_the_output_is_the_targets_own(plain, speculated):
    assert speculated.token_ids == plain.token_ids
    assert not any(speculated.faults.values())


def test_finished_answers_are_valid(speculated):
    finished = [output for output in speculated.outputs[: len(PEOPLE)] if output["finish_reason"] == "stop"]
    assert finished
    for output in finished:
        jsonschema.validate(json.loads(output["text"]), PERSON)


def test_forced_tokens_are_drafted_and_accepted(speculated):
    metrics = speculated.metrics
    forced, style, context = (metrics[f"aasd:grammar_accepted_tokens:{of}"] for of in ("forced", "style", "context"))
    assert forced > 100 and style > 30 and context > 30, metrics
    assert metrics["aasd:grammar_seconds"] > 0


def test_a_target_that_expects_the_text_writes_it_in_the_tokens_that_were_drafted(aasd_engine):
    """The schema is in the prompt; the first answers show how the target writes."""
    prompts = [f"{person}\n\nIts schema: {json.dumps(PERSON)}" for person in PEOPLE]
    asked = with_options(greedy(prompts, 90, structured_outputs={"json": PERSON}), aasd_verification="strict")
    aasd_engine.run(asked)
    metrics = aasd_engine.run(asked).metrics
    drafted, rejected = (metrics[f"aasd:grammar_{of}_tokens:forced"] for of in ("draft", "rejected"))
    assert rejected <= 0.03 * drafted and drafted > 20, metrics


@pytest.mark.parametrize(
    "sampling",
    [
        {"min_tokens": 60, "seed": 1},
        {"stop": ["age", "19"]},
        {"logprobs": 2},
        {"max_tokens": 7},
        {"repetition_penalty": 1.3},
        SEVERAL,
    ],
    ids=lambda sampling: next(iter(sampling)),
)
def test_with_other_parameters(plain_engine, aasd_engine, sampling):
    asked = requests(**sampling)[:: len(PEOPLE)]
    plain, ours = plain_engine.run(asked), aasd_engine.run(with_options(asked, aasd_verification="strict"))
    assert ours.token_ids == plain.token_ids
    assert ours.accepted > 0 and not any(ours.faults.values())


def test_a_request_without_speculation_has_no_drafts(plain, aasd_engine):
    ours = aasd_engine.run(with_options(requests(), aasd_enabled=False))
    assert ours.drafted == 0 and ours.token_ids == plain.token_ids


@pytest.mark.long
@pytest.mark.parametrize("kind", ["guidance", "preemption", "adapter"])
def test_in_other_engines(demo_model, tmp_path, kind):
    asked = requests()
    if kind == "adapter":
        adapter, options = lora_adapter(tmp_path / "adapter", demo_model), {"enable_lora": True}
        asked = [one | ({"adapter": adapter} if number % 2 else {}) for number, one in enumerate(asked)]
    elif kind == "preemption":
        options = {"num_gpu_blocks_override": 20, "block_size": 32, "max_model_len": 512}
    else:
        options = {"structured_outputs_config": {"backend": "guidance"}}
    found = []
    for aasd in (None, {"aasd_verification": "strict", "aasd_draft_length": 8}):
        with engine(demo_model, aasd=aasd, **options) as started:
            found.append(started.run(asked))
    plain, ours = found
    assert ours.token_ids == plain.token_ids and not any(ours.faults.values())
    assert ours.metrics["aasd:grammar_accepted_tokens:forced"] > 50
    assert (ours.metrics["vllm:num_preemptions"] > 0) is (kind == "preemption")


PARSER = """
from vllm.reasoning import ReasoningParser, ReasoningParserManager

@ReasoningParserManager.register_module("until_a_full_stop")
class Parser(ReasoningParser):
    def __init__(self, tokenizer, *args, **kwargs):
        super().__init__(tokenizer, *args, **kwargs)
        self._ends = {tokenizer.encode(text, add_special_tokens=False)[-1] for text in ("a.", "a.\\n")}

    def is_reasoning_end(self, input_ids):
        return False

    def is_reasoning_end_streaming(self, input_ids, delta_ids):
        return not self._ends.isdisjoint(delta_ids)

    def extract_content_ids(self, input_ids):
        return []

    def extract_reasoning(self, model_output, request):
        return None, model_output

    def extract_reasoning_streaming(self, *args):
        return None
"""


@pytest.mark.long
def test_a_grammar_begins_after_reasoning_even_within_a_draft(demo_model, tmp_path):
    """The reasoning repeats the prompt, so that its end is drafted."""
    (tmp_path / "parser.py").write_text(PARSER)
    reasoning = {"reasoning_parser": "until_a_full_stop", "reasoning_parser_plugin": str(tmp_path / "parser.py")}
    asked = [
        one
        for constraint in CONSTRAINTS[:3]
        for one in greedy([f"Say this three times: {person}" for person in PEOPLE], 100, structured_outputs=constraint)
    ]
    found = []
    for aasd in (None, {"aasd_verification": "strict", "aasd_draft_length": 8}):
        with engine(demo_model, aasd=aasd, structured_outputs_config=reasoning, max_num_seqs=16) as started:
            found.append(started.run(asked))
    plain, ours = found
    assert ours.token_ids == plain.token_ids
    assert sum(not output["text"].startswith("{") and "{" in output["text"] for output in ours.outputs) >= 2
    assert ours.metrics["aasd:grammar_accepted_tokens:forced"] > 20 and not any(ours.faults.values())


def random_schema(rng, depth=0):
    """A schema of any of the kinds that grammars can force something of."""
    words = ("id", "name", "été", "a b", "x_1", 'quote"d', "long_property_name", "城市", "back\\slash")
    kinds = ["string", "integer", "enum", "boolean", "const", *(["object", "array"] if depth < 3 else [])]
    kind = rng.choice(kinds)
    if kind == "object" or depth == 0:
        names = rng.sample(words, rng.randint(1, 4))
        required = [name for name in names if rng.random() < 0.8]
        properties = {name: random_schema(rng, depth + 1) for name in names}
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    if kind == "array":
        return {"type": "array", "items": random_schema(rng, depth + 1), "minItems": rng.randint(0, 2), "maxItems": 3}
    if kind == "string":
        return {"type": "string", **rng.choice([{}, {"maxLength": 5}, {"pattern": "^[A-Z]{2}-[0-9]{3}$"}])}
    if kind == "enum":
        return {"enum": rng.sample([*words, 1, 10, None, True], rng.randint(1, 4))}
    return {"const": rng.choice(words)} if kind == "const" else {"type": kind}


@pytest.mark.long
def test_fuzzed_schemas_on_a_tiny_model(demo_model, tmp_path):
    """Random weights write whatever the grammar allows, in whatever tokens, and end in the middle."""
    rng = random.Random(int(os.environ.get("AASD_FUZZ_SEED", "0")))
    model = sliding_window_model(tmp_path / "model", demo_model, hybrid=False)
    asked = []
    for number in range(int(os.environ.get("AASD_FUZZ_CASES", "1000"))):
        sampling = rng.choice([{}, {}, {"stop": ["a"]}, {"min_tokens": 9}, {"ignore_eos": True}, SEVERAL])
        constraint = rng.choice([{"json": random_schema(rng)}] * 6 + list(CONSTRAINTS[1:]))
        max_tokens = rng.randint(sampling.get("min_tokens", 1), 48)
        asked += greedy([f"{number} {rng.choice(PEOPLE)}"], max_tokens, structured_outputs=constraint, **sampling)
    options = {"max_num_seqs": 16, "max_model_len": 512}
    found = []
    for aasd in (None, {"aasd_verification": "strict", "aasd_draft_length": 12}):
        with engine(model, aasd=aasd, **options) as started:
            found.append(started.run(asked))
            assert "Please file an issue" not in started.log() and "Unexpected: grammar" not in started.log()
    plain, ours = found
    different = [one["sampling"] for one, a, b in zip(asked, plain.token_ids, ours.token_ids, strict=True) if a != b]
    assert not different, f"{len(different)} of {len(asked)}: {different[:3]}"
    assert ours.metrics["aasd:grammar_accepted_tokens:forced"] > len(asked) and not any(ours.faults.values())


def suite_schemas():
    """What xgrammar takes of the JSON Schema Test Suite, which the source of the package `jsonschema` holds."""
    folder = os.environ.get("AASD_JSON_SCHEMA_SUITE")
    if not folder:
        pytest.skip("AASD_JSON_SCHEMA_SUITE isn't set to a folder like jsonschema-4.26.0/json/tests/draft2020-12")
    for path in sorted(pathlib.Path(folder).glob("*.json")):
        for case in json.loads(path.read_text()):
            schema = case["schema"]
            if isinstance(schema, dict) and "$ref" not in json.dumps(schema):
                with contextlib.suppress(Exception):
                    xgrammar.Grammar.from_json_schema(json.dumps(schema))
                    if not has_xgrammar_unsupported_json_features(schema):
                        yield schema


@pytest.mark.long
def test_a_public_suite_of_schemas_and_generated_tools(plain_engine, aasd_engine):
    rng = random.Random(1)
    schemas = list(suite_schemas())
    chosen = [*rng.sample(schemas, min(300, len(schemas)))]
    chosen += [
        {
            "type": "object",
            "properties": {"name": {"const": f"tool_{number}"}, "parameters": random_schema(rng)},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for number in range(100)
    ]
    asked = [
        one
        for schema in chosen
        for one in greedy(
            [f"Answer as {json.dumps(schema)[:300]}"], 60, structured_outputs={"json": json.dumps(schema)}
        )
    ]
    plain, ours = plain_engine.run(asked), aasd_engine.run(with_options(asked, aasd_verification="strict"))
    assert ours.token_ids == plain.token_ids and not any(ours.faults.values())
    assert ours.metrics["aasd:grammar_accepted_tokens:forced"] > len(asked)
    ended = [(one, schema) for one, schema in zip(ours.outputs, chosen, strict=True) if one["finish_reason"] == "stop"]
    assert len(ended) > 100
    for output, schema in ended:
        value = json.loads(output["text"])
        if "parameters" in schema.get("properties", {}):
            jsonschema.validate(value, schema)
