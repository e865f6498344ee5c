"""How often the parts of a packed parameter recur in a wider model: once for each head.

Where heads are interleaved (q₁k₁v₁ q₂k₂v₂ …), a part is a share of every period. The shapes of a narrow copy
and of the full-size model do not tell how many periods the latter has. The numbers of heads do, which both
models hold as attributes of modules or configurations.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from normwise.planning.parameters import bare

__all__ = ["HeadCounts", "counts_of", "head_counts", "is_of_heads", "period_of_mask"]

# {path of a module: {attribute: number}}
HeadCounts = Mapping[str, Mapping[str, int]]

# Not the groups of experts that are routed together, nor the number of heads in a group.
_HEADS = re.compile(r"(?!topk|n_group$|.*expert|.*key_value_groups)\w*(head|group)\w*")
_NO_COUNTS = re.compile(r"\w*(dim|size|width|rank|channels|features|idx|index|key_value_groups)s?")


def head_counts(model: nn.Module) -> HeadCounts:
    """Return the numbers that modules hold as attributes, and the numbers of heads in their configurations.

    Example:
        >>> head_counts(nn.MultiheadAttention(8, 2))
        {'': {'num_heads': 2}, 'out_proj': {}}
    """
    found = {}
    for path, module in model.named_modules():
        counts = dict(_counts(vars(module)))
        config = getattr(module, "config", None)
        if hasattr(config, "__dict__"):
            of_config = _counts(vars(config))
            counts |= {f"config.{name}": number for name, number in of_config if is_of_heads(name)}
        found[bare(path) if path else path] = counts
    return found


def _counts(attributes: Mapping[str, object]) -> Iterator[tuple[str, int]]:
    for name, value in attributes.items():
        is_number = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if is_number and not _NO_COUNTS.fullmatch(name):
            yield name, value  # type: ignore[misc]


def is_of_heads(attribute: str) -> bool:
    """Return whether an attribute counts heads or groups, by its name.

    Example:
        >>> is_of_heads("config.num_key_value_heads"), is_of_heads("n_layers")
        (True, False)
    """
    return _HEADS.fullmatch(attribute.rpartition(".")[2]) is not None


def counts_of(name: str, narrow: HeadCounts, wide: HeadCounts) -> dict[str, tuple[int, int]]:
    """Return {attribute: (number in the narrow copy, in the wide model)} of the modules around a parameter.

    Example:
        >>> narrow, wide = ({"attn": {"num_heads": heads}} for heads in (2, 16))
        >>> counts_of("attn.qkv.weight", narrow, wide)
        {'attn.num_heads': (2, 16)}
    """
    parts = bare(name).split(".")
    return {
        f"{path}.{attribute}".lstrip("."): (count, wide[path][attribute])
        for path in (".".join(parts[:k]) for k in range(len(parts)))
        for attribute, count in narrow.get(path, {}).items()
        if attribute in wide.get(path, {})
    }


def period_of_mask(mask: Sequence[bool]) -> int:
    """Return the shortest period of a mask, or its length.

    Example:
        >>> period_of_mask([True, False, False] * 4), period_of_mask([True, True, False, False])
        (3, 4)
    """
    size, values = len(mask), list(mask)
    return next(p for p in range(1, size + 1) if size % p == 0 and values[:p] * (size // p) == values)
