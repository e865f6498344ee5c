"""Which weights of a network are scale-invariant, alone and jointly.

The public names stand here; the modules of this package are private.
"""

from normwise.invariance.find import find_invariances
from normwise.invariance.parts import (
    dimension_of,
    expand_parts,
    merge_parts,
    parameter_of,
    periods_of,
    widened_part,
)
from normwise.invariance.result import Evidence, Invariances, SearchStats

__all__ = [
    "Evidence",
    "Invariances",
    "SearchStats",
    "dimension_of",
    "expand_parts",
    "find_invariances",
    "merge_parts",
    "parameter_of",
    "periods_of",
    "widened_part",
]
