"""Tasks that need no download: code and documentation that ship with Python.

`code_infile` is like LCC (Guo et al., 2023), `code_crossfile` like RepoBench-P (Liu et al., 2023); in `quote` and
`edit` the answer repeats its input, and in `agent` (asked for by its name only) also earlier answers. They change only
with the version of Python.
"""

import json
import keyword
import pathlib
import re
from collections import Counter
from collections.abc import Iterator
from pydoc_data.topics import topics

from benchmarks.tasks import Task

LIBRARY = pathlib.Path(json.__file__).parents[1]

_CODE_CHARS = 4500
_SNIPPET_CHARS = 2200
_TEXT_CHARS = 2400
_SHORTEST_TEXT = 1200
_TURNS, _AGENT_CHARS = 10, (500, 900)
_PACKAGES = ["asyncio", "concurrent/futures", "email", "http", "importlib", "json", "logging", "multiprocessing"]
_PACKAGES += ["unittest", "urllib", "wsgiref", "xml/dom", "xml/etree", "xml/sax"]


def builtin_tasks() -> list[Task]:
    """All of them."""
    return [*in_file(), *cross_file(), *documentation()]


def in_file() -> Iterator[Task]:
    """Code to continue: a library file up to a line in its second half."""
    for path in sorted(LIBRARY.glob("[a-z]*.py")):
        lines = _lines(path)
        at = next((i for i in range(len(lines) * 3 // 5, len(lines)) if _is_worth_guessing(lines[i])), None)
        before = _last("".join(lines[:at]), _CODE_CHARS)
        if at is not None and len(before) >= _CODE_CHARS // 2:
            yield _completion("code_infile", path, at, before)


def cross_file() -> Iterator[Task]:
    """The same after the head of a file of the same package that it imports from."""
    for package in _PACKAGES:
        for path in sorted((LIBRARY / package).glob("[a-z]*.py")):
            lines = _lines(path)
            at = next((i for i in range(len(lines) * 3 // 5, len(lines)) if _is_worth_guessing(lines[i])), None)
            found = re.search(r"^from \.(\w+) import", "".join(lines[:at]), re.MULTILINE)
            source = path.parent / f"{found[1]}.py" if found else path
            if at is not None and source != path and source.is_file():
                before = f"# {_name(source)}\n{source.read_text()[:_SNIPPET_CHARS]}\n\n\n# {_name(path)}\n"
                before += _last("".join(lines[:at]), _CODE_CHARS - _SNIPPET_CHARS)
                yield _completion("code_crossfile", path, at, before)


def documentation() -> Iterator[Task]:
    """Quotes from a text, and copies of it with one word changed; the topics of Python's own ``help()``."""
    for topic in sorted(topics):
        text = topics[topic].strip()
        text = text if len(text) <= _TEXT_CHARS else text[:_TEXT_CHARS].rpartition("\n\n")[0]
        if len(text) < _SHORTEST_TEXT:
            continue
        quote = f"Quote the three most important sentences of this text, word by word.\n\n{text}"
        yield Task(topic, "quote", quote, f"{text}\n\nThe most important sentences again:\n\n")
        words = Counter(re.findall(r"\b[a-z]{5,}\b", text))
        word = max(words, key=lambda w: (words[w], w))
        edit = f"Write this text again, with {word!r} in capital letters and nothing else changed.\n\n{text}"
        raw = f"{text}\n\nThe same, with {word!r} in capital letters:\n\n"
        yield Task(topic, "edit", edit, raw)


def agent() -> Iterator[Task]:
    """Sessions of ten turns with a coding agent, one task a turn, whose prompt holds the turns before it.

    In every turn a tool quotes a function as it is by now, and the next edit of it is asked for.
    """
    for path in sorted(LIBRARY.glob("[a-z]*.py")):
        for code in re.split(r"(?m)^(?=(?:def|class) )", path.read_text(encoding="utf-8"))[1:]:
            words = Counter(re.findall(r"\b[a-z_]{4,}\b", code))
            names = [name for name, _ in words.most_common() if not keyword.iskeyword(name)][:_TURNS]
            if len(names) == _TURNS and _AGENT_CHARS[0] <= len(code) <= _AGENT_CHARS[1]:
                yield from _session(path, code.rstrip() + "\n", names)
                break


def _session(path: pathlib.Path, code: str, names: list[str]) -> Iterator[Task]:
    text = "You edit code. Answer each request with all of the code as it is afterwards, and nothing else."
    for turn, name in enumerate(names, 1):
        text += f"\n\nTool read_file returned:\n\n```python\n{code}```\n\nRequest: rename `{name}` to `new_{name}`."
        yield Task(f"{_name(path)}:{turn}", "agent", text, f"{text}\n\n```python\n")
        code = re.sub(rf"\b{name}\b", f"new_{name}", code)


def _completion(category: str, path: pathlib.Path, at: int, before: str) -> Task:
    text = f"Continue this Python code. Write only what follows.\n\n```python\n{before}```"
    return Task(f"{_name(path)}:{at + 1}", category, text, before)


def _is_worth_guessing(line: str) -> bool:
    """Code of some length, not a comment, a quoted text or the like."""
    bare = line.strip()
    return len(bare) >= 15 and bare[0].isalpha() and bare.isascii() and re.search(r"[=(\[.]", bare) is not None


def _last(text: str, chars: int) -> str:
    """The last lines of a text, at most `chars` characters."""
    if len(text) <= chars:
        return text
    return text[-chars:].partition("\n")[2]


def _lines(path: pathlib.Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines(keepends=True)


def _name(path: pathlib.Path) -> str:
    return path.relative_to(LIBRARY).as_posix()
