"""Measure every model family and write docs/models.md (`make test-models`).

    python -m tests.models.table                  all rows, then docs/models.md
    python -m tests.models.table gemma2 lfm2 ...  these rows, on the terminal

Worker processes measure the rows, so that a dead process costs one row. Exit status 1 if any cell is WRONG or a crash.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.models.row import CRASH, STAGES, WRONG, Cell, Row

_REPOSITORY = Path(__file__).resolve().parents[2]
_NUM_WORKERS = 2
_ROW_TIMEOUT_SECONDS = 180


class _Worker:
    """Process that measures rows: reads names from standard input and writes rows as JSON."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115 (closed with the worker)

    def measure(self, name: str) -> Row:
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
        assert self._process.stdin is not None and self._process.stdout is not None
        timer = threading.Timer(_ROW_TIMEOUT_SECONDS, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(name + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if line:
            return Row.from_json(line)
        self._process.wait()
        cell = Cell(CRASH, reason=f"the process died (exit status {self._process.returncode})")
        return Row(name, name, **dict.fromkeys(STAGES, cell), log=Path(self._log.name).read_text()[-3000:])

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _start(self) -> subprocess.Popen[str]:
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(_REPOSITORY),
        }
        return subprocess.Popen(
            [sys.executable, "-m", "tests.models.table", "--worker"],
            cwd=_REPOSITORY,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )


def measure(names: list[str], num_workers: int = _NUM_WORKERS) -> Iterator[Row]:
    """Yield the rows in the order of `names`, each when it is complete."""
    local = threading.local()
    workers: list[_Worker] = []

    def measure_one(name: str) -> Row:
        if not hasattr(local, "worker"):
            local.worker = _Worker()
            workers.append(local.worker)
        return local.worker.measure(name)  # type: ignore[no-any-return]

    try:
        with ThreadPoolExecutor(num_workers) as pool:
            yield from pool.map(measure_one, names)
    finally:
        for worker in workers:
            worker.close()


def _serve() -> None:
    """Run a worker: rows go to standard output, the output of libraries to standard error."""
    rows = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import warnings

    import torch
    from transformers.utils import logging

    from tests.models.measure import measure_row

    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    for line in sys.stdin:
        rows.write(measure_row(line.strip()).to_json() + "\n")
        rows.flush()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="rows; all if none is given")
    parser.add_argument("--workers", type=int, default=_NUM_WORKERS, help="processes")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        _serve()
        return 0
    from tests.models import families, models_page

    start = time.perf_counter()
    rows = []
    for row in measure(arguments.names or families.names(), arguments.workers):
        rows.append(row)
        print(
            f"{row.name:28}",
            *(f"{getattr(row, stage).status:9}" for stage in STAGES),
            f"{row.seconds:5.1f} s",
            flush=True,
        )
        for stage in STAGES:
            cell: Cell = getattr(row, stage)
            if cell.reason or cell.status in (WRONG, CRASH):
                print(f"    {stage}: {cell.detail} {cell.reason}", flush=True)
        if row.log:
            print(row.log, file=sys.stderr, flush=True)
    seconds = time.perf_counter() - start
    print(models_page.summary(rows), f"({seconds:.0f} s)")
    if not arguments.names:
        path = _REPOSITORY / "docs" / "models.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text(models_page.text(rows, families.excluded()), encoding="utf-8")
        print(f"wrote {path.relative_to(_REPOSITORY)}")
    return int(any(row.has(WRONG) or row.has(CRASH) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
