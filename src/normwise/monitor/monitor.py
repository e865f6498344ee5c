"""A monitor: an optimizer whose steps observe themselves."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.hooks import RemovableHandle

from normwise.decay import riding
from normwise.decay.copying import attached
from normwise.decay.state_making import only_makes_state
from normwise.decay.targets import group_of, name_of
from normwise.monitor.finding import Finding
from normwise.monitor.findings import Findings, Schedule
from normwise.monitor.layers import Layer, watched
from normwise.monitor.measure import COLUMNS, gradient_sums, movement, step_sums
from normwise.monitor.observation import Memory, Observation, Row, along_of, balance_of, row_of, scale_of
from normwise.monitor.pulls import Groups, LayerPull, equilibria, pulls_on
from normwise.monitor.trackers import Tracker, check_tracker
from normwise.norms import wide_dtype
from normwise.planning.budget import simulated_budgets
from normwise.planning.plan import Plan
from normwise.sharding import local_tensor, placed_as
from normwise.units import LocalUnit, Unit, global_sums, local_units, local_values

__all__ = ["Monitor"]

_FORMAT = 1
# Decay that shrinks a weight by less than this many units in the last place may be lost in rounding.
_COARSE = 2.0


class Monitor:
    """Observes an optimizer: norms, rotations and effective learning rates, and what is wrong with them.

    From its construction on, every ``every``-th ``optimizer.step()`` is observed. The other steps are only
    counted. It stands beside a :class:`normwise.Decay` or without one, beside the optimizer's own
    weight_decay too, and whichever is constructed first: it sees gradients before a Decay adds to them, and
    weights after all decay. (With ``Decay(every=k)`` decay acts after every k-th step. Let the ``every`` of
    the monitor be a multiple of k, and each observed step contains one application.)

    The optimizer keeps the monitor alive. Sharded parameters are measured where they lie, and ranks exchange
    sums, once in an observed step; every rank has the same numbers, and rank 0 gives them to the trackers.

    Args:
        optimizer: A torch.optim optimizer, or several: a row is complete when each has stepped.
        plan: A plan for the model: it says which weights are scale-invariant, and of which units.
        model: The model, for the names of its weights, where there is no plan: then all weights are watched
            row by row, and nothing is known of their invariance. Beside a plan: the copy to watch.
        units: Instead of a plan: Units or parameters that are scale-invariant. The default without any of
            the three are the units of the Decays that are attached to the optimizer.
        every: Observe each step whose number is a multiple of this, and the first step.
        trackers: Where rows and findings go: :mod:`normwise.trackers`, or objects with the methods
            ``log(step, values)`` and ``finding(finding)``.
        total_steps: The number of steps of the whole training. Findings about the rest of the schedule need
            it.
        scheduler: The learning-rate schedule, for the same findings; a copy is simulated. Without it they
            take the present rate.
        per_unit: Patterns of names of layers, with ``*``, whose units are also logged one by one.

    Attributes:
        every: As given.
        steps: The number of steps taken so far, by the optimizer that has taken most.
        layers: The names of the watched layers.
        findings: What is wrong now, as :class:`~normwise.monitor.finding.Finding` objects.
        last: The last :class:`~normwise.monitor.observation.Observation`, with per-unit tensors, or None.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is not allowed, or the optimizer holds none of the watched weights.

    Example:
        >>> import normwise as nw
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4, bias=False), torch.nn.BatchNorm1d(4))
        >>> plan = nw.plan(net, [torch.randn(8, 3)])
        >>> optimizer = torch.optim.SGD(plan.param_groups(), lr=0.1)
        >>> monitor = nw.Monitor(optimizer, plan=plan, every=10)
        >>> net(torch.randn(8, 3)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(monitor.last.rows[0].values)[:4]
        ['dead', 'effective_lr', 'gradient_scale', 'norm']
        >>> monitor
        Monitor(1 layer, every=10, steps=1, findings: none)
    """

    def __init__(
        self,
        optimizer: Optimizer | Iterable[Optimizer],
        plan: Plan | None = None,
        *,
        model: torch.nn.Module | None = None,
        units: Iterable[Unit | Tensor] | None = None,
        every: int = 50,
        trackers: Tracker | Iterable[Tracker] = (),
        total_steps: int | None = None,
        scheduler: LRScheduler | None = None,
        per_unit: str | Sequence[str] = (),
    ) -> None:
        for name, value in (("every", every), ("total_steps", total_steps)):
            if isinstance(value, bool) or not (value is None or isinstance(value, int)):
                raise TypeError(f"{name} must be a number of steps, not {value!r}")
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is not allowed: give a number of steps, 1 or more")
        self.optimizers = _optimizers(optimizer)
        names = {
            id(p): name_of(o, p).removeprefix("parameter ").split(" of shape")[0].strip("'")
            for o in self.optimizers
            for group in o.param_groups
            for p in group["params"]
        }
        decayed = [unit for o in self.optimizers for decay in attached(o) for unit in decay.units]
        self._watched = watched(plan, model, units, decayed, names)
        self._check_held(set(names))
        self.every = every
        self.per_unit = self._chosen([per_unit] if isinstance(per_unit, str) else list(per_unit))
        self._trackers: list[Any] = [trackers] if hasattr(trackers, "log") else list(trackers)
        for tracker in self._trackers:
            check_tracker(tracker)
        self._schedule = self._schedule_of(total_steps, scheduler)
        self._findings = Findings(self._watched, self._schedule, self.optimizers)
        self._watches = [_Watch(self, optimizer) for optimizer in self.optimizers]
        self._memories: dict[str, Memory] = {}
        self._rows: dict[int, dict[int, Row]] = {}  # of steps that not all optimizers have taken
        self._losses: list[Any] = []
        self._extra: dict[str, Any] = {}
        self._has_begun = False
        self.last: Observation | None = None
        riding.ride(self.optimizers[0], "monitor", self, required=False)

    def _check_held(self, held: set[int]) -> None:
        missing = [layer for layer in self._watched.layers if not {id(p) for p in layer.unit.params} <= held]
        if len(missing) == len(self._watched.layers):
            raise ValueError(
                f"the optimizer holds none of the {len(missing)} watched weights, such as "
                f"{missing[0].name!r}: construct the optimizer after the model is complete (wrapped, "
                "sharded, converted), and the plan for that model (plan.apply_to)"
            )
        if missing:
            warnings.warn(
                f"{len(missing)} of {len(self._watched.layers)} watched weights, such as "
                f"{missing[0].name!r}, are not in the optimizer: they are watched from when they are added "
                "to it (add_param_group)",
                stacklevel=3,
            )

    def _chosen(self, patterns: Sequence[str]) -> tuple[str, ...]:
        chosen: list[str] = []
        for pattern in patterns:
            found = [name for name in self.layers if fnmatchcase(name, pattern)]
            if not found:
                raise ValueError(
                    f"per_unit={pattern!r} matches no layer; the names are {', '.join(self.layers[:4])}, …"
                )
            chosen += found
        return tuple(dict.fromkeys(chosen))

    def _schedule_of(self, total_steps: int | None, scheduler: LRScheduler | None) -> Schedule:
        if scheduler is None or total_steps is None:
            if scheduler is not None:
                raise ValueError("scheduler is given without total_steps: give total_steps= too")
            return Schedule(total_steps)
        owner = getattr(scheduler, "optimizer", None)
        owner = owner if isinstance(owner, Optimizer) else self.optimizers[0]
        return Schedule(total_steps, max(b.time for b in simulated_budgets(owner, scheduler, total_steps, 1)))

    # -- what the user asks --------------------------------------------------------------------------------

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the watched layers."""
        return tuple(layer.name for layer in self._watched.layers)

    @property
    def findings(self) -> list[Finding]:
        """What is wrong now."""
        return self._findings.present()

    @property
    def steps(self) -> int:
        """The number of steps taken so far, by the optimizer that has taken most."""
        return max(watch.count for watch in self._watches)

    def record(self, loss: float | Tensor | None = None, **values: float | Tensor) -> None:
        """Note the loss of the coming or present step, and further numbers, for the next row.

        The row gets the mean and the largest of the losses that were noted since the last one, and the last
        of each other number. A tensor is read in an observed step only. Losses that a closure returns to
        ``optimizer.step(closure)`` are noted without a call.

        Raises:
            TypeError: A value is not a number or a tensor with one element.

        Example:
            >>> import normwise as nw
            >>> weight = torch.nn.Parameter(torch.ones(2, 3))
            >>> optimizer = torch.optim.SGD([weight], lr=0.1)
            >>> monitor = nw.Monitor(optimizer, units=[weight], every=10)
            >>> loss = weight.square().sum()
            >>> loss.backward()
            >>> monitor.record(loss=loss)
            >>> optimizer.step()
            >>> monitor.last.network["loss"]
            6.0
        """
        for name, value in (("loss", loss), *values.items()):
            if value is None and name == "loss":
                continue
            one = isinstance(value, Tensor) and value.numel() == 1
            if not one and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise TypeError(f"{name} must be a number or a tensor with one element, not {value!r:.60}")
            kept = value.detach() if isinstance(value, Tensor) else value
            if name == "loss":
                self._losses.append(kept)
            else:
                self._extra[name] = kept

    def remove(self) -> None:
        """Detach from the optimizer and close the trackers. A second call does nothing."""
        for watch in self._watches:
            watch.remove()
        riding.leave(self.optimizers[0], self)
        if self._has_begun:
            for tracker in self._trackers:
                if hasattr(tracker, "close"):
                    tracker.close()
        self._has_begun = False

    def __repr__(self) -> str:
        count = len(self.layers)
        kinds = ", ".join(finding.kind for finding in self.findings) or "none"
        layers = f"{count} layer{'s' if count != 1 else ''}"
        return f"Monitor({layers}, every={self.every}, steps={self.steps}, findings: {kinds})"

    # -- state ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain values and tensors (``weights_only=True``)."""
        return {
            "format": _FORMAT,
            "layers": list(self.layers),
            "steps": [watch.count for watch in self._watches],
            "due": [watch.due for watch in self._watches],
            "memory": {
                name: {"square": m.square.clone(), "weight": m.weight, "idle": m.idle.clone()}
                for name, m in self._memories.items()
            },
            "findings": self._findings.state_dict(),
        }

    def check_state_dict(self, state_dict: Any) -> None:
        """Raise a ValueError that says why this monitor cannot continue from a state. Changes nothing."""
        if not isinstance(state_dict, Mapping):
            raise ValueError(f"the state must be a mapping, not {type(state_dict).__name__}")
        _, findings = self._read(state_dict)
        probe = Findings(self._watched, Schedule(None), self.optimizers)
        _load_findings(probe, findings)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from the state_dict of a monitor of the same layers.

        The state also rides in that of the first optimizer, ``optimizer.state_dict()``, and is restored with
        it: only what drops it there (``torch.distributed.checkpoint``) needs this call. A state of other
        layers, or a damaged one, is no reason to refuse the optimizer's: a warning says so, and the monitor
        goes on from its own state.

        Raises:
            TypeError: ``state_dict`` is not a mapping.
            ValueError: It is not of a monitor, or of other layers or optimizers; then nothing has changed.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a mapping, not {type(state_dict).__name__}")
        memories, findings = self._read(state_dict)
        _load_findings(self._findings, findings)
        self._memories = memories
        for watch, count, due in zip(self._watches, state_dict["steps"], state_dict["due"], strict=True):
            watch.count, watch.due = int(count), bool(due)
        riding.note_loaded(self.optimizers[0], self)

    def _read(self, state_dict: Mapping[str, Any]) -> tuple[dict[str, Memory], Any]:
        """Return the memories and the state of the findings, or raise a ValueError."""
        if state_dict.get("format") != _FORMAT:
            raise ValueError(
                f"this is no state of a Monitor of this version (format {state_dict.get('format')!r}, not "
                f"{_FORMAT}): start a new monitor"
            )
        missing = [
            name for name in ("layers", "steps", "due", "memory", "findings") if name not in state_dict
        ]
        if missing:
            raise ValueError(f"the state of a Monitor is damaged (no {missing[0]!r}): start a new monitor")
        if list(state_dict["layers"]) != list(self.layers):
            other = sorted(set(state_dict["layers"]) ^ set(self.layers)) or ["their order"]
            raise ValueError(
                f"the state is of a monitor of other layers (different: {', '.join(other[:3])}): give the "
                "same plan or units"
            )
        if len(state_dict["steps"]) != len(self._watches):
            raise ValueError(
                f"the state is of a monitor of {len(state_dict['steps'])} optimizers, and this one has "
                f"{len(self._watches)}: give the same optimizers"
            )
        counts = {layer.name: _acting(layer) for layer in self._watched.layers}
        memories = {}
        for name, m in state_dict["memory"].items():
            if name not in counts or not all(isinstance(m.get(key), Tensor) for key in ("square", "idle")):
                raise ValueError(f"the state of {name!r} is damaged: start a new monitor")
            if m["square"].shape != (counts[name],) or m["idle"].shape != (counts[name],):
                raise ValueError(
                    f"the state of {name!r} has {len(m['square'])} units, and the layer has {counts[name]}: "
                    "give the same plan or units"
                )
            memories[name] = Memory(m["square"].clone(), m["idle"].clone(), float(m["weight"]))
        return memories, state_dict["findings"]

    # -- rows ----------------------------------------------------------------------------------------------

    def _memory(self, layer: Layer) -> Memory:
        if layer.name not in self._memories:
            count = _acting(layer)
            square = torch.zeros(count, dtype=torch.float64)
            self._memories[layer.name] = Memory(square, torch.zeros(count, dtype=torch.int64))
        return self._memories[layer.name]

    def _take(self, step: int, rows: Mapping[int, Row]) -> None:
        """Take the rows of one optimizer, and give on what is complete."""
        self._rows.setdefault(step, {}).update(rows)
        counts = [watch.count for watch in self._watches]
        for complete in sorted(self._rows):
            if min(counts) >= complete or max(self._rows) > complete:
                self._give(complete, self._rows.pop(complete))

    def _give(self, step: int, rows: dict[int, Row]) -> None:
        if not rows:
            return
        network = {"lr": max(row.lr for row in rows.values())}
        turning = [row.values["rotation"] for row in rows.values() if row.values.get("rotation", 0.0) > 0]
        shrunk = [
            row.values["rotation"]
            for row in rows.values()
            if row.layer.kind == "shrink" and row.values.get("rotation", 0.0) > 0
        ]
        turning = shrunk or turning
        if len(turning) > 1:
            network["imbalance"] = max(turning) / min(turning)
        for balance in self._watched.balances:
            value = None if balance.joint else balance_of(balance, rows)
            if value is not None and math.isfinite(value):
                network[f"balance/{balance.name}"] = value
        losses = [float(loss) for loss in self._losses]
        if losses:
            network |= {"loss": sum(losses) / len(losses), "loss_max": max(losses)}
            if any(math.isnan(loss) for loss in losses):
                network["loss_max"] = math.nan
        network |= {name: float(value) for name, value in self._extra.items()}
        self._losses, self._extra = [], {}
        along = {b.name: value for b in self._watched.balances if (value := along_of(b, rows)) is not None}
        self.last = Observation(step, [rows[k] for k in sorted(rows)], network, along)
        changed = self._findings.look(self.last)
        if not self._trackers or not _writes():
            return
        begins, self._has_begun = not self._has_begun, True
        values = self.last.values(self.per_unit)
        for tracker in list(self._trackers):
            try:
                if begins and hasattr(tracker, "begin"):
                    tracker.begin(self._settings())
                tracker.log(step, values)
                for finding in changed:
                    tracker.finding(finding)
            except OSError as error:  # a full disk must not end a training
                self._trackers.remove(tracker)
                warnings.warn(
                    f"{tracker!r} cannot be written to ({error}) and gets no more rows: make room, and start "
                    "the job again from a checkpoint to go on there",
                    stacklevel=2,
                )

    def _settings(self) -> dict[str, Any]:
        """Return what a tracker may say about the whole run."""
        return {
            "every": self.every,
            "total_steps": self._schedule.total_steps,
            "optimizers": [type(optimizer).__name__ for optimizer in self.optimizers],
            "layers": {layer.name: layer.kind for layer in self._watched.layers},
            "units": {layer.name: _acting(layer) for layer in self._watched.layers},
        }


class _Watch:
    """The hooks of a monitor on one of its optimizers.

    In an observed step the pre-hook is the first of all, so that it sees gradients as they are before a Decay
    in mode "coupled" adds to them, and the post-hook the last, so that it sees what every Decay did.
    """

    def __init__(self, monitor: Monitor, optimizer: Optimizer) -> None:
        self.monitor, self.optimizer = monitor, optimizer
        self.groups = Groups(optimizer)
        self.count = 0
        self.due = False  # whether a GradScaler skipped a step that was to be observed: then the next one is
        self._is_in_step = False
        self._before: dict[int, list[tuple[Tensor, Tensor]]] | None = None
        self._local: dict[int, tuple[Unit, ...]] = {}
        # Python alone runs the hooks under torch.compile, as those of Decay
        self._pre = optimizer.register_step_pre_hook(torch.compiler.disable(self._before_step))
        self._post = optimizer.register_step_post_hook(torch.compiler.disable(self._after_step))
        _place(self._pre, last=False)

    def remove(self) -> None:
        self._pre.remove()
        self._post.remove()

    # -- before the step -----------------------------------------------------------------------------------

    def _before_step(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._is_in_step, self._before = False, None
        if only_makes_state(self.optimizer, args, kwargs):
            return None
        self._is_in_step = True
        number = self.count + 1
        is_observed = self.due or number == 1 or number % self.monitor.every == 0
        if is_observed:
            _place(self._post, last=True)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0] is the optimizer
        if closure is None:
            if is_observed:
                self._look()
            return None
        wrapped = self._wrapped(closure, is_observed)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": wrapped}
        return (args[0], wrapped, *args[2:]), kwargs

    def _wrapped(self, closure: Callable[[], Any], is_observed: bool) -> Callable[[], Any]:
        is_first = True

        def closure_then_look() -> Any:
            nonlocal is_first
            loss = closure()
            if is_first:
                is_first = False
                if isinstance(loss, (int, float)) or (isinstance(loss, Tensor) and loss.numel() == 1):
                    self.monitor.record(loss=loss)
                if is_observed:
                    self._look()
            return loss

        return closure_then_look

    @torch.no_grad()
    def _look(self) -> None:
        """Copy the weights that have a gradient, and take the sums that need the gradient."""
        scale = getattr(self.optimizer, "grad_scale", None)
        held = group_of(self.optimizer)
        self._before = {}
        for k, layer in enumerate(self.monitor._watched.layers):
            params = layer.unit.params
            if not all(id(p) in held for p in params) or all(p.grad is None for p in params):
                continue
            parts = self._parts(k, layer)
            found = []
            for place, (owner, local) in enumerate(zip(params, parts, strict=True)):
                weight = local.params[place].detach()
                factor = None if scale is None else scale.to(weight.device, wide_dtype(weight.device))
                if owner.grad is None:  # of another tensor of a joint unit
                    gradient = torch.zeros_like(weight)
                else:
                    dense = owner.grad.to_dense() if owner.grad.is_sparse else owner.grad
                    gradient = local_tensor(placed_as(owner, dense))
                found.append((weight.clone(), gradient_sums(weight, gradient, layer.unit.dim, factor)))
            self._before[k] = found

    def _parts(self, k: int, layer: Layer) -> tuple[Unit, ...]:
        """Return this rank's part of a layer's unit, for each of its parameters."""
        if k not in self._local:
            self._local[k] = local_units(layer.unit, lambda _: layer.name)
        for part in self._local[k]:
            if isinstance(part, LocalUnit):
                part.refresh()
        return self._local[k]

    # -- after the step ------------------------------------------------------------------------------------

    def _after_step(self, *_: Any) -> None:
        if not self._is_in_step:  # a subclass whose step() calls super().step() fires the hooks twice
            return
        self._is_in_step = False
        self.count += 1
        before, self._before = self._before, None
        if before is None:
            return
        found_inf = getattr(self.optimizer, "found_inf", None)
        self.due = found_inf is not None and bool(found_inf > 0)
        if not self.due:
            self._observe(before)

    @torch.no_grad()
    def _observe(self, before: dict[int, list[tuple[Tensor, Tensor]]]) -> None:
        layers, held = self.monitor._watched.layers, group_of(self.optimizer)
        units, sums, pulls = [], [], {}
        for k, found in before.items():
            layer, group = layers[k], held[id(layers[k].unit.params[0])]
            parts = self._parts(k, layer)
            pulls[k] = pulls_on(layer.unit, self.optimizer, group, self.groups)
            columns = []
            squares = torch.stack([gradient[:, 0] for _, gradient in found]).sum(0)
            for place, (local, (weight, gradient)) in enumerate(zip(parts, found, strict=True)):
                new = local.params[place].detach()
                factors = _factors(pulls[k], squares.sqrt(), local, new)
                columns.append(torch.cat([gradient, step_sums(weight, new, layer.unit.dim, factors)], 1))
            found.clear()  # the copies are not needed any more
            units.append(parts)
            sums.append(columns)
        measured = []
        for k, total in zip(before, _on_cpu(global_sums(units, sums)), strict=True):
            layer, index = layers[k], held[id(layers[k].unit.params[0])]
            lr, how = float(self.optimizer.param_groups[index].get("lr") or 0.0), self.groups.of(index)
            moved, memory = movement(_masked(total, layer)), self.monitor._memory(layer)
            acting = [pull.of(lambda sizes: _masked(sizes, layer)) for pull in pulls[k]]  # noqa: B023
            scale = scale_of(moved, memory, how, lr)
            has_direction = layer.kind in ("shrink", "weight")
            settling = acting[0].settling(lr, scale, how) if len(acting) == 1 and has_direction else None
            measured.append((layer, moved, memory, how, lr, acting, scale, settling))
        settled = equilibria([settling for *_, settling in measured])
        rows = {
            k: row_of(*measurement[:-1], settled=one)
            for k, measurement, one in zip(before, measured, settled, strict=True)
        }
        self.monitor._take(self.count, rows)


def _load_findings(findings: Findings, state: Any) -> None:
    try:
        findings.load_state_dict(state)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(
            f"the findings in the state of a Monitor are damaged ({type(error).__name__}: {error}): start a "
            "new monitor"
        ) from error


def _factors(pulls: Sequence[LayerPull], norms: Tensor, local: Unit, weight: Tensor) -> Tensor | None:
    """Return what decay multiplies each unit by, if it may be lost in the rounding of the weights.

    The norms are those of this rank's part: exact where units are whole.
    """
    if len(pulls) != 1 or not weight.numel():
        return None
    factors = pulls[0].of(lambda sizes: local_values(local, sizes)).factors(norms)
    if factors is None:
        return None
    shrunk = 1 - factors
    limit = _COARSE * torch.finfo(weight.dtype).eps
    if weight.device.type == "cpu" and not bool(((shrunk > 0) & (shrunk < limit)).any()):
        return None
    return factors


def _on_cpu(sums: list[Tensor]) -> list[Tensor]:
    """Return tensors of one width on the CPU, with one copy per device."""
    counts: dict[torch.device, list[int]] = {}
    for k, one in enumerate(sums):
        counts.setdefault(one.device, []).append(k)
    moved = list(sums)
    for which in counts.values():
        joined = torch.cat([sums[k] for k in which]).cpu().double()
        for k, piece in zip(which, joined.split([len(sums[k]) for k in which]), strict=True):
            moved[k] = piece
    assert all(one.shape[1] == len(COLUMNS) for one in moved)
    return moved


def _place(handle: RemovableHandle, *, last: bool) -> None:
    """Make a hook the first or the last of its kind, as torch does for ``prepend=True`` on modules."""
    hooks = handle.hooks_dict_ref()
    if hooks and next(reversed(hooks) if last else iter(hooks)) != handle.id:
        hooks.move_to_end(handle.id, last=last)


def _masked(values: Tensor, layer: Layer) -> Tensor:
    """Return the values of those units that the layer's mask selects."""
    mask = layer.unit.mask
    return values if mask is None else values[mask.to(values.device)]


def _acting(layer: Layer) -> int:
    return layer.unit.count if layer.unit.mask is None else int(layer.unit.mask.sum())


def _writes() -> bool:
    """Whether this is the rank that gives rows to trackers."""
    import torch.distributed as dist

    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _optimizers(given: object) -> tuple[Optimizer, ...]:
    several = list(given) if isinstance(given, Iterable) else [given]
    found = []
    for one in several:
        while isinstance(inner := getattr(one, "optimizer", None), Optimizer):  # accelerate's wrapper
            one = inner
        if not isinstance(one, Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, or several, not {type(one).__name__}"
            )
        found.append(one)
    if not found:
        raise ValueError("optimizer is empty: give at least one torch.optim.Optimizer")
    return tuple(dict.fromkeys(found))
