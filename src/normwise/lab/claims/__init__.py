"""The claims of the paper, a file each. A new file with a ``CLAIM`` joins by being there."""

from __future__ import annotations

import importlib
import pkgutil

from normwise.lab.claims.claim import Claim

__all__ = ["all_claims", "claims_named"]


def all_claims() -> list[Claim]:
    """Return every claim, in the order of the report."""
    found = []
    for module in pkgutil.iter_modules(__path__):
        claim = getattr(importlib.import_module(f"{__name__}.{module.name}"), "CLAIM", None)
        if claim is not None:
            found.append(claim)
    return sorted(found, key=lambda claim: claim.order)


def claims_named(names: list[str]) -> list[Claim]:
    """Return the claims with these names, or all where none is named.

    Raises:
        ValueError: There is none of that name.
    """
    known = {claim.id: claim for claim in all_claims()}
    for name in names:
        if name not in known:
            raise ValueError(f"claim {name!r} is not known: choose from {', '.join(known)}")
    return [claim for claim in known.values() if not names or claim.id in names]
