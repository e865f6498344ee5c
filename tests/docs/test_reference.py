"""The reference of the programming interface has every public name, once, and each has a docstring."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

from tests.docs.pages import ROOT, blocks

import normwise as nw
from normwise import _public

PAGES = sorted(ROOT.glob("docs/api/*.md"))
DIRECTIVE = re.compile(r"^\.\. auto(module|class|function):: normwise\.(\w+)$", re.MULTILINE)


def test_every_public_name_is_there_once() -> None:
    text = "\n".join(block for page in PAGES for block in blocks(page.read_text("utf-8"), "{eval-rst}"))
    names = [name for _, name in DIRECTIVE.findall(text)]
    assert text.count(".. auto") == len(names)
    assert sorted(names) == sorted([*_public.__all__, *_public.INTEGRATIONS])


def test_every_public_name_is_of_the_kind_that_it_is_listed_as() -> None:
    kinds: dict[str, Callable[[object], bool]] = {
        "module": inspect.ismodule,
        "class": inspect.isclass,
        "function": inspect.isfunction,
    }
    for page in PAGES:
        for kind, name in DIRECTIVE.findall(page.read_text("utf-8")):
            if name not in _public.INTEGRATIONS:  # these need their libraries
                assert kinds[kind](getattr(nw, name)), name
                assert inspect.getdoc(getattr(nw, name)), name
