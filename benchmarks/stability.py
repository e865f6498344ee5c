"""Whether verdicts depend on the processor or on the seeds.

    python -m benchmarks.stability --out DIR

runs the quick budget with other vector instructions and with disjoint sets of seeds, each in a folder of
DIR, and prints verdict × instructions × seeds. The same command goes on where it was stopped. The exit code
is 1 if a claim is reproduced in one job and not reproduced in another.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

from normwise.lab.claims.conditions import SIGNS

# What torch (ATen), oneDNN and MKL may use. Without an entry: all that the processor has.
INSTRUCTIONS: Mapping[str, Mapping[str, str]] = {
    "own": {},
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "none": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
}
JOBS = (("own", "0-2"), ("none", "0-2"), ("own", "100-102"), ("own", "200-202"), ("avx2", "0-2"))


def main() -> None:
    """Run the jobs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the jobs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--table", action="store_true", help="only print the table of what is done")
    arguments = parser.parse_args()
    if not arguments.table:
        for instructions, seeds in JOBS:
            _run(arguments.out / f"{instructions}-{seeds}", instructions, seeds, arguments.jobs)
    found = {
        (instructions, seeds): verdicts
        for instructions, seeds in JOBS
        if (verdicts := _verdicts(arguments.out / f"{instructions}-{seeds}"))
    }
    print("\n".join(table(found)))
    contrary = contradictions(found)
    for line in contrary or ["No claim is reproduced in one job and not reproduced in another."]:
        print(line)
    sys.exit(1 if contrary else 0)


def table(found: Mapping[tuple[str, str], Mapping[str, str]]) -> list[str]:
    """Return verdict × instructions × seeds as lines of Markdown; a dash where a claim was not judged."""
    claims = list(dict.fromkeys(claim for verdicts in found.values() for claim in verdicts))
    head = [f"{instructions}, seeds {seeds}" for instructions, seeds in found]
    rows = [
        [f"`{claim}`", *(SIGNS.get(verdicts.get(claim, ""), "–") for verdicts in found.values())]
        for claim in claims
    ]
    lines = [["claim", *head], ["---"] * (len(head) + 1), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def contradictions(found: Mapping[tuple[str, str], Mapping[str, str]]) -> list[str]:
    """Return a line for each claim and pair of jobs with reproduced against not reproduced."""
    worst = {"reproduced", "not reproduced"}
    return [
        f"{claim}: {here[claim]} with {' '.join(one)}, {there[claim]} with {' '.join(other)}"
        for (one, here), (other, there) in combinations(found.items(), 2)
        for claim in here
        if claim in there and {here[claim], there[claim]} == worst
    ]


def _run(out: Path, instructions: str, seeds: str, jobs: int) -> None:
    code = "from normwise.cli import main; main()"
    command: Sequence[str] = ["reproduce", "--out", str(out), f"--seeds={seeds}", "--jobs", str(jobs)]
    limits = {"OMP_NUM_THREADS": "1", **INSTRUCTIONS[instructions]}
    print(f"{out.name}: {' '.join(f'{name}={value}' for name, value in limits.items())}", flush=True)
    subprocess.run([sys.executable, "-c", code, *command], env=os.environ | limits, check=True)


def _verdicts(out: Path) -> dict[str, str]:
    if not (out / "results.json").exists():
        return {}
    claims = json.loads((out / "results.json").read_text(encoding="utf-8"))["claims"]
    return {
        name: claim["verdict"] for name, claim in sorted(claims.items(), key=lambda item: item[1]["order"])
    }


if __name__ == "__main__":
    main()
