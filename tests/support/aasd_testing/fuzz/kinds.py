"""The kinds of requests: what each asks for, and whether its answer must be the target's own."""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

from aasd_testing.fuzz import prompts_of_tokens
from aasd_testing.fuzz.limits import MAX_MODEL_LEN, Limits

STRICT = {"aasd_verification": "strict"}
OFF = {"aasd_enabled": False}
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["text", "code"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "n"],
    "additionalProperties": False,
}
REGEX = r"(yes|no|maybe)( (yes|no|maybe)){0,5}\."
CHOICES = ["summary", "quotation", "source code"]
# A call as the server's parser, hermes, reads it: the small model makes none unless it must.
CALL_REGEX = r'<tool_call>\n\{"name": "classify", "arguments": \{"kind": "(text|code)", "n": [1-9]\}\}\n</tool_call>'
POLICIES = (
    {},
    {"aasd_verification": "fly", "aasd_fly_window": 3},
    {"aasd_verification": "budget", "aasd_budget_nats": 1.0},
    {"aasd_verification": "conditional", "aasd_alpha": 0.1},
)
TOOL = {"type": "function", "function": {"name": "classify", "strict": True, "parameters": SCHEMA}}
LONG = 2_000_000
"""Characters of a name or value that is too long."""

_NAMED = {"type": "function", "function": {"name": "classify"}}
_STOPS = ([" the"], [".", "?"], ["\n"], [",", " of "], [" and", " is", "a"])
_BAD_WORDS = ([" the", "The", " of"], [" a", " is", "It"])
_ACCEPTED_OPTIONS = (
    {"aasd_enabled": 1},
    {"aasd_enabled": "false"},
    {"aasd_alpha": 0},
    {"AASD_alpha": "somebody else's"},
    {"kv": "v" * 200, **STRICT},
)
_REFUSED_OPTIONS = (
    ({"aasd_alpha": 1e308}, "is not allowed"),
    ({"aasd_alpha": "0.1"}, "is not allowed"),
    ({"aasd_enabled": "maybe"}, "it takes true or false"),
    ({"aasd_enabled": 2}, "it takes true or false"),
    ({"aasd_verifcation": "strict"}, "Did you mean 'aasd_verification'?"),
    ({"aasd_": 1}, "Unknown request option"),
    ({**STRICT, "aasd_alpha": 0.1}, "it takes effect only with"),
    ({"aasd_verification": [1]}, "is not allowed"),
    ({"aasd_verification": {"repeat": "v", "times": LONG}}, "is not allowed"),
)


class Kind(NamedTuple):
    """A kind of request.

    Attributes:
        make: gives the request's fields.
        weight: how often it comes beside the others; of questions, how many there are in each turn.
        needs: features that an engine must have for it.
    """

    make: Callable[[random.Random, Limits], dict[str, Any]]
    weight: float = 1.0
    needs: frozenset[str] = frozenset()


def _greedy(rng: random.Random, limits: Limits, **sampling: Any) -> dict[str, Any]:
    most = rng.choice((limits.max_answer, rng.randint(2, limits.max_answer)))
    sampling = {"temperature": 0.0, "max_tokens": most, **sampling}
    return {"prompt": prompts_of_tokens.describe(rng, limits.max_prompt), "sampling": sampling}


def _of_length(rng: random.Random, limits: Limits, tokens: int, shape: str, **sampling: Any) -> dict[str, Any]:
    prompt = {"shape": shape, "seed": rng.randrange(prompts_of_tokens.NUM_TEXTS), "tokens": tokens}
    return _greedy(rng, limits, **sampling) | {"prompt": prompt}


def _copy(rng: random.Random, limits: Limits) -> dict[str, Any]:
    asked = _of_length(rng, limits, limits.max_prompt, "period", max_tokens=limits.max_answer)
    asked["prompt"]["period"] = 7
    return asked


def _thinking(rng: random.Random, limits: Limits) -> dict[str, Any]:
    asked = _greedy(rng, limits, thinking_token_budget=rng.randint(0, 6), max_tokens=limits.max_answer)
    asked["prompt"]["think"] = True
    return asked


def _structured(rng: random.Random, limits: Limits, least: int, **constraint: Any) -> dict[str, Any]:
    return _greedy(rng, limits, max_tokens=max(least, limits.max_answer), structured_outputs=constraint)


def _with(**sampling: tuple) -> Kind:
    """A greedy request that has one of some values of each parameter."""
    return Kind(
        lambda rng, limits: _greedy(rng, limits, **{name: rng.choice(values) for name, values in sampling.items()})
    )


def _needing(feature: str, weight: float, make: Callable[..., dict[str, Any]]) -> Kind:
    return Kind(make, weight, frozenset({feature}))


QUESTIONS = {
    "plain": Kind(_greedy),
    "copy": Kind(_copy),
    "canary": Kind(lambda rng, limits: _of_length(rng, limits, limits.max_prompt, "canary"), 2),
    "thinking": _needing("thinking", 3, _thinking),
    "embeds": _needing("embeds", 2, lambda rng, limits: _greedy(rng, limits) | {"embeds": True}),
    "scored": _with(logprobs=(6,), logprob_token_ids=([28, 30, 198, 260, 284, 48_000], list(range(300, 306)))),
    "stop": _with(stop=_STOPS),
    "stop_kept": _with(stop=_STOPS, include_stop_str_in_output=(True,)),
    "stop_token": _with(stop_token_ids=([28, 30, 198, 260, 284],)),
    "many_stop_tokens": _with(stop_token_ids=tuple({"from": 19_000, "to": end} for end in (19_065, 19_700, 49_000))),
    "min_tokens": Kind(
        lambda rng, limits: _greedy(
            rng, limits, min_tokens=rng.randint(1, limits.max_answer), max_tokens=limits.max_answer
        )
    ),
    "ignore_eos": _with(ignore_eos=(True,)),
    "penalties": _with(repetition_penalty=(0.9, 1.3), frequency_penalty=(0.5,), presence_penalty=(0.2,)),
    "bad_words": _with(bad_words=_BAD_WORDS),
    "many_bad_words": _with(bad_words=({"words": 60},)),
    "allowed_ids": Kind(
        lambda rng, limits: _greedy(rng, limits, allowed_token_ids=sorted(rng.sample(range(100, 2000), 40)))
    ),
    "many_allowed_ids": _with(allowed_token_ids=({"from": 0, "to": 48_000},)),
    "schema": Kind(lambda rng, limits: _structured(rng, limits, 32, json=SCHEMA)),
    "regex": Kind(lambda rng, limits: _structured(rng, limits, 16, regex=REGEX)),
    "choice": Kind(lambda rng, limits: _structured(rng, limits, 8, choice=CHOICES)),
    "one_token_prompt": Kind(lambda rng, limits: _of_length(rng, limits, 1, "text")),
    "one_token_answer": _with(max_tokens=(1,)),
    "longest_prompt": Kind(lambda rng, limits: _of_length(rng, limits, MAX_MODEL_LEN - 1, "text", max_tokens=1)),
    "to_the_limit": Kind(
        lambda rng, limits: _of_length(rng, limits, MAX_MODEL_LEN - 12, "text", max_tokens=12, ignore_eos=True)
    ),
}
"""Greedy, so that the target alone says what the answer is; each is asked verified strictly, or without drafts."""


def _sampled(rng: random.Random, limits: Limits, **sampling: Any) -> dict[str, Any]:
    sampling = {"temperature": rng.choice((0.3, 1.0)), "seed": rng.randrange(99), **sampling}
    return _greedy(rng, limits, **sampling) | {"xargs": rng.choice((*POLICIES, STRICT))}


def _relaxed_sampling(rng: random.Random, limits: Limits) -> dict[str, Any]:
    return _sampled(rng, limits) | {"xargs": {**rng.choice(POLICIES), "aasd_relax_sampling": True}}


def _refused(rng: random.Random, limits: Limits, message: str, **sampling: Any) -> dict[str, Any]:
    return _greedy(rng, limits, **sampling) | {"refused": message}


def _refused_option(rng: random.Random, limits: Limits) -> dict[str, Any]:
    xargs, message = rng.choice(_REFUSED_OPTIONS)
    return _refused(rng, limits, message) | {"xargs": xargs}


def _tool(rng: random.Random, limits: Limits, choice: Any, **sampling: Any) -> dict[str, Any]:
    via = rng.choice(("chat", "chat_stream"))
    return _greedy(rng, limits, max_tokens=60, **sampling) | {"via": via, "tools": [TOOL], "tool_choice": choice}


def _chat(rng: random.Random, limits: Limits) -> dict[str, Any]:
    via = rng.choice(("chat", "chat_stream"))
    return _greedy(rng, limits, logprobs=2) | {"via": via, "xargs": rng.choice(POLICIES)}


FREE = {
    "policy": Kind(lambda rng, limits: _greedy(rng, limits) | {"xargs": rng.choice(POLICIES)}, 3),
    "sampled": Kind(_sampled, 2),
    "relaxed_sampling": Kind(_relaxed_sampling),
    "top_k": _needing("top_k", 2, lambda rng, limits: _sampled(rng, limits, top_k=rng.randint(1, 40), top_p=0.9)),
    "several": Kind(lambda rng, limits: _sampled(rng, limits, n=rng.randint(2, 4)), 2),
    "sampled_schema": Kind(
        lambda rng, limits: _sampled(rng, limits, max_tokens=40, structured_outputs={"json": SCHEMA})
    ),
    "accepted_option": Kind(lambda rng, limits: _greedy(rng, limits) | {"xargs": rng.choice(_ACCEPTED_OPTIONS)}),
    "refused_option": Kind(_refused_option),
    "long_key": Kind(
        lambda rng, limits: _refused(rng, limits, "Unknown request option") | {"long_key": rng.choice((81, LONG))}, 0.5
    ),
    "refused_logit_bias": Kind(lambda rng, limits: _refused(rng, limits, "logit_bias", logit_bias={"300": 5.0}), 0.5),
    "refused_min_p": Kind(lambda rng, limits: _refused(rng, limits, "min_p", temperature=0.5, min_p=0.2), 0.5),
    "too_long": Kind(
        lambda rng, limits: _of_length(rng, limits, MAX_MODEL_LEN + 9, "noise") | {"refused": "maximum"}, 0.5
    ),
    "beam": Kind(lambda rng, limits: _greedy(rng, limits, n=rng.randint(2, 3), max_tokens=4) | {"via": "beam"}),
    "scoring": Kind(lambda rng, limits: _greedy(rng, limits) | {"via": "scoring"}),
    "tool_named": Kind(lambda rng, limits: _tool(rng, limits, _NAMED)),
    "tool_required": Kind(lambda rng, limits: _tool(rng, limits, "required")),
    "tool_auto": Kind(lambda rng, limits: _tool(rng, limits, "auto")),
    "tool_called": Kind(lambda rng, limits: _tool(rng, limits, "auto", structured_outputs={"regex": CALL_REGEX})),
    "chat": Kind(_chat),
}
"""Whose answers depend on drafts, chance or the client's library: only their form is judged."""


def possible(kinds: dict[str, Kind], limits: Limits) -> dict[str, Kind]:
    """Those that an engine can be asked."""
    return {name: kind for name, kind in kinds.items() if kind.needs <= limits.features}
