"""`socratic plot_scaling`: write a report with tables and plots of finished runs."""

import json

from trainer.commands.command_line import command
from trainer.commands.extras import needs_extra
from trainer.runtime import terminal
from trainer.settings import PlotSettings

DESCRIPTION = """Write a report of studies or runs: accuracies with confidence intervals, tests between methods, and types of errors.

  socratic plot_scaling runs/quickstart
  socratic plot_scaling runs/small runs/large --output_dir runs/both --title "Two studies"
  socratic plot_scaling runs/gsm8k --max_examples 10000 --bertscore_model models/roberta-large

Reads run directories. Writes a page to open in a browser (index.html: tables, figures, tests between methods, examples of
predictions), the figures as SVG and PNG, the comparison with the paper as LaTeX and CSV, and all numbers as CSV and JSON.
The same run directories give the same bytes. Prints the headlines, and names every run or evaluation that the report leaves
out. Needs no accelerator, and torch only for BERTScore."""


@command(PlotSettings, DESCRIPTION)
def main(settings: PlotSettings) -> None:
    with needs_extra("report"):
        from trainer.report.build import build_report
    page = build_report(
        settings.runs, settings.output_dir, settings.title, settings.max_examples, settings.bertscore_model
    )
    results = json.loads((page.parent / "results.json").read_text(encoding="utf-8"))
    for headline in results["headlines"]:
        terminal.info(headline)
    for run in results["unfinished"]:
        terminal.info(f"not in the report: {run['study']}/{run['run']}: {run['missing']}")
    terminal.info(f"report: {page}")


if __name__ == "__main__":
    main()
