"""All that is to be measured on a GPU, in order of worth, within a time, and what is left by the next call.

    python -m benchmarks.gpu --out DIR --minutes 9      # again with the same DIR: goes on where it was
    python -m benchmarks.gpu --out DIR --again hosts    # measures a part anew
    python -m benchmarks.gpu --out DIR --dry-run        # every part on a CPU, at toy size

Each part is a process of its own and a file DIR/NAME.csv, whose rows are written unit by unit: one that crashes, hangs or
runs out of time spares the others, and keeps its rows. DIR/parts.csv says what became of each part. Where the source came
without its history, SPRINT_COMMIT names it.
"""

import argparse
import importlib
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch

from benchmarks import report
from benchmarks.gpu.driver import PARTS, UNFINISHED, claim, drive
from benchmarks.gpu.table import Table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the CSV files")
    parser.add_argument("--minutes", type=float, default=9.0, help="it ends within them")
    parser.add_argument("--again", choices=list(PARTS), nargs="+", default=[], help="parts to measure anew")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, at toy size: does every part run?")
    parser.add_argument("--part", choices=list(PARTS), help="this part alone, in this process")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device here: give --dry-run")
    if not args.minutes >= 0:  # or not a number
        parser.error(f"--minutes must be 0 or more, got {args.minutes}")
    deadline = time.monotonic() + 60 * args.minutes
    device = "cpu" if args.dry_run else "cuda"
    if args.part is None:
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
                signal.signal(number, _end)
        try:
            with claim(args.out):
                env = report.environment(device)
                return drive(args.out, env=env, deadline=deadline, dry=args.dry_run, again=args.again)
        except (ValueError, OSError) as error:
            parser.error(f"--out {args.out}: {error}")
        except KeyboardInterrupt:
            print("interrupted: the same command goes on from here")
            return 130
    env = report.environment(device)
    if args.dry_run:
        torch.set_num_threads(1)
    module = importlib.import_module(f"benchmarks.gpu.{PARTS[args.part].module}")
    table = Table(args.out / f"{args.part}.csv", env=env, keys=module.KEYS, deadline=deadline)
    module.run(table, dry=args.dry_run)
    return 0 if table.complete else UNFINISHED


def _end(number: int, _: object) -> NoReturn:
    """Make a signal an exception: what is running is stopped on the way out."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
