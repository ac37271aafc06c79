"""Can this machine, or every node of this job, train and give right numbers? python tools/doctor.py (also srun, mpiexec, deepspeed)."""

from __future__ import annotations

import time

from command_line import parse

from trainer.runtime import terminal
from trainer.settings import DoctorSettings

DESCRIPTION = """Check versions, compiler, MPI, Slurm, disk, memory, network, clocks, GPUs, and the gradients of the installed DeepSpeed.

  python tools/doctor.py --output_dir runs
  srun --ntasks-per-node=8 python tools/doctor.py --output_dir /scratch/me/runs     (every node of the allocation)
  mpiexec -n 2 python tools/doctor.py          deepspeed --num_gpus 2 tools/doctor.py

A line a check: ok, warn or fail with its remedy. Exits with status 1 if anything failed."""


def main() -> None:
    settings = parse(DoctorSettings, DESCRIPTION)
    terminal.run(lambda: _examine(settings))


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
