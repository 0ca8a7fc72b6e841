"""Which axis of what meets a table's rows is the batch: tried where shapes cannot tell, once for each kind of block.

`q (B, heads, K, D)` times a table `(K, D)` of each sample is well defined; `q (heads, B, K, D)` is not, nor are slopes
`(heads, 1, 1)`, but where there are as many heads as samples they have the same shapes. So the block runs twice more, with
another first sample: what holds the batch along axis 0 differs in its first row, and there alone.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sprint.hosts.mechanism.bound import Stop
from sprint.hosts.mechanism.guided import own_tensors
from sprint.hosts.mechanism.holders import mapped
from sprint.hosts.mechanism.rows import untold, watched
from sprint.hosts.mechanism.sides import has_rows

if TYPE_CHECKING:
    from sprint.hosts.mechanism.state import SprintState

Call = Callable[[Any, dict[str, Any]], Any]  # of a block with its arguments by name
NOISE = 0.01  # share of the first row's difference that others may have, as where precision is scaled for all of them


def proved(call: Call, block: Any, named: dict[str, Any], *, stop: Stop, state: "SprintState", model: nn.Module) -> Any:
    """Call a block, and prove what it did to tables that have a row set for each sample, unless that is known."""
    kind, tokens = (stop.place.blocks.name, type(stop.block)), named[stop.place.image]
    if not state.doubts or kind in state.proved or len(tokens) == 1 or not has_rows(stop.place, named):
        return call(block, named)
    if any(hasattr(parameter, "placements") for parameter in stop.block.parameters()):
        return call(block, named)  # FSDP gathers its weights at each call, and another rank may have no doubt
    with watched(is_doubtful) as doubts:
        output = call(block, named)
    if any(doubts) and not (tokens.is_cuda and torch.cuda.is_current_stream_capturing()):
        again = partial(call, stop.block)
        if prove(again, named, batch=len(tokens), model=model):
            state.proved.add(kind)
    return output


def is_doubtful(tensor: Tensor) -> bool:
    """Whether axis 0, as long as the batch, may be another than the batch: heads, or a stack."""
    return tensor.ndim < 4 or not {1, len(tensor)}.isdisjoint(tensor.shape[1:-1])


def prove(call: Callable[[dict[str, Any]], Any], named: dict[str, Any], *, batch: int, model: nn.Module) -> bool:
    """Try whether what meets rows holds the batch along axis 0; False if some of it cannot be told.

    Args:
        call: the block, of its arguments by name.
        named: these arguments.
        batch: B.
        model: whose parameters and buffers no sample changes.

    Raises:
        TypeError: something holds it elsewhere, or nothing tells, and its shape leaves doubt.
    """
    one, other = (_met(call, dict(_varied(named, batch=batch, model=model, vary=vary))) for vary in (False, True))
    pairs = list(zip(one, other, strict=False))
    held = torch.stack([_leads(a, b) for a, b in pairs]).tolist() if pairs else []
    for (tensor, _), leads in zip(pairs, held, strict=True):
        if not leads and is_doubtful(tensor):
            raise untold(tensor, batch)
    return all(held)


def _met(call: Callable[[dict[str, Any]], Any], named: dict[str, Any]) -> list[Tensor]:
    devices = {x.device.index for x in named.values() if isinstance(x, Tensor) and x.is_cuda}
    with torch.no_grad(), torch.random.fork_rng(devices), watched(Tensor.clone) as met:
        call(named)
    return met


def _varied(named: dict[str, Any], *, batch: int, model: nn.Module, vary: bool) -> Iterator[tuple[str, Any]]:
    """The arguments, copied where they have a row for each sample, with another first one or not."""
    own = set(map(id, own_tensors(model)))

    def varied(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype.itemsize < 2 or not value.ndim:
            return value
        if len(value) != batch or value.numel() == batch or id(value) in own:  # of as many numbers, also slopes of heads
            return value
        value = value.clone()
        if vary:
            value[0] = torch.randn(value[0].shape, generator=torch.Generator().manual_seed(0)).to(value)
        return value

    return ((name, mapped(varied, value)) for name, value in named.items())


def _leads(one: Tensor, other: Tensor) -> Tensor:
    """Whether the first row differs, and no other one."""
    if one.shape != other.shape:
        return torch.zeros((), dtype=torch.bool, device=one.device)
    apart = (one.float() - other.float()).abs().nan_to_num(nan=0.0).reshape(len(one), -1).amax(dim=1)
    return (apart[0] > 0) & (apart[1:] <= NOISE * apart[0]).all()
