"""What a single request may change of the server's settings, and how far."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vllm_aasd.config import REMOVED, Settings
from vllm_aasd.fields import PREFIX, checked, refuse_unknown
from vllm_aasd.predicted_tokens import OPTION as PREDICTION

_FIELDS = {PREFIX + field.name: field for field in dataclasses.fields(Settings) if field.metadata["looser"]}
# vLLM's HTTP front end hands on true and false as 1 and 0.
_SWITCH_WORDS = {0: False, 1: True, "false": False, "true": True}


def with_overrides(server: Settings, options: Mapping[str, Any]) -> Settings:
    """The settings by which a request is served.

    Values are what the same keys take in ``--speculative-config``; a switch may also be 0 or 1, or the words
    "true" or "false".

    Args:
        server: the server's settings.
        options: whatever came with the request; keys that don't begin with `aasd_` are somebody else's, and a
            prediction, which changes no setting, is checked elsewhere.

    Returns:
        `server` itself if the request asks for nothing of ours.

    Raises:
        ValueError: an unknown key, a value of the wrong type or out of range, a parameter of a rule that isn't in
            force, or more than the server allows; the text names the key and what is allowed, never the value.
    """
    ours = {key: value for key, value in options.items() if str(key).startswith(PREFIX)}
    refuse_unknown("request option", ours, {*_FIELDS, PREDICTION}, REMOVED)
    ours.pop(PREDICTION, None)
    if not ours:
        return server
    if server.allow_request_override == "no":
        raise ValueError(
            f"The request's {next(iter(ours))} is not allowed: the server's {PREFIX}allow_request_override is 'no'."
        )
    values = {
        _FIELDS[key].name: checked(_FIELDS[key], _switch(_FIELDS[key], value), is_clients=True)
        for key, value in ours.items()
    }
    asked = dataclasses.replace(server, **values)
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
    """In what a request's verification is looser than the server's, if in anything.

    Strict verification is never looser. Another rule than the server's is, even where its parameters make it accept
    less. The same rule is looser if one of its parameters is, as the parameter's `looser` tells: then, and only
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
    return value
