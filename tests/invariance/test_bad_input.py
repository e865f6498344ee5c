"""What cannot be probed is refused in one line that names it and the remedy."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normwise as nw

X = torch.zeros(4, 3).normal_(generator=torch.Generator().manual_seed(0))


def frozen() -> nn.Module:
    return nn.Linear(3, 2).requires_grad_(False)


def out_of_memory(model: nn.Module, batch: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore lines.")


def nan(model: nn.Module, batch: Tensor) -> Any:
    return model(batch) * float("nan")


CASES: list[tuple[Callable[[], Any], Any, Any, type[Exception], str]] = [
    (lambda: "net", [X], None, TypeError, "model must be a torch.nn.Module, not str"),
    (frozen, [X], None, ValueError, "no trainable parameter.*unfreeze"),
    (nn.ReLU, [X], None, ValueError, "no trainable parameter"),
    (
        lambda: nn.LazyLinear(2),
        [X],
        None,
        ValueError,
        "'weight' of a lazy module.*run the model on one batch",
    ),
    (lambda: nn.Linear(3, 2, device="meta"), [X], None, ValueError, "'weight' is on the meta device.*move"),
    (
        lambda: nn.Linear(3, 2),
        [],
        None,
        ValueError,
        r"batches is empty \(too few batches: 0\): give at least one",
    ),
    (lambda: nn.Linear(3, 2), 7, None, TypeError, "batches must be an iterable of batches.*not int"),
    (lambda: nn.Linear(3, 2), [X], 7, TypeError, "forward must be a function"),
    (
        lambda: nn.Linear(5, 2),
        [X],
        None,
        RuntimeError,
        r"failed on batch 0 \(4, 3\): give batches it can run.*shapes",
    ),
    (lambda: nn.Linear(3, 2), [{"x": X}], None, TypeError, r"failed on batch 0 \{x: \(4, 3\)\}"),
    (lambda: nn.Linear(3, 2), [X], nan, ValueError, "the outputs contain NaN on batch 0.*check the inputs"),
    (lambda: nn.Linear(3, 2), [X * float("nan")], None, ValueError, "the outputs contain NaN"),
    (
        lambda: nn.Linear(3, 2),
        [X],
        lambda m, b: m(b).argmax(-1),
        ValueError,
        "no output depends on a parameter",
    ),
    (
        lambda: nn.Linear(3, 2),
        [X],
        lambda m, b: m(b).detach(),
        ValueError,
        "no output depends on a parameter",
    ),
    (lambda: nn.Linear(3, 2), [X], lambda m, b: b, ValueError, "no output depends on a parameter"),
    (lambda: nn.Linear(3, 2), [X], lambda m, b: None, ValueError, "no output depends on a parameter"),
    (
        lambda: nn.Linear(3, 2),
        [X],
        lambda m, b: torch.zeros(3, requires_grad=True) * 2,
        ValueError,
        "the outputs depend on no parameter",
    ),
    (
        lambda: nn.Linear(3, 2),
        [X],
        out_of_memory,
        RuntimeError,
        "out of memory.*batch 0.*give smaller batches",
    ),
]


@pytest.mark.parametrize(("build", "batches", "forward", "error", "words"), CASES)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_bad_input_is_refused_in_one_line(
    build: Callable[[], Any], batches: Any, forward: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        nw.find_invariances(build(), batches, forward)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tolerance", [0, -1e-3, 0.5, float("nan"), "small", True])
def test_bad_tolerance_is_refused(tolerance: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"tolerance={tolerance!r} must be")):
        nw.find_invariances(nn.Linear(3, 2), [X], tolerance=tolerance)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_modules_are_refused() -> None:
    with pytest.raises(TypeError, match=r"scripted module.*give the eager model"):
        nw.find_invariances(torch.jit.script(nn.Linear(3, 2)), [X])
