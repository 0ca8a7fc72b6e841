"""Seconds of one guided sampling step: none, CFG and PDG, `sprint.CapturedModel` beside the model itself.

python -m benchmarks.sampling                                        # on a GPU: XL/2, 256 px, 50 images, bf16 weights
python -m benchmarks.sampling --preset S/2 --batch 8                 # on a CPU: float32
python -m benchmarks.sampling --quick
"""

from typing import Any

import torch

import sprint
from benchmarks import report

GUIDANCE: dict[str, Any] = {
    "CFG": sprint.ClassifierFreeGuidance(3.0),
    "PDG": sprint.PathDropGuidance(3.0),
    "PDG, same condition": sprint.PathDropGuidance(3.0, weak="same"),
}


def guided_flops(cost: sprint.costs.Cost) -> dict[str, float]:
    """Of one guided step, by the names of GUIDANCE."""
    return {
        "CFG": 2 * cost.full.forward,
        "PDG": cost.full.forward + cost.shallow.forward,
        "PDG, same condition": cost.shared or float("nan"),
    }


def main() -> None:
    parser = report.arguments(__doc__ or "")
    parser.add_argument("--preset", default="XL/2")
    parser.add_argument("--grid", type=report.grid, default=(16, 16))
    parser.add_argument("--batch", type=int, default=50)
    args = parser.parse_args()
    if args.quick:
        args.preset, args.grid, args.batch, args.repeats = "S/2", (4, 4), 2, 1
    dtype, peak = report.default_dtype(args.device), report.measured_peak(args.device, quick=args.quick)
    torch.manual_seed(args.seed)
    model = sprint.SiT.preset(args.preset).to(args.device, dtype).eval()
    x = torch.randn(args.batch, 4, 2 * args.grid[0], 2 * args.grid[1], device=args.device, dtype=dtype)
    y = torch.randint(0, 1000, (args.batch,), device=args.device)
    cost = sprint.cost(args.preset, grid=args.grid, batch=args.batch)
    flops = guided_flops(cost)
    rows = []
    for name in ("eager", "CapturedModel"):  # in this order: the second compiles the model's blocks in place
        callee = model if name == "eager" else sprint.CapturedModel(model)
        jobs = {kind: (lambda guidance=guidance, m=callee: guidance(m, x, 0.5, y)) for kind, guidance in GUIDANCE.items()}
        with torch.no_grad():
            taken = report.seconds(jobs, repeats=args.repeats, device=args.device, warmup=5)
        for kind, seconds in taken.items():
            rate = flops[kind] / seconds
            rows.append(
                {"preset": args.preset, "batch": args.batch, "implementation": name, "guidance": kind, "ms": 1000 * seconds,
                 "CFG/this": taken["CFG"] / seconds, "FLOP ratio": flops["CFG"] / flops[kind], "TFLOP": flops[kind] / 1e12,
                 "TFLOP/s": rate / 1e12,
                 "of peak": rate / peak}
            )  # fmt: skip
    print(f"peak of a matrix product: {peak / 1e12:.3g} TFLOP/s")
    report.publish("sampling", rows, out=args.out, env=report.environment(args.device))


if __name__ == "__main__":
    main()
