"""Trials of `check` on the stream of tokens: what may be dropped is of the image, stands where its grid says, and nobody
counts it."""

import math
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from sprint.hosts.mechanism.holders import leaves
from sprint.hosts.tried import Draws, Finding, Inputs, Tried, noise

IMAGE = "dropped tokens are the image's"


class Streams(Tried):
    """Trials of what the stream holds."""

    def image(self) -> Finding:
        """What may be dropped is of the image, and stands where its grid says: another image changes each such token, and
        another pixel the token that it lies in."""
        x, drop = self._first(), self.state.drop
        if drop is None:
            return Finding(IMAGE, None, "wrapped without a drop sampler")
        if not all(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in tree_leaves(x)):
            return Finding(IMAGE, None, "NOT PROVED: the first argument is no image")
        draws = Draws(drop)
        self.run("sparse", drop=draws.drop)
        here, grid = self._captured(self._inputs_with(x)), draws.grid
        length, ends = math.prod(grid), self.state.host.always_kept == "first"
        part = slice(here.shape[1] - length, None) if ends else slice(0, length)

        def changed(image: Any) -> Tensor:
            return (self._captured(self._inputs_with(image)) != here).any(dim=-1)[:, part].all(dim=0)

        moved = changed(tree_map(lambda leaf: leaf + noise(leaf), x))
        name = next(iter(self._named()))
        if not moved.any():
            return Finding(IMAGE, None, f"NOT PROVED: no token depends on {name!r}, the first argument")
        stray, what = ~moved, f"do not depend on {name!r}"
        if isinstance(x, Tensor) and x.ndim > 2 and self.state.host.grid is None:
            ends = [(slice(None), end) if x.ndim == 3 else (..., end, end) for end in (0, -1)]
            everywhere = changed(_raised(x, ends[0])) & changed(_raised(x, ends[1]))
            if not stray.any() and not everywhere.all():
                stray, what = everywhere, f"depend on both ends of {name!r}, as no patch does unless the image is very small"
        if stray.any():
            numbers = ", ".join(map(str, stray.nonzero().flatten().tolist()[:5]))
            return Finding(
                IMAGE,
                False,
                f"{int(stray.sum())} of {length} {what} (token {numbers}, …): class tokens, registers, a text or a "
                "reference among them; correct stream=, image_tokens= or grid=",
            )
        if isinstance(x, Tensor) and x.ndim > 3 and self.state.host.grid is None and len(grid) > 1:
            moved, (*_, rows, columns) = changed(_raised(x, (..., 0, -1))), grid
            ends = [columns - 1] if rows != columns else [columns - 1, (columns - 1) * rows]  # by rows, or by columns
            if not moved.all() and not any(moved[end] for end in ends):
                found = ", ".join(map(str, moved.nonzero().flatten().tolist()[:3]))
                return Finding(
                    IMAGE,
                    False,
                    f"the last pixel of the first row is not in token {ends[0]} of a grid {grid}, but in {found}",
                )
        return Finding(IMAGE, True, f"all {length} depend on {name!r}")

    def enters(self) -> None:
        """Raise ValueError where no call reaches the wrapped model's own forward."""
        self._captured((self.args, self.kwargs))

    def _captured(self, inputs: "Inputs") -> Tensor:
        """The image tokens that would enter the middle, had the encoder's blocks not mixed them."""
        captured: list[Tensor] = []
        hook = self.host.sprint.fusion.register_forward_pre_hook(  # pyright: ignore
            lambda module, args: captured.append(args[0].clone())
        )
        try:
            self._set("idle", "encoder", "shallow", inputs)
        finally:
            hook.remove()
        if not captured:
            raise ValueError(
                f"{type(self.model).__name__} was called, and the forward of the wrapped {type(self.host).__name__} did not "
                "run, so that no path was taken: a loop of its own over the blocks runs all tokens on every path; call the "
                "wrapped model itself"
            )
        return captured[0]

    def _inputs_with(self, image: Any) -> "Inputs":
        """The inputs with another image."""
        first = self._first()
        return tree_map(
            lambda value: image if value is first else value, (self.args, self.kwargs), is_leaf=lambda value: value is first
        )

    def counts(self) -> Finding | None:
        """No argument of the blocks is how many tokens each sample has; None if so."""
        found = []
        for place, named in self._met():
            length = named[place.image].shape[1]
            for name, value in named.items():
                told = name in (place.image, place.blocks.text, *place.blocks.tables, *place.blocks.others, *place.sides)
                for leaf in () if told else leaves(value):
                    whole = isinstance(leaf, Tensor) and not leaf.is_floating_point() and leaf.ndim == 1
                    if whole and len(leaf) and bool((leaf == length).all()):
                        found.append(name)
        if self.state.drop is None or not found:
            return None
        return Finding(
            "no argument counts tokens", False, f"{found[0]!r} of the blocks is the number of all tokens: see others="
        )

    def tokens(self) -> str:
        """What is dropped: image tokens, their grid, those that are kept."""
        if self.state.drop is None:
            return ""
        draws = Draws(self.state.drop)
        lengths = [named[place.image].shape[1] for place, named in self._met()]
        self.run("sparse", drop=draws.drop)
        if draws.subset is None:
            return ""
        drawn, grid = draws.subset.num_tokens, "x".join(map(str, draws.grid))
        stream = "" if lengths[:1] in ([], [drawn]) else f" of {lengths[0]}"
        kept = draws.subset.num_kept
        return f"image tokens {drawn}{stream}, grid {grid}, kept {kept} ({100 * kept / drawn:.3g} %)"


def _raised(image: Tensor, place: Any) -> Tensor:
    """The image with one more at a place."""
    image = image.clone()
    image[place] += 1
    return image
