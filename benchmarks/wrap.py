"""What wrapping costs and saves on a model of diffusers: forward and backward, host against wrapped, in turns.

python -m benchmarks.wrap [--quick]
"""

import copy
from collections.abc import Callable
from typing import Literal

import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

import sprint
from benchmarks import report


def main() -> None:
    parser = report.arguments(__doc__ or "")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--heads", type=int, default=6, help="of 64 channels")
    parser.add_argument("--side", type=int, default=32, help="of the latents; patches are 2x2")
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()
    if args.quick:
        args.layers, args.heads, args.side, args.batch, args.repeats = 6, 1, 8, 2, 1

    torch.manual_seed(0)
    config = {"num_attention_heads": args.heads, "attention_head_dim": 64, "num_layers": args.layers, "in_channels": 4}
    host = DiTTransformer2DModel(**config, sample_size=args.side).to(args.device).eval()
    drop = sprint.StructuredDrop(0.75)
    wrapped = sprint.wrap(copy.deepcopy(host), encoder_depth=2, decoder_depth=2, drop=drop)
    routing = sprint.wrap(copy.deepcopy(host), encoder_depth=2, decoder_depth=2, drop=drop, merge="routing")
    x = torch.randn(args.batch, 4, args.side, args.side, device=args.device)
    call = {"timestep": torch.arange(args.batch, device=args.device), "class_labels": torch.zeros_like(x[:, 0, 0, 0]).long()}

    def step(model: torch.nn.Module, path: Literal["full", "sparse"] | None) -> Callable[[], None]:
        def job() -> None:
            model.zero_grad()
            if path is None:
                model(x, **call).sample.square().mean().backward()
                return
            with sprint.path(model, path):
                model(x, **call).sample.square().mean().backward()

        return job

    jobs = {
        "host": step(host, None),
        "wrapped, full path": step(wrapped, "full"),
        "wrapped, full path, no fusion": step(routing, "full"),
        "wrapped, sparse path": step(wrapped, "sparse"),
        "host again": step(host, None),
    }
    taken = report.seconds(jobs, repeats=args.repeats, device=args.device)
    rows = [{"job": name, "ms": 1000 * s, "ms / host": s / taken["host"]} for name, s in taken.items()]
    report.publish("wrap", rows, out=args.out, env=report.environment(args.device))


if __name__ == "__main__":
    main()
