"""The kinds of requests: what each asks for, and whether its answer must be the target's own."""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

from aasd_testing.fuzz import prompts_of_tokens
from aasd_testing.fuzz.limits import Limits

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
POLICIES = (
    {},
    {"aasd_verification": "typical"},
    {"aasd_verification": "fly", "aasd_fly_window": 3},
    {"aasd_verification": "budget", "aasd_budget_nats": 1.0},
    {"aasd_verification": "conditional", "aasd_alpha": 0.1, "aasd_collapse_guard": False},
)
TOOL = {"type": "function", "function": {"name": "classify", "strict": True, "parameters": SCHEMA}}

_STOPS = ([" the"], [".", "?"], ["\n"], [",", " of "], [" and", " is", "a"])
_BAD_WORDS = ([" the", "The", " of"], [" a", " is", "It"])
_REFUSED_OPTIONS = (
    ({"aasd_floor": 2}, "The request's aasd_floor is not allowed"),
    ({"aasd_enabled": "maybe"}, "it takes true or false"),
    ({"aasd_verifcation": "strict"}, "Did you mean 'aasd_verification'?"),
    ({**STRICT, "aasd_alpha": 0.1}, "it takes effect only with"),
    ({"aasd_verification": [1]}, "is not allowed"),
)


class Kind(NamedTuple):
    """A kind of request.

    Attributes:
        weight: how often it comes, beside the others.
        needs: features that an engine must have for it.
        make: gives the request's fields.
    """

    weight: float
    make: Callable[[random.Random, Limits], dict[str, Any]]
    needs: frozenset[str] = frozenset()


def _greedy(rng: random.Random, limits: Limits, **sampling: Any) -> dict[str, Any]:
    sampling = {"temperature": 0.0, "max_tokens": rng.randint(2, limits.max_answer), **sampling}
    return {"prompt": prompts_of_tokens.describe(rng, limits.max_prompt), "sampling": sampling}


def _of_length(rng: random.Random, limits: Limits, tokens: int, shape: str, **sampling: Any) -> dict[str, Any]:
    asked = _greedy(rng, limits, **sampling)
    asked["prompt"] = {"shape": shape, "seed": rng.randrange(prompts_of_tokens.NUM_TEXTS), "tokens": tokens}
    return asked


def _penalties(rng: random.Random, limits: Limits) -> dict[str, Any]:
    return _greedy(rng, limits, repetition_penalty=rng.choice((0.9, 1.3)), frequency_penalty=0.5, presence_penalty=0.2)


def _structured(rng: random.Random, limits: Limits, least: int, **constraint: Any) -> dict[str, Any]:
    return _greedy(rng, limits, max_tokens=max(least, limits.max_answer), structured_outputs=constraint)


QUESTIONS: dict[str, Callable[[random.Random, Limits], dict[str, Any]]] = {
    "plain": _greedy,
    "copy": lambda rng, limits: (
        _of_length(rng, limits, limits.max_prompt, "period", max_tokens=limits.max_answer)
        | {"prompt": {"shape": "period", "seed": rng.randrange(9), "tokens": limits.max_prompt, "period": 7}}
    ),
    "stop": lambda rng, limits: _greedy(rng, limits, max_tokens=limits.max_answer, stop=rng.choice(_STOPS)),
    "stop_kept": lambda rng, limits: _greedy(
        rng, limits, max_tokens=limits.max_answer, stop=rng.choice(_STOPS), include_stop_str_in_output=True
    ),
    "stop_token": lambda rng, limits: _greedy(rng, limits, stop_token_ids=[28, 30, 198, 260, 284]),
    "min_tokens": lambda rng, limits: _greedy(
        rng, limits, min_tokens=rng.randint(1, limits.max_answer), max_tokens=limits.max_answer
    ),
    "ignore_eos": lambda rng, limits: _greedy(rng, limits, ignore_eos=True, max_tokens=limits.max_answer),
    "penalties": _penalties,
    "bad_words": lambda rng, limits: _greedy(rng, limits, bad_words=rng.choice(_BAD_WORDS)),
    "allowed_ids": lambda rng, limits: _greedy(rng, limits, allowed_token_ids=sorted(rng.sample(range(100, 2000), 40))),
    "schema": lambda rng, limits: _structured(rng, limits, 32, json=SCHEMA),
    "regex": lambda rng, limits: _structured(rng, limits, 16, regex=REGEX),
    "choice": lambda rng, limits: _structured(rng, limits, 8, choice=CHOICES),
    "one_token_prompt": lambda rng, limits: _of_length(rng, limits, 1, "text"),
    "one_token_answer": lambda rng, limits: _greedy(rng, limits, max_tokens=1),
    "longest_prompt": lambda rng, limits: _of_length(rng, limits, limits.max_model_len - 1, "text", max_tokens=1),
    "to_the_limit": lambda rng, limits: _of_length(
        rng, limits, limits.max_model_len - 12, "text", max_tokens=12, ignore_eos=True
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


def _too_long(rng: random.Random, limits: Limits) -> dict[str, Any]:
    asked = _of_length(rng, limits, limits.max_model_len + rng.randint(1, 40), "noise")
    return asked | {"refused": "maximum"}


def _beam(rng: random.Random, limits: Limits) -> dict[str, Any]:
    asked = _greedy(rng, limits, n=rng.randint(2, 3), max_tokens=rng.randint(2, 6))
    return asked | {"via": "beam"}


def _tool(rng: random.Random, limits: Limits, choice: Any) -> dict[str, Any]:
    return _greedy(rng, limits, max_tokens=60) | {"via": "chat", "tools": [TOOL], "tool_choice": choice}


HTTP = frozenset({"http"})
FREE: dict[str, Kind] = {
    "policy": Kind(3, lambda rng, limits: _greedy(rng, limits) | {"xargs": rng.choice(POLICIES)}),
    "sampled": Kind(2, _sampled),
    "relaxed_sampling": Kind(1, _relaxed_sampling),
    "top_k": Kind(
        2, lambda rng, limits: _sampled(rng, limits, top_k=rng.randint(1, 40), top_p=0.9), frozenset({"top_k"})
    ),
    "several": Kind(2, lambda rng, limits: _sampled(rng, limits, n=rng.randint(2, 4))),
    "sampled_schema": Kind(
        1, lambda rng, limits: _sampled(rng, limits, max_tokens=40, structured_outputs={"json": SCHEMA})
    ),
    "refused_logit_bias": Kind(0.5, lambda rng, limits: _refused(rng, limits, "logit_bias", logit_bias={"300": 5.0})),
    "refused_min_p": Kind(0.5, lambda rng, limits: _refused(rng, limits, "min_p", temperature=0.5, min_p=0.2)),
    "refused_option": Kind(0.5, _refused_option),
    "too_long": Kind(0.5, _too_long),
    "beam": Kind(1, _beam, HTTP),
    "tool_named": Kind(
        1, lambda rng, limits: _tool(rng, limits, {"type": "function", "function": {"name": "classify"}}), HTTP
    ),
    "tool_required": Kind(1, lambda rng, limits: _tool(rng, limits, "required"), HTTP),
    "tool_auto": Kind(0.5, lambda rng, limits: _tool(rng, limits, "auto"), HTTP),
    "chat": Kind(
        1, lambda rng, limits: _greedy(rng, limits, logprobs=2) | {"via": "chat", "xargs": rng.choice(POLICIES)}, HTTP
    ),
}
"""Whose answers depend on drafts, chance or the client's library: only their form is judged."""
