"""Fields of a settings class: documented, typed, range-checked, and with what a request may do to them."""

import dataclasses
import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import Any, get_args

PREFIX = "aasd_"
"""What every key of ours begins with, beside vLLM's own keys in ``--speculative-config``."""


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
        doc: what it does, for the README.
        within: lowest and highest number allowed.
        choices: words allowed.
        rule: the value of `verification` under which it takes effect; None for any.
        looser: which values, given by a request, let verification accept more than the server's: those that are
            "higher" or "lower", any "other", or "none". None where a request may not give it. See `vllm_aasd.overrides`.
    """
    metadata = {"doc": doc, "within": within, "choices": choices, "rule": rule, "looser": looser}
    return dataclasses.field(default=default, metadata=metadata)


def refuse_removed(values: Mapping[str, Any], removed: Mapping[str, str]) -> None:
    """Raise the ValueError that says what to do instead of the first key that an earlier version had."""
    for key, value in values.items():
        if key in removed:
            raise ValueError(f"{key}={value!r} is not allowed any more: {removed[key]}.")


def refuse_unknown(kind: str, keys: Iterable[str], known: Collection[str]) -> None:
    """Raise the ValueError that names the first unknown key, what may have been meant, and what is known."""
    for key in keys:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"Unknown {kind} {key!r}.{hint} Known: {', '.join(sorted(known))}.")


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


def checked(field: dataclasses.Field, value: Any) -> Any:
    """The value of a field, as the type that it has.

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
    raise ValueError(f"{PREFIX}{field.name}={value!r} is not allowed: it takes {allowed(field)}.")


def _kinds(field: dataclasses.Field) -> tuple[type, ...]:
    return get_args(field.type) or (field.type,)
