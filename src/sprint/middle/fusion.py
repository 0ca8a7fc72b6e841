"""Sparse-dense residual fusion: join the dense shallow path with the sparse deep path.

    h = W [g_pad ; f] + b          W: (C, 2C), deep half first        (SPRINT, arXiv 2510.21986, residual fusion)

`f (B, N, C)` are the encoder's tokens, `g (B, K, C)` the middle's, `g_pad` is `g` at the kept places and the mask token
`m` elsewhere. Because `W [g_pad ; f] = W_g g_pad + W_f f`, the deep half is multiplied on the K kept tokens and on `m`
once; the padded `(B, N, 2C)` tensor of the plain form is never built. The weights are those of the plain form.
"""

from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sprint.arguments import checked
from sprint.middle.tokens import TokenSubset
from sprint.random import uniform

Sources = Literal["both", "deep", "shallow"]
Init = Literal["xavier", "identity"]
Fill = Literal["mask", "shallow"]


class SplitLinear(nn.Module):
    """`W [g ; f] + b` with its halves multiplied apart, each on as many tokens as it has.

    It is called as a module, and is no `nn.Linear`, so that offloading finds its weights, and what rewrites linear layers
    by type (casts of storage, quantisation, "all-linear" adapters) leaves it as it is.

    Args:
        halves: 2, or 1 where `W` has only one of them.
        dim: C.
        residual: compute `W_g g` as `g + (W_g - I) g`. The same map, but where `W_g` is the identity its result is `g`, bit
            by bit in any precision of the product (autocast, TF32), and near it more accurate.
    """

    def __init__(self, halves: int, dim: int, *, residual: bool = False) -> None:
        super().__init__()
        self.residual = residual
        self.weight = nn.Parameter(torch.empty(dim, halves * dim))  # deep half first
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, shallow: Tensor | None, *deep: Tensor) -> tuple[Tensor, ...]:
        """`W_f f + b` (or `b` without shallow tokens), and `W_g g` of each of the deep ones."""
        for tokens in (shallow, *deep):
            if tokens is not None and tokens.device != self.weight.device and not tokens.is_meta:
                raise ValueError(
                    f"tokens are on {tokens.device}, the fusion on {self.weight.device}: move it with .to(device); a model "
                    "that is offloaded must be wrapped before"
                )
            if tokens is None or tokens.is_meta or torch.is_autocast_enabled(tokens.device.type):
                continue
            if tokens.dtype != self.weight.dtype:
                raise TypeError(
                    f"tokens are {tokens.dtype}, the fusion {self.weight.dtype}: convert one with .to(dtype), or use "
                    "torch.autocast"
                )
        if not deep:
            return (F.linear(shallow, self.weight, self.bias),)  # pyright: ignore[reportArgumentType]
        if shallow is None:
            deep_weight, base = self.weight, self.bias
        else:
            deep_weight, shallow_weight = self.weight.split(len(self.weight), dim=1)
            base = F.linear(shallow, shallow_weight, self.bias)
        if not self.residual:
            return base, *(F.linear(tokens, deep_weight) for tokens in deep)
        change = deep_weight - torch.eye(len(deep_weight), dtype=deep_weight.dtype, device=deep_weight.device)
        return base, *(tokens + F.linear(tokens, change) for tokens in deep)

    def extra_repr(self) -> str:
        return f"weight={tuple(self.weight.shape)}"


class Fusion(nn.Module, ABC):
    """What fusions share: the call, its checks, and the draw of samples that lose their deep path.

    A fusion of your own has `fuse`. Path-drop acts in `train()` only, like dropout; dropping *tokens* never depends on the
    mode.

    Args:
        dim: C.
        path_drop: probability in [0, 1] of losing a sample's deep path, in training.

    Raises:
        ValueError: `path_drop` is no probability.
    """

    sources: Sources = "both"

    def __init__(self, dim: int, *, path_drop: float) -> None:
        super().__init__()
        if not 0 <= path_drop <= 1:
            raise ValueError(f"path_drop is a probability in [0, 1], got {path_drop}")
        self.dim, self.path_drop = dim, path_drop

    def reset_parameters(self) -> None:
        """Initialise what it has."""

    @abstractmethod
    def fuse(self, shallow: Tensor, deep: Tensor | None, subset: TokenSubset | None, dropped: Tensor | None) -> Tensor:
        """Join the tokens: arguments as of `forward`, checked and drawn."""

    def forward(
        self,
        shallow: Tensor,
        deep: Tensor | None = None,
        subset: TokenSubset | None = None,
        *,
        dropped: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Join shallow and deep tokens.

        Args:
            shallow: encoder tokens f, (B, N, C).
            deep: middle tokens g, (B, K, C) in the order of `subset`, or (B, N, C) without one. None means that the middle
                did not run (shallow path): every place is one that the middle did not see.
            subset: where the deep tokens belong.
            dropped: (B,) bool, samples that lose their deep path. By default drawn in training.
            generator: for that draw.

        Returns:
            h, (B, N, C).

        Raises:
            ValueError: shapes that do not fit each other.
            TypeError: dtypes that do not fit.
        """
        if shallow.ndim != 3 or shallow.shape[-1] != self.dim:
            raise ValueError(f"shallow tokens must be (B, N, {self.dim}), got {tuple(shallow.shape)}")
        if deep is not None and deep.shape[-1] != self.dim:
            raise ValueError(f"deep tokens must be (B, K, {self.dim}), got {tuple(deep.shape)}")
        if deep is not None and subset is None and deep.shape != shallow.shape:
            raise ValueError(
                f"without a subset deep tokens must be {tuple(shallow.shape)} like the shallow ones, got "
                f"{tuple(deep.shape)}: pass the subset that they were gathered with"
            )
        if subset is not None and subset.num_tokens != shallow.shape[1]:
            raise ValueError(
                f"the subset was drawn from {subset.num_tokens} tokens, there are {shallow.shape[1]} shallow ones: "
                "draw it on the grid of these tokens"
            )
        draws = deep is not None and self.sources != "shallow" and self.training and self.path_drop > 0
        if draws and dropped is None:
            dropped = uniform((len(shallow),), device=shallow.device, generator=generator) < self.path_drop
        mask = getattr(self, "mask_token", None)
        if deep is not None and subset is None and dropped is None and mask is not None and mask.requires_grad:
            # A trained mask token takes part in every step: DistributedDataParallel waits for its gradient.
            dropped = torch.zeros(len(shallow), dtype=torch.bool, device=shallow.device) if self.training else None
        return self.fuse(shallow, deep, subset, dropped)


@checked
class SparseDenseResidual(Fusion):
    """SPRINT's fusion, `h = W [g_pad ; f] + b`.

    In training, each sample loses its whole deep path with probability `path_drop` (path-drop learning), so that the
    shallow path alone learns a velocity and can serve as the weak branch of Path-Drop Guidance.

    Args:
        dim: C.
        path_drop: probability in [0, 1] of replacing a sample's deep tokens by the mask token, in training.
        sources: "both", or the paper's ablations "deep" (`W_g g_pad + b`) and "shallow" (`W_f f + b`), W: (C, C).
        learnable_mask: train the mask token. The reference freezes it at N(0, 0.02), and so do we by default.
        fill: what stands for g where the middle did not run: the mask token, as in the paper, or f, with which a pretrained
            model begins to drop tokens from a loss near its own (`W_g` is then multiplied on all tokens). Where no mask
            token is used there is none, so that a state dictionary does not fit a fusion of another fill.
        init: "xavier" (from scratch), or "identity", `W = [I ; 0]`: the output is the deep path, bit by bit, which
            leaves a pretrained model unchanged as long as nothing is dropped, also under autocast.

    Examples:
        >>> fusion = SparseDenseResidual(8)
        >>> fusion(torch.randn(2, 16, 8), torch.randn(2, 16, 8)).shape
        torch.Size([2, 16, 8])
    """

    def __init__(
        self,
        dim: int,
        *,
        path_drop: float = 0.1,
        sources: Sources = "both",
        learnable_mask: bool = False,
        init: Init = "xavier",
        fill: Fill = "mask",
    ) -> None:
        super().__init__(dim, path_drop=path_drop)
        if init == "identity" and sources == "shallow":
            raise ValueError("init='identity' keeps the deep path, which sources='shallow' leaves out: use init='xavier'")
        if fill == "shallow" and (learnable_mask or sources == "shallow"):
            what = "sources='shallow' has no deep half" if sources == "shallow" else "learnable_mask would train no token"
            raise ValueError(f"fill='shallow' puts f in the deep half instead of the mask token, and {what}: leave it out")
        self.sources, self.init, self.fill = sources, init, fill
        self.proj = SplitLinear(2 if sources == "both" else 1, dim, residual=init == "identity")
        self.mask_token: nn.Parameter | None = None
        if fill == "mask":
            self.mask_token = nn.Parameter(torch.empty(1, 1, dim), requires_grad=learnable_mask)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the projection as `init` says and the mask token from N(0, 0.02)."""
        nn.init.zeros_(self.proj.bias)
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)
        if self.init == "identity":
            with torch.no_grad():
                self.proj.weight.zero_()[:, : self.dim].fill_diagonal_(1)
        else:
            nn.init.xavier_uniform_(self.proj.weight)

    def fuse(self, shallow: Tensor, deep: Tensor | None, subset: TokenSubset | None, dropped: Tensor | None) -> Tensor:
        """`W_g g_pad + W_f f + b`; where the middle did not run or was lost, the fill stands for g."""
        if self.sources == "shallow":
            return self.proj(shallow)[0].to(shallow.dtype)  # the stream keeps its dtype under autocast
        source = None if self.sources == "deep" else shallow
        rest = shallow if self.mask_token is None else self.mask_token
        if deep is None:
            base, fill = self.proj(source, rest)
            return (base + fill).to(shallow.dtype).expand_as(shallow)
        if self.fill == "shallow" and subset is None and dropped is None:
            base, sparse = self.proj(source, deep)
            return (sparse + base).to(shallow.dtype)
        base, fill, sparse = self.proj(source, rest, deep)  # (B, N, C), (1, 1, C) or (B, N, C), (B, K, C)
        if dropped is not None:
            lost = subset.gather(fill) if subset is not None and self.fill == "shallow" else fill
            sparse = torch.where(dropped.view(-1, 1, 1), lost.to(sparse.dtype), sparse)
        # The deep tokens come first, so that the sum has their strides, on which later kernels' last bits may depend.
        return ((sparse if subset is None else subset.restore(sparse, fill)) + base).to(shallow.dtype)

    def extra_repr(self) -> str:
        fill = "" if self.fill == "mask" else f", fill={self.fill!r}"
        return f"dim={self.dim}, path_drop={self.path_drop}, sources={self.sources!r}{fill}"


@checked
class TokenRouting(Fusion):
    """Dropped tokens bypass the middle, without parameters (TREAD, arXiv 2501.04765): `h = g` where kept, `f` elsewhere.

    An alternative to `SparseDenseResidual`, for comparison. The shallow path is the encoder's output, and a sample that
    loses its deep path bypasses the middle whole.

    Args:
        dim: C.
        path_drop: as in `SparseDenseResidual`.
    """

    def __init__(self, dim: int, *, path_drop: float = 0.0) -> None:
        super().__init__(dim, path_drop=path_drop)

    def fuse(self, shallow: Tensor, deep: Tensor | None, subset: TokenSubset | None, dropped: Tensor | None) -> Tensor:
        """`g` at the kept places, `f` elsewhere."""
        return _beside(shallow, deep, subset, dropped)


@checked
class MaskRestore(Fusion):
    """The mask token at dropped places and nothing else, `h = g_pad` (SPRINT's "deep only" ablation without its projection).

    An alternative to `SparseDenseResidual`, for comparison.

    Args:
        dim: C.
        path_drop: as in `SparseDenseResidual`.
        learnable_mask: train the mask token; without a projection a frozen one would stay noise, so the default is True.
    """

    def __init__(self, dim: int, *, path_drop: float = 0.0, learnable_mask: bool = True) -> None:
        super().__init__(dim, path_drop=path_drop)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim), requires_grad=learnable_mask)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The mask token from N(0, 0.02)."""
        with torch.no_grad():
            self.mask_token.copy_(0.02 * torch.randn(1, 1, self.dim))

    def fuse(self, shallow: Tensor, deep: Tensor | None, subset: TokenSubset | None, dropped: Tensor | None) -> Tensor:
        """`g` at the kept places, the mask token elsewhere."""
        return _beside(self.mask_token.to(shallow.dtype).expand_as(shallow), deep, subset, dropped)


def _beside(rest: Tensor, deep: Tensor | None, subset: TokenSubset | None, dropped: Tensor | None) -> Tensor:
    """The deep tokens at their places, and the rest elsewhere and in samples that lost them."""
    if deep is None:
        return rest
    fused = deep if subset is None else subset.restore(deep, rest)
    return fused if dropped is None else torch.where(dropped.view(-1, 1, 1), rest, fused)
