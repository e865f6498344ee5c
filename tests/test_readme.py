"""What the README and the reference results tell is what came out (tests/docs/ has code and links)."""

from __future__ import annotations

from pathlib import Path

from benchmarks.reference_tables import claims, pages

README = Path(__file__).parents[1] / "README.md"


def test_there_are_exactly_two_commands() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("make ")] == ["make reproduce", "make test"]


def test_the_tables_are_those_of_the_reference_results() -> None:
    """Verdicts and numbers alike: nothing in them is written by hand."""
    for page, tables in pages().items():
        text = page.read_text(encoding="utf-8")
        for name, table in tables.items():
            assert f"<!-- {name} -->\n{table}\n<!-- end of {name} -->" in text, (page, name)


def test_the_cells_of_no_tuning_are_counted_as_they_came_out() -> None:
    """The one result that the README tells in prose."""
    statistics = claims("full")["no-tuning"]["statistics"]
    counts = statistics["overall"]["counts"]
    set_ups = [name for name, cells in statistics.items() if "lr × 1, norm 1" in cells and "," in name]
    prose = " ".join(README.read_text(encoding="utf-8").split())
    assert len(set_ups) == 8
    assert (
        f"in {counts['better']} of {sum(counts.values())} settings, equivalent in {counts['equivalent']} and "
        f"worse in {counts['worse']}; {counts['undecided']} are undecided."
    ) in prose
