"""`socratic study`: run a study (models x methods x data x seeds) from its file, here or on Slurm, or show its state."""

from __future__ import annotations

import sys
from pathlib import Path

from trainer.commands.command_line import new_parser, read_yaml
from trainer.commands.extras import require_extra
from trainer.runtime import terminal
from trainer.study.study_file import load_study

DESCRIPTION = """\
Run a study: prepare shards; train, convert and evaluate every run; report.
Completed work is read from disk: after a failure, Ctrl-C or a crash the same command resumes.

  socratic study run|status studies/quickstart.yaml                       (on this machine)
  socratic study submit studies/quickstart.yaml --cluster cluster.env     (as Slurm jobs)
  socratic study logs studies/quickstart.yaml stories.cot.0.7m.s0
  socratic study resubmit studies/quickstart.yaml --failed                (or: cancel)
"""


def main(tools: Path | None = None) -> None:
    """Run the command line. `tools`: folder of the scripts that stages run; None: modules of the installed package."""
    terminal.run_main(lambda: _study(tools))


def _study(tools: Path | None) -> None:
    parser = new_parser(DESCRIPTION)
    add = parser.add_argument
    add("command", choices=("run", "status", "submit", "resubmit", "logs", "cancel"))
    add("file", type=Path, help="study file, e.g. studies/quickstart.yaml")
    add("run", nargs="?", default="", help="logs: of which run (or shard set, or 'report')")
    add("--output_dir", default="", help="folder of the study's directory [the file's; runs]")
    add("--shards_dir", default="", help="folder of the token shards [the file's; shards]")
    add("--num_ranks", type=int, default=0, help="processes a training runs on [the file's; 1]")
    add("--num_parallel", type=int, default=0, help="run: stages at the same time [the file's; 1]")
    add("--dry_run", action="store_true", help="run, submit: only show the commands or batch scripts")
    add("--keep_going", action="store_true", help="run: after a failure continue with the other runs")
    add("--cluster", type=Path, help="submit: your site's facts, see slurm/cluster.env.example")
    add("--failed", action="store_true", help="resubmit: what failed, and what waited for it")
    flags = parser.parse_args()
    given = (flags.output_dir, flags.shards_dir, flags.num_ranks, flags.num_parallel)
    study = load_study(read_yaml(flags.file), flags.file, *given)
    if flags.command == "run":
        from trainer.study import executor, table

        if flags.dry_run:
            table.print_dry_run(study, tools)
        else:
            require_extra("report")  # the last stage needs it
            sys.exit(executor.run_study(study, tools, flags.keep_going))
    else:
        from trainer.cluster.command import run_command

        run_command(flags.command, study, tools, flags.cluster, flags.dry_run, flags.run, flags.failed)


if __name__ == "__main__":
    main()
