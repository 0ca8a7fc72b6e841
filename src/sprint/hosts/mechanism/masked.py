"""An oracle for dropped tokens, for `check`: the host runs all of its tokens, and attention sees the kept keys only.

Nothing is gathered on the way, so that no error of gathering can be shared: what the kept tokens are at the end of the
middle must be what they are when they run alone.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sprint.hosts.declare import Stream
from sprint.middle.tokens import TokenSubset

_SOFTMAX = {torch.softmax, torch.special.softmax, Tensor.softmax, F.softmax}


class Masked(TorchFunctionMode):
    """While middle blocks run in it, attention between the tokens of a stream leaves out the dropped image tokens.

    Attention is torch's own, or a softmax over scores (B, *, queries, keys).

    Args:
        order: of image and text in attention over both.
        across: also attention of other queries than the stream's, of sound to a video, say, to as many keys or more.
        only: of each block's attentions that could be meant, this one alone, where another is to a text of as many tokens.
    """

    def __init__(self, order: Stream, *, across: bool = False, only: int | None = None) -> None:
        super().__init__()
        self.order, self.across, self.only = order, across, only
        self.blocks = 0
        """Middle blocks that ran."""
        self.reached: set[int] = set()
        """Those whose attention was masked."""
        self.met = self.samples = 0  # attentions of this block that could be meant; those of one sample
        self.subset: TokenSubset | None = None
        self.places: Tensor | None = None

    def of(self, subset: TokenSubset, places: Tensor | None = None) -> "Masked":
        """For one block, with the subset of this call, and where the text and then the image stand in the stream, (B, L)."""
        self.subset, self.places, self.blocks, self.met, self.samples = subset, places, self.blocks + 1, 0, 0
        return self

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if self.subset is not None and func is F.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            kwargs = {**dict(zip(names[: len(args)], args, strict=True)), **kwargs}
            args, query, tokens = (), kwargs["query"], kwargs["key"].shape[-2]
            lost = None if kwargs.get("is_causal") else self._lost(query.shape[:-2], query.shape[-2], tokens)
            if lost is not None:
                kwargs["attn_mask"] = _without(lost, kwargs.get("attn_mask"))
        elif self.subset is not None and func in _SOFTMAX:
            scores, *rest = args or (kwargs.pop("input"),)
            dim = rest[0] if rest else kwargs.get("dim")
            if dim in (-1, scores.ndim - 1) and scores.ndim > 2:
                lost = self._lost(scores.shape[:-2], scores.shape[-2], scores.shape[-1])
                scores = scores if lost is None else scores.masked_fill(lost, float("-inf"))
            args = (scores, *rest)
        elif (
            self.subset is not None and func is F.multi_head_attention_forward
        ):  # of (L, B, C), and with its own call within
            tokens = args[1].shape[0]
            if self._between_tokens(args[0].shape[0], tokens):
                lost = torch.zeros(args[0].shape[1], tokens, dtype=args[0].dtype, device=args[0].device)
                lost.masked_fill_(~self._seen(self.subset, tokens), float("-inf"))
                given = kwargs.get("key_padding_mask")
                kwargs["key_padding_mask"] = lost if given is None else _without(lost != 0, given)
        return func(*args, **kwargs)

    def _lost(self, lead: Any, queries: int, keys: int) -> Tensor | None:
        """Which keys are dropped, to broadcast over scores (*lead, queries, keys): (B, heads, …), (B heads, …), or (1, …),
        sample by sample; None for other attention."""
        assert self.subset is not None
        batch = len(self.subset.keep)
        if not lead or not (lead[0] % batch == 0 or lead[0] == 1) or not self._between_tokens(queries, keys):
            return None
        seen = self._seen(self.subset, keys)
        if lead[0] % batch:
            seen = seen[self.samples % batch].unsqueeze(0)
            self.samples += 1
        return ~seen.repeat_interleave(lead[0] // len(seen), dim=0).view(lead[0], *[1] * len(lead), keys)

    def _between_tokens(self, queries: int, keys: int) -> bool:
        """Whether this is attention to the tokens of a stream, rather than to a text."""
        assert self.subset is not None
        if (queries != keys and not self.across) or keys < self.subset.num_tokens:
            return False
        self.met += 1
        if self.only not in (None, self.met - 1):
            return False
        self.reached.add(self.blocks)
        return True

    def _seen(self, subset: TokenSubset, tokens: int) -> Tensor:
        """Which of the stream's tokens may be seen, (B, L) bool."""
        image = subset.mask
        text = torch.ones(len(image), tokens - subset.num_tokens, dtype=torch.bool, device=image.device)
        if self.places is not None and self.places.shape[1] == tokens:
            seen = torch.cat([text, image], dim=1)
            return seen.scatter(1, self.places, seen)
        return torch.cat([text, image] if self.order == "text+image" else [image, text], dim=1)


def _without(lost: Tensor, mask: Tensor | None) -> Tensor:
    """A mask, bool (True: seen) or to be added, that loses these too."""
    if mask is None:
        return ~lost
    return mask & ~lost if mask.dtype == torch.bool else mask.masked_fill(lost, float("-inf"))
