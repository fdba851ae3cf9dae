"""What an object of the plugin holds: to find what requests that have ended leave behind."""

import collections
from collections.abc import Collection, Iterator
from typing import Any


def reachable(value: Any, path: str = "", skip: Collection[str] = (), seen: set[int] | None = None) -> Iterator:
    """Pairs of attribute path and string for all strings in the plugin's objects and in plain containers.

    Args:
        value: where to begin.
        path: its name.
        skip: attributes to leave out.
        seen: ids of the objects that have been visited.
    """
    seen = set() if seen is None else seen
    if isinstance(value, str):
        yield path, value
    if id(value) in seen:
        return
    seen.add(id(value))
    inner: list[tuple[str, Any]] = []
    if isinstance(value, dict):
        inner = [(path, item) for item in (*value, *value.values())]
    elif isinstance(value, list | tuple | set | frozenset | collections.deque):
        inner = [(path, item) for item in value]
    elif type(value).__module__.startswith("vllm_aasd"):
        slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
        names = [*getattr(value, "__dict__", ()), *slots]
        inner = [
            (f"{path}.{name}", getattr(value, name)) for name in names if name not in skip and hasattr(value, name)
        ]
    for inner_path, item in inner:
        yield from reachable(item, inner_path, skip, seen)
