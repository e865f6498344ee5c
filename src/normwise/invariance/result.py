"""The result of :func:`normwise.find_invariances`."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor, nn

from normwise.units import Unit

__all__ = ["Evidence", "Invariances", "SearchStats"]


@dataclass
class SearchStats:
    """The cost and the precision of a search.

    Attributes:
        rows: Backward passes behind the joint symmetries.
        rank: The rank that these passes reached.
        passes: Backward passes behind the verdicts.
        trials: Forward passes that confirmed verdicts and symmetries by rescaling.
        dtype: The floating-point type of the probe, such as "float64".
        note: Why the probe did not use float64, if it tried to.
    """

    rows: int = 0
    rank: int = 0
    passes: int = 0
    trials: int = 0
    dtype: str = ""
    note: str = ""


@dataclass
class Evidence:
    """The measurements behind the verdict on one parameter.

    Attributes:
        verdict: "scale-invariant", "scale-invariant up to eps", "partly scale-invariant", "no effect",
            "not invariant" or "undetermined".
        dim: The dimension that counts the units of the verdict: 0, 1, or None (the whole tensor).
        residual: |Σwg|/√Σ(wg)² with shrunk eps, pooled over the backward passes: the largest of all invariant
            units, or that of the whole tensor. It is about 1 where nothing is invariant, and NaN without a
            gradient.
        residual_real_eps: The same at the model's eps.
        shift_dim: The dimension that counts the units to which a constant can be added, if any.
        shift_residual: |Σg|/√Σg²: the smallest of rows, columns and whole tensor, where rows and columns
            count with their largest residual.
        units: The number of units of ``dim``.
        invariant_units: The number of invariant units.
        unseen_units: The number of units that got no gradient, so that nothing is known about them.
        blocks: Ranges of units that are invariant together but not one by one: the groups of a group norm,
            the heads of a packed projection.
        reason: An explanation, if the verdict needs one.
    """

    verdict: str
    dim: int | None = None
    residual: float = float("nan")
    residual_real_eps: float = float("nan")
    shift_dim: int | None = None
    shift_residual: float = float("nan")
    units: int = 1
    invariant_units: int = 0
    unseen_units: int = 0
    blocks: list[tuple[int, int]] = field(default_factory=list)
    reason: str = ""


@dataclass
class Invariances:
    """The invariances of a model: a verdict for each parameter, and all joint rescaling symmetries.

    Attributes:
        scale_invariant: {name: dim}: multiplying a unit by any α > 0 changes no output. The units are the
            rows (0), the columns (1), or only the whole tensor (None).
        partial: {name: (dim, mask)}: only the rows or columns in the boolean mask are scale-invariant, one by
            one or in the blocks that the evidence lists.
        up_to_eps: {name: residual}: parameters from ``scale_invariant`` and ``partial`` whose residual at the
            model's eps is above the tolerance. They are invariant except for the eps of a norm layer.
        shift_invariant: Names: adding a constant to each row, each column or the whole tensor changes no
            output (``evidence[name].shift_dim`` says which).
        no_effect: Names: no values change the outputs.
        not_invariant: Names of all other parameters that could be determined; they may be in ``joint``.
        undetermined: {name: reason}.
        joint: [{name: exponent}]: w_k → α^e_k·w_k for all k together changes no output. This is a sparse
            basis, in small integers, of the symmetries beyond the parameters that are invariant alone. If
            only a part of a packed parameter is involved, the key is an expression: ``"qkv.weight[0:64]"``
            (rows), ``"c_attn.weight[:, 0:64]"`` (columns),
            ``"qkv.weight.unflatten(0, (-1, 24))[:, 0:8]"`` (the first 8 of every 24 rows: interleaved heads).
            ``normwise.invariance.parameter_of`` gives the parameter's name.
        groups: [{name: exponent > 0}]: jointly scale-invariant groups, each of them minimal. Every parameter
            of any such group is in at least one of them.
        joint_residuals: The residual ``|Σ e·Σwg|/√Σ e²·Σ(wg)²`` of each symmetry in ``joint`` at the
            model's eps. A symmetry whose residual is above the tolerance holds up to eps.
        group_residuals: The same of each group in ``groups``.
        parts: {name: keys of its parts}: packed parameters whose parts scale differently. Parts without an
            effect, such as the biases of keys, are not listed: they may scale with any other part.
        unconfirmed_joint: Symmetries of the null space that rescaling refuted. They hold only nearby, as
            below the clamp of a ReLU6 that no sample reaches.
        unnamed_joint: The number of further symmetries, whose exponents are not small integers. No list
            contains them, and a warning reports them.
        evidence: {name: the measurements behind the verdict}.
        frozen: Names of parameters with ``requires_grad=False``. They have verdicts like all others.
        stats: The cost of the search (``rows``, ``rank``, ``passes``, ``trials``) and its ``dtype``.

    Example:
        >>> import torch
        >>> import normwise as nw
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 5, bias=False), nn.LayerNorm(5), nn.Linear(5, 3))
        >>> inv = nw.find_invariances(net, [torch.randn(16, 4)])
        >>> inv.scale_invariant
        {'0.weight': None}
        >>> inv.joint
        [{'1.weight': 1, '1.bias': 1, '2.weight': -1}]
    """

    scale_invariant: dict[str, int | None] = field(default_factory=dict)
    partial: dict[str, tuple[int, Tensor]] = field(default_factory=dict)
    up_to_eps: dict[str, float] = field(default_factory=dict)
    shift_invariant: set[str] = field(default_factory=set)
    no_effect: set[str] = field(default_factory=set)
    not_invariant: set[str] = field(default_factory=set)
    undetermined: dict[str, str] = field(default_factory=dict)
    joint: list[dict[str, int]] = field(default_factory=list)
    groups: list[dict[str, int]] = field(default_factory=list)
    joint_residuals: list[float] = field(default_factory=list)
    group_residuals: list[float] = field(default_factory=list)
    parts: dict[str, list[str]] = field(default_factory=dict)
    unconfirmed_joint: list[dict[str, int]] = field(default_factory=list)
    unnamed_joint: int = 0
    evidence: dict[str, Evidence] = field(default_factory=dict)
    frozen: set[str] = field(default_factory=set)
    stats: SearchStats = field(default_factory=SearchStats)

    @property
    def dtype(self) -> str:
        """The floating-point type of the probe, such as "float64"."""
        return self.stats.dtype

    @property
    def names(self) -> list[str]:
        """The name of every parameter, in the order of the model."""
        return list(self.evidence)

    def units(self, model: nn.Module) -> list[Unit]:
        """Return the units that are scale-invariant alone, for :class:`normwise.Decay`.

        Decaying these units changes no output of the model, up to the eps of the norm layers. Frozen and
        complex parameters are left out. So are rows or columns of a partly invariant parameter that are
        invariant only in blocks (``evidence[name].blocks``): decaying them one by one would change outputs.

        Args:
            model: The model that was searched, or one whose parameters have the same names and shapes.

        Raises:
            ValueError: The model has no parameter of this name, or its shape does not fit.

        Example:
            >>> import torch
            >>> import normwise as nw
            >>> net = nn.Sequential(nn.Linear(4, 5, bias=False), nn.LayerNorm(5), nn.Linear(5, 3))
            >>> nw.find_invariances(net, [torch.randn(16, 4)]).units(net)
            [Unit((5, 4), dim=None)]
        """
        slices: dict[str, tuple[int | None, Tensor | None]] = {
            name: (dim, None) for name, dim in self.scale_invariant.items()
        }
        for name, (dim, mask) in self.partial.items():
            alone = mask.clone()
            for start, stop in self.evidence[name].blocks:
                alone[start:stop] = False
            if alone.any():
                slices[name] = dim, alone
        params = dict(model.named_parameters())
        missing = [name for name in slices if name not in params]
        if missing:
            raise ValueError(
                f"model has no parameter {missing[0]!r}: give the model that find_invariances searched"
            )
        return [
            Unit(params[name], *slices[name])
            for name in self.names
            if name in slices and params[name].requires_grad and params[name].is_floating_point()
        ]

    def __str__(self) -> str:
        """Return the number of parameters with each verdict, and of symmetries, one per line."""
        counts = Counter(e.verdict for e in self.evidence.values())
        lines = [f"{number:5d} {verdict}" for verdict, number in counts.most_common()]
        lines.append(f"{len(self.shift_invariant):5d} shift-invariant")
        lines.append(
            f"{len(self.joint):5d} joint symmetries ({len(self.groups)} jointly scale-invariant groups)"
        )
        if self.unnamed_joint:
            lines.append(f"{self.unnamed_joint:5d} joint symmetries whose exponents are no small integers")
        if self.stats.note:
            lines.append(self.stats.note)
        return "\n".join(lines)

    def __repr__(self) -> str:
        counts = {
            f.name: len(getattr(self, f.name))
            for f in dataclasses.fields(self)
            if hasattr(getattr(self, f.name), "__len__") and f.name != "evidence"
        }
        inside = ", ".join(f"{name}: {count}" for name, count in counts.items() if count)
        return f"Invariances({inside or 'nothing'})"
