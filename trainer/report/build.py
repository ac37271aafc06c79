"""Build a report directory from study directories. All files are made in memory before the first file is written."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from trainer.errors import UserError
from trainer.report import drawing
from trainer.report.comparison import comparison_rows, to_latex
from trainer.report.format import replace_unprintable
from trainer.report.load import is_run, load_frames
from trainer.report.page import render_page
from trainer.report.plots import all_figures
from trainer.report.report_data import ReportData, results_table, to_json
from trainer.storage import atomic_dir
from trainer.storage.run_directory import StudyDirectory


def build_report(
    study_dirs: Sequence[str | Path],
    output_dir: str | Path = "",
    title: str = "",
    max_examples: int = 2000,
    bertscore_model: str = "",
) -> Path:
    """Write the page, the figures, and the tables as CSV, JSON and LaTeX. Return the path of index.html.

    `study_dirs` are study or run directories. Default of `output_dir`: report/ in the study of the first directory.
    Default of `title`: the names of the studies. The page shows at most `max_examples` predictions in total.
    `bertscore_model` is a local folder; "" means no BERTScore. The same input, with the same time of the newest results.json
    (which the page shows), gives the same bytes. Raises UserError if results are unreadable or contradictory. If the input has
    an error, an older report stays unchanged.
    """
    paths = [Path(path) for path in study_dirs]
    if not paths:
        raise UserError("no study to report on; name a study directory or a run directory")
    study = load_frames(paths)
    title = replace_unprintable(title) or ", ".join(study.runs["study"].unique())
    data = ReportData(title, study, max_examples, bertscore_model)
    in_tables = [method for table in data.paper_tables for method in table["columns"]]
    styles = drawing.method_styles([*study.runs["run_method"], *data.summary["method"], *in_tables])
    all_panels = all_figures(data, styles)
    figures = {name: panels for name, panels in all_panels.items() if panels}
    files: dict[str, bytes] = {}
    for name, panels in figures.items():
        files |= drawing.figure_files(name, panels)
    tables = {"results.csv": results_table(study.runs)}
    if data.paper_tables:
        tables["comparison.csv"] = pd.DataFrame(comparison_rows(data.paper_tables), dtype=object)
        files["comparison.tex"] = to_latex(data.paper_tables).encode()
    files |= {name: rows.to_csv(index=False, lineterminator="\n").encode() for name, rows in tables.items()}
    files["results.json"] = to_json(data).encode()
    # The page must be written last, so that its links never point to missing files.
    files["index.html"] = render_page(data, figures, styles).encode()

    first_study = StudyDirectory(paths[0].resolve().parent if is_run(paths[0]) else paths[0])
    folder = Path(output_dir) if str(output_dir) else first_study.report
    for name, content in files.items():
        atomic_dir.write_bytes(folder / name, content)
    optional = {"comparison.csv", "comparison.tex"}
    # The last two names are figures of earlier versions.
    names = (*all_panels, "scaling_fit", "throughput")
    optional |= {f"{name}.{extension}" for name in names for extension in ("svg", "png")}
    for name in optional - files.keys():
        (folder / name).unlink(missing_ok=True)  # a file of an older report
    return folder / "index.html"
