"""Taking weight_decay off parameters of an optimizer that a trainer has built: groups are split in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from normwise.decay.wrappers import FirstGroups, unwrapped_schedule

__all__ = ["GroupSplit", "split_groups"]

# what schedulers of torch keep for each group
_PER_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums")


@dataclass
class GroupSplit:
    """How the groups of an optimizer were split.

    Attributes:
        optimizer: The optimizer.
        before: The number of groups that it had.
        parents: For each new group, which are the last ones, the index of the group that it was a part of.
        members: For each group that was split, the parameters in the order that they had.
        decays: For each group whose weight_decay was changed, what it had.
        changes: What was changed, a line each.
    """

    optimizer: Optimizer
    before: int
    parents: list[int] = field(default_factory=list)
    members: dict[int, list[Tensor]] = field(default_factory=dict)
    decays: dict[int, float] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)
    _passes_on: bool = False

    def hide_from(self, schedulers: Iterable[Any]) -> None:
        """Show the groups that there were to schedulers that were built for them.

        The new groups follow those that they were a part of, so no scheduler and no state of one changes.
        """
        if not self.parents:
            return
        for scheduler in schedulers:
            self._hide_from(unwrapped_schedule(scheduler).scheduler)
        if not self._passes_on:
            self.optimizer.register_step_pre_hook(FirstGroups(self.optimizer, self.parents).pass_on)
            self._passes_on = True

    def _hide_from(self, scheduler: Any) -> None:
        for inner in getattr(scheduler, "_schedulers", ()):
            self._hide_from(inner)
        for name in _PER_GROUP:  # of a scheduler that was built for the groups as they are now
            if isinstance(values := getattr(scheduler, name, None), list):
                setattr(scheduler, name, values[: self.before])
        if not isinstance(scheduler.optimizer, FirstGroups):
            scheduler.optimizer = FirstGroups(scheduler.optimizer, self.parents)

    def merge_in_states(self) -> None:
        """Save and load states of the optimizer as if its groups had not been split.

        For trainers that load the optimizer's state before a callback can split its groups.
        """
        self.optimizer.register_state_dict_post_hook(self._merged)
        self.optimizer.register_load_state_dict_pre_hook(self._split)

    def _merged(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        groups = [dict(group) for group in state_dict["param_groups"]]
        ids = {
            id(param): (key, name)
            for live, group in zip(optimizer.param_groups, groups, strict=True)
            for param, key, name in zip(
                live["params"],
                group["params"],
                group.get("param_names") or [None] * len(group["params"]),
                strict=True,
            )
        }
        for parent, members in self.members.items():
            groups[parent]["params"] = [ids[id(param)][0] for param in members]
            if "param_names" in groups[parent]:
                groups[parent]["param_names"] = [ids[id(param)][1] for param in members]
        for index, decay in self.decays.items():
            groups[index]["weight_decay"] = decay
        new = range(self.before, self.before + len(self.parents))
        state_dict["param_groups"] = [group for k, group in enumerate(groups) if k not in new]

    def _split(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        live, saved = optimizer.param_groups, state_dict["param_groups"]
        if len(saved) != len(live) - len(self.parents):
            return state_dict
        groups = [dict(group) for group in saved]
        groups[self.before : self.before] = [dict(saved[parent]) for parent in self.parents]
        labels: dict[int, tuple[Any, Any]] = {}
        for parent, members in self.members.items():
            ids = saved[parent]["params"]
            if len(ids) != len(members):
                return state_dict  # torch says what is wrong
            names = saved[parent].get("param_names") or [None] * len(ids)
            labels |= {id(p): label for p, label in zip(members, zip(ids, names, strict=True), strict=True)}
        for k in {*self.members, *range(self.before, self.before + len(self.parents))}:
            groups[k]["params"] = [labels[id(param)][0] for param in live[k]["params"]]
            if "param_names" in groups[k]:
                groups[k]["param_names"] = [labels[id(param)][1] for param in live[k]["params"]]
            groups[k]["weight_decay"] = live[k]["weight_decay"]
        for k in self.decays:
            groups[k]["weight_decay"] = live[k]["weight_decay"]
        return {**state_dict, "param_groups": groups}


def split_groups(
    optimizer: Optimizer, wanted: Callable[[Tensor, float], float], names: Mapping[int, str]
) -> GroupSplit:
    """Give each parameter the weight_decay that is wanted, and change nothing else.

    Args:
        optimizer: The optimizer.
        wanted: Returns the weight_decay of a parameter, given what it has.
        names: {id of a parameter: name}, for what is said.

    Returns:
        What was done. A group whose parameters all want the same is kept as it is; else those that want
        another value than the group has go to new groups at the end, with the same settings.

    Example:
        >>> import torch
        >>> weight, bias = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.SGD([weight, bias], lr=0.1, weight_decay=0.5)
        >>> split = split_groups(optimizer, lambda p, has: 0.0 if p is weight else has, {id(weight): "w"})
        >>> [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
        [(1, 0.5), (1, 0.0)]
        >>> split.changes
        ['param_groups[0]: weight_decay 0.5 → 0 for w']
    """
    split = GroupSplit(optimizer, len(optimizer.param_groups))
    for k in range(split.before):
        group = optimizer.param_groups[k]
        if "weight_decay" not in group:
            continue
        present = group["weight_decay"]
        values = {id(param): wanted(param, present) for param in group["params"]}
        others = sorted({value for value in values.values() if value != present})
        if not others:
            continue
        for value in others:
            moved = [
                names.get(id(p), f"a parameter{tuple(p.shape)}")
                for p in group["params"]
                if values[id(p)] == value
            ]
            split.changes.append(f"param_groups[{k}]: weight_decay {present:g} → {value:g} for {_few(moved)}")
        split.decays[k] = present
        if len(set(values.values())) == 1:
            group["weight_decay"] = others[0]
            continue
        split.members[k] = list(group["params"])
        kept = present if present in values.values() else others[0]
        for value in [kept, *(value for value in others if value != kept)]:
            places = [j for j, param in enumerate(split.members[k]) if values[id(param)] == value]
            if value == kept:
                continue
            optimizer.param_groups.append(_part(group, places, value))
            split.parents.append(k)
        _keep(group, [j for j, param in enumerate(split.members[k]) if values[id(param)] == kept], kept)
    return split


def _part(group: dict[str, Any], places: list[int], weight_decay: float) -> dict[str, Any]:
    """Return a group with the same settings and some of the parameters."""
    part = {key: _copied(value) for key, value in group.items() if key not in ("params", "param_names")}
    part["params"] = list(group["params"])
    if "param_names" in group:
        part["param_names"] = list(group["param_names"])
    _keep(part, places, weight_decay)
    return part


def _keep(group: dict[str, Any], places: list[int], weight_decay: float) -> None:
    for key in ("params", "param_names"):
        if key in group:
            group[key] = [group[key][place] for place in places]
    group["weight_decay"] = weight_decay


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _few(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{', '.join(names[:2])} and {len(names) - 2} others"
