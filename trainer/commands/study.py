"""`socratic study`: run a study (models x methods x data x seeds) on this machine or on Slurm; show its status and logs."""

import sys
from pathlib import Path

from trainer.commands.command_line import new_parser, read_yaml
from trainer.commands.extras import require_extra
from trainer.runtime import terminal
from trainer.study.study_file import load_study

DESCRIPTION = """\
Run a study: prepare shards; train, convert and evaluate every run; report.
Completed stages are found on disk: after a failure, Ctrl-C or a crash the same command resumes.

  socratic study run|status studies/quickstart.yaml                       (on this machine)
  socratic study submit studies/quickstart.yaml --cluster cluster.env     (as Slurm jobs)
  socratic study logs studies/quickstart.yaml stories.cot.0.7m.s0
  socratic study resubmit studies/quickstart.yaml --failed                (or: cancel)
"""


def main(scripts_dir: Path | None = None) -> None:
    """Run the command line. `scripts_dir`: folder of the scripts that run stages; None: stages run as modules of the package."""
    terminal.run_main(lambda: _study(scripts_dir))


def _study(scripts_dir: Path | None) -> None:
    parser = new_parser(DESCRIPTION)
    add = parser.add_argument
    add("command", choices=("run", "status", "submit", "resubmit", "logs", "cancel"))
    add("file", type=Path, help="study file, e.g. studies/quickstart.yaml")
    add("run", nargs="?", default="", help="logs: name of a run or shard set, or 'report'")
    add("--output_dir", default="", help="parent of the study directory [as in the file, else runs]")
    add("--shards_dir", default="", help="parent of the shard directories [as in the file, else shards]")
    add("--num_ranks", type=int, default=0, help="processes per training [as in the file, else 1]")
    add("--num_parallel", type=int, default=0, help="run: concurrent stages [as in the file, else 1]")
    add("--dry_run", action="store_true", help="run, submit: only print the commands or batch scripts")
    add("--keep_going", action="store_true", help="run: continue with the other runs after a failure")
    add("--cluster", type=Path, help="submit: settings of your site, see slurm/cluster.env.example")
    add("--failed", action="store_true", help="resubmit: failed jobs and the jobs that depend on them")
    flags = parser.parse_args()
    if flags.run and flags.command != "logs":
        parser.error(f"{flags.command} takes no run, but got {flags.run!r}")
    overrides = (flags.output_dir, flags.shards_dir, flags.num_ranks, flags.num_parallel)
    study = load_study(read_yaml(flags.file), flags.file, *overrides)
    if flags.command == "run":
        from trainer.study import executor, table

        if flags.dry_run:
            table.print_dry_run(study, scripts_dir)
        else:
            require_extra("report")  # needed by the last stage; fail early
            sys.exit(executor.run_study(study, scripts_dir, flags.keep_going))
    else:
        from trainer.cluster.command import run_command

        run_command(flags.command, study, scripts_dir, flags.cluster, flags.dry_run, flags.run, flags.failed)


if __name__ == "__main__":
    main()
