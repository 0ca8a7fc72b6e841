"""The sparse middle: drop tokens, run the middle blocks on the rest, restore, fuse.

A model is `[*encoder, SparseMiddle(middle, fusion), *decoder]`. Three paths lead through the middle (SPRINT, arXiv
2510.21986):

    full      g(f)                all tokens            second training stage, sampling
    sparse    g(f[keep])          kept tokens only      first training stage
    shallow   mask token          the middle never runs  weak branch of Path-Drop Guidance

Which path is taken is an argument, or state set by a `with` block; it is never read off `train()` or `eval()`, because the
second stage trains on all tokens.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sprint.arguments import checked
from sprint.middle.fusion import Fusion
from sprint.middle.tokens import TokenSubset

Path = Literal["full", "sparse", "shallow"]


def run(
    blocks: Iterable[nn.Module], tokens: Tensor, *args: Any, tap: int = 0, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Run blocks in turn; also return the tokens after the first `tap` of them (None if `tap` lies outside)."""
    tapped = None
    for count, block in enumerate(blocks, start=1):
        if getattr(block, "recompute", False) and torch.is_grad_enabled():
            # Blocks draw nothing, so that there is no random state to keep (nor could a CUDA graph read one).
            tokens = checkpoint(block, tokens, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        else:
            tokens = block(tokens, *args, **kwargs)
        if count == tap:
            tapped = tokens
    return tokens, tapped


@checked
class SparseMiddle(nn.Module):
    """The middle blocks of a model as one block, with token dropping and fusion inside.

    Args:
        blocks: modules called as `block(tokens, *args, **kwargs)` that return tokens of the same shape.
        fusion: joins their output with their input.
        tables: names of keyword arguments that hold one row per token, (B or 1, N, *), such as rotary tables; they are
            gathered with the tokens.

    Examples:
        >>> from sprint import SparseDenseResidual
        >>> blocks = [nn.Linear(8, 8), nn.Linear(8, 8)]
        >>> middle = SparseMiddle(blocks, SparseDenseResidual(8))
        >>> model = nn.Sequential(nn.Linear(8, 8), middle, nn.Linear(8, 8))
        >>> tokens = torch.randn(2, 4, 8)
        >>> subset = TokenSubset.from_keep(torch.tensor([[0], [3]]), 4)
        >>> middle(tokens, subset=subset).shape                  # as an argument
        torch.Size([2, 4, 8])
        >>> with middle.routed(subset=subset):                   # as state, for a model whose loop you do not own
        ...     model(tokens).shape
        torch.Size([2, 4, 8])
    """

    def __init__(self, blocks: Iterable[nn.Module], fusion: Fusion, *, tables: tuple[str, ...] = ("rope",)) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.fusion = fusion
        self.tables = tables
        self._route: tuple[Path | None, TokenSubset | None] = (None, None)

    @contextmanager
    def routed(self, *, path: Path | None = None, subset: TokenSubset | None = None) -> Iterator[None]:
        """Within the `with` block, calls that name neither path nor subset take this route."""
        _resolve(path, subset)
        before = self._route
        self._route = (path, subset)
        try:
            yield
        finally:
            self._route = before

    def forward(
        self,
        tokens: Tensor,
        *args: Any,
        subset: TokenSubset | None = None,
        path: Path | None = None,
        tap: int = 0,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the middle.

        Args:
            tokens: encoder output, (B, N, C).
            *args: passed to every block, unchanged (conditions, masks without a token axis).
            subset: tokens that the blocks see; given one, the path is "sparse".
            path: "full", "sparse" or "shallow"; by default "sparse" with a subset and "full" without.
            tap: also return the tokens after this many middle blocks, (B, K, C) on the sparse path.
            generator: for the path-drop draw in training.
            **kwargs: passed to every block; those named in `tables` are gathered first.

        Returns:
            Fused tokens (B, N, C); with `tap`, a pair of them and the tapped tokens.

        Raises:
            ValueError: path and subset contradict each other, or `tap` asks for blocks that do not run.
        """
        if path is None and subset is None:
            path, subset = self._route
        path = _resolve(path, subset)
        if path == "shallow" or self.fusion.sources == "shallow":
            if tap:
                raise ValueError(f"tap={tap} asks for a middle block, and on the shallow path no middle block runs")
            return self.fusion(tokens)
        kept = tokens
        if subset is not None:
            kept = subset.gather(tokens)
            for name in self.tables:
                if kwargs.get(name) is not None:
                    kwargs[name] = subset.gather(kwargs[name])
        deep, tapped = run(self.blocks, kept, *args, tap=tap, **kwargs)
        fused = self.fusion(tokens, deep, subset, generator=generator)
        return (fused, tapped) if tap else fused


def _resolve(path: Path | None, subset: TokenSubset | None) -> Path:
    if path is None:
        return "full" if subset is None else "sparse"
    if path not in get_args(Path):  # also in compiled code, where arguments are not looked at
        raise ValueError(f"path must be one of {', '.join(get_args(Path))}, got {path!r}")
    if (path == "sparse") != (subset is not None):
        raise ValueError(
            f"path={path!r} {'needs' if path == 'sparse' else 'takes no'} subset: "
            "pass subset=drop.sample(...) for the sparse path, and none for the full and shallow ones"
        )
    return path
