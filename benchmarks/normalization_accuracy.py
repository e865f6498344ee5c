"""How exact the weight-normalisation family is: the largest error in ULP, by type and by norm of the units.

Run:  python -m benchmarks.normalization_accuracy [--out benchmarks/results]

The error of a unit is the Euclidean norm of its difference from float64, divided by its norm, in units of the
type's eps. The tables give the largest error over units, shapes and dims: of the value / of the gradient.
"out of range": the true gradient is not a normal number of the type.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

import normwise as nw
from normwise.normalization._exact import Formula, exact_forward, unit_size

NORMS = (1e-30, 1e-20, 1e-10, 1e-6, 1e-4, 1e-2, 1.0, 1e2, 1e4, 1e6, 1e10, 1e20, 1e30)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS: tuple[tuple[tuple[int, ...], int | None], ...] = (
    ((64, 9), 0),
    ((64, 64, 1, 1), 0),
    ((32, 64, 3, 3), 0),
    ((16, 32, 3, 3), 1),
    ((64, 3072), 0),
    ((4, 40_000), 0),
    ((256, 256), None),
)
RANGE = {torch.float16: (1e-3, 1e4)}  # these norms stay clear of the type's limits


def exact(kind: str, w: Tensor, dim: int | None) -> Tensor:
    """Return the member in float64. For float64 weights the errors are therefore those of two evaluations."""
    size = unit_size(w, dim)
    formula = Formula(dim, kind != "weight_norm", size**0.5 if kind == "weight_standardization" else 1.0)
    return exact_forward(w, None, formula)


def error(computed: Tensor, true: Tensor, dim: int | None) -> float | None:
    """Return the largest error of a unit in ULP, or None where the truth is out of the type's range."""
    limits = torch.finfo(computed.dtype)
    dims = [k for k in range(computed.ndim) if k != dim]
    if float(true.abs().max()) > limits.max:
        return None
    size = torch.linalg.vector_norm(true, dim=dims)
    if float(size.min()) / unit_size(computed, dim) ** 0.5 < limits.tiny * 100:
        return None
    return float((torch.linalg.vector_norm(computed.double() - true, dim=dims) / size).max()) / limits.eps


def worst(kind: str, dtype: torch.dtype, norm: float) -> str:
    """Return "value / gradient": the largest errors over all layouts."""
    function = getattr(nw.functional, kind)
    values, gradients = [0.0], [0.0]
    skipped = False
    for k, (shape, dim) in enumerate(LAYOUTS):
        generator = torch.Generator().manual_seed(k)
        w = torch.randn(shape, generator=generator, dtype=torch.float64)
        w = (w * norm / unit_size(w, dim) ** 0.5).to(dtype).requires_grad_()
        upstream = torch.randn(shape, generator=generator).to(dtype)
        true_w = w.detach().double().requires_grad_()
        out, true = function(w, dim), exact(kind, true_w, dim)
        (gradient,) = torch.autograd.grad(out, w, upstream)
        (true_gradient,) = torch.autograd.grad(true, true_w, upstream.double())
        value_error = error(out.detach(), true.detach(), dim)
        gradient_error = error(gradient, true_gradient, dim)
        values.append(value_error or 0.0)
        gradients.append(gradient_error or 0.0)
        skipped |= gradient_error is None
    return f"{max(values):.1f} / " + ("out of range" if skipped else f"{max(gradients):.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, help="write normalization_accuracy.md there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# How exact the weight-normalisation family is",
        "",
        f"`python -m benchmarks.normalization_accuracy`, torch {torch.__version__}, CPU. "
        "Largest error in ULP of the type: value / gradient.",
        "",
    ]
    for kind in ("weight_norm", "centered_weight_norm", "weight_standardization"):
        lines += [f"## {kind}", "", "| norm | " + " | ".join(str(d)[6:] for d in DTYPES) + " |"]
        lines += ["|---|" + "---|" * len(DTYPES)]
        for norm in NORMS:
            cells = []
            for dtype in DTYPES:
                low, high = RANGE.get(dtype, (0.0, float("inf")))
                cells.append(worst(kind, dtype, norm) if low <= norm <= high else "")
            lines.append(f"| {norm:.0e} | " + " | ".join(cells) + " |")
        lines.append("")
    print("\n".join(lines))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "normalization_accuracy.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
