"""The names of a server's corpora, which its front ends check those of a request against.

A front end has those of the start in its configuration. What workers add and drop later, they write to a file of the
server's folder, which is read when a request names any.
"""

import json
import os
from pathlib import Path
from typing import Any

from vllm_aasd import corpus_names
from vllm_aasd.config import CORPORA, Settings
from vllm_aasd.engine.server_folder import server_folder

_MAX_SHOWN = 20


def names_file(settings: Settings) -> str:
    """Where a server's workers write the names of its corpora; empty if it has none and never will."""
    folder = server_folder() if settings.corpora is not None else ""
    return os.path.join(folder, "corpus_names") if folder else ""


def check_names(config: Any, asked: tuple[str, ...]) -> None:
    """Refuse a request that names a corpus that isn't there.

    Raises:
        ValueError: naming those that are.
    """
    known = _names(config)
    if not set(asked) <= set(known):
        shown = ", ".join(map(repr, known[:_MAX_SHOWN])) + ", ..." * (len(known) > _MAX_SHOWN)
        raise ValueError(
            f"The request's {CORPORA} is not allowed: it takes {corpus_names.ALLOWED_NAMES}. Known: {shown or 'none'}."
        )


def write_names(file: str, names: list[str]) -> None:
    """Let front ends know of the corpora that there are now; does nothing without a file."""
    if file:
        writing = Path(f"{file}.{os.getpid()}")
        writing.write_text(json.dumps(names))
        writing.replace(file)


def _names(config: Any) -> list[str]:
    try:
        return json.loads(Path(config.aasd_corpora_file).read_text())
    except (OSError, ValueError):
        return [name for name, _ in config.aasd.corpora or ()]
