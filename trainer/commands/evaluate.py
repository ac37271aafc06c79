"""`socratic evaluate`: generate answers with one or several models and score them."""

from __future__ import annotations

from trainer.commands.command_line import parse
from trainer.runtime import distributed, restarts, startup, terminal
from trainer.runtime.stop_request import StopRequest
from trainer.settings import EvaluateSettings

DESCRIPTION = """A student, or several together, answer every problem of a shard set once; all ranks take problems from one queue.

  deepspeed --num_gpus 2 --module trainer.commands.evaluate --model_name_or_path runs/mine/gsm8k.socratic.gpt2.s0/export \\
      --shards shards/gsm8k-test
  mpiexec -n 2 socratic evaluate ...          socratic evaluate ...

Two models: a decomposer asks the sub-questions, all ahead or in turn with the solutions (as it was trained), and a solver
solves them. Their sizes may differ, their tokenizer may not; one socratic export can play both. Or the data asks:

  socratic evaluate --decomposer runs/mine/gsm8k.decomposer_interleaved.gpt2.s0/export \\
      --solver runs/mine/gsm8k.solver.gpt2.s0/export --shards shards/gsm8k-test
  socratic evaluate --subquestions gold --solver runs/mine/gsm8k.solver.gpt2.s0/export --shards shards/gsm8k-test

A decomposer_operators or _equations is guided by a plan: add --planner EXPORT, or --guidance_from gold.

Before the first answer a few prompts are decoded and compared with the model's own forward pass. With --backend auto a
model is decoded in slots where the logits are its own, else by its own forward pass and cache, which is slower and works
for every family; results.json says which, how far apart the logits were, and why.

Writes predictions.jsonl and results.json into evaluation/<data>-<split>-<mode> of the run directory; of a pair, in a run
beside those of its students, <data>.iterative_interleaved.<model>.s<seed>. Run the same command again after an
interruption: what is solved is kept."""


def main() -> None:
    settings = parse(EvaluateSettings, DESCRIPTION)
    terminal.run_main(lambda: _evaluate(settings))


def _evaluate(settings: EvaluateSettings) -> None:
    startup.pause_gc()
    StopRequest().install_signal_handlers()
    from trainer.evaluation import job

    directory = job.resolve_job(settings).directory
    terminal.redirect_library_output(directory.logs, "evaluate")
    bytes_written = sum(part.stat().st_size for part in directory.rank_files.glob("*.jsonl"))
    restarts.record_restart(directory.restarts, bytes_written, settings.max_restarts)
    distributed.initialize()
    from trainer.evaluation.evaluate import evaluate

    evaluate(settings)


if __name__ == "__main__":
    main()
