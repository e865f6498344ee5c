"""What is wrong with a training, seen from norms and rotations: findings with evidence and a remedy.

:data:`THRESHOLDS` holds every number that decides, with its reason. A finding needs its evidence in several
observed steps in a row, and ends when it is gone for as many.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from normwise.decay.copying import attached
from normwise.monitor.finding import KINDS, Finding
from normwise.monitor.layers import Watched
from normwise.monitor.observation import Observation, Row
from normwise.planning.pulls import pulls_of

__all__ = ["THRESHOLDS", "Findings", "Schedule", "Threshold"]


class Threshold(NamedTuple):
    """A number that decides, and why it is that number."""

    value: float
    reason: str


THRESHOLDS = {
    "least turn": Threshold(
        0.05, "radians in all that is left of the schedule: 3°, which changes no feature of a layer"
    ),
    "steps left": Threshold(1e5, "where total_steps is not given: a long training"),
    "largest turn": Threshold(
        0.5,
        "radians in a step: 29°; the healthy trainings of the tests turn by 0.004 to 0.07",
    ),
    "largest equilibrium turn": Threshold(
        0.3, "radians in a step: lr·c = 0.045, so decay forgets a weight in 20 steps"
    ),
    "least strength": Threshold(
        0.5, "S = Σ lr·c over the schedule; at 0.5, norm⁴ has come 86 % of the way to equilibrium (SGD)"
    ),
    "distance from equilibrium": Threshold(2.0, "as a factor of the norm: 4 in the effective rate of SGD"),
    "imbalance": Threshold(
        100.0,
        "fastest to slowest layer; at equilibrium about 1, in the healthy trainings of the tests up to 45",
    ),
    "swallowed": Threshold(0.5, "part of the decay that rounding swallows: the weights see half of it"),
    "part along the weight": Threshold(
        0.3, "of what ⟨w, g⟩ is without invariance; with it 0.001, and 0.03 under bfloat16 autocast"
    ),
    "largest norm": Threshold(1e18, "its square leaves the range of float32 at 1.8e19"),
    "smallest norm": Threshold(1e-18, "its square leaves the range of float32 at 1.1e-19"),
    "spike": Threshold(
        3.0, "times the median of the largest losses of the last 20 rows, and 10 median deviations above it"
    ),
}

_ATTACH = "plan.attach(optimizer, scheduler=scheduler, total_steps=total_steps)"
_HISTORY = 20


class _Seen(NamedTuple):
    """Evidence in one observed step."""

    layer: str  # or nothing, where it concerns no single layer
    evidence: str
    remedy: str


@dataclass
class Schedule:
    """What is known of the learning rates to come.

    Attributes:
        total_steps: The number of steps of the training, or None.
        total_time: Σ lr over them, of the group with the largest; None: at the present rate.
        elapsed: Σ lr so far.
    """

    total_steps: int | None
    total_time: float | None = None
    elapsed: float = 0.0

    def left(self, step: int, lr: float) -> float | None:
        """Return how many steps at this rate are left; None if that is not known."""
        if self.total_steps is None or lr <= 0:
            return None
        if self.total_time is None:
            return max(0.0, float(self.total_steps - step))
        return max(0.0, self.total_time - self.elapsed) / lr

    def whole(self, step: int, lr: float) -> float | None:
        """Return the length of the whole schedule in steps at this rate."""
        if self.total_steps is None or lr <= 0:
            return None
        return self.total_steps if self.total_time is None else self.total_time / lr


class Findings:
    """Looks at every observed step, and remembers what has been found.

    Args:
        watched: What the monitor watches.
        schedule: What is known of the learning rates to come.
        optimizers: The optimizers.
    """

    def __init__(self, watched: Watched, schedule: Schedule, optimizers: Sequence[Optimizer]) -> None:
        self.watched, self.schedule, self.optimizers = watched, schedule, optimizers
        self._found: dict[str, Finding] = {}
        self._counts: dict[tuple[str, str], list[int]] = {}  # (kind, layer): [times seen, times not, since]
        self._losses: list[float] = []
        self._first_loss: float | None = None
        self._past: list[dict[str, tuple[float, float]]] = []  # {layer: (norm, rotation)} of the last rows
        self._rate = math.inf  # of the last row: while it rises, a small turn is a warm-up
        self._last = 0
        self._pulls: tuple[Any, list[_Seen], list[_Seen]] = (None, [], [])

    def present(self) -> list[Finding]:
        """Return what is wrong now, in the order of :data:`KINDS`."""
        return [self._found[kind] for kind in KINDS if kind in self._found]

    def look(self, observation: Observation) -> list[Finding]:
        """Look at an observed step; return the findings that are new, have changed or are over.

        A finding whose evidence changes is stated again each time that it has lasted twice as long.
        """
        step, lr = observation.step, observation.network["lr"]
        self.schedule.elapsed += lr * max(0, step - self._last)
        seen: dict[str, list[_Seen]] = {kind: [] for kind in KINDS}
        twice, vectors = self._static()
        seen["decayed twice"], seen["decayed vectors"] = twice, vectors
        for row in observation.rows:
            for kind, one in self._of_row(row, observation):
                seen[kind].append(one)
        seen["not invariant"] += self._of_groups(observation)
        excused = {one.layer for kinds in seen.values() for one in kinds}
        seen["layers out of balance"] += self._balance(observation, excused)
        seen["loss spike"] += self._spike(observation)
        self._rate, self._last = lr, step
        self._past = [
            *self._past[-_HISTORY + 1 :],
            {
                row.layer.name: (row.values.get("norm", math.nan), row.values.get("rotation", math.nan))
                for row in observation.rows
            },
        ]
        return [found for kind in KINDS for found in self._update(kind, seen[kind], step)]

    def _update(self, kind: str, seen: Sequence[_Seen], step: int) -> Iterable[Finding]:
        """Count the evidence for one kind; yield its finding if it has changed."""
        needed, by_layer = KINDS[kind], {one.layer: one for one in seen}
        for layer in by_layer:
            counts = self._counts.setdefault((kind, layer), [0, 0, step])
            counts[0] += 1
            counts[1] = 0
        for (of, layer), counts in list(self._counts.items()):
            if of == kind and layer not in by_layer:
                counts[1] += 1
                if counts[0] < needed or counts[1] >= needed:
                    del self._counts[of, layer]
        firm = [layer for (of, layer), c in self._counts.items() if of == kind and c[0] >= needed]
        before = self._found.get(kind)
        if not firm:
            if before is not None:
                del self._found[kind]
                yield replace(before, step=step, ended=True)
            return
        named = tuple(layer for layer in firm if layer)
        current = [by_layer[layer] for layer in firm if layer in by_layer]
        if not current:
            return
        since = min(self._counts[kind, layer][2] for layer in firm)
        found = Finding(kind, named, since, step, current[0].evidence, current[0].remedy)
        if before is not None and set(named) == set(before.layers):
            outdated = found.evidence != before.evidence and step - since >= 2 * (before.step - since)
            if not outdated:  # else it is stated again, with what the evidence is now
                return
        self._found[kind] = found
        yield found

    # -- one layer -----------------------------------------------------------------------------------------

    def _of_row(self, row: Row, observation: Observation) -> Iterable[tuple[str, _Seen]]:
        name, values = row.layer.name, row.values

        def say(kind: str, evidence: str, remedy: str) -> tuple[str, _Seen]:
            return kind, _Seen(name, f"{name}: {evidence}", remedy)

        beyond = list(self._range(row, say))
        yield from beyond
        lost = values.get("decay_lost", 0.0)
        if lost > THRESHOLDS["swallowed"].value and values["pull"] > 0:
            dtype = str(row.layer.unit.params[0].dtype).removeprefix("torch.")
            yield say(
                "decay lost to rounding",
                f"decay of {values['pull']:.1e} a step is below the precision of {dtype}; {lost:.0%} is lost",
                "nw.Decay(optimizer, rule, params, compensated=True)",
            )
        if row.dead:
            units = len(row.movement.norm)
            yield say(
                "dead units",
                f"{row.dead} of {units} units are zero or get no gradient",
                "initialise them again (decay is shrinking them to nothing), or lower the learning rate",
            )
        if row.layer.alone:
            noise = float(row.movement.noise.square().sum())
            part = math.sqrt(float(row.movement.along.square().sum()) / noise) if noise > 0 else 0.0
            if part > THRESHOLDS["part along the weight"].value:
                yield say(
                    "not invariant",
                    f"taken as scale-invariant, but its gradient has a part along it ({part:.2g} of that of "
                    "a weight without invariance)",
                    "plan = nw.plan(model, batches) anew for this model as it is trained",
                )
        if row.layer.kind == "shrink" and row.dead < len(row.movement.norm) and not beyond:
            yield from self._rate_of(row, observation, say)

    def _range(self, row: Row, say: Callable[..., tuple[str, _Seen]]) -> Iterable[tuple[str, _Seen]]:
        values, dtype = row.values, row.layer.unit.params[0].dtype
        size = row.layer.unit.numel**0.5
        low, high = THRESHOLDS["smallest norm"].value, THRESHOLDS["largest norm"].value
        info = torch.finfo(dtype)
        if dtype == torch.float16:
            low, high = info.tiny * size, info.max / 8
        smallest, largest = values.get("norm_min", 1.0), values.get("norm_max", math.inf)
        if not math.isfinite(largest) or largest > high:
            yield say(
                "norm out of range",
                f"a norm is {largest:.2g}, near the largest that {dtype} computes with",
                f"{_ATTACH}  # starts in equilibrium, whatever the norm was",
            )
        elif 0 < smallest < low:
            yield say(
                "norm out of range",
                f"a norm is {smallest:.2g}, near the smallest that {dtype} computes with",
                "a smaller coefficient, or a rule that ends there: nw.EpsilonShiftedL2(coefficient, epsilon)",
            )
        if near := int(row.movement.near_overflow.sum()):
            yield say(
                "gradient near overflow",
                f"{near} elements of its float16 gradient are above a quarter of the largest number",
                "torch.amp.GradScaler with a smaller scale, or train in bfloat16",
            )

    def _rate_of(
        self, row: Row, observation: Observation, say: Callable[..., tuple[str, _Seen]]
    ) -> Iterable[tuple[str, _Seen]]:
        values, step, lr = row.values, observation.step, row.lr
        turn, settled = values.get("rotation"), values.get("equilibrium_rotation")
        if turn is None or lr <= 0 or not bool((row.movement.gradient > 0).any()):
            return
        left, whole = self.schedule.left(step, lr), self.schedule.whole(step, lr)
        known = left is not None and whole is not None
        # near the end little is left for every layer: then what counts is half of the schedule
        steps = (
            max(left, whole / 2) if left is not None and whole is not None else THRESHOLDS["steps left"].value
        )
        to_come = turn * steps
        is_warming_up = not known and observation.network["lr"] > self._rate * 1.001
        is_pulled = len(row.pulls) == 1 and not row.pulls[0].rule.projects  # a sphere has no strength
        if is_pulled and settled is not None and settled > THRESHOLDS["largest equilibrium turn"].value:
            yield say(
                "decay too strong",
                f"at equilibrium it turns by {settled:.2g} rad ({math.degrees(settled):.0f}°) a step, "
                "and forgets what it learned",
                f"{_ATTACH}  # or a coefficient {settled**2 / 1e-4:.0f} times as small",
            )
        elif turn > THRESHOLDS["largest turn"].value:
            yield say(
                "effective rate too large",
                f"it turns by {turn:.2g} rad ({math.degrees(turn):.0f}°) a step at norm {values['norm']:.2g}",
                "a lower learning rate, or a longer weight: its norm changes no output",
            )
        elif to_come < THRESHOLDS["least turn"].value and not is_warming_up:
            span = "in what is left of the schedule" if known else "in 100 000 steps"
            yield say(
                "effective rate vanished",
                f"it turns by {turn:.1e} rad a step at norm {values['norm']:.2g}: by less than "
                f"{math.degrees(to_come):.1g}° {span}",
                f"{_ATTACH}  # starts in equilibrium, whatever the norm was",
            )
        elif whole is not None:
            yield from self._strength(row, whole, say)

    def _strength(
        self, row: Row, whole: float, say: Callable[..., tuple[str, _Seen]]
    ) -> Iterable[tuple[str, _Seen]]:
        """Say whether decay is too weak to lead to equilibrium within the schedule."""
        norm, settled = row.values.get("norm"), row.values.get("equilibrium_norm")
        if not norm or not settled or len(row.pulls) != 1:
            return
        speed = 1 / (1 - row.group.momentum) if row.pulls[0].mode == "coupled" else 1.0
        strength = row.values["pull"] * whole * speed
        apart = max(norm / settled, settled / norm)
        if (
            strength < THRESHOLDS["least strength"].value
            and apart > THRESHOLDS["distance from equilibrium"].value
        ):
            yield say(
                "decay too weak",
                f"S = Σ lr·c = {strength:.2g} over the schedule, so the norm {norm:.3g} does not come to its "
                f"equilibrium, {settled:.3g}",
                f"{_ATTACH}  # or a coefficient {3 / max(strength, 1e-12):.0f} times as large (S = 3)",
            )

    # -- the network ---------------------------------------------------------------------------------------

    def _of_groups(self, observation: Observation) -> Iterable[_Seen]:
        for name, part in observation.along.items():
            if part > THRESHOLDS["part along the weight"].value:
                yield _Seen(
                    name,
                    f"{name}: taken as scale-invariant jointly, but the gradients have a part along them "
                    f"({part:.2g})",
                    "plan = nw.plan(model, batches) anew for this model as it is trained",
                )

    def _balance(self, observation: Observation, excused: set[str]) -> Iterable[_Seen]:
        turns = {
            row.layer.name: row.values["rotation"]
            for row in observation.rows
            if row.layer.kind == "shrink"
            and row.values.get("rotation", 0) > 0
            and row.layer.name not in excused
        }
        if len(turns) < 2:
            return
        slow, fast = min(turns, key=turns.__getitem__), max(turns, key=turns.__getitem__)
        ratio = turns[fast] / turns[slow]
        if ratio <= THRESHOLDS["imbalance"].value:
            return
        middle = statistics.median(turns.values())
        for name in sorted(turns, key=lambda n: -abs(math.log(turns[n] / middle)))[:3]:
            yield _Seen(
                name,
                f"{fast} turns by {turns[fast]:.1e} rad a step and {slow} by {turns[slow]:.1e}, {ratio:.0f} "
                "times apart",
                f"{_ATTACH}  # decay on all scale-invariant weights balances them",
            )

    def _spike(self, observation: Observation) -> Iterable[_Seen]:
        loss = observation.network.get("loss_max")
        if loss is None:
            return
        past = self._losses
        if self._first_loss is None and math.isfinite(loss):
            self._first_loss = abs(loss)
        middle = statistics.median(past) if past else 0.0
        spread = statistics.median(abs(x - middle) for x in past) if past else 0.0
        factor = THRESHOLDS["spike"].value
        is_large = (
            len(past) >= 6
            and loss - middle > max((factor - 1) * abs(middle), 10 * spread)
            and loss > 0.1 * (self._first_loss or 0.0)
        )
        if is_large or not math.isfinite(loss):
            yield _Seen(
                "",
                f"the loss rose to {loss:.3g} from {middle:.3g} (median of the rows before); "
                f"{self._before(observation)}",
                "clip gradients (torch.nn.utils.clip_grad_norm_), or lower the peak of the learning rate",
            )
        else:
            self._losses = [*past[-_HISTORY + 1 :], loss]

    def _before(self, observation: Observation) -> str:
        """Say what norms and rotations did before a spike, compared with the rows before."""
        changes = []
        rows = {
            row.layer.name: (row.values.get("norm", math.nan), row.values.get("rotation", math.nan))
            for row in observation.rows
        }
        for name, now in rows.items():
            for k, what in enumerate(("norm", "turn per step")):
                value, usual = now[k], [p[name][k] for p in self._past if name in p and p[name][k] > 0]
                if len(usual) >= 3 and value > 0:
                    middle = statistics.median(usual)
                    changes.append((abs(math.log(value / middle)), name, what, middle, value))
        large = [change for change in sorted(changes, reverse=True) if change[0] > math.log(2)]
        if not large:
            return "no norm or rotation changed by a factor of 2"
        _, worst, what, middle, value = large[0]
        more = f", and {len(large) - 1} more changed by more than 2" if len(large) > 1 else ""
        return f"the {what} of {worst} went from {middle:.2g} to {value:.2g}{more}"

    # -- the set-up ----------------------------------------------------------------------------------------

    def _static(self) -> tuple[list[_Seen], list[_Seen]]:
        """Say what is decayed twice, and which vectors are decayed; anew only where the set-up changed."""
        key = [
            (group.get("weight_decay"), len(group["params"]))
            for optimizer in self.optimizers
            for group in optimizer.param_groups
        ] + [[id(decay) for decay in attached(optimizer)] for optimizer in self.optimizers]
        if self._pulls[0] == key:
            return self._pulls[1], self._pulls[2]
        twice, vectors = [], []
        by_id = {id(param): name for name, param in self.watched.vectors.items()}
        for optimizer in self.optimizers:
            for which, pulls in pulls_of(optimizer).items():
                name = self.watched.names.get(which, "a parameter")
                if len(pulls) > 1:
                    words = " and ".join(map(str, pulls))
                    twice.append(
                        _Seen(
                            name,
                            f"{name} is decayed by {words}",
                            "optimizer.param_groups[k]['weight_decay'] = 0",
                        )
                    )
                if which in by_id and pulls:
                    vectors.append(
                        _Seen(
                            by_id[which],
                            f"{by_id[which]} is pulled to zero by {pulls[0]}, though it is a gain or a bias",
                            "torch.optim.…(plan.param_groups(weight_decay=…)), which leaves them alone",
                        )
                    )
        self._pulls = (key, twice, vectors)
        return twice, vectors

    # -- state ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain values."""
        return {
            "found": {kind: finding.to_dict() for kind, finding in self._found.items()},
            "counts": [[*key, *counts] for key, counts in self._counts.items()],
            "losses": list(self._losses),
            "first_loss": self._first_loss,
            "past": [{name: list(pair) for name, pair in one.items()} for one in self._past],
            "rate": self._rate,
            "last": self._last,
            "elapsed": self.schedule.elapsed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned; an error leaves everything as it was."""
        found = {
            kind: Finding(**{**one, "layers": tuple(one["layers"])}) for kind, one in state["found"].items()
        }
        counts = {(kind, layer): list(numbers) for kind, layer, *numbers in state["counts"]}
        past = [{name: (pair[0], pair[1]) for name, pair in one.items()} for one in state["past"]]
        losses = list(state["losses"])
        first_loss, rate, last, elapsed = (state[key] for key in ("first_loss", "rate", "last", "elapsed"))
        self._found, self._counts, self._past, self._losses = found, counts, past, losses
        self._first_loss, self._rate, self._last = first_loss, rate, last
        self.schedule.elapsed = elapsed
