"""Fields of a settings class: documented, typed, range-checked, and with what a request may do to them."""

import dataclasses
import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import Any, get_args

PREFIX = "aasd_"
"""What every key of ours begins with, beside vLLM's own keys in ``--speculative-config``."""

MAX_SHOWN = 80
"""Characters of a name or value in a message: clients send both, of any size."""


def setting(
    default: Any,
    doc: str,
    *,
    within: tuple[float, float] | None = None,
    choices: tuple[str, ...] = (),
    rule: str | None = None,
    looser: str | None = None,
) -> Any:
    """A field of a settings class.

    Args:
        default: its value where none is given.
        doc: what it does, for the settings page.
        within: lowest and highest number allowed.
        choices: words allowed.
        rule: the value of `verification` under which it takes effect; None for any.
        looser: which values, given by a request, let verification accept more than the server's: those that are
            "higher" or "lower", any "other", or "none". None if a request may not give it. See `vllm_aasd.overrides`.
    """
    metadata = {"doc": doc, "within": within, "choices": choices, "rule": rule, "looser": looser}
    return dataclasses.field(default=default, metadata=metadata)


def shown(value: Any) -> str:
    """The `repr` of a name or value for a message, cut to `MAX_SHOWN` characters."""
    text = repr(value[:MAX_SHOWN] if isinstance(value, str) else value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def refuse_unknown(kind: str, keys: Iterable[str], known: Collection[str], removed: Mapping[str, str]) -> None:
    """Refuse what isn't a key of ours.

    Args:
        kind: what the keys are, for the message.
        keys: as they were given.
        known: what they may be.
        removed: keys of earlier versions, and what to use instead.

    Raises:
        ValueError: naming the first unknown key, and what to use instead, or what may have been meant.
    """
    for key in keys:
        # A long name is no typo, and to compare or even hash it takes long.
        is_short = len(key) < MAX_SHOWN
        if is_short and key in known:
            continue
        if is_short and key in removed:
            raise ValueError(f"The {kind} {key!r} is gone: {removed[key]}")
        close = difflib.get_close_matches(key, known, n=1) if is_short else []
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"Unknown {kind} {shown(key)}.{hint} Known: {', '.join(sorted(known))}.")


def allowed(field: dataclasses.Field) -> str:
    """What a field accepts, in words."""
    kinds = _kinds(field)
    words = [repr(choice) for choice in field.metadata["choices"]]
    if bool in kinds:
        words += ["true", "false"]
    elif field.metadata["within"]:
        low, high = field.metadata["within"]
        words.append(f"{'an integer' if int in kinds else 'a number'} from {low:g} to {high:g}")
    return " or ".join(words)


def checked(field: dataclasses.Field, value: Any, *, is_clients: bool = False) -> Any:
    """The value of a field, as the type that it has.

    Args:
        field: of a settings class.
        value: as it was given.
        is_clients: whether a request brought it. vLLM logs what it refuses, so the message doesn't hold the value then.

    Raises:
        ValueError: it is of the wrong type or out of range; the text names the key, the value and what is allowed.
    """
    kinds = _kinds(field)
    if type(value) is str and value in field.metadata["choices"]:
        return value
    if type(value) is bool and bool in kinds:
        return value
    # JSON writes 1.0 as 1.
    if type(value) in (int, float) if float in kinds else type(value) is int and int in kinds:
        low, high = field.metadata["within"]
        if low <= value <= high:
            return float(value) if float in kinds else value
    key = PREFIX + field.name
    given = f"The request's {key}" if is_clients else f"{key}={shown(value)}"
    raise ValueError(f"{given} is not allowed: it takes {allowed(field)}.")


def _kinds(field: dataclasses.Field) -> tuple[type, ...]:
    return get_args(field.type) or (field.type,)
