"""Real prompts that ship with Python: its own documentation and the sources of its library."""

import inspect
import json
import textwrap
from pydoc_data.topics import topics

_MODULES = (json.encoder, json.decoder, textwrap, inspect)


def real_prompts(count: int, max_chars: int = 2000) -> list[str]:
    """User messages that lean on a text: summaries, questions with quotes, edits, and code to go on with.

    Args:
        count: how many, the kinds in turn.
        max_chars: the longest text that a message holds.
    """
    texts = [topics[name].strip()[:max_chars] for name in sorted(topics) if len(topics[name]) > 1200]
    codes = [inspect.getsource(module)[: max_chars // 2] for module in _MODULES]
    codes += [inspect.getsource(module)[3000 : 3000 + max_chars // 2] for module in _MODULES]
    kinds = (
        ("Summarise this text in three sentences.\n\n", texts),
        ("Quote the two most important sentences of this text, word by word.\n\n", texts[1:]),
        ("Continue this Python code.\n\n", codes),
        ("Rewrite this text as a list, keeping its words.\n\n", texts[2:]),
    )
    prompts = []
    for number in range(count):
        turn, kind = divmod(number, len(kinds))
        task, sources = kinds[kind]
        prompts.append(task + sources[turn * 3 % len(sources)])
    return prompts
