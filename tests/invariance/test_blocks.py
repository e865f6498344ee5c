"""Ranges of units that are invariant together."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from normwise.invariance.verdicts import invariant_blocks


@given(
    st.lists(st.tuples(st.integers(1, 6), st.sampled_from(["invariant", "not", "silent"])), max_size=40),
    st.integers(2, 12),
    st.integers(0, 2**32 - 1),
)
def test_exactly_the_ranges_that_are_built_to_vanish_are_found(
    built: list[tuple[int, str]], passes: int, seed: int
) -> None:
    """Each range of random sums vanishes by its last unit, does not vanish, or is zero throughout."""
    rng = np.random.default_rng(seed)
    ranges, expected, start = [np.zeros((passes, 0))], [], 0
    for width, kind in built:
        sums = rng.normal(size=(passes, width)) * 10.0 ** rng.uniform(-2, 2, size=width)
        if kind == "silent":
            sums[:] = 0.0
        elif kind == "invariant":
            sums[:, -1] -= sums.sum(1)
            if width > 1:  # one alone is zero, and so is no evidence
                expected.append((start, start + width))
            else:
                sums[:] = 0.0
        ranges.append(sums)
        start += width
    sums = np.concatenate(ranges, axis=1)
    squares = sums**2 + 1e-6 * (sums != 0)
    assert invariant_blocks(sums, squares, 1e-9, 1e-12) == expected
