"""Values and first gradients of the family against float64, over types, scales, shapes and dims."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.normalization.reference import FUNCTIONS, KINDS, error_in_ulp, reduced, reference, with_gradient
from torch import Tensor

import normwise as nw
from normwise.normalization import _kernels
from normwise.normalization._exact import Formula, exact_forward, unit_size
from normwise.normalization._kernels import normalize

SCALES = {
    torch.float64: (-30, 30),
    torch.float32: (-30, 30),
    torch.bfloat16: (-30, 30),
    torch.float16: (-3, 3),
}
LAYOUTS: list[tuple[tuple[int, ...], int | None]] = [
    ((5, 27), 0),
    ((4, 3, 3, 3), 0),
    ((4, 6, 3), 1),
    ((3, 4, 5), -1),
    ((9, 7), 1),
    ((6, 8), None),
    ((2, 3, 2, 3), None),
]
# Sums of d terms, a division and a rounding: a few ULP. Results of half types are rounded once, at the end.
FEW_ULP = {torch.float64: 8.0, torch.float32: 6.0, torch.bfloat16: 1.0, torch.float16: 1.0}


def draw_weight(shape: tuple[int, ...], dim: int | None, scale: float, seed: int) -> Tensor:
    """Return float64 units whose norms are about ``scale``, each a little different."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator, dtype=torch.float64)
    spread = (
        torch.rand([1 if k in reduced(w, dim) else s for k, s in enumerate(shape)], generator=generator) + 0.5
    )
    weight: Tensor = w * spread * (scale / unit_size(w, None if dim is None else dim % len(shape)) ** 0.5)
    return weight


@settings(max_examples=60, deadline=None)
@given(data=st.data(), kind=st.sampled_from(KINDS), seed=st.integers(0, 10**6))
@pytest.mark.parametrize("dtype", SCALES, ids=str)
def test_value_and_gradient_are_exact_to_a_few_ulp_at_every_scale(
    dtype: torch.dtype, data: st.DataObject, kind: str, seed: int
) -> None:
    shape, dim = data.draw(st.sampled_from(LAYOUTS))
    low, high = SCALES[dtype]
    w = draw_weight(shape, dim, 10.0 ** data.draw(st.integers(low, high)), seed).to(dtype)
    if dim is not None and data.draw(st.booleans()):
        w.select(dim, 1).fill_(0.0 if kind == "weight_norm" else float(w.flatten()[0]))
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    value, gradient = with_gradient(lambda v: FUNCTIONS[kind](v, dim), w, upstream)
    true_value, true_gradient = with_gradient(
        lambda v: reference(kind, v, dim), w.double(), upstream.double()
    )
    assert value.dtype == gradient.dtype == dtype
    assert value.shape == w.shape
    assert error_in_ulp(value, true_value, dim) <= FEW_ULP[dtype]
    if dtype == torch.float16:  # gradients of tiny half weights leave the range
        return
    assert error_in_ulp(gradient, true_gradient, dim) <= FEW_ULP[dtype]


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(KINDS), exponent=st.integers(-90, 90), seed=st.integers(0, 10**6))
def test_scaling_by_powers_of_two_changes_nothing_and_divides_the_gradient(
    kind: str, exponent: int, seed: int
) -> None:
    alpha = 2.0**exponent
    w, upstream = draw_weight((4, 3, 3, 3), 0, 1.0, seed).float(), torch.randn(4, 3, 3, 3)
    value, gradient = with_gradient(FUNCTIONS[kind], w, upstream)
    scaled_value, scaled_gradient = with_gradient(FUNCTIONS[kind], w * alpha, upstream)
    assert error_in_ulp(scaled_value, value.double()) <= 4
    assert error_in_ulp(scaled_gradient, gradient.double() / alpha) <= 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", SCALES, ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_units_without_a_direction_give_zeros_and_zero_gradients(
    kind: str, dtype: torch.dtype, scale: float
) -> None:
    w = (draw_weight((4, 9), 0, scale, 0)).to(dtype)
    w[1] = 0.0
    w[2] = 0.0 if kind == "weight_norm" else 0.7 * scale
    for rows in (w, w[1:3]):
        value, gradient = with_gradient(FUNCTIONS[kind], rows, torch.randn(rows.shape))
        undirected = slice(1, 3) if len(rows) == 4 else slice(None)
        assert bool((value[undirected] == 0).all())
        assert bool((gradient[undirected] == 0).all())
        assert bool(gradient.isfinite().all())


def random_normal(shape: tuple[int, ...], mean: float = 0.0, std: float = 1.0) -> Tensor:
    return mean + std * torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("w", "dim", "bound"),
    [
        (random_normal((16, 64, 3, 3), 10, 0.05).half(), 0, 1.0),
        (random_normal((16, 64, 3, 3), 10, 0.05).bfloat16(), 0, 0.6),
        (random_normal((64, 3)).half(), 0, 1.0),
        (random_normal((64, 3)).bfloat16(), 0, 1.0),
        (random_normal((8, 50), 0.5), 0, 4.0),
        (random_normal((8, 50), 5.0), 0, 4.0),
        (random_normal((8, 50), 30.0), 0, 4.0),
        (random_normal((8, 50), 1e3), 0, 4.0),
        (random_normal((16, 64, 3, 3), 0.4, 0.05).half(), 0, 1.0),
        (random_normal((2, 70_000)), 0, 4.0),
        (random_normal((8, 20_000)).bfloat16(), 0, 0.4),
        (random_normal((300, 400)), None, 4.0),
    ],
    ids=lambda value: (
        f"{value.dtype}, {tuple(value.shape)}, mean {float(value.mean()):.0e}"
        if isinstance(value, Tensor)
        else str(value)
    ),
)
@pytest.mark.parametrize("kind", KINDS)
def test_large_means_and_units_of_all_lengths(kind: str, w: Tensor, dim: int | None, bound: float) -> None:
    upstream = torch.randn(w.shape, generator=torch.Generator().manual_seed(1)).to(w.dtype)
    values = with_gradient(lambda v: FUNCTIONS[kind](v, dim), w, upstream)
    exact = with_gradient(lambda v: reference(kind, v, dim), w.double(), upstream.double())
    assert max(error_in_ulp(f, e, dim) for f, e in zip(values, exact, strict=True)) < bound


@settings(max_examples=60, deadline=None)
@given(
    gain_exponent=st.integers(-30, 30),
    exponent=st.integers(-30, 30),
    upstream_exponent=st.integers(-20, 20),
    centered=st.booleans(),
)
@example(gain_exponent=0, exponent=-10, upstream_exponent=20, centered=True)
@example(gain_exponent=0, exponent=11, upstream_exponent=-20, centered=True)
@example(gain_exponent=5, exponent=-7, upstream_exponent=15, centered=False)
@example(
    gain_exponent=-7, exponent=7, upstream_exponent=-16, centered=True
)  # 9.3, the largest of 15,006 cases
def test_extreme_gains_and_gradients_overflow_only_where_the_truth_does(
    gain_exponent: int, exponent: int, upstream_exponent: int, centered: bool
) -> None:
    """Outputs up to 3e38, and gradients up to 1e28: beyond, a product inside torch's kernel may overflow."""
    w = draw_weight((3, 9), 0, 10.0**exponent, 0).float()
    gain = torch.tensor([[0.5], [1.0], [2.0]]) * 10.0**gain_exponent
    upstream = torch.randn(3, 9, generator=torch.Generator().manual_seed(1)) * 10.0**upstream_exponent
    formula = Formula(0, centered, 1.0)
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in (w, gain)]
        function = normalize if dtype == torch.float32 else exact_forward
        out = function(leaves[0], leaves[1], formula)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, upstream.to(dtype))])
    size = torch.linalg.vector_norm(upstream.double(), dim=1, keepdim=True)
    along = (results[0][2].double() - results[1][2]).abs() / size  # a sum that may cancel
    assert bool((along <= 4 * torch.finfo(torch.float32).eps).all())
    for computed, exact, limit in zip(results[0][:2], results[1][:2], (3e38, 1e28), strict=True):
        representable = (exact.abs() < limit) & ((exact.abs() > 1e-33) | (exact == 0))
        for row in range(3):
            if bool(representable[row].all()):
                assert error_in_ulp(computed[row : row + 1], exact[row : row + 1]) <= 12


@pytest.mark.parametrize(
    ("scale", "gain", "expected"), [(1.0, None, (0, 0)), (1e20, None, (1, 0)), (1e20, 1e20, (1, 1))]
)
@pytest.mark.parametrize("centered", [False, True])
def test_every_evaluation_is_reached_and_agrees(
    scale: float, gain: float | None, expected: tuple[int, int], centered: bool
) -> None:
    """The fused kernels, the fused kernels after scaling and the exact evaluation each do their part."""
    w, formula = draw_weight((4, 9), 0, scale, 0).float(), Formula(0, centered, 1.0)
    g = None if gain is None else torch.full((4, 1), gain)
    with (
        patch.object(_kernels, "_scale_to_one", wraps=_kernels._scale_to_one) as scaling,
        patch.object(_kernels, "exact_forward", wraps=exact_forward) as exact,
    ):
        out = normalize(w, g, formula)
    assert (scaling.call_count, exact.call_count) == expected
    assert error_in_ulp(out, exact_forward(w.double(), None if g is None else g.double(), formula)) < 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_unit_that_is_not_ordinary_is_seen_among_many(dtype: torch.dtype) -> None:
    w = torch.eye(65, 3, dtype=dtype) + 1
    for norm in [2.0**e for e in range(-40, 41)] + [0.0, -0.0, 1e38, float("inf"), float("nan")]:
        w[37] = torch.tensor([0.0, norm, 0.0])
        with patch.object(_kernels, "_scale_to_one", wraps=_kernels._scale_to_one) as scaling:
            computed = nw.functional.weight_norm(w)
        assert scaling.called != (1e-8 < norm < 1e8), norm
        direction = float(norm != 0) if math.isfinite(norm) else math.nan
        torch.testing.assert_close(float(computed[37, 1]), direction, equal_nan=True)


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e-3, 1.0, 1e6, 1e20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_eps_as_a_checkpoint_was_trained_with_it(scale: float, dtype: torch.dtype) -> None:
    w, upstream = draw_weight((4, 25), 0, 5 * scale, 0).to(dtype), torch.randn(4, 25)
    computed = with_gradient(lambda v: nw.functional.weight_standardization(v, eps=1e-6), w, upstream)
    exact = with_gradient(
        lambda v: reference("weight_standardization", v, eps=1e-6), w.double(), upstream.double()
    )
    assert max(error_in_ulp(f, e) for f, e in zip(computed, exact, strict=True)) < 8


@pytest.mark.parametrize("kind", KINDS)
def test_strides_and_memory_formats_do_not_matter(kind: str) -> None:
    w = torch.randn(8, 4, 3, 3)
    expected = FUNCTIONS[kind](w)
    for other in (
        w.to(memory_format=torch.channels_last),
        w.flip(0).flip(0),
        w.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        torch.testing.assert_close(FUNCTIONS[kind](other), expected)
    for dtype in SCALES:  # torch's kernel would divide by 0 and end the process
        assert FUNCTIONS[kind](torch.empty(0, 5, dtype=dtype)).shape == (0, 5)


def test_nan_and_inf_are_passed_on_in_their_unit_only() -> None:
    w = torch.randn(3, 5)
    w[1, 2] = float("nan")
    for function in FUNCTIONS.values():
        out = function(w)
        assert bool(out[1].isnan().all())
        assert bool(out[[0, 2]].isfinite().all())


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: nw.functional.weight_norm(torch.randn(4, 1)), ValueError, "no direction"),
        (lambda: nw.functional.centered_weight_norm(torch.randn(4, 2)), ValueError, "at least 3"),
        (lambda: nw.functional.weight_standardization(torch.randn(4, 2)), ValueError, "at least 3"),
        (lambda: nw.functional.weight_norm(torch.randn(4)), ValueError, "no direction"),
        (lambda: nw.functional.weight_norm(torch.randn(4, 3), dim=2), ValueError, "out of range"),
        (lambda: nw.functional.weight_norm(torch.ones(4, 3, dtype=torch.long)), TypeError, "floating-point"),
        (
            lambda: nw.functional.weight_norm(torch.ones(4, 3, dtype=torch.cfloat)),
            TypeError,
            "floating-point",
        ),
        (lambda: nw.functional.weight_norm([1.0, 2.0]), TypeError, "must be a tensor"),  # type: ignore[arg-type]
        (lambda: nw.functional.weight_standardization(torch.randn(4, 3), eps=-1.0), ValueError, "eps"),
        (
            lambda: nw.functional.weight_standardization(torch.randn(4, 3), eps=float("nan")),
            ValueError,
            "eps",
        ),
    ],
)
def test_errors_say_what_is_wrong(call: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()  # type: ignore[operator]
