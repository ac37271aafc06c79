"""`socratic convert_checkpoint`: convert a ZeRO checkpoint to a Hugging Face folder."""

from trainer.commands import next_command
from trainer.commands.command_line import command
from trainer.runtime import startup
from trainer.settings import ConvertSettings

DESCRIPTION = """Convert a DeepSpeed ZeRO checkpoint to a Hugging Face folder: config, safetensors, tokenizer, model card.

  socratic convert_checkpoint runs/quickstart/stories.socratic.0.7m.s0     (its latest checkpoint, to export/)
  socratic convert_checkpoint runs/.../checkpoints/step-000120 --dtype bf16 --output_dir my-model --verify

The weights are streamed: memory use does not grow with the model."""


@command(ConvertSettings, DESCRIPTION)
def main(settings: ConvertSettings) -> None:
    startup.pause_gc()
    from trainer.export.convert import convert

    export = convert(settings)
    if not settings.dry_run:
        next_command.print_next(next_command.after_convert(export))


if __name__ == "__main__":
    main()
