"""Convert a checkpoint of a model and compare the export with the files of `save_pretrained`."""

from __future__ import annotations

from pathlib import Path

from tests.export.family_export import check_export
from tests.models.row import OK, WRONG, Cell


def measure(model_folder: Path, work: Path) -> Cell:
    """Return whether names, shapes, dtypes and numbers of the export are those of `save_pretrained`."""
    try:
        check_export(model_folder, work)
    except AssertionError as error:
        return Cell(WRONG, str(error).strip().partition("\n")[0])
    return Cell(OK)
