"""Benchmarks against other tools: python benchmarks/run.py [SUITE ...] [--rounds 3] [--readme]   (or: make bench)

Prints a table and writes each measured row to benchmarks/results/<date>-<machine>.json and .md; other rows of the same
day are kept. `--readme` puts the newest rows of this machine into docs/benchmarks.md.
A suite is a module with `comparisons() -> Iterator[Comparison]`; its shards, models and checkpoints are made once under
build/benchmarks. If a comparison fails or its contenders disagree, the others still run and the exit status is 1.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks import machine, table  # noqa: E402
from benchmarks.harness import Comparison, ContenderFailed, Result, Unequal, measure  # noqa: E402
from benchmarks.processes import preload  # noqa: E402

SUITES = ("start", "shards", "conversion", "evaluation", "training")
LIBRARIES = [  # of both sides, loaded once for all contenders
    "torch", "numpy", "datasets", "safetensors.torch", "transformers", "deepspeed", "accelerate", "trl", "lm_eval",
    "transformers.trainer", "trl.trainer.sft_trainer", "lm_eval.models.huggingface", "deepspeed.utils.zero_to_fp32",
    "trainer.training.loop", "trainer.evaluation.pipeline", "trainer.export.convert", "trainer.shards.prepare",
]  # fmt: skip
RESULTS = REPOSITORY / "benchmarks" / "results"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suites", nargs="*", default=SUITES, metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument("--rounds", type=int, default=3, help="every contender runs once a round (default 3)")
    parser.add_argument("--only", default="", help="comparisons whose work contains this text")
    parser.add_argument("--readme", action="store_true", help="put the table into docs/benchmarks.md")
    chosen = parser.parse_args()
    unknown = set(chosen.suites) - set(SUITES)
    if unknown:
        parser.error(f"no suite named {', '.join(sorted(unknown))}; there are: {', '.join(SUITES)}")

    preload(*LIBRARIES)
    facts = machine.facts()
    path = RESULTS / f"{facts['date']}-{facts['machine']}.json"
    rows, last, failures = _rows(path), [], 0
    for suite in chosen.suites:
        for comparison in importlib.import_module(f"benchmarks.{suite}.suite").comparisons():
            if chosen.only in comparison.work:
                result = _one(suite, comparison, chosen.rounds, last)
                failures += result is None
                if result:
                    last = [result]
                    measured = {"revision": facts["revision"], "load_average_after": machine.load_average()}
                    rows[comparison.work] = {"suite": suite, **result.to_dict(), **measured}
                    _write(path, _in_order(rows), facts)
    print(table.markdown(_in_order(rows), facts))
    if failures:
        print(f"{failures} not measured: see above", file=sys.stderr)
    if chosen.readme:
        table.into_readme(
            REPOSITORY / "docs" / "benchmarks.md", table.markdown(_newest(facts["machine"]), facts)
        )
    return 1 if failures else 0


def _in_order(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows in the order of the suites."""
    return sorted(rows.values(), key=lambda row: SUITES.index(row["suite"]))


def _newest(machine: str) -> list[dict[str, Any]]:
    """Return the newest row of every comparison, with its date."""
    rows = {}
    for path in sorted(RESULTS.glob(f"*-{machine}.json")):
        for work, row in _rows(path).items():
            rows[work] = {**row, "date": path.name[:10]}
    return _in_order(rows)


def _rows(path: Path) -> dict[str, dict[str, Any]]:
    """Return the rows measured before, by work."""
    if not path.exists():
        return {}
    return {row["work"]: row for row in json.loads(path.read_text(encoding="utf-8"))["results"]}


def _one(suite: str, comparison: Comparison, rounds: int, last: list[Result]) -> Result | None:
    """Measure one comparison. `last`: the previous result; another figure of the same contenders reuses its rounds."""
    print(f"{suite}: {comparison.work}", flush=True)
    if last and last[0].comparison.contenders == comparison.contenders:
        return Result(comparison, last[0].rounds)
    try:
        return measure(comparison, rounds, lambda line: print(line, flush=True))
    except (ContenderFailed, Unequal) as error:
        print(f"NOT MEASURED: {comparison.work}: {error}", file=sys.stderr, flush=True)
        return None


def _write(path: Path, rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": facts, "results": rows}, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(table.markdown(rows, facts), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
