"""Build a report directory from study directories. All files are made in memory before the first is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from trainer.errors import UserError
from trainer.report import drawing
from trainer.report.comparison import comparison_rows, to_latex
from trainer.report.format import clean
from trainer.report.load import is_run, load_frames
from trainer.report.page import render_page
from trainer.report.plots import all_figures
from trainer.report.report_data import ReportData, result_rows, to_csv, to_json
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
    of the first run); of `title`: the studies' names. The page shows `max_examples` predictions in total.
    `bertscore_model` is a local folder, "" for no BERTScore. The same directories give the same bytes. Raises
    UserError for unreadable or contradictory results, and then leaves an older report unchanged.
    """
    paths = [Path(path) for path in study_dirs]
    if not paths:
        raise UserError("no study to report on; name a study directory or a run directory")
    study = load_frames(paths)
    title = clean(title) or ", ".join(study.runs["study"].unique())
    data = ReportData(title, study, max_examples, bertscore_model)
    styles = drawing.method_styles([*study.runs["run_method"], *data.summary["method"]])
    all_panels = all_figures(data, styles)
    figures = {name: panels for name, panels in all_panels.items() if panels}
    files: dict[str, bytes] = {}
    for name, panels in figures.items():
        files |= drawing.figure_files(name, panels)
    if data.comparison_tables:
        rows = pd.DataFrame(comparison_rows(data.comparison_tables), dtype=object)
        files["comparison.csv"] = to_csv(rows).encode()
        files["comparison.tex"] = to_latex(data.comparison_tables).encode()
    files["results.csv"] = to_csv(result_rows(study.runs)).encode()
    files["results.json"] = to_json(data).encode()
    # Written last, so that the files that the page links to exist.
    files["index.html"] = render_page(data, figures, styles).encode()

    folder = Path(output_dir) if str(output_dir) else _default_output(paths[0])
    for name, content in files.items():
        atomic_dir.write_bytes(folder / name, content)
    optional = {"comparison.csv", "comparison.tex"}
    optional |= {f"{name}.{kind}" for name in all_panels for kind in ("svg", "png")}
    for name in optional - files.keys():
        (folder / name).unlink(missing_ok=True)  # from an older report
    return folder / "index.html"


def _default_output(path: Path) -> Path:
    return StudyDirectory(path.resolve().parent if is_run(path) else path).report
