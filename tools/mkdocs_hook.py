"""mkdocs's hook: files outside ``docs/`` have no page on the site, so links to them become their names."""

import re
from typing import Any

_LINK_OUT = re.compile(r"\[(`[^`\]]+`)\]\(\.\./[^)]*\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page's text without such links."""
    return _LINK_OUT.sub(r"\1", markdown)
