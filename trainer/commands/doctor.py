"""`socratic doctor`: check that this machine, or every node of a job, can train and computes correct gradients."""

from __future__ import annotations

import time

from trainer.commands.command_line import parse
from trainer.runtime import terminal
from trainer.settings import DoctorSettings

DESCRIPTION = """Check versions, compiler, MPI, Slurm, disk, memory, network, clocks, GPUs, and the gradients of the installed DeepSpeed.

  socratic doctor --output_dir runs
  srun --ntasks-per-node=8 socratic doctor --output_dir /scratch/me/runs     (every node of the allocation)
  mpiexec -n 2 socratic doctor          deepspeed --num_gpus 2 --module trainer.commands.doctor

A line a check: ok, warn or fail with its remedy. Exits with status 1 if anything failed."""


def main() -> None:
    settings = parse(DoctorSettings, DESCRIPTION)
    terminal.run_main(lambda: _examine(settings))


def _examine(settings: DoctorSettings) -> None:
    import tempfile
    from pathlib import Path

    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="doctor-") as logs:
        terminal.redirect_library_output(Path(logs), "doctor")
        from trainer.runtime import startup

        startup.pause_gc()
        from trainer.doctor.run_checks import print_report, run_checks

        healthy = print_report(run_checks(settings), time.monotonic() - start, settings.json)
    if not healthy:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
