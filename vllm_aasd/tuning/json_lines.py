"""Files with one JSON object a line."""

import json
import pathlib
from collections.abc import Callable
from typing import Any


class DataError(ValueError):
    """A line of a data file isn't as it should be; the text names the file, the line and what is wrong."""


def read_lines(path: pathlib.Path, keep: Callable[[dict[str, Any]], None]) -> None:
    """Hand each line's JSON object on; empty lines are passed over.

    Args:
        path: of the file.
        keep: called with each object; may raise ValueError.

    Raises:
        DataError: for a line that isn't an object, or that ``keep`` refuses.
    """
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
                if not isinstance(value, dict):
                    raise ValueError(f"an object is wanted, and this is {type(value).__name__}")
                keep(value)
            except ValueError as error:
                raise DataError(f"{path}:{number}: {error}") from None
