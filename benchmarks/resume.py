"""What was measured so far, kept beside the result, so that an interrupted run can go on."""

import hashlib
import json
import pathlib
from typing import Any


class Store:
    """A file that goes when the result is written.

    Args:
        path: of the file.
        settings: all that the measurements depend on; a file of other settings isn't gone on with.
    """

    def __init__(self, path: pathlib.Path, settings: Any) -> None:
        self.path = path
        self._key = hashlib.sha256(json.dumps(settings, default=str).encode()).hexdigest()

    def save(self, found: dict[Any, Any]) -> None:
        """Write what was found, by place: tuples, and values that JSON knows. An earlier file is replaced only when this one is whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({"key": self._key, "found": list(found.items())}))
        partial.replace(self.path)

    def load(self) -> dict[tuple, Any]:
        """Read what was found, by place, tuples among the values having become lists; nothing without a file.

        Raises:
            ValueError: if the file is of other settings.
        """
        if not self.path.exists():
            return {}
        saved = json.loads(self.path.read_text())
        if saved["key"] != self._key:
            raise ValueError(f"{self.path} is of a run with other settings; run without --resume")
        return {tuple(place): measured for place, measured in saved["found"]}

    def remove(self) -> None:
        """Remove the file, if there is one."""
        self.path.unlink(missing_ok=True)
