"""Which weights a monitor watches, what each is, and what it is called."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from normwise.invariance import parameter_of
from normwise.norms import of_shape
from normwise.planning.parameters import bare, parameter_aliases, role_of
from normwise.planning.plan import Plan
from normwise.planning.treatment import Cause, Verdict, is_group
from normwise.units import Unit

__all__ = ["KINDS", "Balance", "Layer", "Watched", "short_names", "watched"]

KINDS = {
    "shrink": "scale-invariant: only the direction matters",
    "balance": "in a symmetry that scales other weights down when it scales this one up",
    "L2": "in no symmetry: decay regularises",
    "weight": "a weight whose invariance is not known",
}


@dataclass(frozen=True)
class Layer:
    """One watched weight.

    Attributes:
        name: What the weight is called in rows and findings.
        kind: One of :data:`KINDS`.
        unit: Its units.
        parameters: The full names of its parameters.
        alone: Whether the plan says that it is scale-invariant alone, so that its gradient has no part along
            it.
    """

    name: str
    kind: str
    unit: Unit
    parameters: tuple[str, ...]
    alone: bool = False


@dataclass(frozen=True)
class Balance:
    """A joint symmetry of whole parameters, as {index of the layer: exponent}.

    Gradient flow conserves Σ e·‖w‖² if some exponents are negative. If none is, the members are
    scale-invariant jointly, and Σ e·⟨w, ∇⟩ is zero.
    """

    name: str
    exponents: Mapping[int, int]

    @property
    def joint(self) -> bool:
        """Whether the members are jointly scale-invariant."""
        return all(exponent > 0 for exponent in self.exponents.values())


@dataclass(frozen=True)
class Watched:
    """What a monitor watches.

    Attributes:
        layers: The weights.
        balances: The joint symmetries between them.
        vectors: {full name: parameter} of the gains, biases and other vectors that have an effect, where a
            plan or a model says which these are.
        names: {id of a parameter: full name}.
    """

    layers: tuple[Layer, ...]
    balances: tuple[Balance, ...]
    vectors: Mapping[str, Tensor]
    names: Mapping[int, str]


def watched(
    plan: object,
    model: object,
    units: Iterable[Any] | None,
    decayed: Sequence[Unit],
    names: Mapping[int, str],
) -> Watched:
    """Return what to watch, given the arguments of :class:`normwise.Monitor`.

    Args:
        plan: A Plan, or None.
        model: A module, or None.
        units: Units or parameters, or None.
        decayed: The Units of the Decays that are attached to the optimizers.
        names: {id of a parameter: name}, as the optimizers know them.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: More than one of ``plan``, ``model`` and ``units`` is given, or nothing is left to watch.
    """
    given = [name for name, value in (("plan", plan), ("units", units)) if value is not None]
    if len(given) > 1:
        raise ValueError("plan and units are both given: give one of them")
    if plan is not None and not isinstance(plan, Plan):
        raise TypeError(f"plan must be a normwise.Plan, as nw.plan(model, batches) makes, not {_type(plan)}")
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {_type(model)}")
    if isinstance(plan, Plan):
        return _from_plan(plan if model is None else plan.apply_to(model), names)
    parameters = {} if model is None else dict(model.named_parameters())
    names = {**names, **{id(param): bare(name) for name, param in parameters.items()}}
    if units is not None:
        chosen = _checked(units)
    elif model is not None:
        return _from_model(model, names)
    elif decayed:
        chosen = list(decayed)
    else:
        raise ValueError(
            "nothing says what to watch: give plan=nw.plan(model, batches), or model=, or units=, or attach "
            "a Decay before"
        )
    full = [tuple(names.get(id(p), f"tensor{of_shape(p)}") for p in unit.params) for unit in chosen]
    short = short_names(["+".join(parts) for parts in full])
    layers = (
        Layer(name, "shrink", unit, parts, alone=True)
        for name, unit, parts in zip(short, chosen, full, strict=True)
    )
    return Watched(tuple(layers), (), _vectors(model), names)


def _type(value: object) -> str:
    return type(value).__name__


def _checked(units: Iterable[Any]) -> list[Unit]:
    chosen = [units] if isinstance(units, (Tensor, Unit)) else list(units)
    for item in chosen:
        if not isinstance(item, (Tensor, Unit)):
            raise TypeError(f"units must be Units or parameters, not {_type(item)}")
    if not chosen:
        raise ValueError("units is empty: give at least one Unit, or plan=nw.plan(model, batches)")
    return [item if isinstance(item, Unit) else Unit(item, 0 if item.ndim > 1 else None) for item in chosen]


def _from_plan(plan: Plan, names: Mapping[int, str]) -> Watched:
    kept = [t for t in plan.treatments if t.verdict != Verdict.NONE and t.role == "weight"]
    kept += [t for t in plan.treatments if t.verdict == Verdict.SHRINK and t.role != "weight"]
    named = plan.parameters
    layers = tuple(
        Layer(
            name,
            t.verdict.value,
            Unit(named[t.name], t.dim, t.mask) if t.verdict == Verdict.SHRINK else Unit(named[t.name], None),
            (t.name,),
            alone=t.cause == Cause.ALONE,
        )
        for t, name in zip(kept, short_names([bare(t.name) for t in kept]), strict=True)
    )
    if not layers:
        raise ValueError("the plan has no weights to watch: all its parameters are gains, biases or frozen")
    places = {t.name: k for k, t in enumerate(kept)}
    balances = tuple(
        Balance(
            _balance_name([(layers[places[n]].name, e) for n, e in symmetry.items()]),
            {places[n]: e for n, e in symmetry.items()},
        )
        for symmetry in plan.symmetries
        if all(parameter_of(key) == key and key in places for key in symmetry)
        and (is_group(symmetry) or any(layers[places[n]].kind == "balance" for n in symmetry))
    )
    vectors = {
        bare(t.name): named[t.name]
        for t in plan.treatments
        if t.role != "weight" and t.cause not in (Cause.NO_EFFECT, Cause.FROZEN) and t.verdict == Verdict.NONE
    }
    names = {**names, **{id(param): bare(name) for name, param in named.items()}}
    return Watched(layers, balances, vectors, names)


def _vectors(model: nn.Module | None) -> dict[str, Tensor]:
    """Return {name: parameter} of the gains, biases and vectors of a model."""
    if model is None:
        return {}
    named = dict(model.named_parameters())
    return {
        bare(name): named[name]
        for name in parameter_aliases(model)
        if role_of(model, name, named[name]) != "weight"
    }


def _from_model(model: nn.Module, names: Mapping[int, str]) -> Watched:
    parameters = dict(model.named_parameters())
    weights = {
        bare(name): parameters[name]
        for name in parameter_aliases(model)
        if role_of(model, name, parameters[name]) == "weight" and parameters[name].requires_grad
    }
    if not weights:
        raise ValueError("the model has no trainable weights to watch: give units=")
    short = short_names(list(weights))
    layers = (
        Layer(short_name, "weight", Unit(param, 0), (name,))
        for short_name, (name, param) in zip(short, weights.items(), strict=True)
    )
    return Watched(tuple(layers), (), _vectors(model), names)


def _balance_name(members: Sequence[tuple[str, int]]) -> str:
    up = "+".join(name for name, e in members if e > 0)
    down = "+".join(name for name, e in members if e < 0)
    return f"{up}|{down}" if down else up


def short_names(names: Sequence[str]) -> list[str]:
    """Return names without "weight" at the end, where that leaves them different.

    Example:
        >>> short_names(["fc.weight", "attn.in_proj_weight", "conv.parametrizations.weight.original1"])
        ['fc', 'attn.in_proj_weight', 'conv']
    """
    short = [_short(name) for name in names]
    again = [_short(name) if short.count(_short(name)) == 1 else name for name in names]
    counts: dict[str, int] = {}
    unique = []
    for name in again:
        counts[name] = counts.get(name, 0) + 1
        unique.append(name if counts[name] == 1 else f"{name}#{counts[name]}")
    return unique


def _short(name: str) -> str:
    for ending in (".parametrizations.weight.original1", ".parametrizations.weight.original", ".weight"):
        if name.endswith(ending):
            return name.removesuffix(ending)
    return name
