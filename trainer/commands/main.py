"""`socratic COMMAND ...`: run trainer/commands/COMMAND.py."""

import importlib
import sys
from typing import Any

from trainer import __version__

# These summaries are not read from the modules' docstrings, because importing every module would make `--help` slow.
COMMANDS = {
    "doctor": "check that this machine, or every node of a job, can train and computes correct gradients",
    "plan": "estimate memory, disk and time of a training or a study before it is submitted",
    "annotate": "let a teacher model write the solution steps of problems, and check them",
    "prepare_shards": "tokenize problems once, for all methods",
    "train": "train one model with DeepSpeed ZeRO, on one or many ranks",
    "convert_checkpoint": "convert a ZeRO checkpoint to a Hugging Face folder",
    "evaluate": "generate answers with one or several models and score them",
    "plot_scaling": "write a report with tables and plots of finished runs",
    "study": "prepare, train, convert, evaluate and report models x methods x data x seeds, here or on Slurm",
}


def main() -> None:
    """Run the command named by the first argument; exit with status 2 if there is no such command."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        raise SystemExit(0 if arguments else 2)
    if arguments[0] == "--version":
        print(__version__)
        return
    name = arguments[0]
    if name not in COMMANDS:
        from trainer.storage.configuration import did_you_mean

        hint = did_you_mean(name, COMMANDS)
        print(f"socratic: error: there is no command {name!r}{hint}; see socratic --help", file=sys.stderr)
        raise SystemExit(2)
    sys.argv = [f"socratic {name}", *arguments[1:]]
    run_command(name)


def run_command(name: str, **arguments: Any) -> None:
    """Import trainer/commands/NAME.py and call its main function with `arguments`.

    Ctrl-C ends the process with one line, even during this import. So this module imports nothing that takes time.
    """
    try:
        importlib.import_module(f"trainer.commands.{name}").main(**arguments)
    except KeyboardInterrupt:
        from trainer.runtime import terminal

        terminal.exit_interrupted()


def _help() -> str:
    lines = "\n".join(f"  {name:<20}{summary}" for name, summary in COMMANDS.items())
    return f"""usage: socratic COMMAND ...

Distil step-by-step reasoning into small language models with DeepSpeed ZeRO.

{lines}

socratic COMMAND --help shows examples and all flags. --version shows the version.
Several ranks: mpiexec -n 2 socratic train ..., or deepspeed --module trainer.commands.train ..."""
