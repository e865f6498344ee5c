"""The claims of the paper, one file each. A new file joins by defining ``CLAIM``."""

from __future__ import annotations

import importlib
import pkgutil

from normwise.lab.claims import at_size
from normwise.lab.claims.claim import Claim

__all__ = ["all_claims", "claims_named"]


def all_claims(budget: str = "quick") -> list[type[Claim]]:
    """Return every claim that a budget has, in the order of the report."""
    names = [
        f"{package}.{found.name}"
        for package, path in ((__name__, __path__), (at_size.__name__, at_size.__path__))
        for found in pkgutil.iter_modules(path)
    ]
    modules = map(importlib.import_module, names)
    claims = [module.CLAIM for module in modules if hasattr(module, "CLAIM")]
    return sorted((claim for claim in claims if budget in claim.budgets), key=lambda claim: claim.order)


def claims_named(names: list[str], budget: str = "quick") -> list[type[Claim]]:
    """Return the claims of a budget with these names, or all of them if no name is given.

    Raises:
        ValueError: A name is not known, or the budget does not have this claim.

    Example:
        >>> [claim.id for claim in claims_named([], "paper")]
        ['under-fitting', 'shrink']
    """
    everywhere = [claim.id for claim in all_claims()]
    known = {claim.id: claim for claim in all_claims(budget)}
    for name in names:
        if name not in everywhere:
            raise ValueError(f"claim {name!r} is not known: choose from {', '.join(everywhere)}")
        if name not in known:
            raise ValueError(f"claim {name!r} is not in --budget {budget}, which has {', '.join(known)}")
    return [claim for claim in known.values() if not names or claim.id in names]
