from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tests.inspection import factories
from typer.testing import CliRunner

import normwise as nw
from normwise import cli
from normwise.inspection.batches import random_inputs
from normwise.inspection.inspect import Inspection, inspect
from normwise.inspection.models import load
from normwise.inspection.terminal import text

HERE = "tests.inspection.factories"


def test_a_factory_with_random_inputs_gives_the_plan_of_the_model() -> None:
    found = inspect(f"{HERE}:resnet", shapes=["8x3x8x8"])
    assert found.plan.verdicts["stem.weight"] == "shrink"
    assert found.plan.verdicts["fc.weight"] == "balance"
    tokens = inspect(f"{HERE}:gpt", shapes=["4,7:int64"])
    assert tokens.plan.verdicts["emb.weight"] == "shrink"


def test_batches_from_a_file_or_a_function_give_the_same(tmp_path: Path) -> None:
    random = inspect(f"{HERE}:resnet", shapes=["8x3x8x8"]).plan
    save_file({"x": torch.randn(8, 3, 8, 8)}, tmp_path / "named.safetensors")
    save_file({"0": torch.randn(8, 3, 8, 8)}, tmp_path / "placed.safetensors")
    for options in (
        {"batch": tmp_path / "named.safetensors"},
        {"batch": tmp_path / "placed.safetensors"},
        {"batches": f"{HERE}:batches"},
    ):
        found = inspect(f"{HERE}:resnet", **options)
        assert found.plan.verdicts == random.verdicts


def test_several_inputs_go_in_by_position_and_a_class_or_a_model_is_a_factory_too() -> None:
    found = inspect(f"{HERE}:TwoInputs", shapes=["6x4", "6:int64"])
    assert set(found.plan.verdicts) == {"emb.weight", "fc.weight", "fc.bias"}
    assert inspect(f"{HERE}:a_model", shapes=["8x3"]).plan.verdicts["0.weight"] == "L2"


def test_modules_of_the_working_directory_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_here_normwise.py").write_text(
        "import torch\nnet = torch.nn.Linear(2, 2)\n", encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    assert isinstance(load("only_here_normwise:net"), torch.nn.Linear)


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        (None, {}, "give either a factory"),
        (f"{HERE}:gpt", {"transformers": "gpt2"}, "give either a factory"),
        ("gpt", {"shapes": ["2"]}, "names nothing"),
        ("no_such_package.models:gpt", {"shapes": ["2"]}, "cannot be imported: No module named"),
        (
            "no_such.py:gpt",
            {"shapes": ["2"]},
            "'no_such.py' is a path: go to its folder and give 'no_such:gpt'",
        ),
        ("a/b.py:gpt", {"shapes": ["2"]}, "give 'b:gpt'"),
        ("a\nb:gpt", {"shapes": ["2"]}, r"'a\\nb' cannot be imported"),
        (f"{HERE}:nothing", {"shapes": ["2"]}, "has no attribute 'nothing'"),
        (f"{HERE}:no\nthing", {"shapes": ["2"]}, "has no attribute"),
        (f"{HERE}:raising", {"shapes": ["2"]}, r"raised KeyError: .* \(factories.py, line \d+\)"),
        (f"{HERE}:asserting", {"shapes": ["2x3"]}, r"AssertionError: three .*\(factories.py, line \d+\)"),
        (f"{HERE}:resnet", {"batches": f"{HERE}:lazy_batches"}, r"KeyError: 'x' \(factories.py, line \d+\)"),
        (f"{HERE}:a_model", {"batches": f"{HERE}:mappings"}, r"--forward FUNCTION, where .*batch\['image'\]"),
        (f"{HERE}:resnet", {"shapes": ["99999999x99999"]}, "needs 2.4e.05 GB of memory: give smaller"),
        (f"{HERE}:resnet", {"shapes": ["8x3x8x8"], "forward": f"{HERE}:number"}, "must be a function"),
        (f"{HERE}:stopping", {"shapes": ["2"]}, "raised SystemExit: usage"),
        (f"{HERE}:number", {"shapes": ["2"]}, "is a int: give a function"),
        (f"{HERE}:text", {"shapes": ["2"]}, "made a str, and a torch.nn.Module is needed"),
        (f"{HERE}:resnet", {}, "needs inputs"),
        (f"{HERE}:resnet", {"shapes": ["8x3x"]}, "is no shape"),
        (f"{HERE}:resnet", {"shapes": ["8x0"]}, "has 0 values"),
        (f"{HERE}:resnet", {"shapes": ["8x3:float99"]}, "'float99' is not one of"),
        (f"{HERE}:resnet", {"shapes": ["8x4x8x8"]}, r"the model failed on batch . .*\(8, 4, 8, 8\)"),
        (
            f"{HERE}:resnet",
            {"batch": Path("nowhere.safetensors")},
            "--batch 'nowhere.safetensors' cannot be read",
        ),
        (f"{HERE}:resnet", {"shapes": ["2"], "batches": "a:b"}, "--input and --batches are given"),
        (f"{HERE}:resnet", {"batches": f"{HERE}:raising"}, "raised KeyError"),
        (f"{HERE}:resnet", {"shapes": ["8x3x8x8"], "overrides": {"x": "none"}}, "matches no parameter"),
    ],
)
def test_bad_input_is_one_line(factory: str | None, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        inspect(factory, **options)
    assert "\n" not in str(caught.value)


def test_a_function_says_how_the_model_is_called() -> None:
    found = inspect(f"{HERE}:a_model", batches=f"{HERE}:mappings", forward=f"{HERE}:image")
    assert found.plan.verdicts == inspect(f"{HERE}:a_model", shapes=["8x3"]).plan.verdicts


def test_a_path_is_refused_before_the_script_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "script.py").write_text("open('ran', 'w')\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is a path"):
        load("script.py:net")
    assert not (tmp_path / "ran").exists()


def _refusal(call: Callable[[], object]) -> str:
    """Return what a call says when it refuses, or nothing."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


@settings(max_examples=200, deadline=None)
@given(st.text("ab0.:/\\\n é-", max_size=12))
def test_any_name_of_a_factory_is_one_line(name: str) -> None:
    refusal = _refusal(lambda: load(name))
    assert refusal
    assert "\n" not in refusal


@settings(max_examples=200, deadline=None)
@given(st.lists(st.from_regex(r"[0-9x,:intfloa643 \n-]{0,14}", fullmatch=True), min_size=1, max_size=2))
def test_any_input_is_drawn_or_refused_in_one_line(texts: list[str]) -> None:
    with mock.patch("normwise.inspection.batches._memory", return_value=10**6):  # 1 MB at most
        assert "\n" not in _refusal(lambda: random_inputs(texts, torch.nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "normwise: stopped"),
        (ValueError("two\nlines"), 2, "normwise: two lines"),
        (OSError(28, "No space left on device"), 2, "normwise: the output or a file: No space left on"),
        (BrokenPipeError(), 2, "normwise: the output was closed"),
    ],
    ids=repr,
)
def test_a_command_ends_in_one_line_and_an_exit_code(
    error: BaseException, code: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr("normwise.inspection.inspect.inspect", fail)
    result = CliRunner().invoke(cli.app, ["inspect", f"{HERE}:gpt"])
    assert result.exit_code == code
    assert result.stderr.startswith(words)
    assert len(result.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def gpt() -> Inspection:
    return inspect(f"{HERE}:gpt", shapes=["4x7:int64"])


def test_the_terminal_view_fits_80_columns_and_says_everything(gpt: Inspection) -> None:
    view = text(gpt)
    assert max(map(len, view.splitlines())) <= 80
    for words in (
        "SHRINK  parameters: 8",
        "attn.{0-1}.qkv.weight ×2",
        "by row, 16 of 24",
        "decay balances the two sides and regularises their product",
        "8 JOINT SYMMETRIES",
        "attn.*.qkv.weight +1, attn.*.o.weight −1",
    ):
        assert words in view


def test_100_parameters_read_as_a_few_lines() -> None:
    found = inspect(f"{HERE}:deep", shapes=["16x4"])
    assert len(found.plan.treatments) == 100
    view = text(found)
    assert len(view.splitlines()) < 60
    assert max(map(len, view.splitlines())) <= 80


def test_json_is_a_plan_that_loads(gpt: Inspection, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(gpt.to_json(), encoding="utf-8")
    whole = json.loads(gpt.to_json())
    assert whole["model"] == f"{HERE}:gpt"
    assert whole["counts"]["shrink"]["parameters"] == 8
    loaded = nw.Plan.load(tmp_path / "plan.json", factories.gpt())
    assert loaded.treatments == gpt.plan.treatments


def test_the_command_prints_and_writes(tmp_path: Path) -> None:
    arguments = ["inspect", f"{HERE}:gpt", "--input", "4x7:int64"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0
    assert "SHRINK" in result.stdout
    result = CliRunner().invoke(cli.app, [*arguments, "--json", "--html", str(tmp_path / "page.html")])
    assert json.loads(result.stdout)["what"] == "normwise plan"
    assert (tmp_path / "page.html").exists()


def test_bad_input_of_the_command_is_exit_code_2() -> None:
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            "from normwise.cli import main; main()",
            "inspect",
            "no_such:thing",
            "--input",
            "2",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr == ("normwise: 'no_such' cannot be imported: No module named 'no_such'\n")


_GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 24, "vocab_size": 23}


@pytest.mark.filterwarnings("ignore")
def test_a_configuration_of_transformers_needs_no_inputs(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(_GPT2), encoding="utf-8")
    found = inspect(None, transformers=str(path))
    tied = found.plan.treatments[0]
    assert (tied.name, tied.aliases, tied.verdict) == (
        "transformer.wte.weight",
        ("lm_head.weight",),
        "balance",
    )
    assert inspect(None, transformers=str(path), shapes=["2x5:int64"]).plan.verdicts == found.plan.verdicts
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="is no configuration") as caught:
        inspect(None, transformers=str(path))
    assert "\n" not in str(caught.value)
