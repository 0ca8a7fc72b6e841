"""A subset of tokens: which are kept, and the pair gather and restore (SPRINT, arXiv 2510.21986, token dropping).

All shapes follow from the subset's own shape: nothing here waits for the device, except `from_keep`, which checks values.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sprint.arguments import called, checked


@called("a TokenSubset such as TokenSubset.from_keep(indices, num_tokens)")
@checked
@dataclass(frozen=True, eq=False)
class TokenSubset:
    """The tokens that are kept, as indices; `gather` and `restore` are a pair that cannot be mismatched.

    Build one with `drop.sample(...)` or, from indices of your own, with `TokenSubset.from_keep`, which checks their values.

    Args:
        keep: kept token indices per sample, (B, K), int64, distinct in each row, in [0, num_tokens).
        num_tokens: N, the number of tokens before dropping.

    Examples:
        >>> subset = TokenSubset.from_keep(torch.tensor([[2, 0]]), 3)
        >>> tokens = torch.tensor([[[10.0], [11.0], [12.0]]])
        >>> subset.gather(tokens).flatten().tolist()
        [12.0, 10.0]
        >>> subset.restore(subset.gather(tokens), torch.zeros(1, 1, 1)).flatten().tolist()
        [10.0, 0.0, 12.0]
    """

    keep: Tensor
    num_tokens: int

    def __post_init__(self) -> None:
        if self.keep.ndim != 2:
            raise ValueError(f"keep must have shape (B, K), got {tuple(self.keep.shape)}: pass one row per sample")
        if self.keep.dtype != torch.int64:
            raise TypeError(f"keep must be int64, got {self.keep.dtype}: convert with keep.long()")
        if not 1 <= self.keep.shape[1] <= self.num_tokens:
            raise ValueError(
                f"keep must name 1 to {self.num_tokens} (num_tokens) tokens per sample, got {self.keep.shape[1]}"
            )

    @classmethod
    def from_keep(cls, keep: Tensor, num_tokens: int) -> "TokenSubset":
        """Make a subset of indices that come from elsewhere, checking their values (this waits for the device).

        Args:
            keep: (B, K) int64 indices in [0, num_tokens), no repeats within a row.
            num_tokens: N.

        Raises:
            TypeError: `keep` is not int64.
            ValueError: wrong rank, an index out of range, or an index that repeats in its row.
        """
        subset = cls(keep, num_tokens)
        if keep.numel() == 0:
            return subset
        low, high = int(keep.min()), int(keep.max())
        if low < 0 or high >= num_tokens:
            raise ValueError(
                f"keep holds indices from {low} to {high}, expected 0 to {num_tokens - 1}: "
                "indices count tokens row-major over the token grid"
            )
        ordered = keep.sort(dim=1).values
        repeats = (ordered[:, 1:] == ordered[:, :-1]).any(dim=1)
        if bool(repeats.any()):
            row = int(repeats.int().argmax())
            raise ValueError(f"keep repeats an index in row {row}: each token can be kept once")
        return subset

    @property
    def num_kept(self) -> int:
        """K, the number of kept tokens per sample."""
        return self.keep.shape[1]

    @property
    def mask(self) -> Tensor:
        """(B, N) bool, True where a token is kept."""
        empty = torch.zeros(self.keep.shape[0], self.num_tokens, dtype=torch.bool, device=self.keep.device)
        return empty.scatter(1, self.keep, True)

    def gather(self, tokens: Tensor) -> Tensor:
        """Take the kept tokens.

        Args:
            tokens: (B, N, *), any dtype; a leading 1 instead of B (a table that all samples share) is expanded.

        Returns:
            (B, K, *), in the order of `keep`.

        Raises:
            ValueError: the batch, the number of tokens or the device differs from the subset's.
        """
        batch, kept = self.keep.shape
        self._check(tokens, "tokens", rows=(1, batch), length=self.num_tokens)
        index = self._index(tokens)
        return tokens.expand(batch, *tokens.shape[1:]).gather(1, index.expand(batch, kept, *tokens.shape[2:]))

    def restore(self, sparse: Tensor, fill: Tensor) -> Tensor:
        """Put kept tokens back to their places, with `fill` at all others: the inverse of `gather`.

        Args:
            sparse: (B, K, *), in the order of `keep`.
            fill: broadcastable to (B, N, *), for example a mask token (1, 1, C); takes `sparse`'s dtype.

        Returns:
            (B, N, *) of `sparse`'s dtype.

        Raises:
            ValueError: the batch, the number of tokens or the device differs from the subset's.
        """
        batch = self.keep.shape[0]
        self._check(sparse, "sparse", rows=(batch,), length=self.num_kept)
        filled = fill.to(sparse.dtype).expand(batch, self.num_tokens, *sparse.shape[2:])
        return filled.scatter(1, self._index(sparse).expand_as(sparse), sparse)

    def _index(self, tokens: Tensor) -> Tensor:
        return self.keep.view(*self.keep.shape, *([1] * (tokens.ndim - 2)))

    def _check(self, tokens: Tensor, name: str, *, rows: tuple[int, ...], length: int) -> None:
        if tokens.ndim < 2 or tokens.shape[0] not in rows or tokens.shape[1] != length:
            raise ValueError(
                f"{name} must have shape ({rows[-1]}, {length}, ...), got {tuple(tokens.shape)}: "
                f"this subset keeps {self.num_kept} of {self.num_tokens} tokens for {self.keep.shape[0]} samples"
            )
        if tokens.device != self.keep.device:
            raise ValueError(
                f"{name} is on {tokens.device}, the subset on {self.keep.device}: draw it with device={str(tokens.device)!r}"
            )
