"""`socratic doctor`: check that this machine, or every node of a job, can train and computes correct gradients."""

import tempfile
import time
from pathlib import Path

from trainer.commands.command_line import command
from trainer.runtime import startup, terminal
from trainer.settings import DoctorSettings

DESCRIPTION = """Check versions, compiler, MPI, Slurm, disk, memory, network, clocks, GPUs, and the gradients of the installed DeepSpeed.

  socratic doctor --output_dir runs
  srun --ntasks-per-node=8 socratic doctor --output_dir /scratch/me/runs     (every node of the allocation)
  mpiexec -n 2 socratic doctor          deepspeed --num_gpus 2 --module trainer.commands.doctor

Prints one line per check: ok, warn or fail, with a remedy. Exits with status 1 if a check failed."""


@command(DoctorSettings, DESCRIPTION)
def main(settings: DoctorSettings) -> None:
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="doctor-") as logs:
        terminal.redirect_library_output(Path(logs), "doctor")
        startup.pause_gc()
        from trainer.doctor.run_checks import print_report, run_checks

        healthy = print_report(run_checks(settings), time.monotonic() - start, settings.json)
    if not healthy:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
