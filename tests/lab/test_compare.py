"""``normwise compare`` on the network that its page shows."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.docs.pages import ROOT, blocks
from tests.pages import made_up_results

import normwise as nw
from normwise import cli
from normwise.lab import compare as module
from normwise.lab.compare import compare
from normwise.lab.report.results_file import read_results
from normwise.lab.runs.own import OwnRun, source_of

PAGE = (ROOT / "docs" / "how-to" / "compare-rules.md").read_text("utf-8")
(CODE,) = blocks(PAGE, "python")
(COMMAND,) = re.findall(r"^normwise (compare .*)$", PAGE, re.MULTILINE)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The page's example with one epoch, as a module of a name of its own."""
    name = f"mine_{tmp_path.name.replace('-', '_')}"
    assert CODE.count(" * 20") == 1
    (tmp_path / f"{name}.py").write_text(CODE.replace(" * 20", ""), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with made_up_results.without_figures():
        yield f"{name}:setup"
    sys.modules.pop(name, None)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["normwise", *arguments])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.thorough
def test_the_command_of_the_page_leaves_three_claims_and_resumes(
    mine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = COMMAND.replace("mine:setup", mine).replace("--seeds 3", "--seeds 2").split()
    assert command(monkeypatch, *arguments, "--json") == 0
    output = capsys.readouterr()
    found = json.loads(output.out)
    assert found["claims"] == read_results(tmp_path / "compared")["claims"]
    assert set(found["claims"]) == {"shrink", "initialization", "no-tuning"}
    for claim in found["claims"].values():
        assert claim["verdict"] in ("reproduced", "undecided", "partly", "not reproduced")
        assert claim["headline"]
        assert claim["changes"] == []
        for place in claim["thresholds"]:
            at = claim["statistics"]
            for key in place.split(" / "):
                at = at[key]
            assert {"mean", "low", "high"} <= at.keys()
    assert found["claims"]["initialization"]["runs"]["count"] == 3 * (2 * 2 + 3 + 2)
    # the usual rate and scale is one cell for all three claims
    assert len(list((tmp_path / "compared" / "runs").iterdir())) == 5 * (2 * 2 + 3 + 2)
    page = (tmp_path / "compared" / "report.html").read_text("utf-8")
    assert f"normwise compare {mine} --seeds 0-1" in page

    assert command(monkeypatch, *arguments) == 0
    output = capsys.readouterr()
    assert "all runs are done already" in output.err
    assert "no-tuning" in output.out


def test_rules_and_scales_act_on_what_is_invariant_alone(mine: str) -> None:
    base = OwnRun(target=mine, source=source_of(mine))
    lines = []
    for scale in (1.0, 1e3):
        logged: list[float] = []
        summary = OwnRun(**(vars(base) | {"rule": "none", "init_scale": scale})).run(
            lambda line, kept=logged: kept.append(line["train_loss"])  # type: ignore[misc]
        )
        assert summary["status"] == "finished"
        lines.append((logged, summary["initial_loss"]))
    assert lines[0][0][0] == pytest.approx(lines[1][0][0], rel=1e-4)  # the first loss is before any step
    assert lines[0][0][-1] != pytest.approx(lines[1][0][-1], rel=1e-3)


def test_l2_has_the_coefficient_that_its_page_says(mine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = nw.Decay

    def spy(optimizer: torch.optim.Optimizer, rule: nw.Rule, *arguments: object, **more: object) -> nw.Decay:
        seen.append(rule)
        return original(optimizer, rule, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(nw, "Decay", spy)
    OwnRun(target=mine, source=source_of(mine), rule="l2", multiple=10.0).run(lambda line: None)
    (rule,) = seen
    assert isinstance(rule, nw.L2)
    steps = 23  # 1137 training images in batches of 50
    assert rule.strength == pytest.approx(30 / (0.05 * (steps + 1)))  # Σlr of half a cosine


def test_a_changed_file_is_another_run(mine: str, tmp_path: Path) -> None:
    before = source_of(mine)
    file = tmp_path / f"{mine.partition(':')[0]}.py"
    file.write_text(file.read_text("utf-8") + "# changed\n", encoding="utf-8")
    assert source_of(mine) != before
    one, other = (OwnRun(target=mine, source=source) for source in (before, source_of(mine)))
    assert one.identity != other.identity


BROKEN = """
import torch
def pair(): return 1, 2
def wrong_model(): return (lambda: 3), (lambda part, seed: []), None.__class__
def raises(): raise OSError("no disk")
def plain(): return (lambda: torch.nn.Linear(2, 2)), (lambda part, seed: [(torch.ones(1, 2), 0)]), print
def empty():
    net = lambda: torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
    return net, (lambda part, seed: []), print
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["broken"], "'broken' names nothing: give package.module:name"),
        (["nowhere:setup"], "'nowhere' cannot be imported: "),
        (["broken:pair"], "'broken:pair' returned a tuple: return the three functions model, data and loss"),
        (["broken:raises"], "'broken:raises' raised OSError: "),
        (
            ["broken:plain", "--rules", "l2,none"],
            "--rules l2,none compares nothing: give aws, and l2, none or both",
        ),
        (
            ["broken:plain", "--rules", "l2,awz"],
            "--rules l2,awz: 'awz' is not known: choose from none, l2, aws",
        ),
        (["broken:plain", "--optimizer", "lamb"], "--optimizer lamb is not known: choose from sgd, adamw"),
        (["broken:plain", "--lr", "0"], "--lr 0.0 is not possible: give a positive number"),
        (["broken:plain", "--seeds", "1"], "--seeds 1 is not possible"),
        (["broken:plain", "--device", "cuda:7"], "--device cuda:7 is not possible"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "broken.py").write_text(BROKEN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    assert command(monkeypatch, "compare", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"normwise: {message}")
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "compared").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrong_model", "model() made a int, and a torch.nn.Module is needed"),
        ("plain", "no weight of its model is scale-invariant, so there is nothing to compare"),
        ("empty", "data('train', 0) gave no batches"),
    ],
)
def test_what_a_run_finds_out_is_one_line_too(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text(BROKEN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    with pytest.raises(ValueError, match="failed: ValueError") as caught:
        compare(f"broken:{name}", out=tmp_path / "out", seeds=2)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_that_does_not_finish_scores_its_initial_network() -> None:
    class Runs:
        def summaries(self, run: OwnRun, seeds: list[int]) -> list[dict[str, object]]:
            return [
                {"status": "finished", "test_loss": 1.0, "initial_loss": 3.0},
                {"status": "not finite", "initial_loss": 2.0},
            ]

    run = OwnRun(target="a:b", source="")
    assert module._losses(Runs(), run, [0, 1]) == [1.0, 2.0]  # type: ignore[arg-type]
