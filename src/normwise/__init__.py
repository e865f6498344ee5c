"""normwise: weight decay for normalised networks.

Most weights of a modern network are followed by a normalisation, so only their direction matters.
Weight decay on such a weight does not regularise: it sets the effective learning rate. normwise finds
these weights, decays them by rules that are functions of their norm, and predicts the result.

``import normwise`` is fast: torch is imported when a public name is first used. ``normwise._public``
lists the public names.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from normwise._public import *  # noqa: F403
    from normwise.integrations import accelerate as accelerate
    from normwise.integrations import lightning as lightning
    from normwise.integrations import transformers as transformers
else:

    def __getattr__(name: str) -> Any:
        public = importlib.import_module("normwise._public")
        if name in public.INTEGRATIONS:
            return importlib.import_module(f"normwise.integrations.{name}")
        if name == "__all__":
            return ["__version__", *public.__all__]
        if name not in public.__all__:
            raise AttributeError(f"module 'normwise' has no attribute {name!r}")
        value = getattr(public, name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    public = importlib.import_module("normwise._public")
    return sorted({*globals(), *public.__all__, *public.INTEGRATIONS})
