"""Layers of one pattern taken together, so that 300 parameters read as twenty lines."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

__all__ = ["label", "pattern", "starred", "together"]

T = TypeVar("T")


def pattern(name: str) -> str:
    """Return ``name`` with its numbers as stars.

    Example:
        >>> pattern("h.11.attn.c_attn.weight")
        'h.*.attn.c_attn.weight'
    """
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def starred(sentence: str) -> str:
    """Return a sentence with the numbers in the names in it as stars.

    Example:
        >>> starred("in a pair with h.0.wv, h.0.wo and 2 others: decay balances 1.0 of it.")
        'in a pair with h.*.wv, h.*.wo and 2 others: decay balances 1.0 of it.'
    """
    return re.sub(r"[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)+", _starred, sentence)


def _starred(found: re.Match[str]) -> str:
    name = found[0]
    return name if re.fullmatch(r"[0-9.]+", name) else pattern(name)


def label(names: Sequence[str]) -> str:
    """Return one name for names of one pattern.

    Example:
        >>> label(["h.0.fc.weight", "h.1.fc.weight", "h.2.fc.weight", "h.5.fc.weight"])
        'h.{0-2,5}.fc.weight'
        >>> label(["fc.weight"])
        'fc.weight'
    """
    columns = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(_spelled(list(dict.fromkeys(column))) for column in columns)


def _spelled(parts: list[str]) -> str:
    if len(parts) == 1:
        return parts[0]
    numbers = sorted(int(part) for part in parts)
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    return "{" + ",".join("-".join(map(str, r)) for r in ranges) + "}"


def together(items: Iterable[tuple[str, Hashable, T]]) -> list[list[T]]:
    """Return the items in groups of one pattern and one key, in the order of their first members.

    Args:
        items: (name, what must be the same, item).

    Example:
        >>> together([("h.0.w", 1, "a"), ("h.0.b", 0, "b"), ("h.1.w", 1, "c"), ("h.2.w", 2, "d")])
        [['a', 'c'], ['b'], ['d']]
    """
    groups: dict[Hashable, list[T]] = {}
    for name, key, item in items:
        groups.setdefault((pattern(name), key), []).append(item)
    return list(groups.values())
