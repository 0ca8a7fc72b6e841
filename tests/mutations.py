"""Does `make test` bite? Plant faults one by one, in a copy of the tree, and see whether the tests turn red.

    python tests/mutations.py                    # all faults; an hour or more on two cores
    python tests/mutations.py --only 0 7 12      # some of them
    python tests/mutations.py --check            # are the faulty lines still there?

For each fault the tests of its own room run first, up to the first failure, then all others. Nothing here runs in CI.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Fault(NamedTuple):
    """A line that becomes wrong."""

    what: str
    file: str
    """Below src/sprint, or below examples."""
    right: str
    wrong: str


FAULTS = [
    Fault("structured drop: members and groups swapped", "middle/groups.py",
          "order = (*range(0, 2 * axes, 2), *range(1, 2 * axes, 2))",
          "order = (*range(1, 2 * axes, 2), *range(0, 2 * axes, 2))"),
    Fault("random drop: the generator is not passed", "middle/drop.py",
          "scores = uniform((1 if self.shared else batch, num_tokens), device=device, generator=generator)",
          "scores = uniform((1 if self.shared else batch, num_tokens), device=device)"),
    Fault("drop: the same tokens for all samples", "middle/drop.py",
          "found, rows = self._cells(grid), 1 if self.shared else batch", "found, rows = self._cells(grid), 1"),
    Fault("drop: ragged groups are not shuffled", "middle/groups.py",
          "shuffled = draw((rows, num_tokens)).argsort(dim=1)",
          "shuffled = draw((rows, num_tokens)).argsort(dim=1).sort(dim=1).values"),
    Fault("subset: restored in ascending order, not that of keep", "middle/tokens.py",
          "return filled.scatter(1, self._index(sparse)", "return filled.scatter(1, self._index(sparse).sort(dim=1).values"),
    Fault("fusion: shallow half first", "middle/fusion.py",
          "deep_weight, shallow_weight = self.weight.split(", "shallow_weight, deep_weight = self.weight.split("),
    Fault("fusion: path-drop keeps what it should drop", "middle/fusion.py",
          "sparse = torch.where(dropped.view(-1, 1, 1), lost.to(sparse.dtype), sparse)",
          "sparse = torch.where(dropped.view(-1, 1, 1), sparse, lost.to(sparse.dtype))"),
    Fault("fusion: path-drop in eval too", "middle/fusion.py",
          'self.sources != "shallow" and self.training and', 'self.sources != "shallow" and'),
    Fault("middle: rotary tables are not gathered", "middle/sparse.py",
          "kwargs[name] = subset.gather(kwargs[name])", "kwargs[name] = kwargs[name][:, : subset.num_kept]"),
    Fault("interpolant: sign of the cosine's derivative", "flow/interpolants.py",
          "return -math.pi / 2 * self.sigma(t)", "return math.pi / 2 * self.sigma(t)"),
    Fault("score without its sign", "flow/interpolants.py",
          "return -self.noise(v, x, t) / self.sigma(like(t, x))", "return self.noise(v, x, t) / self.sigma(like(t, x))"),
    Fault("guidance: weak and strong swapped in CFG", "flow/guidance.py",
          "return guide(predict(model, x, t, null), predict(model, x, t, y), scale",
          "return guide(predict(model, x, t, y), predict(model, x, t, null), scale"),
    Fault("PDG: the weak prediction takes the full path", "flow/guidance.py",
          'with middle.routed(path="shallow"):', 'with middle.routed(path="full"):'),
    Fault("guidance interval ignored", "flow/guidance.py",
          "if not interval[0] <= t <= interval[1]:", "if False:"),
    Fault("Velocity: a reversed time without a reversed velocity", "flow/velocity.py",
          "return -output if self.reverse else output", "return output"),
    Fault("Heun averages the first slope alone", "flow/sampling.py",
          "return x + (t_next - t) * (first + second) / 2", "return x + (t_next - t) * first"),
    Fault("SDE: half of the drift's correction is missing", "flow/sampling.py",
          "drift = v - w / 2 * interpolant.score(", "drift = v - w / 4 * interpolant.score("),
    Fault("log-normal time forgets its mean", "flow/loss.py",
          "torch.exp(self.mean + self.std * draw)", "torch.exp(self.std * draw)"),
    Fault("REPA: features of dropped tokens", "flow/loss.py",
          "else output.repa_subset.gather(repa_target)", "else repa_target[:, : output.repa_subset.num_kept]"),
    Fault("RoPE: rows and columns swapped", "models/layers.py",
          "for axis in (row, column)], dim=1)  # (N, head_dim / 2)",
          "for axis in (column, row)], dim=1)  # (N, head_dim / 2)"),
    Fault("block: gates of attention and MLP swapped", "models/layers.py",
          "shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = ", "shift_a, scale_a, gate_m, shift_m, scale_m, gate_a = "),
    Fault("null class is the first class", "models/layers.py",
          "return torch.full((batch,), self.num_classes,", "return torch.full((batch,), 0,"),
    Fault("patches ordered (row, column, channel)", "models/layers.py",
          '"b c (h p) (w q) -> b (h w) (c p q)"', '"b c (h p) (w q) -> b (h w) (p q c)"'),
    Fault("reference's REPA depth taken as ours", "models/reference.py",
          'repa_depth = int(said["representation_depth"]) - 1', 'repa_depth = int(said["representation_depth"])'),
    Fault("wrapped: the table of a joint stream forgets the text's length", "hosts/mechanism/tables.py",
          "subset.keep + texts], dim=1), rows)", "subset.keep], dim=1), rows)"),
    Fault("wrapped: tables are not gathered", "hosts/mechanism/tables.py",
          "rows = gather_rows(value, table, subset, name=name, **options)", "rows = value"),
    Fault("wrapped: path-drop forgets the text", "hosts/mechanism/route.py",
          "text = torch.where(self.dropped.view(-1, *[1] * (text.ndim - 1)), shallow_text, text)", "text = text"),
    Fault("wrapped: cells in the order of the tokens", "hosts/mechanism/keep.py",
          "return TokenSubset(subset.keep.gather(1, order), subset.num_tokens)", "return subset"),
    Fault("AdamW: no bias correction of the second moment", "training/optim.py",
          "(exp_avg_sq.sqrt() / correction2 + eps)", "(exp_avg_sq.sqrt() + eps)"),
    Fault("average follows twice as fast", "training/averages.py",
          "parameters, 1 - self.decay)", "parameters, 2 - 2 * self.decay)"),
    Fault("second stage keeps the first one's position in the data", "training/schedule.py",
          "images = first.steps * first.batch + inner * second.batch", "images = inner * second.batch"),
    Fault("processes see the same images", "training/order.py",
          "(call * processes + process) * self.each(step)", "(call * processes) * self.each(step)"),
    Fault("latents: standard deviation as variance", "data/latents.py",
          "return scale * (mean + std * normal(", "return scale * (mean + std.sqrt() * normal("),
    Fault("crop of the corner", "data/images.py",
          "left, top = (image.width - size) // 2, (image.height - size) // 2", "left, top = 0, 0"),
    Fault("kernels' twin: even and odd channels swapped", "kernels/fused.py",
          "even, odd = normed.unflatten(-1, (-1, 2)).unbind(-1)", "odd, even = normed.unflatten(-1, (-1, 2)).unbind(-1)"),
    Fault("cost: views count as operations", "costs/counting.py",
          'if func.namespace == "prim" or func.is_view or', 'if func.namespace == "prim" or'),
    Fault("diffusers: the conditional call takes the shallow path", "diffusers/guidance.py",
          'if name != "uncond":', 'if name == "uncond":'),
    Fault("train.py: the seed forgets the step", "imagenet/train.py",
          "seed_of(config.seed, done, call, share[0])", "seed_of(config.seed, 0, call, share[0])"),
]  # fmt: skip


def place(fault: Fault, root: Path) -> Path:
    """The file of a fault."""
    return root / ("examples" if fault.file.startswith("imagenet") else "src/sprint") / fault.file


def pytest(root: Path, *arguments: str) -> bool:
    """Whether the tests are green, up to the first failure."""
    env = {**os.environ, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "auto", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=root, env=env, capture_output=True, check=False).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of faults")
    parser.add_argument("--check", action="store_true", help="only whether each line is there once")
    args = parser.parse_args()
    if lost := [f.what for f in FAULTS if place(f, ROOT).read_text().count(f.right) != 1]:
        raise SystemExit(f"the code has changed, look again at: {'; '.join(lost)}")
    if args.check:
        return
    caught = 0
    chosen = args.only or range(len(FAULTS))
    for number in chosen:
        fault, start = FAULTS[number], time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "sprint"
            shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(".venv", ".git", "out", "site", "__pycache__"))
            path = place(fault, root)
            path.write_text(path.read_text().replace(fault.right, fault.wrong))
            room = f"tests/{fault.file.split('/')[0]}"
            own = [room] if (root / room).is_dir() else []
            red = bool(own) and not pytest(root, *own)
            where = room
            if not red:
                red, where = not pytest(root, *(f"--ignore={name}" for name in own)), "elsewhere"
        caught += red
        verdict = f"red in {where}" if red else "GREEN: not caught"
        print(f"{number:2d}  {verdict:24}  {time.perf_counter() - start:5.0f} s  {fault.what}", flush=True)
    print(f"{caught} of {len(list(chosen))} caught")


if __name__ == "__main__":
    main()
