"""What the parts that SPRINT adds to a step cost, beside one transformer block: drawing, gathering, fusing.

    python -m benchmarks.drop [--quick]

`fusion, padded` is the plain form W [g_pad ; f]; ours multiplies the halves apart.
"""

import torch

import sprint
from benchmarks import report
from sprint.models.layers import Block, axial_rope


def main() -> None:
    parser = report.arguments(__doc__ or "")
    parser.add_argument("--dim", type=int, default=1152)
    parser.add_argument("--grid", type=report.grid, default=(16, 16))
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    if args.quick:
        args.dim, args.grid, args.batch, args.repeats = 64, (4, 4), 2, 1
    device, dtype = args.device, report.default_dtype(args.device)
    torch.manual_seed(args.seed)
    structured, random = sprint.StructuredDrop(0.75), sprint.RandomDrop(0.75)
    subset = structured.sample(args.batch, args.grid, device=device)
    tokens = torch.randn(args.batch, subset.num_tokens, args.dim, device=device, dtype=dtype)
    sparse = subset.gather(tokens)
    fusion = sprint.SparseDenseResidual(args.dim).to(device, dtype)
    mask = fusion.mask_token
    assert mask is not None
    block = Block(args.dim, args.dim // 64).to(device, dtype)
    cond, rope = torch.randn(args.batch, args.dim, device=device, dtype=dtype), axial_rope(args.grid, 64, device=device)

    def padded() -> torch.Tensor:
        full = subset.restore(sparse, mask)
        return torch.nn.functional.linear(torch.cat([full, tokens], dim=-1), fusion.proj.weight, fusion.proj.bias)

    jobs = {
        "one block, all tokens": lambda: block(tokens, cond, rope),
        "one block, kept tokens": lambda: block(sparse, cond, rope[:, : subset.num_kept]),
        "draw, structured": lambda: structured.sample(args.batch, args.grid, device=device),
        "draw, random": lambda: random.sample(args.batch, args.grid, device=device),
        "gather": lambda: subset.gather(tokens),
        "fusion": lambda: fusion(tokens, sparse, subset),
        "fusion, padded": padded,
    }
    with torch.no_grad():
        taken = report.seconds(jobs, repeats=args.repeats, device=device)
    whole = taken["one block, all tokens"]
    rows = [{"job": name, "ms": 1000 * s, "of a block": s / whole} for name, s in taken.items()]
    report.publish("drop", rows, out=args.out, env=report.environment(device))


if __name__ == "__main__":
    main()
