"""`socratic evaluate`: generate answers with one or several models and score them."""

from trainer.commands import next_command
from trainer.commands.command_line import command
from trainer.runtime import distributed, restarts, startup, terminal
from trainer.runtime.stop_request import StopRequest
from trainer.settings import EvaluateSettings

DESCRIPTION = """Generate one answer per problem of a shard directory and score the answers; all ranks take problems from one queue.

  deepspeed --num_gpus 2 --module trainer.commands.evaluate --model_name_or_path runs/mine/gsm8k.socratic.gpt2.s0/export \\
      --shards shards/gsm8k-test
  mpiexec -n 2 socratic evaluate ...          socratic evaluate ...

A pair of models: a decomposer writes the sub-questions and a solver writes their solutions. The method of the decomposer
decides whether it writes all sub-questions ahead or reads each solution before the next sub-question. The sizes of the two
models may differ, their tokenizers may not. One socratic export can have both roles. With --subquestions gold, the
sub-questions are taken from the data:

  socratic evaluate --decomposer runs/mine/gsm8k.decomposer_interleaved.gpt2.s0/export \\
      --solver runs/mine/gsm8k.solver.gpt2.s0/export --shards shards/gsm8k-test
  socratic evaluate --subquestions gold --solver runs/mine/gsm8k.solver.gpt2.s0/export --shards shards/gsm8k-test

A decomposer_*operators or decomposer_*equations reads a plan: add --planner EXPORT, or --guidance_from gold.

At the start, the logits of the fast backend (slots) are compared with the model's own forward pass on a few prompts. With
--backend auto the fast backend is used if they agree, else transformers. results.json has the backend, the largest
difference and the reason.

Writes predictions.jsonl and results.json into evaluation/<data>-<split>-<mode> of the run directory. The results of a pair
are in a run directory of their own, <data>.iterative_interleaved.<model>.s<seed>, beside the runs of its models. Run the
same command again after an interruption: finished answers are kept."""


@command(EvaluateSettings, DESCRIPTION, launches_as="evaluate")
def main(settings: EvaluateSettings) -> None:
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
    next_command.print_next(next_command.after_evaluate(directory))


if __name__ == "__main__":
    main()
