"""A results.json may be damaged in any way: the report and the comparison take it, or say one line."""

from __future__ import annotations

import functools
import json
import operator
import os
import re
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.pages import made_up_results
from tests.pages.checker import Page
from tests.pages.made_up_results import NASTY

from normwise.cli import main
from normwise.lab.claims.exhibits import LARGEST, HeatMap, Plot, Series, Table, dot_plot
from normwise.lab.claims.statistics import Estimate
from normwise.lab.report.html_report import write_report
from normwise.lab.report.inline_svg import inline_svg
from normwise.lab.report.paper_figures import plot_figure
from normwise.lab.report.reference_comparison import Reference, compare, read_reference
from normwise.lab.report.results_file import MOST_BYTES, read_results
from normwise.lab.reproduce import rebuild_report

REPOSITORY = Path(__file__).parents[3]
FUZZ = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def _claim() -> dict[str, Any]:
    """Return a claim with one small exhibit of each kind."""
    claim = made_up_results.claim(Random(0), 2, plots=0, maps=0, tables=0, traces=0)
    x = [0.1, 1.0, 10.0]
    curves = [
        Series("AWS", x, [1.0, 2.0, 3.0], [0.0, 1.0, 2.0], [2.0, 3.0, 4.0], by_seed=[[1.0, 2.0, None]]),
        Series("L2", x, [1.0, None, 3.0], dashed=True, color=3),
    ]
    plot = asdict(Plot("accuracy", "norm", "accuracy (%)", curves, log_x=True))
    heat = asdict(HeatMap("accuracy", "rate", "decay", ["1", "2"], ["3"], [[1.0, None]], "%", low=0.0))
    table = asdict(Table("accuracy", ["rule", "accuracy"], [["AWS", 97.1], ["L2", None]]))
    dots = asdict(
        dot_plot("ahead", "points", {"L2": Estimate(1.0, 0.5, 1.5, 3), NASTY: Estimate(2, 1, 3, 3)})
    )
    return claim | {"plots": [plot, dots], "traces": [plot], "maps": [heat], "tables": [table]}


def _good() -> dict[str, Any]:
    claims = {"shrink": _claim(), "instability": _claim()}
    results = made_up_results.results(claims)
    results["comparison"] = compare(results, Reference("earlier", claims), list(claims))
    return dict(json.loads(json.dumps(results)))


def _places(tree: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of every entry of a tree."""
    for key in tree if isinstance(tree, dict) else range(len(tree)):
        yield (*place, key)
        if isinstance(tree[key], dict | list):
            yield from _places(tree[key], (*place, key))


GOOD = _good()
# Places by kind of entry, so that entries of long lists are not damaged more often than others.
PLACES: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
for one in _places(GOOD):
    PLACES.setdefault(tuple("*" if isinstance(key, int) else key for key in one), []).append(one)
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**400, -(10**30), 1e308, 5e-324, float("nan"), float("inf"), -float("inf"), -0.0]),
    st.sampled_from(
        ["", "a", NASTY, "../../../X", "\ud800", "\x00\x1b[2J", "$x_", "[/b]", "1.5", "n" * 20_000]
    ),
    st.sampled_from([[], {}, [[]], [None], {"mean": "a", "low": 0, "high": 0, "n": 3}, {"../x": 1}]),
    st.floats(allow_nan=False),
    st.text(max_size=5),
)


@st.composite
def _damaged(draw: Any) -> bytes:
    """Draw the text of results with one to three entries deleted, replaced, retyped, repeated or renamed."""
    results = deepcopy(GOOD)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(list(PLACES.values())).flatmap(st.sampled_from))
        try:
            holder, key = functools.reduce(operator.getitem, place[:-1], results), place[-1]
            value = holder[key]
        except (KeyError, IndexError, TypeError):  # it was damaged already
            continue
        what = draw(st.sampled_from(["delete", "replace", "retype", "repeat", "rename"]))
        if what == "delete":
            del holder[key]
        elif what == "replace":
            holder[key] = deepcopy(draw(ODD))
        elif what == "retype":
            holder[key] = draw(st.sampled_from([[value], {"a": value}, str(value), None]))
        elif isinstance(holder, list):
            holder.insert(key, deepcopy(value))
        else:
            holder[draw(st.sampled_from(["../../../X", "a b", "", NASTY, *holder]))] = deepcopy(value)
            if what == "rename":
                holder.pop(key, None)
    text = json.dumps(results).encode()
    kind = draw(st.sampled_from(["whole"] * 8 + ["cut", "byte", "twice"]))
    at: int = draw(st.integers(0, len(text) - 1))
    if kind == "cut":
        return text[:at]
    if kind == "byte":
        return b"".join((text[:at], draw(st.binary(min_size=1, max_size=2)), text[at + 1 :]))
    return text[:-1] + b"," + text[1:] if kind == "twice" else text


def _or_one_line(act: Callable[[], Any]) -> Any:
    """Return the result, or the message of a ValueError, which must be one short line."""
    try:
        return act()
    except ValueError as error:
        message = str(error)
    assert len(message.splitlines()) == 1
    assert len(message) < 600
    return message


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@FUZZ
@given(_damaged())
def test_damaged_results_become_a_report_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, text: bytes
) -> None:
    outer = tmp_path_factory.mktemp("outer")
    out = outer / "a" / "b" / "c" / "out"
    (outer / "results.json").write_bytes(text)
    with made_up_results.without_figures():
        path = _or_one_line(lambda: rebuild_report(outer, out))
    if isinstance(path, str):
        assert path.startswith(str(outer / "results.json"))
        return
    page = path.read_text(encoding="utf-8")
    assert "<script>alert" not in page
    kinds = r"report\.html|normwise\.json|runs|figures(/(shrink|instability)-(map-)?\d+\.(svg|pdf))?"
    assert all(re.fullmatch(kinds, name) for name in _files(out))
    assert _files(outer) - {f"a/b/c/out/{name}" for name in _files(out)} == {
        "results.json",
        "a",
        "a/b",
        "a/b/c",
        "a/b/c/out",
    }


@FUZZ
@given(_damaged())
def test_a_damaged_reference_is_compared_with_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, text: bytes
) -> None:
    path = tmp_path_factory.mktemp("reference") / "results.json"
    path.write_bytes(text)
    names = list(GOOD["claims"])
    reference = _or_one_line(lambda: read_reference(path, names, "digits"))
    if isinstance(reference, str):
        assert reference.startswith(f"--compare {path} ")
        return
    json.dumps(compare(GOOD, reference, names), allow_nan=False)


NUMBER = st.one_of(
    st.none(),
    st.floats(-LARGEST, LARGEST).filter(lambda v: v == 0 or abs(v) >= 1 / LARGEST),
    st.sampled_from([0.0, -0.0, LARGEST, -LARGEST, 1 / LARGEST, 1.0, 1.0 + 2**-52]),
)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.lists(st.tuples(NUMBER, NUMBER).filter(lambda p: p[0] is not None), max_size=4), st.booleans())
def test_every_number_that_is_read_can_be_drawn(points: list[tuple[Any, Any]], log: bool) -> None:
    series = Series("s", [x for x, _ in points], [y for _, y in points])
    plot = asdict(Plot("t", "x", "y", [series], log_x=log, log_y=log))
    assert not re.search("nan|inf", inline_svg(plot, "p"))
    assert plot_figure(plot).pdf.startswith(b"%PDF")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("plots", 0, "series", 1, "x"), "a", "claims.shrink.plots[0].series[1].x is 'a', not a list"),
        (
            ("plots", 0, "series", 1, "x", 2),
            "3",
            "claims.shrink.plots[0].series[1].x[2] is '3', not a number",
        ),
        (("plots", 0, "series", 1, "y", 2), float("nan"), "y[2] is nan, not a number that can be drawn"),
        (("plots", 0, "series", 0, "low"), [1.0], "plots[0].series[0]: low has 1 values, x has 3"),
        (("maps", 0, "values", 0), [1.0], "maps[0]: values[0] has 1 entries, there are 2 columns"),
        (("maps", 0, "y"), ["a", "b"], "maps[0]: values has 1 rows, y has 2 labels"),
        (("tables", 0, "rows", 0), [], "tables[0]: rows[0] has 0 entries, there are 2 columns"),
        (
            ("tables", 0, "rows", 0, 0),
            [1],
            "rows[0][0] is a list, not text or a number or an integer or null",
        ),
        (("statistics", "difference", "mean"), "a", "statistics.difference.mean is 'a', not a number"),
        (("statistics", "difference", "low"), 9.0, "statistics.difference: low 9.0 is above high 0.3"),
        (("statistics", "other"), float("inf"), "statistics.other is inf, not a number up to 1e+150"),
        (("verdict",), "fine", "claims.shrink.verdict is 'fine', not 'reproduced' or 'partly' or 'undec"),
        (("order",), True, "claims.shrink.order is True, not an integer"),
        (("title",), "\x1b[2J", "claims.shrink.title has a character that no page can show"),
        (("protocol", "data"), "digits; rm *", "protocol: data 'digits; rm *' is not one of fashion-mnist, "),
        (("runs", "count"), 3, "claims.shrink.runs: count is 3, but there are 20 identities"),
        (("unknown",), [{"deep": float("nan")}], "claims.shrink.unknown[0].deep is nan"),
    ],
)
def test_a_wrong_entry_is_named(place: tuple[Any, ...], value: Any, message: str, tmp_path: Path) -> None:
    results = deepcopy(GOOD)
    holder = results["claims"]["shrink"]
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match="is damaged") as caught:
        read_results(tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"format": 1, "format": 1}', "the key 'format' is there twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"[" * 60 + b"]" * 60 + b"}", "is nested too deeply"),
        (b"\xff\xfe\x00", "can't decode byte 0xff"),
        (b"", "Expecting value"),
        (b'{"claims": ' + b"9" * 5000 + b"}", "is damaged"),
    ],
)
def test_a_damaged_file_is_one_line(text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_bytes(text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_results(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../../../X", "/X", "shrink-1", "", NASTY])
def test_a_claim_that_is_not_known_is_refused(name: str, tmp_path: Path) -> None:
    results = deepcopy(GOOD)
    results["claims"][name] = results["claims"].pop("shrink")
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match="is not a claim of this version: it has constant-regularizer, "):
        read_results(tmp_path)


@pytest.mark.parametrize("budget", ["quick", "full"])
def test_the_reference_results_can_be_read(budget: str) -> None:
    assert len(read_results(REPOSITORY / "docs" / "results" / budget)["claims"]) == 13


def _with_attacks(value: Any) -> Any:
    """Return a copy in which every text that may be any text is an attack."""
    if isinstance(value, dict):
        kept = ("verdict", "data", "budget", "here", "reference")
        return {key: part if key in kept else _with_attacks(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_with_attacks(part) for part in value]
    return NASTY if isinstance(value, str) else value


def test_every_text_is_escaped(tmp_path: Path) -> None:
    results = _with_attacks(GOOD)
    for claim in results["claims"].values():
        claim["statistics"] = {NASTY: NASTY}
        claim["runs"]["failed"] = {NASTY: NASTY}
        claim["protocol"]["environment"] = {NASTY: NASTY}
    (tmp_path / "results.json").write_text(json.dumps(results))
    with made_up_results.without_figures():
        page = write_report(read_results(tmp_path), tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert [tag for tag, _ in Page(page).tags].count("script") == 3 + 4
    assert page.count("&lt;script&gt;alert") > 100


def test_exhibits_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match="y has 1 values, x has 2"):
        Series("s", [1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match=re.escape("by_seed[1] has 0 values, x has 1")):
        Series("s", [1.0], [1.0], by_seed=[[1.0], []])
    with pytest.raises(ValueError, match="there are 2 columns"):
        HeatMap("t", "x", "y", ["a", "b"], ["c"], [[1.0]], "%")
    with pytest.raises(ValueError, match="there are 1 columns"):
        Table("t", ["a"], [[1, 2]])


def test_no_figure_is_written_outside_the_folder(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    for name in ("../../X", str(tmp_path / "X")):
        results = made_up_results.results({name: made_up_results.claim(Random(0), 0)})
        with made_up_results.without_figures(), pytest.raises(ValueError, match="would be outside"):
            write_report(results, out / "report.html")
    (out / "figures").rmdir()
    (tmp_path / "elsewhere").mkdir()
    (out / "figures").symlink_to(tmp_path / "elsewhere")
    with made_up_results.without_figures(), pytest.raises(ValueError, match="is a symbolic link"):
        write_report(GOOD, out / "report.html")
    (out / "figures").unlink()
    (out / "figures").mkdir()
    for kind in ("svg", "pdf"):
        (out / "figures" / f"shrink-1.{kind}").symlink_to(tmp_path / "elsewhere" / kind)
    with made_up_results.without_figures():
        write_report(GOOD, out / "report.html")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def _report(*arguments: object, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["normwise", "report", *map(str, arguments)])
    with made_up_results.without_figures(), pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_the_report_can_be_written_to_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (there / "results.json").write_text(json.dumps(GOOD))
    for k, source in enumerate((there, there / "results.json")):
        assert _report(source, "--out", tmp_path / f"here {k}", monkeypatch=monkeypatch) == 0
        assert (tmp_path / f"here {k}" / "report.html").exists()
    assert [path.name for path in there.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "is damaged (it is not a regular file)"),
        (os.mkfifo, "is damaged (it is not a regular file)"),
        (lambda path: path.symlink_to(path), "cannot be read"),
        (lambda path: path.symlink_to("/dev/zero"), "is damaged (it is not a regular file)"),
        (
            lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_RDWR), MOST_BYTES + 1),
            "has 64000001 bytes",
        ),
        (lambda path: None, "does not exist: give the --out of a finished normwise reproduce"),
    ],
)
def test_results_that_are_no_file_are_one_line(
    make: Any,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make(tmp_path / "results.json")
    assert _report(tmp_path, monkeypatch=monkeypatch) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    with pytest.raises(ValueError, match="--compare"):
        read_reference(tmp_path, ["shrink"], "digits")


@pytest.mark.parametrize("blocked", ["out", "out/report.html", "out/figures", "out/figures/shrink-1.pdf"])
def test_what_is_in_the_way_is_one_line_that_names_an_option(
    blocked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_text(json.dumps(GOOD))
    assert _report(tmp_path, "--out", tmp_path / "out", monkeypatch=monkeypatch) == 0
    capsys.readouterr()
    path = tmp_path / blocked
    path.rename(tmp_path / "away")
    if path.suffix:
        path.mkdir()
    else:
        path.write_text("in the way")
    assert _report(tmp_path, "--out", tmp_path / "out", monkeypatch=monkeypatch) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"normwise: --out {tmp_path / 'out'} ")
    assert "folder" in said
    assert len(said.splitlines()) == 1
