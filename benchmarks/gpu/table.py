"""All rows so far as one table: python -m benchmarks.gpu.table [--tiny]

Writes benchmarks/results/<date>-<machine>-gpu.json and .md (with --tiny only under build/).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu import cases, facts
from benchmarks.gpu.run import PARTS, rows_folder
from benchmarks.harness import REPOSITORY
from benchmarks.table import number, ours_of

HEAD = ("work", "ours", "peers", "ratio to the best peer", "MFU", "memory: measured, plan")
RESULTS = REPOSITORY / "benchmarks" / "results"


def main() -> None:
    tiny = "--tiny" in sys.argv
    found = rows(tiny)
    if not found:
        sys.exit(f"nothing is measured yet: no rows in {rows_folder(tiny)}")
    told = facts.facts()
    text = markdown(found, told)
    print(text)
    folder = cases.folder(tiny) if tiny else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{told['date']}-{told['machine']}-gpu"
    content = {"machine": told, "results": found}
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    print(f"written: {folder.relative_to(REPOSITORY) / name}.json and .md")


def rows(tiny: bool) -> list[dict[str, Any]]:
    """In the order of the parts, and within a part as they were measured."""
    paths: list[Path] = []
    for part in PARTS:
        paths += sorted(rows_folder(tiny).glob(f"{part}-*.json"), key=lambda path: path.stat().st_mtime)
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def markdown(found: list[dict[str, Any]], told: dict[str, Any]) -> str:
    """MFU counts real tokens, and the head only where something is learned. Memory is what torch allocated at most."""
    devices = sorted({row["device"] for row in found})
    lines = [
        f"{'; '.join(devices)}; {told['date']}, torch {told['versions']['torch']}, "
        f"DeepSpeed {told['versions']['deepspeed']}, transformers {told['versions']['transformers']}.",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|" + " --- |" * len(HEAD),
        *(f"| {' | '.join(cells(row))} |" for row in found),
    ]
    notes = [f"- {row['work']}: {row['notes']}" for row in found if row["notes"]]
    return "\n".join([*lines, *([""] if notes else []), *notes, ""])


def cells(row: dict[str, Any]) -> list[str]:
    ours = ours_of(row)
    last = row["rounds"][-1]
    if last[ours].get("refused"):
        return [row["work"], f"not tried: {last[ours]['refused']}", "", "", "", ""]
    peers = [
        f"{name}: {last[name].get('failed') or number(row['medians'][name])} {told(last[name])}".strip()
        for name in row["ratios"]
    ]
    ratio = row["ratio_to_best_peer"]
    return [
        row["work"],
        f"{number(row['medians'][ours])} {row['unit']}",
        "<br>".join(peers) or "-",
        f"**{ratio:.2f}x**" if ratio is not None else "-",
        percent(last[ours].get("mfu")),
        memory(last[ours]),
    ]


def told(output: dict[str, Any]) -> str:
    return f"({output['attention']})" if "attention" in output else ""


def memory(output: dict[str, Any]) -> str:
    if not output.get("peak_bytes"):
        return "-"
    measured = f"{output['peak_bytes'] / 1e9:.1f} GB"
    if "predicted_bytes" not in output:
        return measured
    error = output["predicted_bytes"] / output["peak_bytes"] - 1
    return f"{measured}, {output['predicted_bytes'] / 1e9:.1f} GB ({error:+.0%})"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


if __name__ == "__main__":
    main()
