"""The linear algebra of symmetries, on planted null spaces."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, nnls

from normwise.invariance.symmetries import (
    integer_basis,
    jointly_invariant_groups,
    nonnegative_least_squares,
    null_space,
)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_integer_basis_spans_the_null_space_of_any_small_symmetries(data: st.DataObject) -> None:
    columns = data.draw(st.integers(3, 9))
    count = data.draw(st.integers(1, columns - 1))
    entries = st.lists(st.sampled_from([-1, 0, 0, 1]), min_size=columns, max_size=columns)
    planted = np.array([data.draw(entries) for _ in range(count)])
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    _, values, vectors = np.linalg.svd(planted, full_matrices=True)
    rank = int(np.sum(values > 1e-9))
    rows = rng.normal(size=(columns + 8, columns - rank)) @ vectors[rank:]
    live = np.linalg.norm(rows, axis=0) > 1e-9
    found = integer_basis(rows[:, live], null_space(rows[:, live], 1e-6), 1e-6)
    assert len(found) == int(live.sum()) - (columns - rank)
    for vector in found:
        assert np.abs(rows[:, live] @ vector).max() < 1e-6


def test_groups_agree_with_a_linear_program() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        basis = [v for v in rng.integers(-1, 2, size=(3, 7)) if v.any()]
        if np.linalg.matrix_rank(np.array(basis)) < len(basis):
            continue
        groups = jointly_invariant_groups(basis)
        covered = np.any(np.array(groups) > 0, axis=0) if groups else np.zeros(7, dtype=bool)
        span = np.array(basis, dtype=float)
        for group in groups:
            assert (group >= 0).all()
            assert np.linalg.matrix_rank(np.vstack([span, group])) == len(basis)
        for k in range(7):
            best = linprog(-span[:, k], A_ub=-span.T, b_ub=np.zeros(7), bounds=[(-1, 1)] * len(basis))
            assert covered[k] == (best.fun < -1e-9)


def test_an_irrational_symmetry_does_not_hide_integer_ones() -> None:
    """Layers in a chain balance their neighbours; the middle one enters by the power √2."""
    powers = np.array([1.0, 1.0, 1.0, 2**0.5, 1.0, 1.0, 1.0])
    rng = np.random.default_rng(0)
    # only Σ powers·e has an effect, beside two weights of no symmetry
    rows = np.concatenate([rng.normal(size=(12, 1)) * powers, rng.normal(size=(12, 2))], axis=1)
    null = null_space(rows, 1e-6)
    assert null.shape[1] == 6
    basis = integer_basis(rows, null, 1e-6)
    assert len(basis) == 5
    for exponents in basis:
        assert sorted(exponents[exponents != 0]) == [-1, 1]


def test_faint_columns_hide_no_symmetry_of_others() -> None:
    """Two weights of a nearly dead unit: rounding errors are as large as their exponents."""
    rng = np.random.default_rng(0)
    sums = rng.normal(size=(40, 12)) @ np.diag(np.logspace(0, -2, 12)) @ rng.normal(size=(12, 12))
    columns: list[np.ndarray[Any, Any]] = []
    for total in sums.T:
        share = rng.normal(size=40) * np.linalg.norm(total) / 6
        columns += [total - share, share, -total]
    faint = 1e-13 * rng.normal(size=40)
    rows = np.stack([*columns, faint, -faint], axis=1)
    basis = integer_basis(rows, null_space(rows, 1e-6), 1e-6)
    expected = [[3 * k, 3 * k + 1, 3 * k + 2] for k in range(12)] + [[36, 37]]
    assert [np.flatnonzero(vector).tolist() for vector in basis] == expected
    assert all((vector[vector != 0] == 1).all() for vector in basis)


def test_nonnegative_least_squares_are_those_of_scipy() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        rows, count = (int(size) for size in rng.integers(1, 9, size=2))
        a, b = rng.normal(size=(rows, count)), rng.normal(size=rows)
        if count > 2:
            a[:, 0] = a[:, 1]  # not unique then, but the minimum is
        x, error = nonnegative_least_squares(a, b)
        assert (x >= 0).all()
        assert error == np.linalg.norm(a @ x - b)
        assert abs(error - nnls(a, b)[1]) < 1e-9
