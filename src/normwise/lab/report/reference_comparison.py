"""Comparison of new results of the claims with earlier ones, statistic by statistic.

Two means are compared by Welch's test (Welch 1947), with standard errors computed from the 95 % intervals.
Of m statistics that do not differ, about m/20 fall outside their interval by chance. A statistic therefore
counts as different only after Holm's correction (Holm 1979) over all statistics: the probability that a
comparison of two jobs reports any false difference is then at most 5 %, however they are correlated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from normwise.lab.report.results_file import Finding, check, read_json

__all__ = ["Reference", "compare", "holm", "lines", "p_value", "read_reference"]

LEVEL = 0.05
# Statistics that do not vary with the seed are equal if they agree to the last digits of float32.
RELATIVE, ABSOLUTE = 1e-6, 1e-9

_Path = tuple[str, ...]
_Estimate = dict[str, Any]


@dataclass(frozen=True)
class Reference:
    """The path and the claims of an earlier ``results.json``."""

    path: str
    claims: dict[str, Any]


@dataclass(frozen=True)
class _AnyResults:
    """A results.json that may have claims which this version does not know."""

    format: Literal[1]
    claims: dict[str, Any]


def read_reference(path: Path, claims: Sequence[str], data: str) -> Reference:
    """Read the results to compare with.

    Args:
        path: A ``results.json``, or a folder that holds one.
        claims: The claims that will be tested.
        data: The data set that they will be tested on.

    Raises:
        ValueError: The file cannot be read or is no ``results.json``, it has none of the claims, or its
            claims are on another data set.
    """
    try:
        content = read_json(path / "results.json" if path.is_dir() else path)
        check(content, _AnyResults)
        found = {name: content["claims"][name] for name in claims if name in content["claims"]}
        for name, claim in found.items():
            check(claim, Finding, ("claims", name))
    except OSError as error:
        raise ValueError(
            f"--compare {path} cannot be read ({error.strerror}): give a results.json, or a folder that "
            "holds one"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"--compare {path} is no results.json of normwise reproduce, or damaged ({error}): give another"
        ) from error
    if not found:
        known = ", ".join(content["claims"]) or "none"
        raise ValueError(f"--compare {path} has none of the claims asked for: it has {known}")
    there = {claim["protocol"]["data"] for claim in found.values()}
    if there != {data}:
        raise ValueError(
            f"--compare {path} is on other data: give --data {', '.join(sorted(there - {data}))} to compare "
            "with it"
        )
    return Reference(str(path), found)


def compare(results: Mapping[str, Any], reference: Reference, claims: Sequence[str]) -> dict[str, Any]:
    """Compare statistics and verdicts.

    A statistic is compared if both sides have an estimate with an interval under the same name. Statistics
    that only one side has (other members, other cells) or that have no interval are only counted. If neither
    side varied with the seed, the means must be equal to the last digits of float32. A claim agrees if none
    of its statistics differs. Its verdict may still differ, as numbers that agree can lie on two sides of a
    threshold; verdicts decide only if no statistic can be compared.

    Args:
        results: The new results, as in ``results.json``.
        reference: The earlier results.
        claims: The claims to compare: those that were just tested.

    Returns:
        Plain values: ``reference``, ``agrees``, ``compared``, ``outside`` (of 95 %), ``not_in_reference``,
        and for each claim of ``claims`` its ``verdict``, ``compared``, ``outside``, ``agrees``,
        ``only_here``, ``only_in_reference``, ``without_interval`` (numbers of statistics), ``protocol``
        (differences of the set-up) and ``rows``, one per statistic. In a row ``inside`` says whether the
        difference lies within the plain 95 % interval, ``agrees`` is the answer after the correction.
    """
    both = [name for name in claims if name in reference.claims]
    found = {name: _claim(results["claims"][name], reference.claims[name]) for name in both}
    rows = [row for claim in found.values() for row in claim["rows"]]
    for row, differs in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["agrees"] = not differs
    for name, claim in found.items():
        verdict = claim["verdict"]
        claim["explanation"] = _explanation(claim, results["claims"][name].get("thresholds", {}))
        claim["agrees"] = (
            all(row["agrees"] for row in claim["rows"])
            if claim["rows"]
            else verdict["here"] == verdict["reference"]
        )
    return {
        "reference": reference.path,
        "agrees": all(claim["agrees"] for claim in found.values()),
        "compared": len(rows),
        "outside": sum(not row["inside"] for row in rows),
        "not_in_reference": [name for name in claims if name not in reference.claims],
        "claims": found,
    }


def p_value(here: _Estimate, reference: _Estimate) -> float:
    """Return the p-value of Welch's test that two means are equal; 1 or 0 if neither varied with the seed.

    Example:
        >>> here = {"mean": 2.0, "low": 1.0, "high": 3.0, "n": 5}
        >>> round(p_value(here, {"mean": 3.0, "low": 2.0, "high": 4.0, "n": 5}), 3)
        0.085
    """
    from scipy.stats import t, ttest_ind_from_stats

    sides = (here, reference)
    errors = [(e["high"] - e["low"]) / 2 / float(t.ppf(0.975, e["n"] - 1)) for e in sides]
    same = max(RELATIVE * max(abs(e["mean"]) for e in sides), ABSOLUTE)
    if abs(here["mean"] - reference["mean"]) <= same:
        return 1.0
    if math.hypot(*errors) <= same:  # rounding left in the intervals is no variation
        return 0.0
    samples = ((e["mean"], error * math.sqrt(e["n"]), e["n"]) for e, error in zip(sides, errors, strict=True))
    first, second = samples
    return float(ttest_ind_from_stats(*first, *second, equal_var=False).pvalue)


def holm(p_values: Sequence[float], level: float = LEVEL) -> list[bool]:
    """Return, for each null hypothesis, whether Holm's step-down procedure rejects it.

    Example:
        >>> holm([0.04, 0.001, 0.03])
        [False, True, False]
    """
    rejected = [False] * len(p_values)
    order = sorted(range(len(p_values)), key=lambda k: p_values[k])
    for step, k in enumerate(order):
        if p_values[k] > level / (len(order) - step):
            break
        rejected[k] = True
    return rejected


def lines(comparison: Mapping[str, Any], most: int = 12) -> list[str]:
    """Return a comparison as lines of text, with the first ``most`` statistics that differ."""
    said = []
    for name, claim in comparison["claims"].items():
        said += [f"{name}: {difference}" for difference in claim["protocol"]]
    for name, claim in comparison["claims"].items():
        verdict, why = claim["verdict"], claim["explanation"]
        if verdict["here"] != verdict["reference"]:
            flip = f"{name}: {verdict['here']} here, {verdict['reference']} in the reference"
            said.append(f"{flip}: {'; '.join(why[:2])}" if why else flip)
    differing = [
        f"differs: {name}: {row['statistic']}: {_number(row['here'])}, reference {_number(row['reference'])}"
        for name, claim in comparison["claims"].items()
        for row in claim["rows"]
        if not row["agrees"]
    ]
    said += differing[:most]
    if len(differing) > most:
        said.append(f"… and {len(differing) - most} more, in results.json")
    compared, outside = comparison["compared"], comparison["outside"]
    said.append(
        f"{outside} of {compared} statistics are outside their 95 % interval; by chance about "
        f"{compared / 20:.0f} would be; {len(differing)} differ after Holm's correction."
    )
    if comparison["not_in_reference"]:
        said.append(f"Not in the reference: {', '.join(comparison['not_in_reference'])}.")
    where = [name for name, claim in comparison["claims"].items() if not claim["agrees"]]
    verdict = f"differs at: {', '.join(where)}" if where else "agrees"
    said.append(f"Compared with {comparison['reference']}: {verdict}.")
    return said


def _claim(here: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Any]:
    """Compare one claim, without the correction, which needs the p-values of all claims."""
    mine, theirs = dict(_estimates(here["statistics"])), dict(_estimates(reference["statistics"]))
    common = [path for path in mine if path in theirs]
    comparable = [path for path in common if _has_interval(mine[path]) and _has_interval(theirs[path])]
    rows = []
    for path in comparable:
        p = p_value(mine[path], theirs[path])
        row = {"statistic": " / ".join(path), "here": mine[path], "reference": theirs[path]}
        rows.append({**row, "p": p, "inside": p >= LEVEL})
    return {
        "verdict": {"here": here["verdict"], "reference": reference["verdict"]},
        "compared": len(rows),
        "outside": sum(not row["inside"] for row in rows),
        "only_here": len(mine) - len(common),
        "only_in_reference": len(theirs) - len(common),
        "without_interval": len(common) - len(comparable),
        "protocol": _differences(here["protocol"], reference["protocol"]),
        "rows": rows,
    }


def _explanation(claim: Mapping[str, Any], thresholds: Mapping[str, Sequence[float]]) -> list[str]:
    """Return which statistics decide differently, if the verdicts differ; those that agree come first."""
    if claim["verdict"]["here"] == claim["verdict"]["reference"]:
        return []
    said = []
    for row in sorted(claim["rows"], key=lambda row: not row["agrees"]):
        for threshold in thresholds.get(row["statistic"], ()):
            inside = [
                side for side in ("here", "reference") if row[side]["low"] <= threshold <= row[side]["high"]
            ]
            beyond = [row[side]["mean"] > threshold for side in ("here", "reference")]
            if not inside and beyond[0] == beyond[1]:
                continue
            where = {0: "between the two", 1: f"in that of {inside[0] if inside else ''}", 2: "in both"}
            said.append(
                f"{row['statistic']} {'agrees' if row['agrees'] else 'differs'}: {_number(row['here'])} "
                f"against {_number(row['reference'])}; the threshold {threshold:g} lies {where[len(inside)]}"
            )
    return said


def _estimates(tree: Any, path: _Path = ()) -> Iterator[tuple[_Path, _Estimate]]:
    """Yield each estimate in the statistics with its path, the keys that lead to it."""
    if isinstance(tree, dict):
        if tree.keys() == {"mean", "low", "high", "n"}:
            yield path, tree
        else:
            for key, value in tree.items():
                yield from _estimates(value, (*path, str(key)))
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from _estimates(value, (*path, str(index)))


def _has_interval(estimate: _Estimate) -> bool:
    numbers = all(
        isinstance(estimate[key], int | float) and math.isfinite(estimate[key])
        for key in ("mean", "low", "high")
    )
    return numbers and isinstance(estimate["n"], int) and estimate["n"] > 1


def _differences(here: Mapping[str, Any], reference: Mapping[str, Any]) -> list[str]:
    """Return how the budgets, seeds and environments of the two differ."""
    found = []
    for key in ("budget", "seeds"):
        if here.get(key) != reference.get(key):
            found.append(f"{key} {here.get(key)} here, {reference.get(key)} in the reference")
    mine, theirs = here.get("environment", {}), reference.get("environment", {})
    for key in mine:
        if mine[key] != theirs.get(key):
            found.append(f"{key} {mine[key]} here, {theirs.get(key, 'not stated')} in the reference")
    return found


def _number(estimate: _Estimate) -> str:
    return f"{estimate['mean']:.4g} [{estimate['low']:.4g}, {estimate['high']:.4g}]"
