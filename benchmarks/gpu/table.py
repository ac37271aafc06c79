"""Print all measured rows as one table: python -m benchmarks.gpu.table [--tiny]

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
    machine = facts.facts()
    text = markdown(found, machine)
    print(text)
    folder = cases.folder(tiny) if tiny else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{machine['date']}-{machine['machine']}-gpu"
    content = {"machine": machine, "results": found}
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    print(f"written: {folder.relative_to(REPOSITORY) / name}.json and .md")


def rows(tiny: bool) -> list[dict[str, Any]]:
    """Return the rows by part, and within a part by time of measurement."""
    paths: list[Path] = []
    for part in PARTS:
        paths += sorted(rows_folder(tiny).glob(f"{part}-*.json"), key=lambda path: path.stat().st_mtime)
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def markdown(found: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    """Return the table. MFU counts real tokens, and the head only at targets. Memory is torch's peak of allocated bytes."""
    devices = sorted({row["device"] for row in found})
    lines = [
        f"{'; '.join(devices)}; {machine['date']}, torch {machine['versions']['torch']}, "
        f"DeepSpeed {machine['versions']['deepspeed']}, transformers {machine['versions']['transformers']}.",
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
        f"{name}: {last[name].get('failed') or number(row['medians'][name])} {attention(last[name])}".strip()
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


def attention(output: dict[str, Any]) -> str:
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
