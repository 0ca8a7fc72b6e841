"""The constants of `sprint.cost` from the measured training steps.

    captured:  seconds = FLOPs / flops + parameters * update
    eager:     seconds = max(FLOPs / flops, operations * launch) + parameters * update

flops and update by least squares of relative errors over our captured steps; launch from the eager step that is furthest
from its products, if one waits for launches at all.
"""

import math
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import sprint
from benchmarks import report
from benchmarks.gpu.table import Table, read, told
from benchmarks.gpu.train import EAGER, OURS, PLAIN_OURS, toy
from benchmarks.report import Row

KEYS = ("implementation", "job", "path")


def run(table: Table, *, dry: bool) -> None:
    """Anew for each state of train_step.csv; a fit that fails leaves the one before where it is.

    Raises:
        ValueError: there is one before and the new one fails.
    """
    del dry
    key = {"implementation": "all", "job": "", "path": ""}
    try:
        rows = _fitted(table.path.parent / "train_step.csv", table.env["device"], key)
    except Exception as error:
        if not all(row.get("error") for row in table.rows):
            raise ValueError("the fit fails, the one before stays") from error
        traceback.print_exc()
        rows = [{**key, "error": told(error)}]
    table.rows = []
    table.put(rows)


def nonnegative(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Two factors, neither negative, with the least relative error."""
    table = np.array(rows) / np.array(seconds)[:, None]
    scale = table.max(axis=0)
    chosen = [0, 1]
    if len(rows) > 1:
        both = np.linalg.lstsq(table / scale, np.ones(len(rows)), rcond=None)[0]
        if (both >= 0).all():
            return [float(value) for value in both / scale]
        chosen = [int(both[1] > both[0])]
    factors = [0.0, 0.0]
    column = (table / scale)[:, chosen[0]]
    factors[chosen[0]] = float(column.sum() / (column**2).sum() / scale[chosen[0]])
    return factors


def line_of(device: str, *, flops: float, update: float, launch: float) -> str:
    """The rates to copy, or that these are none."""
    if not (0 < flops < math.inf and 0 <= update < math.inf and 0 <= launch < math.inf):
        return f"{device}: could not be fitted from these steps: flops {flops:.4g}, update {update:.4g}, launch {launch:.4g}"
    return f'Hardware("{device}", flops={flops:.4g}, update={update:.4g}, launch={launch:.4g})'


def _fitted(path: Path, device: str, key: Row) -> list[Row]:
    rows = [row for row in read(path) if row.get("ms") and row["device"] == device]
    kernels = [row for row in rows if row["implementation"] == OURS]
    captured = kernels or [row for row in rows if row["implementation"] == PLAIN_OURS]
    eager = [row for row in rows if row["implementation"] == EAGER]
    if not captured:
        raise ValueError(f"{path.name} has no step of {OURS!r} on {device} yet")
    costs = {job: _cost(row) for job, row in {row["job"]: row for row in rows}.items()}

    def work(row: Row) -> Any:
        return costs[row["job"]].full if row["path"] == "dense" else costs[row["job"]].sparse

    def seconds(row: Row) -> float:
        return float(row["ms"]) / 1000

    asked = [[work(row).training, costs[row["job"]].parameters] for row in captured]
    product, update = nonnegative(asked, [seconds(row) for row in captured])
    waits = [
        (seconds(row) - costs[row["job"]].parameters * update) / work(row).operations
        for row in eager
        if seconds(row) - costs[row["job"]].parameters * update > 1.1 * work(row).training * product
    ]
    launch = max(0.0, min(waits)) if waits else 0.0
    flops = 1 / product if product else float("inf")
    line = line_of(device, flops=flops, update=update, launch=launch)
    print(line if waits else f"{line}  # no eager step waits for launches: launch is unknown")
    result = []
    for row in (*captured, *eager):
        computing, launching = work(row).training * product, work(row).operations * launch
        longer = max(computing, launching) if row["implementation"] == EAGER else computing
        predicted = longer + costs[row["job"]].parameters * update
        result.append(
            {**{name: row[name] for name in KEYS}, "ms": row["ms"], "fitted ms": 1000 * predicted,
             "fitted/measured": predicted / seconds(row), "error": None}
        )  # fmt: skip
    return [{**key, "line": line, "error": None}, *result]


def _cost(row: Row) -> sprint.costs.Cost:
    grid, _, batch = row["job"].partition(":")
    return sprint.cost(toy() if row["preset"] == "toy" else row["preset"], grid=report.grid(grid), batch=int(batch))
