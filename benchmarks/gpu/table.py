"""`Table`: a CSV file that grows by units of work, so that a run which is stopped goes on where it was."""

import contextlib
import csv
import gc
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.report import Row

STARTED = "started, did not end"
"""In the rows of a unit while it runs; a crash leaves it."""


class Table:
    """Rows of one part, written after each unit.

    Args:
        path: of the CSV file; rows that are there stay, but for units that were started and did not end.
        env: columns of every row.
        keys: columns that tell rows apart.
        deadline: by `time.monotonic`.
    """

    def __init__(self, path: Path, *, env: Row, keys: Sequence[str], deadline: float) -> None:
        self.path, self.env, self.keys, self.deadline = path, env, keys, deadline
        self.rows = [row for row in read(path) if row.get("error") != STARTED]
        self.complete = True

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def unit(self, keys: list[Row], work: Callable[[], list[Row]], *, needs: float) -> None:
        """Do the work that gives rows of these keys, unless they are there or there is too little time.

        An exception becomes the text of their `error`. After one of CUDA's own the process ends, of no use to others.

        Args:
            keys: of the rows.
            work: gives the rows, with their keys.
            needs: seconds that it takes at least.
        """
        names = ", ".join(" ".join(str(value) for value in key.values()) for key in keys)
        if all(self.has(key) for key in keys):
            return
        if self.left < needs:
            print(f"not done, {self.left:.0f} s left of the {needs:.0f} it needs: {names}", flush=True)
            self.complete = False
            return
        print(f"{self.left:.0f} s left: {names}", flush=True)
        self.put([{**key, "error": STARTED} for key in keys])
        try:
            rows = work()
        except Exception as error:
            traceback.print_exc()
            self.put([{**key, "error": told(error)} for key in keys])
            if "CUDA error" in str(error):
                sys.exit(1)
        else:
            self.put(rows)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def has(self, key: Row) -> bool:
        """Whether there is a row of this key."""
        return any(self._key(row) == self._key(key) for row in self.rows)

    def put(self, rows: list[Row]) -> None:
        """Write rows, in the place of those with the same keys."""
        new = {self._key(row) for row in rows}
        self.rows = [row for row in self.rows if self._key(row) not in new] + [{**row, **self.env} for row in rows]
        report.write(self.path, self.rows)

    def _key(self, row: Row) -> tuple[str, ...]:
        return tuple(str(row.get(name, "")) for name in self.keys)


def read(path: Path) -> list[Row]:
    """Rows of a CSV file; none where there is no file, or no text in it."""
    with contextlib.suppress(FileNotFoundError, csv.Error), path.open(newline="", errors="replace") as file:
        return list(csv.DictReader(file))
    return []


def whole(path: Path) -> list[Row]:
    """Rows of a CSV file that have all their columns and say of what commit they are; not a last one without its end."""
    rows = read(path)
    if rows and not path.read_bytes().endswith(b"\n"):
        rows.pop()
    return [row for row in rows if None not in row and None not in row.values() and row.get("commit")]


def told(error: BaseException) -> str:
    """An exception as one line of a table."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def unended(path: Path, error: str | None) -> int:
    """Give rows of units that did not end this error, or drop them if None; returns how many rows there are."""
    rows = read(path)
    for row in rows:
        if row.get("error") == STARTED and error is not None:
            row["error"] = error
    kept = [row for row in rows if row.get("error") != STARTED]
    if rows:
        report.write(path, kept) if kept else path.unlink()
    return len(kept)
