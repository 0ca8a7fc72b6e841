"""Every benchmark runs with --quick, and its CSV file says what is needed to repeat it."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if path.stem not in ("__init__", "report"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_benchmark_runs(name, tmp_path):
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--device", "cpu", "--out", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    with (tmp_path / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 1
    assert all(row["device"] and row["torch"] and row["commit"] for row in rows)
    assert rows[0]["command"].startswith(f"python -m benchmarks.{name} --quick")
