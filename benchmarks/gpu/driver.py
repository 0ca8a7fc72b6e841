"""What is done when: parts in order of worth, each in a process of its own, until the time is over."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import report
from benchmarks.gpu.suite import ROOT
from benchmarks.gpu.table import read, unended
from benchmarks.report import Row

UNFINISHED = 75
"""Exit status of a part that ran out of time between its units."""
PACKAGES = ("triton", "timm", "accelerate", "einops", "diffusers", "xformers", "pytest", "hypothesis")


@dataclass(frozen=True)
class Part:
    """One file of results.

    Args:
        module: that measures it.
        least: seconds below which it is not begun.
        most: seconds after which it is stopped, for the others' sake.
    """

    module: str
    least: float
    most: float = 600.0


PARTS = {  # in order of worth
    "tests": Part("suite", 30, 200),
    "exactness": Part("exactness", 30, 150),
    "train_step": Part("train", 60),
    "sampling": Part("guided", 40, 150),
    "hosts": Part("hosts", 30, 120),
    "profile": Part("kinds", 50, 150),
    "cost": Part("fit", 15, 60),
}
LAST = 25.0  # seconds that are left for the fit

Launch = Callable[[list[str], float], "int | None"]


def launch(command: list[str], seconds: float) -> int | None:
    """Run a part; returns its exit status, or None if it was stopped after these seconds, with all that it started."""
    paths = [str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True)
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def drive(
    out: Path,
    *,
    env: Row,
    deadline: float,
    dry: bool,
    again: Sequence[str] = (),
    start: Launch = launch,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Run the parts that are not finished; returns how many failed.

    Args:
        out: folder of the results.
        env: columns of every row.
        deadline: by the clock.
        dry: at toy size.
        again: parts whose results are dropped first.
        start: runs a command for at most some seconds.
        clock: in seconds.

    Raises:
        ValueError: the folder has results of a dry run and this is none, or the other way round.
    """
    path = out.resolve() / "parts.csv"
    states = {row["part"]: row for row in read(path)}
    if any(row["dry run"] != str(dry) for row in states.values()):
        raise ValueError(f"{out} holds results of {'real runs' if dry else 'a dry run'}: choose another folder")
    missing = ", ".join(name for name in PACKAGES if importlib.util.find_spec(name) is None) or "nothing"
    versions = f"torch {env['torch']}, triton {env['triton']}, commit {env['commit']}"
    print(f"{env['device']}, {versions}; missing: {missing}", flush=True)

    def note(part: str, state: str, seconds: float, reason: str = "") -> None:
        facts = {"state": state, "seconds": round(seconds, 1), "reason": reason, "missing": missing, "dry run": str(dry)}
        states[part] = {"part": part, **facts, **env}
        report.write(path, [states[name] for name in PARTS if name in states])
        print(f"== {part}: {state}{f', {reason}' if reason else ''}, {seconds:.0f} s", flush=True)

    for name in again:
        (path.parent / f"{name}.csv").unlink(missing_ok=True)
    for name, part in PARTS.items():
        file = path.parent / f"{name}.csv"
        if file.exists() and states.get(name, {}).get("state") == "finished" and not _stale(name, file):
            print(f"== {name}: is there", flush=True)
            continue
        least, spare = (1.0, 0.0) if dry else (part.least, 0.0 if name == "cost" else LAST)
        begun, state, reason, rows = clock(), "", "", -1
        while not state:
            left = deadline - 5 - spare - clock()
            if left < least:
                state, reason = "not finished" if rows > 0 else "skipped", f"{max(left, 0):.0f} s left, it needs {least:.0f}"
                break
            seconds = min(left, part.most)
            command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--out", str(path.parent)]
            command += ["--minutes", f"{(seconds - 3) / 60:.2f}", *(["--dry-run"] if dry else [])]
            status = start(command, seconds)
            before, rows = rows, unended(file, None if status is None else f"the process ended with {status}")
            if status is None:
                state, reason = "not finished", f"stopped after {seconds:.0f} s"
            elif status == UNFINISHED:
                state, reason = "not finished", "too little time for its next unit"
            elif status == 0:
                state = "finished"
            elif rows in (0, before):  # nothing new since it was last begun
                state, reason = "failed", f"the process ended with {status}"
        note(name, state, clock() - begun, reason)
    return sum(row["state"] == "failed" for row in states.values())


def _stale(name: str, file: Path) -> bool:
    """Whether there are steps that the fit has not seen."""
    steps = file.with_name("train_step.csv")
    return name == "cost" and steps.exists() and steps.stat().st_mtime > file.stat().st_mtime
