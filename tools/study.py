"""Run a study (models x methods x data x seeds) from its file, or show how far it is."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from command_line import read_yaml

from trainer import terminal
from trainer.study.plan import load

DESCRIPTION = """\
Run a study: prepare shards; train, convert and evaluate every run; report.
What is done is read from disk, so after a failure, Ctrl-C or a crash the same command goes on.

  python tools/study.py run studies/quickstart.yaml
  python tools/study.py status studies/quickstart.yaml
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("command", choices=["run", "status"])
    parser.add_argument("file", type=Path, help="study file, e.g. studies/quickstart.yaml")
    parser.add_argument("--output_dir", default="", help="folder of the study's directory [the file's; runs]")
    parser.add_argument("--shards_dir", default="", help="folder of the token shards [the file's; shards]")
    parser.add_argument(
        "--num_ranks", type=int, default=0, help="processes a training runs on [the file's; 1]"
    )
    parser.add_argument("--dry_run", action="store_true", help="run: only show the stages and their commands")
    parser.add_argument(
        "--keep_going", action="store_true", help="run: after a failure go on with other runs"
    )
    flags = parser.parse_args()

    study = load(read_yaml(flags.file), flags.file, flags.output_dir, flags.shards_dir, flags.num_ranks)
    tools = Path(os.path.relpath(Path(__file__).parent))
    if flags.command == "status" or flags.dry_run:
        from trainer.study.table import show_plan, show_status

        show_status(study) if flags.command == "status" else show_plan(study, tools)
        return
    from trainer.study.run import run

    sys.exit(run(study, tools, flags.keep_going))


if __name__ == "__main__":
    terminal.run(main)
