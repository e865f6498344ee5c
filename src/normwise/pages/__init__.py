"""What HTML pages share: their style, and how templates are filled. Needs the extra 'lab' (jinja2)."""

from __future__ import annotations

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

__all__ = ["environment"]


def environment(package: str) -> Environment:
    """Return an environment for the templates of ``package``, which may include "style.css".

    Text is escaped; a name that is not given is an error.

    Args:
        package: A package with a folder ``templates``.
    """
    return Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("normwise.pages")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
