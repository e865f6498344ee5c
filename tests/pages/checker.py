"""Reads an HTML page and complains about what no page of ours may have."""

from __future__ import annotations

from html.parser import HTMLParser

__all__ = ["Page"]


class Page(HTMLParser):
    """Tags with their attributes, and ids; tags that are not closed and ids that stand twice are errors."""

    VOID = frozenset({"meta", "link", "br", "img", "wbr", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        assert self.open == []
        self.ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]
        assert len(self.ids) == len(set(self.ids))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def targets(self) -> list[str]:
        """Return where the page's references go."""
        names = ("src", "href", "xlink:href", "data", "srcset", "action")
        return [value for _, attributes in self.tags for name in names if (value := attributes.get(name))]

    def with_class(self, name: str) -> list[tuple[str, dict[str, str | None]]]:
        """Return the tags that have a class."""
        return [one for one in self.tags if name in (one[1].get("class") or "").split()]
