"""`pytest -m gpu` as a table: a row for each test, and what is missing."""

import importlib.util
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

from benchmarks.gpu.table import Table
from benchmarks.report import Row

ROOT = Path(__file__).parents[2]
VERDICT = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
REASON = re.compile(r"^(FAILED|ERROR) (\S+?)(?: - (.*))?$")
KEYS = ("test",)


def run(table: Table, *, dry: bool) -> None:
    """One unit: what pytest did until the time was over."""
    table.unit([{"test": "pytest"}], lambda: _tests(table.left - 10, dry=dry), needs=0 if dry else 30)


def marked() -> list[str]:
    """Files with tests that need a GPU; others may need packages that are not there."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if "pytest.mark.gpu" in file.read_text()]


def _tests(seconds: float, *, dry: bool) -> list[Row]:
    if importlib.util.find_spec("pytest") is None:
        raise ModuleNotFoundError("pytest is missing")
    chosen = ["-m", "not gpu and not slow", "tests/middle/test_tokens.py"] if dry else ["-m", "gpu", *marked()]
    options = ["-v", "-rfE", "--tb=short", "--color=no", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    command = [sys.executable, "-m", "pytest", *options, *chosen]
    process = subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "COLUMNS": "400"}
    )
    timer = threading.Timer(max(seconds, 1), process.kill)
    timer.start()
    assert process.stdout is not None
    rows, start, last = {}, time.monotonic(), time.monotonic()
    for line in process.stdout:
        print(line, end="", flush=True)
        if found := VERDICT.match(line):
            seconds = round(time.monotonic() - last, 2)
            rows[found[1]] = {"test": found[1], "verdict": found[2], "seconds": seconds, "error": None}
            last = time.monotonic()
        elif found := REASON.match(line.rstrip()):
            rows.setdefault(found[2], {"test": found[2], "verdict": found[1]})["error"] = found[3]
    code, ended = process.wait(), timer.is_alive()
    timer.cancel()
    verdicts = [row["verdict"] for row in rows.values()]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict.lower()}" for verdict in dict.fromkeys(verdicts))
    error = None if code in (0, 1) else f"pytest ended with {code}"
    error = error if ended else "stopped at the end of its time"
    whole = {"test": "pytest", "verdict": counts, "seconds": round(time.monotonic() - start, 1), "error": error}
    return [whole, *rows.values()]
