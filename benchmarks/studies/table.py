"""A tidy table of runs on disk, and what is read off it: means with their 95% intervals."""

import csv
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# Student's t, two-sided 95%, for 1, 2, ... degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)


class Table:
    """Rows of strings and numbers in a CSV file; a run is all rows that agree in `keys`.

    The file is replaced as a whole with each run, sorted, so a killed study leaves whole runs and
    the order in which they came does not show. One process writes it at a time.
    """

    def __init__(self, path: Path, keys: Sequence[str], values: Sequence[str]):
        self.path, self.keys, self.columns = path, tuple(keys), (*keys, *values)
        self.rows: list[Row] = []
        if path.exists():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                if tuple(reader.fieldnames or ()) != self.columns:
                    raise ValueError(
                        f"{path} has the columns {reader.fieldnames}, not {list(self.columns)}: "
                        "it is of another version, move it away"
                    )
                self.rows = [{k: _number(v) for k, v in row.items()} for row in reader]

    def __contains__(self, run: Row) -> bool:
        return self._key(run) in {self._key(row) for row in self.rows}

    def add(self, rows: Iterable[Row]) -> None:
        """Keep the rows of one or more whole runs; numbers with six digits."""
        self.rows += [{c: _rounded(row[c]) for c in self.columns} for row in rows]
        self.rows.sort(key=self._key)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        partial.replace(self.path)

    def missing(self, runs: Iterable[Row]) -> list[Row]:
        """Those of the runs that are not in the table, in their order."""
        done = {self._key(row) for row in self.rows}
        return [run for run in runs if self._key(run) not in done]

    def select(self, **where: Any) -> list[Row]:
        return [row for row in self.rows if all(row[k] == v for k, v in where.items())]

    def _key(self, row: Row) -> tuple[Any, ...]:
        return tuple(row[key] for key in self.keys)


def run_missing(
    table: Table, runs: Sequence[Row], train: Callable[[list[Row]], Iterable[list[Row]]]
) -> None:
    """Have `train` make what the table lacks of `runs`; each list of rows it yields is whole runs,
    and kept at once.
    """
    if missing := table.missing(runs):
        for rows in train(missing):
            table.add(rows)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean and half the width of its 95% interval (Student's t; infinite for one value)."""
    values = [float(value) for value in values]
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.inf
    t = _T95[min(len(values) - 1, len(_T95)) - 1]
    if not math.isfinite(mean):  # a run diverged
        return mean, math.inf
    return mean, t * statistics.stdev(values) / math.sqrt(len(values))


def _number(text: str) -> str | int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _rounded(value: Any) -> Any:
    """As the file will give it back."""
    return _number(f"{value:.6g}") if isinstance(value, float) else value
