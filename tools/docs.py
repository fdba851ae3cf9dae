"""Write the tables of the documentation that are drawn from the code (``make docs``).

A table stands between ``<!-- NAME -->`` and ``<!-- end -->``. Run with the Python of ``.venv``.
"""

from collections.abc import Callable
from pathlib import Path

from vllm_aasd.config import settings_table
from vllm_aasd.counters import metrics_table

DOCS = Path(__file__).resolve().parent.parent / "docs"

TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "settings.md": {"settings": settings_table},
    "operations.md": {"metrics": metrics_table},
}
"""By page, the tables in it, and what draws each."""


def updated(page: str, text: str) -> str:
    """The text of a page with its tables drawn again.

    Raises:
        ValueError: a table's markers aren't there.
    """
    for name, draw in TABLES[page].items():
        begin, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, found, rest = text.partition(begin)
        _, ends, after = rest.partition(end)
        if not (found and ends):
            raise ValueError(f"docs/{page}: expected {begin.strip()} and {end} after it")
        text = before + begin + draw() + "\n" + end + after
    return text


def main() -> None:
    for page in TABLES:
        path = DOCS / page
        text = path.read_text()
        new = updated(page, text)
        if new != text:
            path.write_text(new)
            print(f"[aasd] written: docs/{page}")


if __name__ == "__main__":
    main()
