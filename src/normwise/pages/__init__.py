"""What HTML pages share: their style, and how templates are filled. Needs the extra 'lab' (jinja2)."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from importlib.resources import files
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

__all__ = ["data_block", "environment", "script_hash", "vendored"]


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


def vendored(path: str) -> Markup:
    """Return the text of a file that others wrote, from ``pages/vendor/``, to be put into a page as it is.

    Raises:
        ValueError: The file could end the ``<script>`` or ``<style>`` that it is put into.
    """
    text = files("normwise.pages").joinpath("vendor", *path.split("/")).read_text(encoding="utf-8")
    if "</" in text:
        raise ValueError(
            f"vendor/{path} has '</' in it, which may end the element around it: escape it there"
        )
    return Markup(text)


def script_hash(script: str) -> str:
    """Return the source expression by which a page's Content-Security-Policy allows this script only.

    Example:
        >>> script_hash("")
        "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='"
    """
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def data_block(data: Any) -> Markup:
    r"""Return data as JSON for a ``<script type="application/json">``: nothing in it can end the element.

    Numbers keep seven digits; what is not finite, which JSON does not know, becomes null.

    Example:
        >>> print(data_block({"</script>": [0.1 + 0.2, float("nan")]}))
        {"\u003c/script\u003e":[0.3,null]}
    """
    text = json.dumps(_rounded(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def _rounded(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _rounded(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_rounded(value) for value in data]
    if isinstance(data, float):
        if not math.isfinite(data):
            return None
        short = float(f"{data:.7g}")
        return int(short) if short.is_integer() and abs(short) < 1e7 else short
    return data
