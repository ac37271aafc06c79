"""Study directories -> report directory. Everything is made in memory first, then each file is put in place whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.errors import UserError
from trainer.report import plots, plots_answers, tables
from trainer.report.comparison_table import comparison_rows
from trainer.report.content import content_of
from trainer.report.format import clean
from trainer.report.html import FigureOnPage, page
from trainer.report.latex import to_latex
from trainer.report.render import figure_files, inline_panels
from trainer.report.results import is_run, load_runs
from trainer.report.style import cause_styles, method_styles
from trainer.report.summary import in_order
from trainer.storage import atomic_dir
from trainer.storage.run_directory import StudyDirectory

MAX_EXAMPLES = 2000


def build_report(
    study_dirs: Sequence[str | Path],
    output_dir: str | Path = "",
    title: str = "",
    max_examples: int = MAX_EXAMPLES,
    bertscore_model: str = "",
) -> Path:
    """Write the page, the figures and the files of numbers; return the path of index.html.

    `study_dirs` are study or run directories. Default of `output_dir`: report/ in the first study (or in the study
    of the first run); of `title`: the studies' names. `max_examples` predictions in all are shown in the page.
    `bertscore_model` is a local folder, "" for no BERTScore. The same directories give the same bytes. On a
    UserError (unreadable or contradictory results) an old report is left as it was.
    """
    paths = [Path(path) for path in study_dirs]
    if not paths:
        raise UserError("no study to report on; name a study directory or a run directory")
    runs = in_order(load_runs(paths))
    title = clean(title) or ", ".join(dict.fromkeys(run.study for run in runs))
    content = content_of(title, runs, max_examples, bertscore_model)
    panels, analyses = content.panels, content.analyses
    methods = [run.method for run in runs] + [cell.method for panel in panels for cell in panel.cells]
    styles = method_styles(methods)
    figures = [
        plots.accuracy_vs_parameters(panels, styles),
        plots_answers.scaling_fit(content.fits, styles),
        plots.accuracy_by_num_steps(panels, styles),
        plots_answers.what_went_wrong(panels, analyses, styles),
        plots_answers.calculator(content.calculators, styles),
        plots.loss_curves(runs, styles),
        plots.throughput(runs, styles),
    ]
    files: dict[str, bytes] = {}
    shown: dict[str, FigureOnPage] = {}
    for figure in figures:
        if figure.panels:
            files |= figure_files(figure)
            shown[figure.name] = FigureOnPage(inline_panels(figure, styles | cause_styles()), figure.files)
    optional = {
        "comparison.csv": tables.to_csv(comparison_rows(content.tables)).encode(),
        "comparison.tex": to_latex(content.tables).encode() if content.tables else b"",
    }
    files |= {name: data for name, data in optional.items() if data}
    files["results.csv"] = tables.to_csv(tables.run_rows(runs)).encode()
    files["results.json"] = tables.to_json(content).encode()
    # Last: whoever sees the new page finds the files it links to.
    files["index.html"] = page(content, shown, styles).encode()

    folder = Path(output_dir) if str(output_dir) else _default_output(paths[0])
    for name, data in files.items():
        atomic_dir.write_bytes(folder / name, data)
    for name in {*optional, *(name for figure in figures for name in figure.files)} - files.keys():
        (folder / name).unlink(missing_ok=True)  # of an older report, and no longer true
    return folder / "index.html"


def _default_output(path: Path) -> Path:
    return StudyDirectory(path.resolve().parent if is_run(path) else path).report
