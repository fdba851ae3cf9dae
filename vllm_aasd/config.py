"""The settings of `aasd`: one typed, range-checked, documented list, and what a request may change of it."""

import dataclasses
import difflib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, get_args

from vllm_aasd import corpus_names
from vllm_aasd.kernels.text import MAX_CORPORA
from vllm_aasd.predicted_tokens import OPTION as PREDICTION
from vllm_aasd.verification import rules

PREFIX = "aasd_"
"""What all of our keys begin with, next to vLLM's own keys in ``--speculative-config``."""

CORPORA = PREFIX + "corpora"
"""As a request option: the names of those to draft from."""

MAX_SHOWN = 80
"""Characters of a name or value in a message: clients send both, of any size."""

_TYPICAL = "set aasd_verification to 'conditional', with aasd_alpha and aasd_beta."
_STRICT = "such requests are always verified strictly. Leave it out."
_CONSTANTS = (
    *("budget_cap", "budget_floor", "budget_kappa", "budget_per_step", "floor", "fly_floor"),
    *("guard_cooldown", "guard_limit", "guard_memory", "min_survival", "top_k"),
)
REMOVED = {
    **{PREFIX + name: "it is a constant now. Leave it out." for name in _CONSTANTS},
    **{f"{PREFIX}typical_{name}": _TYPICAL for name in ("delta", "epsilon", "floor")},
    "aasd_draft": "for n-grams of the request's own text, set method to 'ngram' (or 'ngram_gpu') instead of 'aasd'.",
    "aasd_relax_logprobs": _STRICT,
    "aasd_relax_structured": _STRICT,
}
"""Settings of earlier versions, and what to use instead."""


def setting(
    default: Any,
    doc: str,
    *,
    within: tuple[float, float] | None = None,
    choices: tuple[str, ...] = (),
    rule: str | None = None,
    looser: str | None = None,
    takes: tuple[str, Callable[[Any], Any]] | None = None,
) -> Any:
    """A field of `Settings`.

    Args:
        default: its default.
        doc: what it does, for the settings page.
        within: lowest and highest number allowed.
        choices: words allowed.
        rule: the value of `verification` for which it has an effect; None for any.
        looser: which values, given by a request, let verification accept more than the server's: those that are
            "higher" or "lower", any "other", or "none". None if a request may not give it.
        takes: what is allowed in words, and what makes the field of it, None of what isn't allowed; None for numbers,
            words and switches.
    """
    metadata = {"doc": doc, "within": within, "choices": choices, "rule": rule, "looser": looser, "takes": takes}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The `aasd_*` keys of ``--speculative-config``, without their prefix."""

    enabled: bool = setting(
        True,
        "Enable speculation. A request can turn it off for itself with `false`; on a server with `false`, only "
        "requests that say `true` get it.",
        looser="none",
    )
    draft_length: int | str = setting(
        "adaptive",
        "The longest draft, within `num_speculative_tokens`. `adaptive` drafts as many tokens as are worth their share "
        "of the next step's time, over the whole batch. A number is the most that each request gets at any load.",
        choices=("adaptive",),
        within=(1, 128),
    )
    drafter: str = setting(
        "both",
        "What drafts where the server has a draft model: in each step `both` takes what is expected to emit more "
        "tokens per time, `text` never asks the draft model, and `model` asks nothing else.",
        choices=("both", "text", "model"),
        looser="none",
    )
    prior: int | str = setting(
        60,
        "Draft from the model's prior too, what it says after each token of its vocabulary. The number is how many "
        "seconds the first start of a model may take to make one. `off` for none.",
        choices=("off",),
        within=(0, 86400),
    )
    memory: int | str = setting(
        64,
        "MiB of earlier answers to draft from, shared by requests that share the prefix cache (the same `cache_salt`). "
        "`off` for none; a request can say `off` for itself.",
        choices=("off",),
        within=(1, 65536),
        looser="none",
    )
    corpora: tuple[tuple[str, str], ...] | None = setting(
        None,
        "Text to draft from, by name: files, or folders of files. `{}` for none at first, and room to add some.",
        takes=(corpus_names.ALLOWED_PATHS, corpus_names.paths_of),
    )
    default_corpora: tuple[str, ...] | None = setting(
        None,
        "Which of them requests draft from that don't name any, by default the first four. A request names others "
        "with `aasd_corpora`.",
        takes=(corpus_names.ALLOWED_NAMES, corpus_names.names_of),
    )
    grammar: bool = setting(
        True,
        "Beside structured output and tool calls, draft what the grammar forces, where vLLM schedules synchronously. "
        "`false` only leaves out of drafts what the grammar forbids.",
        looser="none",
    )
    alignment: bool = setting(
        False,
        "Store the target's predictions at every position, and draft from them. This runs lm_head over the prompt.",
    )
    verification: str = setting(
        "conditional",
        "How draft tokens are accepted. `strict` changes nothing in the output. The others also accept tokens that the "
        "target finds likely enough (`conditional`), at which it is undecided and agrees with what follows (`fly`), or "
        "whose loss a budget pays for (`budget`).",
        choices=rules.RULES,
        looser="other",
    )
    alpha: float = setting(
        0.1,
        "`conditional`: how far the acceptance bar falls per nat of entropy.",
        within=(0.0, 10.0),
        rule="conditional",
        looser="higher",
    )
    beta: float = setting(
        0.5,
        "`conditional`: the acceptance bar, a probability, where the target is certain.",
        within=(0.0, 2.0),
        rule="conditional",
        looser="lower",
    )
    fly_window: int = setting(
        6,
        "`fly`: draft tokens after a mismatch that the target must agree with; at most `num_speculative_tokens` - 1.",
        within=(1, 127),
        rule="fly",
        looser="lower",
    )
    fly_threshold: float = setting(
        0.3,
        "`fly`: entropy in nats, over the three likeliest tokens, from which the target counts as undecided.",
        within=(0.0, 1.1),
        rule="fly",
        looser="lower",
    )
    budget_nats: float = setting(
        2.0,
        "`budget`: log-likelihood in nats that a request may lose in all; 0 is strict.",
        within=(0.0, 10000.0),
        rule="budget",
        looser="higher",
    )
    relax_sampling: bool = setting(
        False,
        "Relax sampled requests (temperature > 0) too, which pulls their samples towards the draft. By default they "
        "are verified strictly and keep the target's distribution.",
        looser="higher",
    )
    collapse_guard: bool = setting(
        True,
        "Verify a request strictly for a while when its relaxed tokens come too close together, since that is how a "
        "model is led into copying.",
        looser="lower",
    )
    allow_request_override: str = setting(
        "stricter",
        "What a request may change for itself: `no` for nothing; `stricter` for `aasd_enabled`, and for verification "
        "that accepts no more than the server's own; `any` for every key that a request may set.",
        choices=("no", "stricter", "any"),
    )

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> "Settings":
        """Read the settings from the `aasd_*` keys of a speculative config.

        Args:
            values: ``{"aasd_beta": 0.6, ...}``; keys without the prefix are an error of the caller.

        Raises:
            ValueError: for an unknown or removed key, a value of the wrong type or out of range; the text names the
                key, the value and what is allowed.
        """
        fields = {PREFIX + field.name: field for field in dataclasses.fields(cls)}
        _refuse_unknown("setting", values, fields)
        settings = cls(**{fields[key].name: _checked(fields[key], value) for key, value in values.items()})
        names = [name for name, _ in settings.corpora or ()]
        for name in settings.default_corpora or ():
            if name not in names:
                raise ValueError(
                    f"{PREFIX}default_corpora={shown(values[PREFIX + 'default_corpora'])} is not allowed: it takes "
                    f"names of {PREFIX}corpora: {', '.join(map(repr, names)) or 'there are none'}."
                )
        return settings

    @property
    def asked_corpora(self) -> tuple[str, ...]:
        """The names of the corpora that a request with these settings drafts from, as far as they are there."""
        if self.default_corpora is not None:
            return self.default_corpora
        return tuple(name for name, _ in self.corpora or ())[:MAX_CORPORA]

    def policy(self) -> rules.Policy:
        """How a request with these settings is verified."""
        guards = {"relaxes_sampling": self.relax_sampling, "collapse_guard": self.collapse_guard}
        if self.verification == "conditional":
            return rules.conditional(self.alpha, self.beta, **guards)
        if self.verification == "fly":
            return rules.fly(self.fly_window, self.fly_threshold, **guards)
        if self.verification == "budget":
            return rules.budget(self.budget_nats, **guards)
        return rules.STRICT_POLICY

    def describe(self) -> str:
        """The settings in force, as `aasd_name=value` words."""
        return " ".join(f"{PREFIX}{name}={value}" for name, value in dataclasses.asdict(self).items())


_FIELDS = {PREFIX + field.name: field for field in dataclasses.fields(Settings) if field.metadata["looser"]}
_OPTIONS = {*_FIELDS, PREDICTION, CORPORA}
# vLLM's HTTP front end passes true and false as 1 and 0.
_SWITCH_WORDS = {0: False, 1: True, "false": False, "true": True}


def with_overrides(server: Settings, options: Mapping[str, Any]) -> Settings:
    """A request's settings: the server's, changed by the request's own options.

    Values are as in ``--speculative-config``; a switch may also be 0 or 1, or the words
    "true" or "false".

    Args:
        server: the server's settings.
        options: whatever came with the request; keys that don't begin with `aasd_` aren't ours, and a prediction,
            which changes no setting, is checked elsewhere.

    Returns:
        `server` itself if the request asks for nothing of ours.

    Raises:
        ValueError: an unknown key, a value of the wrong type or out of range, a parameter of another
            rule, or more than the server allows; the text names the key and what is allowed, never the value.
    """
    ours = {key: value for key, value in options.items() if str(key).startswith(PREFIX)}
    _refuse_unknown("request option", ours, _OPTIONS)
    ours.pop(PREDICTION, None)
    if not ours:
        return server
    if server.allow_request_override == "no":
        raise ValueError(
            f"The request's {next(iter(ours))} is not allowed: the server's {PREFIX}allow_request_override is 'no'."
        )
    corpora: dict[str, Any] = {}
    if CORPORA in ours:
        corpora["default_corpora"] = corpus_names.names_of(ours.pop(CORPORA))
        if corpora["default_corpora"] is None:
            raise ValueError(f"The request's {CORPORA} is not allowed: it takes {corpus_names.ALLOWED_NAMES}.")
    values = {
        _FIELDS[key].name: _checked(_FIELDS[key], _switch(_FIELDS[key], value), is_clients=True)
        for key, value in ours.items()
    }
    if type(values.get("memory")) is int:
        raise ValueError(
            f"The request's {PREFIX}memory is not allowed: it takes 'off', since requests share the memory."
        )
    asked = dataclasses.replace(server, **values, **corpora)
    for key in ours:
        rule = _FIELDS[key].metadata["rule"]
        if rule not in (None, asked.verification):
            raise ValueError(
                f"The request's {key} is not allowed: it takes effect only with {PREFIX}verification={rule!r}."
            )
    looser = None if server.allow_request_override == "any" else looser_than(asked, server)
    if looser is not None:
        raise ValueError(
            f"The request's {PREFIX}{looser} is not allowed: it is looser than the server's own "
            f"{getattr(server, looser)!r}, and its {PREFIX}allow_request_override is 'stricter'."
        )
    return asked


def looser_than(asked: Settings, server: Settings) -> str | None:
    """Which setting makes a request's verification looser than the server's, if any.

    Strict verification is never looser. A rule other than the server's is, even if its parameters make it accept
    less. The same rule is looser if one of its parameters is, as the parameter's `looser` says: then, and only
    then, it could accept a draft token that the server's own would reject.

    Returns:
        The name of a field of `Settings`, or None.
    """
    if asked.verification == "strict":
        return None
    if asked.verification != server.verification:
        return "verification"
    for field in _FIELDS.values():
        direction, rule = field.metadata["looser"], field.metadata["rule"]
        ours, theirs = getattr(asked, field.name), getattr(server, field.name)
        if rule not in (None, asked.verification) or direction == "none":
            continue
        if {"higher": ours > theirs, "lower": ours < theirs, "other": ours != theirs}[direction]:
            return field.name
    return None


def _switch(field: dataclasses.Field, value: Any) -> Any:
    if field.type is bool and type(value) in (int, str):
        return _SWITCH_WORDS.get(value, value)
    if field.name == "memory" and _SWITCH_WORDS.get(value, value) is False:
        return "off"
    return value


def shown(value: Any) -> str:
    """The `repr` of a name or value for a message, cut to `MAX_SHOWN` characters."""
    text = repr(value[:MAX_SHOWN] if isinstance(value, str) else value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def _refuse_unknown(kind: str, keys: Iterable[str], known: Collection[str]) -> None:
    """Raise a ValueError that names the first unknown key, and what to use instead, or what may have been meant."""
    for key in keys:
        # A long name is no typo, and takes long to compare.
        is_short = len(key) < MAX_SHOWN
        if is_short and key in known:
            continue
        if is_short and key in REMOVED:
            raise ValueError(f"The {kind} {key!r} is gone: {REMOVED[key]}")
        close = difflib.get_close_matches(key, known, n=1) if is_short else []
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"Unknown {kind} {shown(key)}.{hint} Known: {', '.join(sorted(known))}.")


def _allowed(field: dataclasses.Field) -> str:
    """What a field accepts, in words."""
    if field.metadata["takes"]:
        return field.metadata["takes"][0]
    kinds = _kinds(field)
    words = [repr(choice) for choice in field.metadata["choices"]]
    if bool in kinds:
        words += ["true", "false"]
    elif field.metadata["within"]:
        low, high = field.metadata["within"]
        words.append(f"{'an integer' if int in kinds else 'a number'} from {low:g} to {high:g}")
    return " or ".join(words)


def _checked(field: dataclasses.Field, value: Any, *, is_clients: bool = False) -> Any:
    """The value, converted to the field's type; raises a ValueError that names the key, the value and what is allowed.

    vLLM logs the messages of refused requests, so a client's value (`is_clients`) isn't in them.
    """
    takes = field.metadata["takes"]
    if takes:
        found = takes[1](value)
        if found is not None or value is field.default:
            return found
    kinds = _kinds(field)
    if not takes and type(value) is str and value in field.metadata["choices"]:
        return value
    if type(value) is bool and bool in kinds:
        return value
    # JSON writes 1.0 as 1.
    if (
        field.metadata["within"] and type(value) in (int, float)
        if float in kinds
        else type(value) is int and int in kinds
    ):
        low, high = field.metadata["within"]
        if low <= value <= high:
            return float(value) if float in kinds else value
    key = PREFIX + field.name
    given = f"The request's {key}" if is_clients else f"{key}={shown(value)}"
    raise ValueError(f"{given} is not allowed: it takes {_allowed(field)}.")


def _kinds(field: dataclasses.Field) -> tuple[type, ...]:
    return get_args(field.type) or (field.type,)


def settings_table() -> str:
    """The settings as a Markdown table, for the documentation."""
    rows = ["| key | default | allowed | in a request | what it does |", "| --- | --- | --- | --- | --- |"]
    for field in dataclasses.fields(Settings):
        default = str(field.default).lower() if isinstance(field.default, bool) else field.default
        request = "yes" if field.metadata["looser"] else ""
        key = f"`{PREFIX}{field.name}`"
        default = "" if default is None else f"`{default}`"
        rows.append(f"| {key} | {default} | {_allowed(field)} | {request} | {field.metadata['doc']} |")
    return "\n".join(rows)
