"""What is done when: parts in order of worth, each in a process of its own, until the time is over."""

import contextlib
import fcntl
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import report
from benchmarks.gpu.suite import ROOT
from benchmarks.gpu.table import STARTED, read, unended, whole
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
QUICK = 15.0  # seconds in which a process finds that its units are there

Launch = Callable[[list[str], float], "int | None"]


def launch(command: list[str], seconds: float) -> int | None:
    """Run a part; returns its exit status, or None if it was stopped after these seconds, with all that it started."""
    paths = [str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: handler for number in numbers if callable(handler := signal.getsignal(number))}
    held: list[int] = []  # signals that come before there is a process to stop
    for number in handlers:
        signal.signal(number, lambda number, _: held.append(number))
    process = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True)
    try:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in held:
            signal.raise_signal(number)
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def claim(out: Path) -> Iterator[None]:
    """Lock the folder, made if it is not there, by a POSIX lock as `sprint.training.runs` does; its file goes with the lock.

    Raises:
        ValueError: another process has it.
        OSError: it is no folder, or not to be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # POSIX allows either
            raise ValueError("another process is measuring there: wait for it, stop it, or choose another folder") from error
        try:
            yield
        finally:
            Path(file.name).unlink(missing_ok=True)


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
        again: parts whose results are dropped when they begin.
        start: runs a command for at most some seconds.
        clock: in seconds.

    Raises:
        ValueError: the folder has results of a dry run and this is none, or the other way round, or of another device, or a
            parts.csv that is not ours.
    """
    path = out.resolve() / "parts.csv"
    states = _states(path, dry=dry)
    if others := _others(path.parent, env, again):
        print(f"kept, but of another commit or torch: {others} (--again NAME measures anew)", flush=True)
    missing = ", ".join(name for name in PACKAGES if importlib.util.find_spec(name) is None) or "nothing"
    versions = f"torch {env['torch']}, triton {env['triton']}, commit {env['commit']}"
    print(f"{env['device']}, {versions}; missing: {missing}", flush=True)

    def note(part: str, state: str, seconds: float, reason: str = "") -> None:
        facts = {"state": state, "seconds": round(seconds, 1), "reason": reason, "missing": missing, "dry run": str(dry)}
        states[part] = {"part": part, **facts, "rows": len(read(path.with_name(f"{part}.csv"))), **env}
        report.write(path, [states[name] for name in PARTS if name in states])
        print(f"== {part}: {state}{f', {reason}' if reason else ''}, {seconds:.0f} s", flush=True)

    for name, part in PARTS.items():
        file, known = path.parent / f"{name}.csv", states.get(name, {})
        rows, broken = _count(file, known)
        there = rows > 0 and known.get("state") == "finished"
        if there and name not in again and not _stale(name, file):
            print(f"== {name}: is there", flush=True)
            continue
        void = known.get("state") == "failed" and all(row.get("error") for row in read(file))
        anew = broken or void or (name in again and name != "cost")  # a fit replaces the one before by itself
        least, spare = (1.0, 0.0) if dry else (part.least, 0.0 if name == "cost" else LAST)
        if rows and not known:  # parts.csv was cut
            least = min(least, QUICK)
        begun, state, reason = clock(), "", ""
        while not state:
            left = deadline - 5 - spare - clock()
            if left < least:
                state, reason = "not finished" if rows > 0 else "skipped", f"{max(left, 0):.0f} s left, it needs {least:.0f}"
                break
            if anew:
                file.unlink(missing_ok=True)
                rows = 0
            anew = there = False
            seconds = min(left, part.most)
            command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--out", str(path.parent)]
            command += ["--minutes", f"{max(seconds - 3, 0) / 60:.2f}", *(["--dry-run"] if dry else [])]
            try:
                status = start(command, seconds)
            except (KeyboardInterrupt, SystemExit):
                unended(file, None)
                note(name, "not finished", clock() - begun, "interrupted")
                raise
            before, rows = rows, unended(file, None if status is None else f"the process ended with {status}")
            state, reason = _verdict(status, seconds, read(file), new=rows not in (0, before))
        if there:
            print(f"== {name}: kept as it was, {reason}", flush=True)
        else:
            note(name, state, clock() - begun, reason)
    return sum(row["state"] == "failed" for row in states.values())


def _states(path: Path, *, dry: bool) -> dict[str, Row]:
    """What parts.csv says of each part, but for what was cut off."""
    if any(not {"part", "state", "dry run"} <= row.keys() for row in read(path)):
        raise ValueError(f"{path.name} there has no columns part, state and dry run, it is not ours: choose another folder")
    states = {row["part"]: row for row in whole(path)}
    if any(row["dry run"] != str(dry) for row in states.values()):
        raise ValueError(f"results of {'real runs' if dry else 'a dry run'} are there: choose another folder")
    return states


def _others(folder: Path, env: Row, again: Sequence[str]) -> str:
    """Parts with rows of another commit or torch, in words; raises ValueError for those of another device."""
    found = {}
    for name in PARTS:
        for row in whole(folder / f"{name}.csv"):
            if row.get("device") != env["device"]:
                raise ValueError(f"{name}.csv is of {row.get('device')}, this is {env['device']}: choose another folder")
            if name not in again and any(row[column] != env[column] for column in ("commit", "torch")):
                found[f"{name} of commit {row['commit']}, torch {row['torch']}"] = None
    return "; ".join(found)


def _count(file: Path, known: Row) -> tuple[int, bool]:
    """How many rows of ended units there are, and whether the file is cut or has fewer than are known: then none count."""
    rows = whole(file)
    if file.exists() and len(rows) < max(1, len(read(file)), int(known.get("rows") or 0)):
        print(f"== {file.stem}: its file is cut or lacks rows: to be measured anew", flush=True)
        return 0, True
    return sum(row.get("error") != STARTED for row in rows), False


def _verdict(status: int | None, seconds: float, rows: list[Row], *, new: bool) -> tuple[str, str]:
    """State and reason of a part whose process ended; no state if it crashed after something new: it goes on then."""
    if status is None:
        return "not finished", f"stopped after {seconds:.0f} s"
    if status == UNFINISHED:
        return "not finished", "too little time for its next unit"
    if status == 0:
        errors = [row.get("error") for row in rows] or ["it left no rows"]
        return ("failed", f"every unit, the first by {errors[0]}") if all(errors) else ("finished", "")
    return ("", "") if new else ("failed", f"the process ended with {status}")


def _stale(name: str, file: Path) -> bool:
    """Whether there are steps that the fit has not seen."""
    steps = file.with_name("train_step.csv")
    return name == "cost" and steps.exists() and steps.stat().st_mtime > file.stat().st_mtime
