"""The documentation: generated tables are current, links lead somewhere, and the README stays short and plain."""

import re
from pathlib import Path

import pytest
import yaml

import docs
from mkdocs_hook import on_page_markdown

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
MAX_README_LINES = 150
NOT_OUR_WORDS = re.compile(r"\b(passed over|take in|so many|nobody|somebody)\b|\d %", re.IGNORECASE)

_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
_PATH = re.compile(r"`((?:benchmarks|docs|kernels|tests|tools|vllm_aasd)/[\w./-]*)`")


def prose(text: str) -> str:
    """A page without its blocks of code."""
    return _FENCE.sub("", text)


def anchors(text: str) -> set[str]:
    """What a page's headings can be linked by, as GitHub and mkdocs name them."""
    words = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in _HEADING.findall(prose(text)))
    return {re.sub(r"\s", "-", heading) for heading in words}


def dead_links(page: Path, text: str) -> list[str]:
    """The relative links of a page that lead to no file, or to no heading of one."""
    dead = []
    for link in _LINK.findall(prose(text)):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text() if name else text)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", docs.TABLES)
def test_generated_tables_are_current(page):
    text = (docs.DOCS / page).read_text()
    assert docs.updated(page, text) == text, "run `make docs`"


def test_only_a_table_is_drawn_again_and_one_without_its_markers_is_an_error(monkeypatch):
    for text in ("<!-- end -->", "<!-- settings -->\n| key |"):
        with pytest.raises(ValueError, match="expected <!-- settings -->"):
            docs.updated("settings.md", text)
    monkeypatch.setitem(docs.TABLES, "page.md", {"one": lambda: "new"})
    text = "a\n<!-- one -->\nold\n<!-- end -->\nb\n<!-- end -->\n"
    assert docs.updated("page.md", text) == text.replace("old", "new")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_named_path_leads_somewhere_and_the_english_is_plain(page):
    text = page.read_text()
    assert dead_links(page, text) == []
    assert [path for path in _PATH.findall(text) if not (ROOT / path).exists()] == []
    assert [found[0] for found in NOT_OUR_WORDS.finditer(text)] == []


def test_dead_links_are_seen():
    text = "# A b\n[x](nowhere.md) [y](#a-b) [z](#a-c) [`w`](docs/settings.md#all-settingz) ![v](docs/step.svg)"
    assert dead_links(README, text) == ["nowhere.md", "#a-c", "docs/settings.md#all-settingz"]


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= MAX_README_LINES


def test_the_readme_names_real_settings():
    from vllm_aasd.config import PREFIX, Settings

    named = set(re.findall(rf"{PREFIX}(\w+)", README.read_text()))
    assert named <= set(Settings.__dataclass_fields__)


def test_every_page_is_in_the_navigation():
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = {page for entry in navigation for page in entry.values()}
    assert listed == {page.name for page in PAGES if page.parent == docs.DOCS}


def test_every_refused_option_of_vllm_is_documented():
    from vllm_aasd.engine import unsupported

    page = (docs.DOCS / "compatibility.md").read_text()
    refused = {refusal.name for runner in unsupported.BY_RUNNER.values() for refusal in runner}
    of_vllm = {name for name in refused if not name.startswith("aasd_")}
    assert [one for one in of_vllm if f"`{one}`" not in page and f"`--{one.replace('_', '-')}`" not in page] == []


def test_the_site_names_files_that_it_has_no_page_for():
    assert on_page_markdown("[`a/b.py`](../a/b.py) and [c](c.md)") == "`a/b.py` and [c](c.md)"
