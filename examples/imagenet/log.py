"""What a run says of itself: means of its losses in metrics.jsonl and in the trackers, and that they are finite."""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import sprint
from sprint.checkpoint import write_text


class Log:
    """Sums since the last entry; adding to them never waits for the device.

    Args:
        folder: of the run; entries go to its metrics.jsonl.
        accelerator: for sums over all processes, and its trackers.
    """

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self.file, self.accelerator = folder / "metrics.jsonl", accelerator
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}
        self.images, self.since = 0, time.perf_counter()

    def add(self, out: sprint.training.StepOutput, images: int) -> None:
        """Of one call of the step."""
        values: dict[str, Any] = {"loss": out.loss, **out.metrics}
        if out.grad_norm is not None:
            values["grad_norm"] = out.grad_norm
        for name, value in values.items():
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value  # FSDP2's norm
            self.sums[name] = self.sums.get(name, 0.0) + whole.double()
            self.counts[name] = self.counts.get(name, 0) + 1
        self.images += images

    def check(self, step: int, last: int) -> dict[str, float]:
        """The sums, averaged over all processes.

        Args:
            step: done.
            last: step of the last checkpoint, 0 for none.

        Raises:
            SystemExit: one is not finite.
        """
        names = sorted(self.sums)
        reduced: Any = self.accelerator.reduce(torch.stack([self.sums[name] for name in names]), "mean")
        sums = dict(zip(names, reduced.tolist(), strict=True))
        if broken := [name for name, total in sums.items() if total - total != 0]:
            kept = f"the checkpoint of step {last} is from before" if last else "nothing was saved yet"
            raise SystemExit(
                f"{' and '.join(broken)} before step {step} not finite; {kept}, and the same command goes on from there: "
                "lower learning_rate, or raise warmup_steps"
            )
        return sums

    def write(self, step: int, sums: dict[str, float], **more: float) -> dict[str, float]:
        """One entry, and a fresh start; returns the entry."""
        now = time.perf_counter()
        means = {name: total / self.counts[name] for name, total in sums.items()}
        entry = {"step": step, **means, **more, "images_per_s": self.images / (now - self.since)}
        if self.accelerator.is_main_process:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        self.accelerator.log({name: value for name, value in entry.items() if name != "step"}, step=step)
        self.sums, self.counts, self.images, self.since = {}, {}, 0, now
        return entry

    def window(self, sums: dict[str, float]) -> dict[str, Any]:
        """What was added since the last entry, for a checkpoint."""
        return {"sums": sums if self.sums else {}, "counts": self.counts}

    def go_back(self, step: int, window: dict[str, Any]) -> None:
        """Stand where a checkpoint was written: forget later entries, take up its window."""
        device = self.accelerator.device
        self.sums = {name: torch.tensor(v, device=device, dtype=torch.float64) for name, v in window["sums"].items()}
        self.counts = dict(window["counts"])
        if self.accelerator.is_main_process and self.file.exists():
            lines = self.file.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [line for line in lines if _step(line) <= step]
            if damaged := [number for number, line in enumerate(lines, start=1) if math.isinf(_step(line))]:
                print(f"{self.file}: line {damaged[0]} is damaged, and left out" + (" like others" if damaged[1:] else ""))
            write_text(self.file, "".join(f"{line}\n" for line in kept))


def _step(line: str) -> float:
    """Of an entry; infinity for what is none."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
