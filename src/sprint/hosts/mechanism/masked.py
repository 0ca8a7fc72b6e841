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


class Masked(TorchFunctionMode):
    """While middle blocks run in it, torch's attention between the tokens of a stream leaves out the dropped image tokens.

    Args:
        order: of image and text in attention over both.
        across: also attention of other queries than the stream's, of sound to a video, say, to as many keys or more.
    """

    def __init__(self, order: Stream, *, across: bool = False) -> None:
        super().__init__()
        self.order, self.across = order, across
        self.blocks = 0
        """Middle blocks that ran."""
        self.attentions = 0
        """Times that attention was masked."""
        self.length = 0
        """Tokens of the longest such attention."""
        self.subset: TokenSubset | None = None
        self.places: Tensor | None = None

    def of(self, subset: TokenSubset, places: Tensor | None = None) -> "Masked":
        """For one block, with the subset of this call, and where the text and then the image stand in the stream, (B, L)."""
        self.subset, self.places, self.blocks = subset, places, self.blocks + 1
        return self

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if self.subset is not None and func is F.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            kwargs = {**dict(zip(names[: len(args)], args, strict=True)), **kwargs}
            args, tokens = (), kwargs["key"].shape[-2]
            lead = kwargs["query"].shape[:-2]  # (B, heads) or (B heads,)
            told = not kwargs.get("is_causal") and lead and lead[0] % len(self.subset.keep) == 0  # not sample by sample
            if told and self._between_tokens(kwargs["query"].shape[-2], tokens):
                seen = self._seen(self.subset, tokens)
                seen = seen.repeat_interleave(lead[0] // len(seen), dim=0).view(lead[0], *[1] * len(lead), tokens)
                kwargs["attn_mask"] = _without(~seen, kwargs.get("attn_mask"))
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

    def _between_tokens(self, queries: int, keys: int) -> bool:
        """Whether this is attention to the tokens of a stream, rather than to a text."""
        assert self.subset is not None
        if (queries != keys and not self.across) or keys < self.subset.num_tokens:
            return False
        self.attentions, self.length = self.attentions + 1, max(self.length, keys)
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
