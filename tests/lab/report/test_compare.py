from __future__ import annotations

import json
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import stdtrit
from scipy.stats import ttest_ind

from normwise.cli import main
from normwise.lab.claims.statistics import mean_with_interval
from normwise.lab.report.reference_comparison import Reference, compare, holm, lines, p_value, read_reference

Estimate = dict[str, Any]


def _estimate(values: Any) -> Estimate:
    return mean_with_interval(list(values)).as_dict()


def _results(statistics: dict[str, Any], verdict: str = "reproduced", **protocol: Any) -> dict[str, Any]:
    claim = {
        "verdict": verdict,
        "statistics": statistics,
        "protocol": {"data": "digits", "budget": "quick", "seeds": [0, 1, 2], "environment": {}} | protocol,
    }
    return {"format": 1, "claims": {"shrink": claim}}


def _compared(here: dict[str, Any], there: dict[str, Any]) -> dict[str, Any]:
    return compare(here, Reference("there", there["claims"]), ["shrink"])


@pytest.mark.parametrize(("n", "m"), [(2, 2), (3, 5), (10, 4)])
def test_the_test_is_welchs_though_it_sees_the_intervals_alone(n: int, m: int) -> None:
    rng = np.random.default_rng(0)
    for shift in (0.0, 1.0, 30.0):
        a, b = rng.normal(size=n), 3 * rng.normal(size=m) + shift
        expected = ttest_ind(a, b, equal_var=False).pvalue
        assert p_value(_estimate(a), _estimate(b)) == pytest.approx(expected, rel=1e-9)


def test_what_did_not_vary_must_be_the_same_to_float32s_last_digits() -> None:
    still = _estimate([10.0, 10.0, 10.0])
    assert p_value(still, _estimate([10.000001] * 3)) == 1.0
    assert p_value(still, _estimate([10.001] * 3)) == 0.0
    assert p_value(_estimate([0.0, 0.0]), _estimate([0.0, 0.0])) == 1.0
    # rounding within the mean of equal numbers is no variation
    assert p_value(_estimate([0.1] * 3), _estimate([0.2] * 3)) == 0.0
    # one side did vary: an ordinary test
    assert 0.3 < p_value(still, _estimate([10.0, 10.0, 10.3])) < 0.5


def test_holm_steps_down() -> None:
    # 0.05/4, 0.05/3, 0.05/2, 0.05/1: the third is above its own level, so the fourth is not looked at
    assert holm([0.01, 0.016, 0.026, 0.04]) == [True, True, False, False]
    assert holm([0.04, 0.02]) == [True, True]
    assert holm([]) == []


def test_equal_results_agree_in_everything() -> None:
    results = _results({"weight_norm": {"gain": _estimate([1.0, 2.0, 3.0]), "holds": True}})
    found = _compared(results, deepcopy(results))
    claim = found["claims"]["shrink"]
    assert (found["agrees"], claim["agrees"], claim["compared"], claim["outside"]) == (True, True, 1, 0)
    assert claim["rows"][0]["statistic"] == "weight_norm / gain"
    assert lines(found)[-1] == "Compared with there: agrees."


def test_a_difference_is_found_under_its_name_and_no_other() -> None:
    rng = np.random.default_rng(1)
    cells = {f"cell {k}": rng.normal(size=5) for k in range(30)}
    here = {"arms": [{name: _estimate(values) for name, values in cells.items()}]}
    there = {"arms": [{name: _estimate(rng.normal(size=5)) for name in cells}]}
    there["arms"][0]["cell 7"] = _estimate(rng.normal(size=5) + 40)
    found = _compared(_results(here), _results(there, verdict="partly"))
    assert [row["statistic"] for row in found["claims"]["shrink"]["rows"] if not row["agrees"]] == [
        "arms / 0 / cell 7"
    ]
    assert not found["agrees"]
    assert found["claims"]["shrink"]["verdict"] == {"here": "reproduced", "reference": "partly"}
    assert lines(found)[-1] == "Compared with there: differs at: shrink."
    assert any(line.startswith("differs: shrink: arms / 0 / cell 7: ") for line in lines(found))


def test_what_one_side_has_alone_and_what_has_no_interval_is_counted() -> None:
    both, single = _estimate([1.0, 2.0]), _estimate([1.0])
    infinite = {"mean": float("inf"), "low": None, "high": None, "n": 3}
    here = {"both": both, "mine": both, "one seed": single, "infinite": infinite, "number": 3.0}
    there = {
        "both": both,
        "theirs": {"a": both, "b": both},
        "one seed": both,
        "infinite": infinite,
        "number": 9.0,
    }
    claim = _compared(_results(here), _results(there))["claims"]["shrink"]
    counts = {key: claim[key] for key in ("compared", "only_here", "only_in_reference", "without_interval")}
    assert counts == {"compared": 1, "only_here": 1, "only_in_reference": 2, "without_interval": 2}


def test_verdicts_decide_only_where_there_is_nothing_else() -> None:
    number = {"a": _estimate([1.0, 2.0])}
    assert _compared(_results(number), _results(number, verdict="partly"))["agrees"]
    assert not _compared(_results({}), _results({}, verdict="partly"))["agrees"]
    assert _compared(_results({}), _results({}))["agrees"]


@pytest.mark.parametrize(
    ("here", "there", "where"),
    [
        ([1.6, 2.3, 2.9], [1.6, 1.9, 2.3], "in both"),
        ([1.6, 2.3, 2.9], [1.5, 1.51, 1.52], "in that of here"),
        ([2.5, 2.51, 2.52], [1.5, 1.51, 1.52], "between the two"),
    ],
)
def test_a_flipped_verdict_is_explained_in_its_line(
    here: list[float], there: list[float], where: str
) -> None:
    mine, other = _results({"spread": _estimate(here)}), _results({"spread": _estimate(there)}, "partly")
    mine["claims"]["shrink"]["thresholds"] = {"spread": [2.0], "unknown": [0.0]}
    found = _compared(mine, other)
    (line,) = [line for line in lines(found) if line.startswith("shrink: reproduced here, partly in")]
    agrees = "agrees" if found["claims"]["shrink"]["rows"][0]["agrees"] else "differs"
    assert f"spread {agrees}: {sum(here) / 3:.4g} [" in line
    assert line.endswith(f"the threshold 2 lies {where}")
    same = _compared(mine, _results({"spread": _estimate(there)}))
    assert same["claims"]["shrink"]["explanation"] == []


def test_what_was_done_differently_is_said() -> None:
    here = _results({}, environment={"torch": "2.13.0"})
    there = _results({}, budget="full", environment={"torch": "2.14.0"})
    assert lines(_compared(here, there))[:2] == [
        "shrink: budget quick here, full in the reference",
        "shrink: torch 2.13.0 here, 2.14.0 in the reference",
    ]


@pytest.mark.parametrize("sizes", [(3, 3), (3, 5)])
@pytest.mark.one_in(2)
def test_false_alarms_are_as_rare_as_promised(sizes: tuple[int, int]) -> None:
    """40 statistics without a difference, 150 times over, of all scales, a third of them hanging together."""
    rng = np.random.default_rng(2)
    alarms = outside = compared = 0
    for _ in range(150):
        scales = 10.0 ** rng.uniform(-3, 3, size=40)
        sides = []
        for n in sizes:
            values = rng.normal(size=(40, n))
            values[:13] += 3 * rng.normal(size=n)  # by seed
            values *= scales[:, None]
            means, halves = values.mean(1), stdtrit(n - 1, 0.975) * values.std(1, ddof=1) / n**0.5
            ends = zip(means, means - halves, means + halves, strict=True)
            keys = ("mean", "low", "high", "n")
            sides.append({f"s{k}": dict(zip(keys, (*end, n), strict=True)) for k, end in enumerate(ends)})
        found = _compared(*map(_results, sides))
        alarms += not found["agrees"]
        outside += found["outside"]
        compared += found["compared"]
    assert compared == 6000
    assert alarms <= 150 * 0.05 + 2 * (150 * 0.05 * 0.95) ** 0.5
    assert 0.01 * compared < outside < 0.06 * compared  # Welch's test errs a little less than it may


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read (No such file or directory): give a results.json"),
        ("{", "is no results.json of normwise reproduce, or damaged (Expecting property name"),
        ("[]", "is no results.json of normwise reproduce"),
        ('{"claims": {}}', "is no results.json of normwise reproduce, or damaged (format is missing)"),
        ('{"format": 2, "claims": {}}', "format is 2, not 1"),
        ('{"format": 1, "claims": {"shrink": {"verdict": "partly"}}}', "claims.shrink.statistics is missing"),
        ('{"format": 1, "claims": {"gravity": {}}}', "has none of the claims asked for: it has gravity"),
        (json.dumps(_results({}, data="fashion-mnist")), "is on other data: give --data fashion-mnist"),
        (json.dumps(_results([])), "claims.shrink.statistics is a list, not an object with names"),  # type: ignore[arg-type]
    ],
)
def test_a_reference_that_cannot_be_used_is_said_in_a_line(
    content: str | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match="--compare") as caught:
        read_reference(path, ["shrink"], "digits")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_reference_may_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(_results({})))
    assert set(read_reference(tmp_path, ["shrink", "instability"], "digits").claims) == {"shrink"}


def test_a_missing_reference_is_said_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["--data", "digits", "--out", str(out), "--compare", str(tmp_path / "none.json")]
    monkeypatch.setattr(sys, "argv", ["normwise", "reproduce", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not out.exists()
