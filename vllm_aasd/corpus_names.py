"""Which corpora a server has, and which a request draws from, as both are written in settings and options."""

import re
from typing import Any

from vllm_aasd.kernels.text import MAX_CORPORA

OFF = "off"

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")

ALLOWED_PATHS = (
    "an object of names and paths, like {\"docs\": \"/srv/docs\"}; a name has 1 to 64 letters, digits, '.', '_' or "
    "'-', and isn't 'off'"
)
ALLOWED_NAMES = f"a name, a list of at most {MAX_CORPORA} names, or '{OFF}'"


def is_name(value: Any) -> bool:
    """Whether a corpus can be called so."""
    return isinstance(value, str) and value != OFF and _NAME.fullmatch(value) is not None


def paths_of(value: Any) -> tuple[tuple[str, str], ...] | None:
    """The name and path of each corpus of a setting, in its order; None if the setting is malformed."""
    if not isinstance(value, dict):
        return None
    if not all(is_name(name) and isinstance(path, str) and path for name, path in value.items()):
        return None
    return tuple(value.items())


def names_of(value: Any) -> tuple[str, ...] | None:
    """The names of a setting or option, none twice; None if it is malformed."""
    if value == OFF:
        return ()
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or len(names) > MAX_CORPORA or not all(map(is_name, names)):
        return None
    return tuple(dict.fromkeys(names))
