"""Evaluate a student: deepspeed --num_gpus 2 tools/evaluate.py --model_name_or_path RUN --shards DIR (also mpiexec, srun, python)."""

from __future__ import annotations

from command_line import parse

from trainer import terminal
from trainer.settings import EvaluateSettings

DESCRIPTION = """A student answers every problem of a shard set once; all ranks take problems from one queue.

  deepspeed --num_gpus 2 tools/evaluate.py --model_name_or_path runs/mine/gsm8k.socratic.gpt2.s0/export \\
      --shards shards/gsm8k-test
  mpiexec -n 2 python tools/evaluate.py ...          python tools/evaluate.py ...

Writes predictions.jsonl and results.json into evaluation/<data>-<split>-<mode> of the run directory. Run the same
command again after an interruption: what is solved is kept."""


def main() -> None:
    settings = parse(EvaluateSettings, DESCRIPTION)
    terminal.run(lambda: _evaluate(settings))


def _evaluate(settings: EvaluateSettings) -> None:
    from trainer import distributed
    from trainer.evaluation import task

    terminal.capture_chatter(task.plan(settings).directory.logs, "evaluate")
    distributed.initialize()
    from trainer.evaluation.evaluate import evaluate

    evaluate(settings)
    distributed.shutdown()


if __name__ == "__main__":
    main()
