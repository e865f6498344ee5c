"""The tables of README.md and docs/results/README.md, from docs/results/*/results.json.

    python -m benchmarks.reference_tables

rewrites what stands between the marks ``<!-- NAME -->`` and ``<!-- end of NAME -->``. A test compares the
pages with these tables, so no number in them is written by hand.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from normwise.lab.claims.changes import CHANGES
from normwise.lab.claims.conditions import SIGNS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
BUDGETS = ("quick", "full", "large")


def claims(budget: str) -> dict[str, Any]:
    """Return the claims of the reference results, in the order of the report; none if there are none yet."""
    if not (RESULTS / budget / "results.json").exists():
        return {}
    found = json.loads((RESULTS / budget / "results.json").read_text(encoding="utf-8"))["claims"]
    return dict(sorted(found.items(), key=lambda item: item[1]["order"]))


def results_table(budget: str) -> str:
    """Return the verdicts and answers of a budget."""
    if not claims(budget):
        return "Not run yet."
    rows = [
        f"| `{name}` | {claim['verdict']} | {claim['answer']} |" for name, claim in claims(budget).items()
    ]
    return "\n".join(["| claim | verdict | found |", "|---|---|---|", *rows])


def readme_table() -> str:
    """Return a line for each claim: verdicts of all budgets, and what the quick budget found."""
    others = {budget: claims(budget) for budget in BUDGETS[1:] if claims(budget)}
    rows = []
    for name, claim in claims("quick").items():
        signs = " | ".join(_sign(of.get(name)) for of in others.values())
        own = " (not in the paper)" if claim["source"].startswith("Not in the paper") else ""
        rows.append(f"| {claim['title']}{own} | {SIGNS[claim['verdict']]} | {claim['headline']} | {signs} |")
    head = f"| claim | quick | found in the quick budget | {' | '.join(others)} |"
    return "\n".join([head, f"|---|---|---{'|---' * len(others)}|", *rows])


def side_by_side() -> str:
    """Return the verdict of each claim in each budget that has been run."""
    found = {budget: claims(budget) for budget in BUDGETS if claims(budget)}
    rows = [
        f"| `{name}` | {' | '.join(_sign(of.get(name)) for of in found.values())} |"
        for name in found["quick"]
    ]
    return "\n".join([f"| claim | {' | '.join(found)} |", f"|---{'|---' * len(found)}|", *rows])


def _sign(claim: dict[str, Any] | None) -> str:
    return "–" if claim is None else SIGNS[claim["verdict"]]


def changes_list() -> str:
    """Return the changes of the registration."""
    return "\n".join(
        f"- {change.date}, {', '.join(change.claims) or 'all claims'}: {change.what} *Why:* {change.reason} "
        f"(“{change.commit}”)"
        for change in CHANGES
    )


def pages() -> dict[Path, dict[str, str]]:
    """Return the tables by page and mark."""
    return {
        ROOT / "README.md": {"claims": readme_table()},
        RESULTS / "README.md": {
            "side by side": side_by_side(),
            **{budget: results_table(budget) for budget in BUDGETS},
            "changes": changes_list(),
        },
    }


def main() -> None:
    """Rewrite the pages."""
    for page, tables in pages().items():
        text = page.read_text(encoding="utf-8")
        for name, table in tables.items():
            marked = re.compile(f"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
            places = list(marked.finditer(text))
            if len(places) != 1:
                raise ValueError(f"{page} has {len(places)} places marked {name}: it needs one")
            (place,) = places
            text = f"{text[: place.end(1)]}{table}\n{text[place.start(2) :]}"
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
