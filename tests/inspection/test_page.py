from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.inspection import factories
from tests.pages.checker import Page

import normwise as nw
from normwise.inspection.html_page import write_page
from normwise.inspection.inspect import Inspection
from normwise.inspection.summary import layers, links, symmetry_lines

NASTY = '<script>alert(1)</script> & "quotes"'


def _inspection(title: str = NASTY) -> Inspection:
    import torch

    torch.manual_seed(0)
    return Inspection(title, nw.plan(factories.gpt(), [torch.randint(0, 11, (4, 7))]), 1.0)


@pytest.fixture(scope="module")
def found() -> Inspection:
    return _inspection()


def test_the_page_needs_no_network_runs_no_script_and_escapes(found: Inspection, tmp_path: Path) -> None:
    html = write_page(found, tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert page.targets() == []
    assert not re.search(r"url\(|@import", html)


def test_the_drawing_has_a_layer_for_each_and_dots_at_members(found: Inspection, tmp_path: Path) -> None:
    html = write_page(found, tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(html)
    stack, drawn = layers(found.plan), links(found.plan)
    assert sum(attributes.get("class") == "row" for _, attributes in page.tags) == len(stack)
    dots = sum(len(link.dots) for link in drawn)
    assert sum(tag == "circle" for tag, _ in page.tags) == dots
    assert len(drawn) == len(symmetry_lines(found.plan))
    for t in found.plan.treatments:
        assert any(t in line.members for layer in stack for line in layer.lines)


def test_links_in_one_lane_do_not_touch(found: Inspection) -> None:
    spans: dict[int, list[tuple[int, int]]] = {}
    for link in links(found.plan):
        for low, high in spans.get(link.lane, []):
            assert max(link.dots) < low or min(link.dots) > high
        spans.setdefault(link.lane, []).append((min(link.dots), max(link.dots)))
    assert links(found.plan, most=1) != links(found.plan)


def test_a_page_that_cannot_be_written_is_one_line(found: Inspection, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--html .* cannot be written"):
        write_page(found, tmp_path / "nowhere" / "page.html")


def test_pages_of_the_lab_and_of_inspect_share_one_style() -> None:
    from normwise.pages import environment

    style = environment("normwise.inspection").get_template("style.css").render()
    assert environment("normwise.lab.report").get_template("style.css").render() == style
    assert "prefers-color-scheme: dark" in style
