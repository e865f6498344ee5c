"""``results.json``: a schema, and how to read the file so that the report can rely on every entry.

The schema is the dataclasses of this file and of the claims: :func:`check` follows their type hints. An
object may have further entries, which later versions may write.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from normwise.lab.claims import all_claims
from normwise.lab.claims.changes import Change
from normwise.lab.claims.claim import Exhibits
from normwise.lab.claims.conditions import Verdict
from normwise.lab.claims.exhibits import LARGEST, can_be_drawn
from normwise.lab.data.catalog import CATALOG, is_known

__all__ = ["Finding", "Results", "check", "read_json", "read_results"]

MOST_BYTES = 64_000_000  # the full budget has 1.3 million
LONGEST_TEXT = 10_000  # characters
DEEPEST = 40  # levels of lists and objects

_Place = tuple[str | int, ...]
_OWN = re.compile(r"own:[\w.]+:[\w.]+")  # the data of a normwise compare
_WORDS = {str: "text", int: "an integer", float: "a number", bool: "true or false", NoneType: "null"}
# Characters that neither XML nor UTF-8 allows, such as control characters and half of a surrogate pair.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True, kw_only=True)
class StoredEstimate:
    """:class:`normwise.lab.claims.statistics.Estimate`, with None for NaN."""

    mean: float | None
    low: float | None
    high: float | None
    n: int

    def __post_init__(self) -> None:
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How the runs of a claim were made."""

    data: str
    budget: Literal["quick", "full", "large", "paper", "own"]
    seeds: Sequence[int]
    environment: Mapping[str, str]
    experiments: str = ""

    def __post_init__(self) -> None:
        own = self.budget == "own" and _OWN.fullmatch(self.data)
        if not own and not is_known(self.data):  # the page shows it in a command to be copied
            raise ValueError(f"data {self.data!r:.60} is not one of {', '.join(CATALOG)}")


@dataclass(frozen=True, kw_only=True)
class Runs:
    """The runs of a claim, and how each that did not finish ended."""

    count: int
    not_finished: int
    identities: Sequence[str]
    failed: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.count != len(self.identities):
            raise ValueError(f"count is {self.count}, but there are {len(self.identities)} identities")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a comparison needs of a claim."""

    verdict: Verdict
    statistics: dict[str, Any]
    protocol: Protocol
    thresholds: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StoredClaim(Exhibits, Finding):
    """A claim that was tested."""

    title: str
    source: str
    question: str
    arms: str
    statistic: str
    rule: str
    order: int
    runs: Runs
    headline: str = ""
    failures_are_the_subject: bool = False
    changes: Sequence[Change] = ()


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """The verdicts of the two sides of a comparison."""

    here: Verdict
    reference: Verdict


@dataclass(frozen=True, kw_only=True)
class ComparedStatistic:
    """A row of :func:`normwise.lab.report.reference_comparison.compare`."""

    statistic: str
    here: StoredEstimate
    reference: StoredEstimate
    inside: bool
    agrees: bool


@dataclass(frozen=True, kw_only=True)
class ComparedClaim:
    """A claim of :func:`normwise.lab.report.reference_comparison.compare`."""

    verdict: Verdicts
    compared: int
    outside: int
    rows: Sequence[ComparedStatistic]
    explanation: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The part that the page shows of :func:`normwise.lab.report.reference_comparison.compare`."""

    claims: Mapping[str, ComparedClaim]


@dataclass(frozen=True, kw_only=True)
class Results:
    """The content of ``results.json``."""

    format: Literal[1]
    claims: Mapping[str, StoredClaim]
    seconds: float
    finished: str
    comparison: Comparison | None = None

    def __post_init__(self) -> None:
        known = [claim.id for claim in all_claims()]
        for name in self.claims:  # names become names of files
            if name not in known:
                raise ValueError(f"{name!r:.60} is not a claim of this version: it has {', '.join(known)}")


def read_results(path: Path) -> dict[str, Any]:
    """Return the content of a ``results.json``.

    Args:
        path: The file, or the folder that holds it.

    Raises:
        ValueError: There is none, or an entry is missing or wrong.
    """
    file = path / "results.json" if path.is_dir() else path
    try:
        results = read_json(file)
        check(results, Results)
    except FileNotFoundError as error:
        raise ValueError(f"{file} does not exist: give the --out of a finished normwise reproduce") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}): give another folder") from error
    except ValueError as error:
        raise ValueError(
            f"{file} is damaged ({error}): delete it and repeat the normwise reproduce that wrote it, which "
            "keeps the finished runs"
        ) from error
    return dict(results)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file that may be damaged.

    Raises:
        OSError: It cannot be opened.
        ValueError: It is not a regular file or is too large; or it is not JSON, has a key twice, or is nested
            too deeply.
    """
    size = path.stat().st_size
    if not path.is_file():
        raise ValueError("it is not a regular file")
    if size > MOST_BYTES:
        raise ValueError(f"it has {size} bytes, more than {MOST_BYTES}")
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repetition)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def check(value: Any, kind: Any, place: _Place = ()) -> None:
    """Check that a value from JSON is what a type hint says; put defaults where a dataclass has them.

    Args:
        value: Of JSON.
        kind: str, int, float, bool, a Literal, a union, a sequence, a mapping, a dataclass, or Any. What Any
            contains is still checked for numbers that are not finite and for texts that no page can show.
        place: The keys and indices that lead to the value.

    Raises:
        ValueError: It is not; the message says where and why.

    Example:
        >>> check({"x": [1.5, "a"]}, dict[str, list[float]])
        Traceback (most recent call last):
        ValueError: x[1] is 'a', not a number
    """
    origin, parts = get_origin(kind) or kind, get_args(kind)
    if len(place) > DEEPEST:
        raise ValueError(f"{_words(place[:4])} is nested too deeply")
    if origin is Any:
        _check_any(value, place)
    elif origin is UnionType:
        _check_union(value, parts, place)
    elif is_dataclass(origin):
        _check_dataclass(value, origin, place)
    elif origin is Literal:
        if not any(value == part and type(value) is type(part) for part in parts):
            raise _wrong(value, " or ".join(map(repr, parts)), place)
    elif origin in (Sequence, list, tuple):
        if not isinstance(value, list):
            raise _wrong(value, "a list", place)
        for k, part in enumerate(value):
            check(part, parts[0], (*place, k))
    elif origin in (Mapping, dict):
        _check_mapping(value, lambda key: parts[1], place)
    elif origin is float and type(value) in (int, float):
        if not can_be_drawn(value):
            raise _wrong(value, "a number that can be drawn", place)
    elif type(value) is not origin:
        raise _wrong(value, _WORDS[origin], place)
    elif origin is int and abs(value) > LARGEST:
        raise _wrong(value, f"at most {LARGEST}", place)
    elif origin is str:
        _check_text(value, place)


def _check_any(value: Any, place: _Place) -> None:
    if isinstance(value, list):
        check(value, list[Any], place)
    elif isinstance(value, dict):
        estimate = {"mean", "low", "high", "n"} <= value.keys()
        check(value, StoredEstimate if estimate else dict[str, Any], place)
    elif isinstance(value, float) and not abs(value) <= LARGEST:
        raise _wrong(value, f"a number up to {LARGEST}", place)
    else:
        check(value, type(value), place)


def _check_union(value: Any, parts: tuple[Any, ...], place: _Place) -> None:
    if value is None and NoneType in parts:
        return
    others = [part for part in parts if part is not NoneType]
    if len(others) == 1:
        check(value, others[0], place)
    elif type(value) in others:
        check(value, type(value), place)
    else:
        raise _wrong(value, " or ".join(_WORDS[part] for part in parts), place)


def _check_dataclass(value: Any, kind: Any, place: _Place) -> None:
    hints = _hints(kind)
    _check_mapping(value, lambda key: hints.get(key, Any), place)
    for one in fields(kind):
        if one.name in value:
            continue
        if one.default_factory is not MISSING:
            value[one.name] = one.default_factory()
        elif one.default is not MISSING:
            value[one.name] = one.default
        else:
            raise ValueError(f"{_words((*place, one.name))} is missing")
    try:
        kind(**{name: part for name, part in value.items() if name in hints})  # what the parts say together
    except ValueError as error:
        raise ValueError(f"{_words(place)}: {error}" if place else str(error)) from error


def _check_mapping(value: Any, kind_of: Any, place: _Place) -> None:
    if not isinstance(value, dict):
        raise _wrong(value, "an object with names", place)
    for key, part in value.items():
        _check_text(key, place)
        check(part, kind_of(key), (*place, key))


def _check_text(text: str, place: _Place) -> None:
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"{_words(place)} has a text of {len(text)} characters, more than {LONGEST_TEXT}")
    if _FORBIDDEN.search(text):
        raise ValueError(f"{_words(place)} has a character that no page can show, in {text!r:.60}")


@lru_cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r:.60} is there twice")
    return found


def _wrong(value: Any, expected: str, place: _Place) -> ValueError:
    return ValueError(f"{_words(place)} is {_short(value)}, not {expected}")


def _short(value: Any) -> str:
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object with names"
    return "null" if value is None else f"{value!r:.60}"


def _words(place: _Place) -> str:
    """Return a place as text, such as ``claims.shrink.plots[0].title``."""
    plain = re.compile(r"[\w-]{1,60}")
    text = "".join(
        f".{key}" if isinstance(key, str) and plain.fullmatch(key) else f"[{key!r:.60}]" for key in place
    )
    return text.removeprefix(".") or "the content"
