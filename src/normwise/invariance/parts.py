"""Parts of a packed parameter (q, k and v of one projection): which units, and what they are called."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Part", "expand_parts", "merge_parts", "parameter_of"]

_KEY = re.compile(r"(?P<name>.+?)(\.unflatten\(\d+, \(-1, \d+\)\))?\[(:, )*\d+:\d+\]")


@dataclass(frozen=True)
class Part:
    """The rows or columns u of one parameter with start ≤ u mod period < stop.

    Attributes:
        index: The number of the parameter.
        dim: The dimension that counts the units: 0 rows, 1 columns.
        start: See above.
        stop: See above.
        period: See above; ``size`` where the part is one range.
        size: How many units there are in all.
    """

    index: int
    dim: int
    start: int
    stop: int
    period: int
    size: int

    def of(self, tensor: Tensor) -> Tensor:
        """Return the view of this part of ``tensor``."""
        if self.period == self.size:
            return tensor.narrow(self.dim, self.start, self.stop - self.start)
        folded: Tensor = tensor.unflatten(self.dim, (-1, self.period))
        part: Tensor = folded.narrow(self.dim + 1, self.start, self.stop - self.start)
        return part

    def key(self, name: str) -> str:
        """Return the part as an expression of torch.

        Example:
            >>> Part(0, 1, 0, 768, 2304, 2304).key("h.0.attn.c_attn.weight")
            'h.0.attn.c_attn.weight[:, 0:768]'
            >>> Part(0, 0, 8, 16, 24, 96).key("query_key_value.bias")
            'query_key_value.bias.unflatten(0, (-1, 24))[:, 8:16]'
        """
        place, view = self.dim, ""
        if self.period != self.size:
            place, view = self.dim + 1, f".unflatten({self.dim}, (-1, {self.period}))"
        return f"{name}{view}[{':, ' * place}{self.start}:{self.stop}]"


def parameter_of(key: str) -> str:
    """Return the name of the parameter that a key of a symmetry is, or is a part of.

    Example:
        >>> parameter_of("h.0.attn.c_attn.weight[:, 0:768]"), parameter_of("fc.weight")
        ('h.0.attn.c_attn.weight', 'fc.weight')
        >>> parameter_of("query_key_value.bias.unflatten(0, (-1, 24))[:, 8:16]")
        'query_key_value.bias'
    """
    found = _KEY.fullmatch(key)
    return found["name"] if found else key


def expand_parts(symmetry: Mapping[str, int], parts: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Return a symmetry with every split parameter written as its parts.

    Args:
        symmetry: {parameter or part: exponent}.
        parts: {parameter: its parts}.

    Example:
        >>> expand_parts({"w": -1, "b": 1}, {"w": ["w[0:2]", "w[2:4]"]})
        {'w[0:2]': -1, 'w[2:4]': -1, 'b': 1}
    """
    return {part: e for key, e in symmetry.items() for part in parts.get(key, [key])}


def merge_parts(symmetry: Mapping[str, int], parts: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Return a symmetry in which a parameter whose parts all have one exponent is written as one.

    Example:
        >>> merge_parts({"w[0:2]": -1, "w[2:4]": -1, "b": 1}, {"w": ["w[0:2]", "w[2:4]"]})
        {'w': -1, 'b': 1}
        >>> merge_parts({"w[0:2]": -1, "b": 1}, {"w": ["w[0:2]", "w[2:4]"]})
        {'w[0:2]': -1, 'b': 1}
    """
    whole = {
        part: name
        for name, own in parts.items()
        for part in own
        if own[0] in symmetry and all(symmetry.get(other) == symmetry[own[0]] for other in own)
    }
    return {whole.get(key, key): e for key, e in symmetry.items()}
