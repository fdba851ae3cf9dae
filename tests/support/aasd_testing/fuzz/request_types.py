"""The types of requests that the fuzzer sends."""

import dataclasses
import random
from collections.abc import Callable
from typing import Any, NamedTuple

from aasd_testing.fuzz.profiles import CORPORA, FLEETING, MAX_MODEL_LEN, Profile
from aasd_testing.fuzz.prompts import Prompts

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
LONG = 2_000_000
"""Characters of a name or value that is too long."""

_RULES = (
    {},
    {"aasd_verification": "fly", "aasd_fly_window": 3},
    {"aasd_verification": "budget", "aasd_budget_nats": 1.0},
    {"aasd_verification": "conditional", "aasd_alpha": 0.1},
)
_TOOL = {"type": "function", "function": {"name": "classify", "strict": True, "parameters": SCHEMA}}
_NAMED_TOOL = {"type": "function", "function": {"name": "classify"}}
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
    ({"aasd_" + "k" * 81: "v"}, "Unknown request option"),
    ({"aasd_" + "k" * LONG: "v" * 100}, "Unknown request option"),
    ({**STRICT, "aasd_alpha": 0.1}, "it takes effect only with"),
    ({"aasd_verification": [1]}, "is not allowed"),
    ({"aasd_prediction": [-1]}, "is not allowed"),
    ({"aasd_corpora": ["readme", "another"]}, "Known:"),
    ({"aasd_verification": "v" * LONG}, "is not allowed"),
)


@dataclasses.dataclass(frozen=True)
class Request:
    """A request, and what its client does.

    Attributes:
        prompt: token ids; empty for the chat endpoint, which takes `message` instead.
        sampling: sampling parameters, as the API names them.
        xargs: the request's ``vllm_xargs``.
        body: more fields of the API's.
        embeds: whether the prompt is sent as embeddings.
        refused_with: text that the error must hold, if the request must be refused.
        reference: which of the answers without speculation its own must equal.
        disconnect_after: tokens after which the client disconnects.
        wait: milliseconds until the next step.
    """

    prompt: list[int]
    sampling: dict[str, Any]
    type: str = ""
    message: str = ""
    xargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    body: dict[str, Any] = dataclasses.field(default_factory=dict)
    embeds: bool = False
    stream: bool = False
    adapter: str | None = None
    refused_with: str | None = None
    reference: int | None = None
    disconnect_after: int | None = None
    wait: int = 0


class Maker:
    """Makes requests that a server of a profile can be sent."""

    def __init__(self, rng: random.Random, profile: Profile, prompts: Prompts) -> None:
        self.rng, self.profile, self.prompts = rng, profile, prompts

    def greedy(self, prompt: list[int] | None = None, **sampling: Any) -> Request:
        """Greedy, so that the target alone decides the answer."""
        most = self.profile.max_answer
        sampling = {"temperature": 0.0, "max_tokens": self.rng.choice((most, self.rng.randint(2, most))), **sampling}
        return Request(prompt or self.prompts.any_shape(self.rng, self.profile.max_prompt), sampling)

    def long(self, prompt: list[int], **sampling: Any) -> Request:
        """Greedy, with an answer as long as this profile's get."""
        return self.greedy(prompt, **{"max_tokens": self.profile.max_answer, **sampling})

    def with_one_of(self, **values: tuple) -> Request:
        """Greedy, with one of some values of each parameter."""
        return self.greedy(**{name: self.rng.choice(options) for name, options in values.items()})

    def text(self, count: int, **sampling: Any) -> Request:
        """Greedy, with a prompt of exactly so many tokens."""
        return self.greedy(self.prompts.text(self.rng, count), **sampling)

    def thinking(self) -> Request:
        prompt = self.prompts.any_shape(self.rng, self.profile.max_prompt) + self.prompts.thinking()
        return self.long(prompt, thinking_token_budget=self.rng.randint(0, 6))

    def canary(self) -> Request:
        """Of a tenant whose text no other request may be drafted from."""
        request = self.greedy(self.prompts.canary(self.rng, self.profile.max_prompt))
        return dataclasses.replace(request, body={"cache_salt": "canary"})

    def structured(self, least: int, **constraint: Any) -> Request:
        return self.greedy(max_tokens=max(least, self.profile.max_answer), structured_outputs=constraint)

    def predicted(self) -> Request:
        """With a prediction: the prompt, which the answer may repeat, or something else."""
        request = self.long(self.prompts.periodic(self.rng, self.profile.max_prompt, 7))
        text = self.prompts.user_message(self.rng, self.profile.max_prompt)
        prediction = self.rng.choice((request.prompt, self.prompts.noise(self.rng, 9), text))
        return dataclasses.replace(request, xargs={"aasd_prediction": prediction})

    def with_corpora(self) -> Request:
        """Of those that it names, one may not be there: then it is refused, see `checks`."""
        names = self.rng.choice(("off", "readme", ["guide", "readme"], FLEETING, [*CORPORA, FLEETING]))
        return dataclasses.replace(self.greedy(), xargs={"aasd_corpora": names})

    def sampled(self, **sampling: Any) -> Request:
        seeded = {"temperature": self.rng.choice((0.3, 1.0)), "seed": self.rng.randrange(99), **sampling}
        return dataclasses.replace(self.greedy(**seeded), xargs=self.rng.choice((*_RULES, STRICT)))

    def with_options(self, xargs: dict[str, Any], refused_with: str | None = None, **sampling: Any) -> Request:
        return dataclasses.replace(self.greedy(**sampling), xargs=xargs, refused_with=refused_with)

    def chat(self, **sampling: Any) -> Request:
        message = self.prompts.user_message(self.rng, self.profile.max_prompt)
        return dataclasses.replace(self.greedy([1], **sampling), prompt=[], message=message)

    def predicted_chat(self) -> Request:
        request = self.chat()
        prediction = {"type": "content", "content": request.message}
        return dataclasses.replace(request, body={"prediction": prediction}, xargs=self.rng.choice(_RULES))

    def tool(self, choice: Any, **sampling: Any) -> Request:
        request = self.chat(max_tokens=60, **sampling)
        return dataclasses.replace(request, body={"tools": [_TOOL], "tool_choice": choice})


class Type(NamedTuple):
    """A type of request; `needs` is a feature that the profile must have."""

    make: Callable[[Maker], Request]
    weight: float = 1.0
    needs: str = ""


REFERENCED = {
    "plain": Type(lambda m: m.greedy()),
    "copy": Type(lambda m: m.long(m.prompts.periodic(m.rng, m.profile.max_prompt, 7))),
    "predicted": Type(lambda m: m.predicted(), 2),
    "corpora": Type(lambda m: m.with_corpora(), 2),
    "canary": Type(lambda m: m.canary(), 2),
    "thinking": Type(lambda m: m.thinking(), 3),
    "embeds": Type(lambda m: dataclasses.replace(m.greedy(), embeds=True), 2, "embeds"),
    "scored": Type(lambda m: m.with_one_of(logprobs=(6,), logprob_token_ids=([28, 30, 198], list(range(300, 306))))),
    "stop": Type(lambda m: m.with_one_of(stop=_STOPS)),
    "stop_kept": Type(lambda m: m.with_one_of(stop=_STOPS, include_stop_str_in_output=(True,))),
    "stop_token": Type(lambda m: m.with_one_of(stop_token_ids=([28, 30, 198, 260, 284],))),
    "many_stop_tokens": Type(
        lambda m: m.greedy(stop_token_ids=list(range(19_000, m.rng.choice((19_065, 19_700, 49_000)))))
    ),
    "min_tokens": Type(lambda m: m.long([], min_tokens=m.rng.randint(1, m.profile.max_answer))),
    "ignore_eos": Type(lambda m: m.greedy(ignore_eos=True)),
    "penalties": Type(
        lambda m: m.with_one_of(repetition_penalty=(0.9, 1.3), frequency_penalty=(0.5,), presence_penalty=(0.2,))
    ),
    "bad_words": Type(lambda m: m.with_one_of(bad_words=_BAD_WORDS)),
    "many_bad_words": Type(lambda m: m.greedy(bad_words=[f" {number}th" for number in range(60)])),
    "allowed_ids": Type(lambda m: m.greedy(allowed_token_ids=sorted(m.rng.sample(range(100, 2000), 40)))),
    "many_allowed_ids": Type(lambda m: m.greedy(allowed_token_ids=list(range(48_000))), needs="many_allowed_ids"),
    "schema": Type(lambda m: m.structured(32, json=SCHEMA)),
    "regex": Type(lambda m: m.structured(16, regex=REGEX)),
    "choice": Type(lambda m: m.structured(8, choice=CHOICES)),
    "one_token_prompt": Type(lambda m: m.text(1)),
    "one_token_answer": Type(lambda m: m.greedy(max_tokens=1)),
    "longest_prompt": Type(lambda m: m.text(MAX_MODEL_LEN - 1, max_tokens=1)),
    "to_the_limit": Type(lambda m: m.text(MAX_MODEL_LEN - 12, max_tokens=12, ignore_eos=True)),
}
"""Greedy, and sent with strict verification or without drafts: the answer must be the target's own."""

OTHER = {
    "relaxed": Type(lambda m: m.with_options(m.rng.choice(_RULES)), 3),
    "sampled": Type(lambda m: m.sampled(), 2),
    "relaxed_sampling": Type(
        lambda m: dataclasses.replace(m.sampled(), xargs={**m.rng.choice(_RULES), "aasd_relax_sampling": True})
    ),
    "top_k": Type(lambda m: m.sampled(top_k=m.rng.randint(1, 40), top_p=0.9), 2, "top_k"),
    "several": Type(lambda m: m.sampled(n=m.rng.randint(2, 4)), 2),
    "sampled_schema": Type(lambda m: m.sampled(max_tokens=40, structured_outputs={"json": SCHEMA})),
    "beam": Type(lambda m: m.greedy(n=m.rng.randint(2, 3), max_tokens=4, use_beam_search=True)),
    "accepted_option": Type(lambda m: m.with_options(m.rng.choice(_ACCEPTED_OPTIONS))),
    "refused_option": Type(lambda m: m.with_options(*m.rng.choice(_REFUSED_OPTIONS)), 1.5),
    "refused_logit_bias": Type(lambda m: m.with_options({}, "logit_bias", logit_bias={"300": 5.0}), 0.5),
    "refused_min_p": Type(lambda m: m.with_options({}, "min_p", temperature=0.5, min_p=0.2), 0.5),
    "too_long": Type(lambda m: dataclasses.replace(m.text(MAX_MODEL_LEN + 9), refused_with="maximum"), 0.5),
    "chat": Type(lambda m: dataclasses.replace(m.chat(logprobs=2), xargs=m.rng.choice(_RULES))),
    "predicted_chat": Type(lambda m: m.predicted_chat()),
    "tool_named": Type(lambda m: m.tool(_NAMED_TOOL)),
    "tool_required": Type(lambda m: m.tool("required")),
    "tool_auto": Type(lambda m: m.tool("auto")),
    "tool_called": Type(lambda m: m.tool("auto", structured_outputs={"regex": CALL_REGEX})),
}
"""The answer depends on drafts, on chance or on the library of a constraint: only its form is checked."""


def possible(types: dict[str, Type], profile: Profile) -> dict[str, Type]:
    """Those that a server of a profile can be sent."""
    return {name: kind for name, kind in types.items() if not kind.needs or kind.needs in profile.features}
