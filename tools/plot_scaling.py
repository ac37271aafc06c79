"""Make a report of studies or runs: python tools/plot_scaling.py runs/quickstart"""

from __future__ import annotations

from command_line import parse

from trainer import terminal
from trainer.settings import PlotSettings

DESCRIPTION = """Make a report: accuracy against parameters, loss curves, throughput, tests between methods.

  python tools/plot_scaling.py runs/quickstart
  python tools/plot_scaling.py runs/small runs/large --output_dir runs/both --title "Two studies"

Reads run directories and writes one page that opens from disk (index.html), the figures as SVG and PNG, and all
numbers as CSV and JSON. Needs no torch and no accelerator."""


def main() -> None:
    settings = parse(PlotSettings, DESCRIPTION)
    terminal.run(lambda: _plot(settings))


def _plot(settings: PlotSettings) -> None:
    from trainer.report.build import build_report

    page = build_report(settings.runs, settings.output_dir, settings.title)
    terminal.say(f"report: {page}")


if __name__ == "__main__":
    main()
