"""State that rides in the state of an optimizer, so that whatever saves and restores the one does the other.

An object joins by one call, :func:`ride`. From then on ``optimizer.state_dict()`` holds its state under the
key "normwise", and ``optimizer.load_state_dict()`` restores it: all objects or, if one refuses, none and the
optimizer neither. An optimizer without such objects loads such a state too and leaves the key alone.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from typing import Any, Protocol

from torch.optim import Optimizer

__all__ = ["KEY", "Rider", "handle_ids", "leave", "note_loaded", "ride", "riders", "with_hook_tables"]

KEY = "normwise"
_FORMAT = 1
_ATTRIBUTE = "_normwise_riders"


class Rider(Protocol):
    """What can ride: an object with a state of plain values and tensors (``weights_only=True``)."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs."""

    def check_state_dict(self, state_dict: Any) -> None:
        """Raise a ValueError that names the first fault of a state. Changes nothing."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Continue from a state. Calls :func:`note_loaded`, as a user may load the state by hand."""


def ride(optimizer: Optimizer, kind: str, rider: Rider, *, required: bool = True) -> None:
    """Save the state of ``rider`` with that of ``optimizer``, and restore it with it.

    Args:
        optimizer: The optimizer.
        kind: What the rider is, in a word, such as "decay". Riders of one kind are told apart by the order in
            which they joined. A state that has none of this kind leaves the rider as it is, and the next step
            warns.
        rider: The object.
        required: Whether the training would go on wrongly without its state. False for what only observes: a
            state that has none of this kind is loaded without a word, and where one does not fit, a warning
            says that the rider goes on from its own state.

    Example:
        >>> import torch
        >>> class Counter:
        ...     count = 0
        ...     def state_dict(self):
        ...         return {"count": self.count}
        ...     def check_state_dict(self, state_dict):
        ...         if set(state_dict) != {"count"}:
        ...             raise ValueError("state_dict is not one of a Counter")
        ...     def load_state_dict(self, state_dict):
        ...         self.count = state_dict["count"]
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
        >>> counter = Counter()
        >>> ride(optimizer, "counter", counter)
        >>> counter.count = 3
        >>> state = optimizer.state_dict()
        >>> counter.count = 0
        >>> optimizer.load_state_dict(state)
        >>> counter.count
        3
    """
    company: _Company | None = vars(optimizer).get(_ATTRIBUTE)
    if company is None:
        company = vars(optimizer)[_ATTRIBUTE] = _Company(optimizer)
    company.riders.append((kind, rider))
    if not required:
        company.observing.add(kind)


def leave(optimizer: Optimizer, rider: Rider) -> None:
    """Undo :func:`ride`; the last rider to leave leaves no trace on the optimizer."""
    company: _Company | None = vars(optimizer).get(_ATTRIBUTE)
    if company is None:
        return
    company.without_state = [entry for entry in company.without_state if entry[1] is not rider]
    company.riders = [entry for entry in company.riders if entry[1] is not rider]
    if not company.riders:
        company.disband()
        del vars(optimizer)[_ATTRIBUTE]


def riders(optimizer: Optimizer, kind: str) -> list[Any]:
    """Return the riders of a kind, in the order in which they joined."""
    company: _Company | None = vars(optimizer).get(_ATTRIBUTE)
    return [] if company is None else [rider for name, rider in company.riders if name == kind]


def note_loaded(optimizer: Optimizer, rider: Rider) -> None:
    """Note that the state of ``rider`` has been restored by hand, so there is nothing to warn about.

    A hand may come before the optimizer's state is loaded (``torch.distributed.checkpoint``) or after.
    """
    company: _Company | None = vars(optimizer).get(_ATTRIBUTE)
    if company is not None:
        company.by_hand.append(rider)
        company.without_state = [entry for entry in company.without_state if entry[1] is not rider]


def with_hook_tables(optimizer: Optimizer) -> None:
    """Give an optimizer that never called ``Optimizer.__init__`` the tables that hooks are entered in.

    Such classes (Lookahead) have methods of their own for the state, which call no hooks: nothing rides.
    """
    for name in ("state_dict_post", "load_state_dict_pre", "load_state_dict_post"):
        vars(optimizer).setdefault(f"_optimizer_{name}_hooks", OrderedDict())


def handle_ids(optimizer: Optimizer) -> set[int]:
    """Return the keys of this module's hooks in the optimizer's tables of hooks."""
    company: _Company | None = vars(optimizer).get(_ATTRIBUTE)
    return set() if company is None else {handle.id for handle in company.handles}


class _Company:
    """The riders of one optimizer, with the hooks that save and restore them.

    torch checks its own part of a state after the first hook and before the second. So the first checks the
    riders' states, and the second loads them: an error of either leaves everything as it was.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.riders: list[tuple[str, Rider]] = []
        self.observing: set[str] = set()
        self.accepted: list[tuple[Rider, Any]] = []
        self.without_state: list[tuple[str, Rider]] = []
        self.by_hand: list[Rider] = []
        self._missing: list[tuple[str, Rider]] = []
        self._misfits: list[str] = []
        with_hook_tables(optimizer)
        self.handles: list[Any] = [
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._check),
            optimizer.register_load_state_dict_post_hook(self._load),
        ]

    def disband(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()

    def _is_of(self, optimizer: Optimizer) -> bool:
        """Whether these are the optimizer's own hooks: copies of some classes carry those of the original."""
        return vars(optimizer).get(_ATTRIBUTE) is self

    def _save(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        if self._is_of(optimizer):
            states: dict[str, Any] = {"format": _FORMAT}
            for kind, rider in self.riders:
                states.setdefault(kind, []).append(rider.state_dict())
            state_dict[KEY] = states

    def _check(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        if not self._is_of(optimizer):
            return
        self.accepted, self._missing, self._misfits = [], [], []
        saved = state_dict.get(KEY, {"format": _FORMAT})
        if not isinstance(saved, dict) or saved.get("format") != _FORMAT:
            raise _refused(f"{KEY!r} in it is not of format {_FORMAT}, which this version of normwise reads")
        for kind in dict.fromkeys(kind for kind, _ in self.riders):
            present = [rider for name, rider in self.riders if name == kind]
            if kind not in saved:
                self._missing += [(kind, rider) for rider in present if kind not in self.observing]
                continue
            try:
                self.accepted += _checked(kind, present, saved[kind])
            except ValueError as error:
                if kind not in self.observing:
                    raise _refused(str(error)) from error
                self._misfits.append(f"{present[0]!r} goes on from its own state: {error}")

    def _load(self, optimizer: Optimizer) -> None:
        if not self._is_of(optimizer):
            return
        accepted, self.accepted = self.accepted, []
        restored = [id(rider) for rider in self.by_hand]
        self.without_state = [entry for entry in self._missing if id(entry[1]) not in restored]
        for rider, state in accepted:
            rider.load_state_dict(state)
        self.by_hand = []
        for misfit in self._misfits:
            warnings.warn(misfit, stacklevel=3)
        if self.without_state and len(self.handles) == 3:
            self.handles.append(optimizer.register_step_pre_hook(self._warn))

    def _warn(self, *_: Any) -> None:
        """Warn at the first step after a load, by when a user may have loaded what was missing by hand."""
        missing, self.without_state = self.without_state, []
        self.handles.pop().remove()
        if missing:
            kinds = " and ".join(dict.fromkeys(kind for kind, _ in missing))
            warnings.warn(
                f"the state that the optimizer has loaded holds no {kinds}: {missing[0][1]!r} goes on from "
                "its own state. If the saved run had one, load its state_dict by hand",
                stacklevel=4,
            )


def _checked(kind: str, present: list[Rider], states: Any) -> list[tuple[Rider, Any]]:
    """Return each rider with its state, or raise a ValueError that says what does not fit."""
    if not isinstance(states, list) or len(states) != len(present):
        found = len(states) if isinstance(states, list) else type(states).__name__
        raise ValueError(
            f"it holds {found} of kind {kind!r}, and the optimizer has {len(present)}: attach as in "
            "the saved run before you load"
        )
    for rider, state in zip(present, states, strict=True):
        rider.check_state_dict(state)
    return list(zip(present, states, strict=True))


def _refused(why: str) -> ValueError:
    return ValueError(
        f"the optimizer's state was refused, and nothing has been changed: {why} (or leave normwise's part "
        f"out: state_dict.pop({KEY!r}))"
    )
