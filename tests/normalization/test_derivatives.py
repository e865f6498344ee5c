"""Higher derivatives, forward mode, torch.func, compilation and autocast."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.normalization.reference import FUNCTIONS, KINDS, error_in_ulp, originals, reference, with_gradient
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import normwise as nw
from normwise.normalization import _kernels
from normwise.normalization._exact import Formula, exact_forward
from normwise.normalization._kernels import normalize

# torch scripts formulas of its own when forward mode is first used; gradcheck of 2.6 uses what is deprecated
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Please use .torch.vmap:FutureWarning"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.one_in(2)
def test_gradcheck_and_gradgradcheck(kind: str, dim: int | None, scale: float) -> None:
    torch.manual_seed(0)
    w = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)

    def function(v: Tensor) -> Tensor:
        out: Tensor = FUNCTIONS[kind](v * scale, dim)
        return out

    assert gradcheck(function, w, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, w, check_fwd_over_rev=True)


@pytest.mark.parametrize("centered", [False, True])
def test_gradients_of_gain_and_weight_together(centered: bool) -> None:
    torch.manual_seed(0)
    w = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    g = torch.rand(3, 1, dtype=torch.float64).add(0.5).requires_grad_()
    for scale in (1.0, 1e100):

        def function(v: Tensor, gain: Tensor, scale: float = scale) -> Tensor:
            return normalize(v * scale, gain, Formula(0, centered, 2.0))

        assert gradcheck(function, (w, g))
        assert gradgradcheck(function, (w, g))


def test_gradient_penalty_is_right_where_torchs_kernel_is_not() -> None:
    """The double backward of torch._weight_norm takes the norms as constants on a CPU."""
    torch.manual_seed(0)
    layer = nw.weight_norm(nn.Linear(5, 4).double())
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)

    def penalty(v: Tensor, g: Tensor) -> Tensor:
        y = torch.tanh(x @ (v * (g / v.norm(dim=1, keepdim=True))).T).sum()
        return torch.autograd.grad(y, [v, g], create_graph=True)[0].square().sum()

    leaves = originals(layer)[::-1]
    layer.bias.data.zero_()
    gradient = torch.autograd.grad(torch.tanh(layer(x)).sum(), leaves, create_graph=True)[0]
    computed = torch.autograd.grad(gradient.square().sum(), leaves)
    expected = torch.autograd.grad(penalty(*leaves), leaves)
    torch.testing.assert_close(computed, expected)


def second_order(
    function: Callable[[Tensor, Tensor], Tensor], leaves: tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """Return the derivatives of a penalty on the gradient of the weight."""
    (gradient,) = torch.autograd.grad(function(*leaves).sin().sum(), leaves[:1], create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), leaves)


def rows(layout: str) -> tuple[Tensor, Tensor]:
    """Return a float64 weight and its gain; the fused kernel is given it as it is, or a copy."""
    torch.manual_seed(0)
    weight = torch.randn(4, 6, 2, dtype=torch.float64)
    weight = weight if layout == "contiguous" else weight.transpose(1, 2)
    return weight.requires_grad_(), torch.rand(4, 1, 1, dtype=torch.float64, requires_grad=True)


ROWS = Formula(0, center=False, factor=1.0)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("around", ["nothing", "checkpoint", "save_on_cpu"])
def test_double_backward_through_hooks_on_saved_tensors(around: str, layout: str) -> None:
    """Activation checkpointing lets a saved tensor be read once, and the kernel's node reads it itself."""
    leaves = rows(layout)

    def fused(v: Tensor, g: Tensor) -> Tensor:
        return normalize(v, g, ROWS)

    def function(v: Tensor, g: Tensor) -> Tensor:
        if around == "checkpoint":
            out: Tensor = checkpoint(fused, v, g, use_reentrant=False)
            return out
        with torch.autograd.graph.save_on_cpu() if around == "save_on_cpu" else nullcontext():
            return fused(v, g)

    expected = second_order(lambda v, g: exact_forward(v, g, ROWS), leaves)
    torch.testing.assert_close(second_order(function, leaves), expected)


def test_two_differentiated_passes_over_one_graph() -> None:
    leaves = rows("contiguous")
    out, exact = normalize(*leaves, ROWS), exact_forward(*leaves, ROWS)
    for upstream in (torch.randn_like(out), torch.randn_like(out)):
        computed, expected = (
            torch.autograd.grad(o, leaves, upstream, create_graph=True) for o in (out, exact)
        )
        torch.testing.assert_close(computed, expected)
        penalties = [torch.cat([g.flatten() for g in some]).square().sum() for some in (computed, expected)]
        computed, expected = (torch.autograd.grad(p, leaves, retain_graph=True) for p in penalties)
        torch.testing.assert_close(computed, expected)
    plain = torch.autograd.grad(out, leaves, upstream)  # and one that is not, last
    torch.testing.assert_close(plain, torch.autograd.grad(exact, leaves, upstream))
    assert not any(g.requires_grad for g in plain)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (torch._C, "_are_functorch_transforms_active"),
        (torch._C, "_len_torch_dispatch_stack"),
        (torch._C, "_is_tracing"),
        (torch._C, "_current_autograd_node"),
        (torch, "_weight_norm_interface"),
        (forward_ad, "_current_level"),
        ("node", "_register_hook_dict"),
        ("node", "_saved_v"),
        ("node", "_saved_g"),
        ("node", "metadata"),
    ],
)
def test_a_torch_without_a_private_name_gives_the_same_derivatives(
    owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves = rows("contiguous")
    expected = second_order(lambda v, g: exact_forward(v, g, ROWS), leaves)
    source, module = inspect.getsource(_kernels), ModuleType("_kernels of an older torch")
    with monkeypatch.context() as patch:
        if owner == "node":  # an attribute of nodes cannot be removed
            source = source.replace(f'"{name}"', f'"{name} of old"', 1)
        else:
            patch.delattr(owner, name)
        exec(source, module.__dict__)
    assert not module._HAS_PRIVATE_NAMES
    computed = second_order(lambda v, g: module.normalize(v, g, ROWS), leaves)
    torch.testing.assert_close(computed, expected)


@pytest.mark.parametrize("around", ["", "checkpoint", "save_on_cpu"])
def test_a_torch_that_does_not_tell_of_hooks_on_saved_tensors(
    around: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before torch 2.7 the double backward is corrected by an ordinary hook, always."""
    monkeypatch.delattr(torch._C._autograd, "_top_saved_tensors_default_hooks", raising=False)
    source, module = inspect.getsource(_kernels), ModuleType("_kernels of torch 2.6")
    exec(source, module.__dict__)
    assert module._HAS_PRIVATE_NAMES
    leaves = rows("contiguous")

    def function(v: Tensor, g: Tensor) -> Tensor:
        if around == "checkpoint":
            out: Tensor = checkpoint(module.normalize, v, g, ROWS, use_reentrant=False)
            return out
        with torch.autograd.graph.save_on_cpu() if around == "save_on_cpu" else nullcontext():
            result: Tensor = module.normalize(v, g, ROWS)
            return result

    expected = second_order(lambda v, g: exact_forward(v, g, ROWS), leaves)
    torch.testing.assert_close(second_order(function, leaves), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_torch_func_transforms(kind: str) -> None:
    torch.manual_seed(0)
    function, w = FUNCTIONS[kind], torch.randn(6, 4, 5)
    w[2, 1] = 0.0
    stacked = torch.stack([function(row) for row in w])
    torch.testing.assert_close(torch.vmap(function)(w), stacked)

    def loss(v: Tensor) -> Tensor:
        total: Tensor = function(v).sin().sum()
        return total

    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(w)[1], torch.func.grad(loss)(w[1]))
    torch.testing.assert_close(torch.func.jacrev(function)(w[0]), torch.func.jacfwd(function)(w[0]))
    double = w[0].double()
    torch.testing.assert_close(
        torch.func.hessian(loss)(double), torch.func.hessian(lambda v: reference(kind, v).sin().sum())(double)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_forward_mode_outside_of_torch_func(kind: str, scale: float) -> None:
    torch.manual_seed(0)
    w, t = torch.randn(4, 6) * scale, torch.randn(4, 6) * scale
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(FUNCTIONS[kind](forward_ad.make_dual(w, t))).tangent
    assert tangent is not None
    expected = torch.func.jvp(lambda v: reference(kind, v), (w.double(),), (t.double(),))[1]
    assert error_in_ulp(tangent, expected) < 16


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_in_one_graph_at_every_scale(kind: str) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    compiled = torch.compile(FUNCTIONS[kind], fullgraph=True, backend="aot_eager")
    w, upstream = torch.randn(4, 9), torch.randn(4, 9)
    w[1] = 0.0
    for scale in (1e-30, 1.0, 1e30):
        computed = with_gradient(compiled, w * scale, upstream)
        exact = with_gradient(lambda v: reference(kind, v), (w * scale).double(), upstream.double())
        assert max(error_in_ulp(f, e) for f, e in zip(computed, exact, strict=True)) < 4


@pytest.mark.filterwarnings("ignore:Skipping serialization of skipfiles:UserWarning")  # torch 2.6
def test_compiled_layer_by_inductor() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer = nw.weight_norm(nn.Linear(6, 4))
    with torch.no_grad():
        originals(layer)[1][1] = 0.0
    x = torch.randn(3, 6)
    y = layer(x)
    y.sum().backward()
    eager = [p.grad for p in layer.parameters()]
    layer.zero_grad()
    compiled: Callable[[Tensor], Tensor] = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x), y)
    compiled(x).sum().backward()
    torch.testing.assert_close([p.grad for p in layer.parameters()], eager)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_waits_for_an_accelerator(kind: str, dtype: torch.dtype) -> None:
    """Tensors without values take the same branches as those of an accelerator; a look at one would raise."""
    w = torch.randn(4, 9, device="meta", dtype=dtype, requires_grad=True)
    g = torch.rand(4, 1, device="meta", dtype=dtype, requires_grad=True)
    formula = Formula(0, kind != "weight_norm", 1.0)
    for out in (FUNCTIONS[kind](w), normalize(w, g, formula)):
        (gradient,) = torch.autograd.grad(out.sum(), w, create_graph=True)
        assert torch.autograd.grad(gradient.sum(), w)[0].shape == w.shape


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_leaves_the_statistics_alone(kind: str) -> None:
    w = torch.randn(4, 9) * 1e20
    w[1] = 0.0
    with torch.autocast("cpu", torch.bfloat16):
        out = FUNCTIONS[kind](w)
        layer = getattr(nw, kind)(nn.Linear(9, 4))
        layer(torch.randn(2, 9)).sum().backward()
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, FUNCTIONS[kind](w))
    assert all(bool(p.grad.isfinite().all()) for p in layer.parameters() if p.grad is not None)


def test_differences_between_eager_and_traced_are_rounding_only() -> None:
    torch.manual_seed(0)
    w, g = torch.randn(8, 20), torch.rand(8, 1)
    for centered in (False, True):
        formula = Formula(0, centered, 3.0)  # a factor that no member has
        assert error_in_ulp(normalize(w, g, formula), exact_forward(w.double(), g.double(), formula)) < 4
