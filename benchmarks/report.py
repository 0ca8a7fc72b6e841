"""What every benchmark shares: timing jobs side by side, the table, the CSV file."""

import argparse
import csv
import gc
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one repeat: does it run?")
    parser.add_argument("--repeats", type=int, default=20, help="timed runs of each job, of which the median counts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"), help="folder of the CSV file")
    return parser


def environment(device: str) -> Row:
    """What a reader needs to judge and repeat a figure."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or platform.machine()
    module = importlib.util.find_spec("__main__")
    module_name = getattr(sys.modules["__main__"].__spec__ or module, "name", sys.argv[0])
    return {
        "device": name if device.startswith("cuda") else f"{name}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": _commit(),
        "command": shlex.join(["python", "-m", module_name.removesuffix(".__main__"), *sys.argv[1:]]),
    }


def seconds(jobs: Mapping[str, Callable[[], Any]], *, repeats: int, device: str, warmup: int = 3) -> dict[str, float]:
    """Median seconds of each job, taken in turns so that a machine that slows down slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for job in jobs.values():
        for _ in range(warmup if repeats > 1 else 1):
            job()
        gc.collect()
    for _ in range(repeats):
        for name, job in jobs.items():
            synchronize(device)
            start = time.perf_counter()
            job()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def windows(jobs: Mapping[str, Callable[[], Any]], *, rounds: int, calls: int, device: str) -> dict[str, list[float]]:
    """Seconds per call of each job in windows of several calls, as a loop makes them: one synchronisation for a window.

    Jobs take turns, forwards in one round and backwards in the next; a window starts with one call that is not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(rounds):
        for name in list(jobs)[:: -1 if turn % 2 else 1]:
            jobs[name]()
            synchronize(device)
            start = time.perf_counter()
            for _ in range(calls):
                jobs[name]()
            synchronize(device)
            times[name].append((time.perf_counter() - start) / calls)
    return times


def spread(times: list[float]) -> Row:
    """Median, least and largest, in milliseconds."""
    return {"ms": 1000 * statistics.median(times), "least ms": 1000 * min(times), "most ms": 1000 * max(times)}


def grid(text: str) -> tuple[int, int]:
    """A token grid from the command line, 16x16."""
    rows, columns = text.split("x")
    return int(rows), int(columns)


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def peak_flops(device: str, *, dtype: torch.dtype, size: int) -> float:
    """Operations per second of a large matrix product on this device: what a benchmark can hope for."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    calls = 10 if device.startswith("cuda") else 1  # one synchronisation for several
    taken = seconds({"product": lambda: [a @ b for _ in range(calls)]}, repeats=10, device=device)["product"]
    return 2 * size**3 * calls / taken


def default_dtype(device: str) -> torch.dtype:
    """Of the products: bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.startswith("cuda") else torch.float32


def measured_peak(device: str, *, quick: bool) -> float:
    """Peak of this device for the default dtype."""
    size = 64 if quick else 8192 if device.startswith("cuda") else 2048
    return peak_flops(device, dtype=default_dtype(device), size=size)


def publish(name: str, rows: list[Row], *, out: Path, env: Row) -> Path:
    """Print the rows as a table and write them, with the environment, to `out/name.csv`."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(column), *(len(row[i]) for row in cells)) for i, column in enumerate(columns)]
    for line in (columns, *cells):
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    path = out / f"{name}.csv"
    write(path, [{**row, **env} for row in rows])
    print(f"\n{env['device']}, torch {env['torch']}, commit {env['commit']}: {path}")
    return path


def write(path: Path, rows: list[Row]) -> None:
    """Write a CSV file at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(column for row in rows for column in row)))
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, path)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _commit() -> str:
    """Where the source came without its history, SPRINT_COMMIT names it."""

    def git(*command: str) -> str:
        run = subprocess.run(["git", *command], capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
        return run.stdout.strip()

    if shutil.which("git") is None:
        return os.environ.get("SPRINT_COMMIT", "unknown")
    commit = git("rev-parse", "--short", "HEAD")
    if not commit:
        return os.environ.get("SPRINT_COMMIT", "unknown")
    return f"{commit}{'+changes' if git('status', '--porcelain', '-uno') else ''}"
