"""``report.html``: results.json as sentences, curves, heat maps and tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from markupsafe import Markup

from normwise.lab.claims.conditions import SIGNS
from normwise.lab.engine.store import write_atomically
from normwise.lab.report.dot_plots import dots_svg
from normwise.lab.report.heat_maps import heat_table
from normwise.lab.report.inline_svg import inline_svg, legend_key
from normwise.lab.report.paper_figures import Figure, heat_figure, plot_figure
from normwise.lab.report.plot_style import PALETTE, SHAPES, color_of, has_markers, number
from normwise.pages import data_block, environment, script_hash, vendored

__all__ = ["write_report"]


def write_report(results: dict[str, Any], path: Path) -> Path:
    """Write the page, and beside it ``figures/`` with each plot and heat map as SVG and PDF.

    The page is self-contained: it needs neither the network nor the figures. Without scripts it shows the
    same curves as static SVG.

    Args:
        results: The content of ``results.json``. Two parts are optional: ``results["comparison"]``, the
            result of :func:`normwise.lab.report.reference_comparison.compare`; and
            ``claim["runs"]["failed"]``, which says how each unfinished run ended, by identity.
        path: Path of the page, which is overwritten.

    Returns:
        ``path``.
    """
    claims = sorted(results["claims"].items(), key=lambda item: item[1]["order"])
    page = _page(results, claims)
    try:
        _write_figures(claims, path.parent / "figures")
        write_atomically(path, page)
    except OSError as error:
        raise ValueError(
            f"--out {path.parent} cannot be written to ({error.strerror}: {error.filename}): give another "
            "folder"
        ) from error
    return path


def _page(results: dict[str, Any], claims: list[tuple[str, dict[str, Any]]]) -> str:
    templates = environment("normwise.lab.report")
    library = vendored("uplot/uPlot.iife.min.js")
    script = Markup(templates.get_template("report.js").render())  # safe: contains none of the results
    return templates.get_template("report.html").render(
        claims=[_claim(name, claim, results) for name, claim in claims],
        tally=[
            (verdict, SIGNS[verdict], sum(claim["verdict"] == verdict for _, claim in claims))
            for verdict in SIGNS
        ],
        own=sum(_is_own(claim) for _, claim in claims),
        experiments=list(dict.fromkeys(filter(None, (c["protocol"].get("experiments") for _, c in claims)))),
        changes=_all_changes(claims),
        runs=_runs(claims),
        finished=results["finished"],
        colors=len(PALETTE),
        shapes=data_block(SHAPES),
        library=library,
        library_style=vendored("uplot/uPlot.min.css"),
        library_license=vendored("uplot/LICENSE"),
        script=script,
        script_sources=f"{script_hash(library)} {script_hash(script)}",
    )


def _write_figures(claims: list[tuple[str, dict[str, Any]]], folder: Path) -> None:
    if folder.is_symlink():
        raise ValueError(f"{folder} is a symbolic link: remove it, or give another folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    for name, claim in claims:
        for k, plot in enumerate(claim["plots"]):
            _write_figure(plot_figure(plot), folder, f"{name}-{k + 1}")
        for k, heat in enumerate(claim.get("maps", ())):
            _write_figure(heat_figure(heat), folder, f"{name}-map-{k + 1}")


def _write_figure(figure: Figure, folder: Path, name: str) -> None:
    if (folder / name).parent != folder:
        raise ValueError(f"figure {name!r:.60} would be outside {folder}: give the claim another name")
    write_atomically(folder / f"{name}.svg", figure.svg)
    write_atomically(folder / f"{name}.pdf", figure.pdf)


def _runs(claims: list[tuple[str, dict[str, Any]]]) -> dict[str, int]:
    """Count the runs; a run that several claims use counts once."""
    identities = {identity for _, claim in claims for identity in claim["runs"]["identities"]}
    failed = {identity for _, claim in claims for identity in claim["runs"].get("failed", ())}
    most = max((claim["runs"]["not_finished"] for _, claim in claims), default=0)  # where "failed" is missing
    return {"count": len(identities), "not_finished": max(len(failed), most)}


def _claim(name: str, claim: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """Return a claim with the additional entries that the template needs."""
    seeds = claim["protocol"]["seeds"]
    return {
        "changes": (),
        "failures_are_the_subject": False,
        **claim,
        "name": name,
        "headline": claim.get("headline") or "",
        "own": _is_own(claim),
        "sign": SIGNS[claim["verdict"]],
        "word": claim["verdict"].split()[0],
        "figures": [_figure(plot, f"{name}-{k + 1}", seeds) for k, plot in enumerate(claim["plots"])],
        "traces": [
            _figure(plot, f"{name}-trace-{k + 1}", seeds) for k, plot in enumerate(claim.get("traces", ()))
        ],
        "maps": [
            {**heat, "id": f"{name}-map-{k + 1}", "table": heat_table(heat)}
            for k, heat in enumerate(claim.get("maps", ()))
        ],
        "numbers": list(_numbers(claim["statistics"])),
        "failed": claim["runs"].get("failed", {}),
        "comparison": _comparison((results.get("comparison") or {}).get("claims", {}).get(name)),
        "command": _command(name, claim["protocol"]),
    }


def _is_own(claim: dict[str, Any]) -> bool:
    """Whether a claim is not in the paper."""
    return bool(claim["source"].startswith("Not in the paper"))


def _all_changes(claims: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the changes of all claims, each once."""
    found = {
        (change["date"], change["commit"], change["what"]): change
        for _, claim in claims
        for change in claim.get("changes") or ()
    }
    return sorted(found.values(), key=lambda change: str(change["date"]))


def _comparison(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the comparison of a claim with the reference: a sentence, and a row per remarkable statistic."""
    if found is None:
        return None
    differ = sum(not row["agrees"] for row in found["rows"])
    verdicts = found["verdict"]
    return {
        "explanation": found.get("explanation") or [],
        "sentence": f"The verdict is “{verdicts['here']}” here and “{verdicts['reference']}” in the "
        f"reference. Of {found['compared']} statistics that both have, {found['outside']} are outside the 95 "
        f"% interval of their difference, where chance alone would put about {found['compared'] / 20:.0f}; "
        f"{differ} differ after Holm's correction.",
        "rows": [
            [
                row["statistic"].replace("_", " "),
                *(_interval(row[part]) for part in ("here", "reference")),
                "no" if row["agrees"] else "yes",
            ]
            for row in found["rows"]
            if not (row["agrees"] and row["inside"])
        ],
    }


def _command(name: str, protocol: dict[str, Any]) -> str:
    if protocol["budget"] == "own":
        seeds = protocol["seeds"]
        return f"normwise compare {protocol['data'].removeprefix('own:')} --seeds {seeds[0]}-{seeds[-1]}"
    return (
        f"normwise reproduce {name} --data {protocol['data']} --budget {protocol['budget']} "
        f"--seeds {protocol['seeds'][0]}-{protocol['seeds'][-1]}"
    )


def _figure(plot: dict[str, Any], identifier: str, seeds: list[int]) -> dict[str, Any]:
    """Return a plot for the template, with the data of the curves for the script."""
    series = [
        {
            **{
                part: curve[part] for part in ("label", "x", "y", "low", "high", "by_seed") if curve.get(part)
            },
            "dashed": int(curve["dashed"]),
            "color": color_of(curve, k),
            "shape": k % len(SHAPES) if has_markers(curve) else None,
        }
        for k, curve in enumerate(plot["series"])
    ]
    axes = {part: plot[part] for part in ("title", "x_label", "y_label", "log_x", "log_y")}
    return {
        **axes,
        "id": identifier,
        "dots": bool(plot.get("categories")),
        "svg": dots_svg(plot) if plot.get("categories") else inline_svg(plot, identifier),
        "legend": [(legend_key(curve, k), curve["label"]) for k, curve in enumerate(plot["series"])],
        "bands": any(curve["low"] is not None and curve["high"] is not None for curve in plot["series"]),
        "data": data_block({**axes, "seeds": seeds, "series": series}),
    }


def _numbers(value: Any, names: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Yield the name and text of every number of the statistics; an estimate counts as one number."""
    if isinstance(value, dict) and {"mean", "low", "high", "n"} <= set(value):
        yield " · ".join(names), f"{_interval(value)}, n = {value['n']}"
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from _numbers(part, (*names, str(name).replace("_", " ")))
    elif isinstance(value, list) and any(isinstance(part, (dict, list)) for part in value):
        for k, part in enumerate(value):
            yield from _numbers(part, (*names, str(k + 1)))
    else:
        yield " · ".join(names), _text(value)


def _interval(estimate: dict[str, Any]) -> str:
    mean, low, high = (
        "–" if estimate[part] is None else number(estimate[part]) for part in ("mean", "low", "high")
    )
    return f"{mean} [{low}, {high}]"


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(value) if isinstance(value, float) else str(value)
