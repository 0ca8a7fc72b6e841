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
import sys
import time
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.gpu.driver import PARTS, UNFINISHED, drive
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
    deadline = time.monotonic() + 60 * args.minutes
    env = report.environment("cpu" if args.dry_run else "cuda")
    if args.part is None:
        return drive(args.out, env=env, deadline=deadline, dry=args.dry_run, again=args.again)
    if args.dry_run:
        torch.set_num_threads(1)
    module = importlib.import_module(f"benchmarks.gpu.{PARTS[args.part].module}")
    table = Table(args.out / f"{args.part}.csv", env=env, keys=module.KEYS, deadline=deadline)
    module.run(table, dry=args.dry_run)
    return 0 if table.complete else UNFINISHED


if __name__ == "__main__":
    sys.exit(main())
