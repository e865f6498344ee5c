"""The claims of the paper, one file each. A new file joins by defining ``CLAIM``."""

from __future__ import annotations

import importlib
import pkgutil

from normwise.lab.claims.claim import Claim

__all__ = ["all_claims", "claims_named"]


def all_claims() -> list[type[Claim]]:
    """Return every claim, in the order of the report."""
    modules = (
        importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)
    )
    claims = [module.CLAIM for module in modules if hasattr(module, "CLAIM")]
    return sorted(claims, key=lambda claim: claim.order)


def claims_named(names: list[str]) -> list[type[Claim]]:
    """Return the claims with these names, or all if no name is given.

    Raises:
        ValueError: A name is not known.
    """
    known = {claim.id: claim for claim in all_claims()}
    for name in names:
        if name not in known:
            raise ValueError(f"claim {name!r} is not known: choose from {', '.join(known)}")
    return [claim for claim in known.values() if not names or claim.id in names]
