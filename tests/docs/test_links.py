"""Links lead somewhere: pages, headings, files and figures. Addresses elsewhere are only well-formed."""

from __future__ import annotations

import re
from functools import cache
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from tests.docs.pages import PAGES, name

MARKDOWN = MarkdownIt("commonmark").enable("table")


def inline(page: Path) -> list[Token]:
    return [t for token in MARKDOWN.parse(page.read_text("utf-8")) for t in token.children or ()]


@cache
def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub and the site give the headings of a page."""
    tokens = MARKDOWN.parse(page.read_text("utf-8"))
    found: set[str] = set()
    for heading, content in pairwise(tokens):
        if heading.type == "heading_open":
            text = "".join(t.content for t in content.children or () if t.type in ("text", "code_inline"))
            found.add(re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_figures_lead_somewhere(page: Path) -> None:
    for token in inline(page):
        target = token.attrs.get("href" if token.type == "link_open" else "src")
        if target is None:
            continue
        address = urlsplit(str(target))
        if address.scheme:
            assert address.scheme == "https", target
            assert re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)+", address.netloc), target
            continue
        file = (page.parent / unquote(address.path)).resolve() if address.path else page
        assert file.exists(), target
        if address.fragment:
            assert address.fragment in anchors(file), target
    for token in inline(page):
        if token.type == "image":
            assert token.content, "a figure needs a text for those who do not see it"
