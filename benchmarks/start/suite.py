"""Start-up times: `--help`, and the first new step of a resumed run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from benchmarks.harness import MATERIALS, Comparison, Contender, Output, Unequal, close_to, python
from benchmarks.start import material

HELP_SECONDS = 0.3
TOLERANCE = 1e-6


def comparisons() -> Iterator[Comparison]:
    yield Comparison(
        work="tools/*.py --help, the slowest",
        figure="seconds",
        unit="s",
        contenders=[Contender("ours", python("benchmarks/start/help.py", "3"), peer=False)],
        gate=nothing_heavy,
        limit=HELP_SECONDS,
        higher_is_better=False,
    )
    folder = MATERIALS / "start"
    for stage in (1, 3):
        path = material.make(folder, stage)
        runs = {"ours": folder / f"stage{stage}", "deepspeed": folder / "from-the-start"}
        contenders = [
            Contender(
                name,
                python("benchmarks/start/resume.py", name, folder, str(stage), path, run),
                peer=name != "ours",
                ranks=material.RANKS,
            )
            for name, run in runs.items()
        ]
        yield Comparison(
            work=f"resume GPT-2 124M, ZeRO-{stage}, 2 ranks: libraries loaded to first new step",
            figure="seconds",
            unit="s",
            contenders=contenders,
            gate=same_step,
            goal=1.0,
            higher_is_better=False,
            notes="ours compares every byte of the checkpoint with its digest first, and makes no weights it will not use",
        )


def nothing_heavy(outputs: Mapping[str, Output]) -> None:
    if found := outputs["ours"]["heavy"]:
        raise Unequal(f"--help loads {found}")


def same_step(outputs: Mapping[str, Output]) -> None:
    """The step after the checkpoint has the same loss and gradient norm."""
    ours, theirs = outputs["ours"], outputs["deepspeed"]
    for key in ("loss", "grad_norm"):
        close_to(key, ours[key], theirs[key], TOLERANCE)
