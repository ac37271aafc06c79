"""Study directories -> report directory. Everything is made in memory first, then each file is put in place whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer import commit
from trainer.errors import UserError
from trainer.report import plots, tables
from trainer.report.comparisons import compare
from trainer.report.format import clean
from trainer.report.headline import headline
from trainer.report.html import FigureOnPage, page
from trainer.report.render import figure_files, inline_panels
from trainer.report.results import is_run, load_runs
from trainer.report.style import method_styles
from trainer.report.summary import in_order
from trainer.report.summary import panels as panels_of
from trainer.run_directory import StudyDirectory


def build_report(study_dirs: Sequence[str | Path], output_dir: str | Path = "", title: str = "") -> Path:
    """Write index.html, the figures (SVG, PNG), results.csv and results.json; return the path of index.html.

    `study_dirs` are study or run directories. Default of `output_dir`: report/ in the first study (or in the study
    of the first run); of `title`: the studies' names. The same directories give the same bytes. On a UserError
    (unreadable or contradictory results) an old report is left as it was.
    """
    paths = [Path(path) for path in study_dirs]
    if not paths:
        raise UserError("no study to report on; name a study directory or a run directory")
    runs = in_order(load_runs(paths))
    panels = panels_of(runs)
    headlines = [headline(panel) for panel in panels]
    comparisons = compare(panels)
    styles = method_styles(run.method for run in runs)
    title = clean(title) or ", ".join(dict.fromkeys(run.study for run in runs))
    figures = [
        plots.accuracy_vs_parameters(panels, styles),
        plots.accuracy_by_num_steps(panels, styles),
        plots.loss_curves(runs, styles),
        plots.throughput(runs, styles),
    ]
    files: dict[str, bytes] = {}
    shown: dict[str, FigureOnPage] = {}
    for figure in figures:
        if figure.panels:
            files |= figure_files(figure)
            shown[figure.name] = FigureOnPage(inline_panels(figure, styles), figure.files)
    files["results.csv"] = tables.to_csv(tables.run_rows(runs)).encode()
    files["results.json"] = tables.to_json(title, headlines, runs, panels, comparisons).encode()
    # Last: whoever sees the new page finds the files it links to.
    files["index.html"] = page(title, headlines, runs, panels, comparisons, shown, styles).encode()

    folder = Path(output_dir) if str(output_dir) else _default_output(paths[0])
    for name, content in files.items():
        commit.write_bytes(folder / name, content)
    for figure in figures:
        if not figure.panels:  # of an older report, and no longer true
            for name in figure.files:
                (folder / name).unlink(missing_ok=True)
    return folder / "index.html"


def _default_output(path: Path) -> Path:
    return StudyDirectory(path.resolve().parent if is_run(path) else path).report
