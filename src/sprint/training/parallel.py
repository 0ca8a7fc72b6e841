"""A model over several processes, and its whole state on one of them.

`distribute` is DistributedDataParallel (each process holds the model) or FSDP2 (each holds a share of it, gathered block by
block). `full_state` and `load_full_state` move whole states out and in, the same file for any number of processes. `leave`
ends a script that ran on several. FSDP2 and torch's distributed checkpoints take two seconds to import, so they are imported
where they are used.
"""

import time
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sprint.arguments import checked
from sprint.capture.compiling import blocks_of
from sprint.models.layers import FinalLayer

Mode = Literal["ddp", "fsdp"]


@checked
def distribute(model: nn.Module, mode: Mode = "ddp", *, dtype: torch.dtype | None = None) -> nn.Module:
    """Train a model on all processes of the default group; on a single process it is left as it is.

    Args:
        model: on this process's device, the same on all of them.
        mode: "ddp", or "fsdp" for models whose states do not fit one device.
        dtype: in which FSDP2 gathers parameters (bfloat16 halves the traffic); gradients are reduced in float32.

    Returns:
        The model for the training step; with "fsdp" the same object, sharded in place.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return model
    if mode == "ddp":
        return DistributedDataParallel(model)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device = next(model.parameters()).device
    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    # Inputs are left to autocast: a time rounded to bfloat16 is another time.
    reduce = torch.float32 if dtype else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduce, cast_forward_inputs=False)
    for block in blocks_of(model):
        if isinstance(block, FinalLayer):
            continue  # small, and its output may be a view, of which FSDP2 warns: it stays with the rest of the model
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # The root, too, is sharded again after each forward pass: parameters are always seen as what they are between the steps.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return model


def full_state(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Whole state of a model and its optimizer, on the CPU of the first process (empty on the others); all must call it.

    Returns:
        "model", and with an optimizer "optimizer", each by parameter name.
    """
    from torch.distributed.checkpoint import state_dict as distributed

    options = distributed.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = {"model": distributed.get_model_state_dict(model, options=options)}
    if optimizer is not None:
        state["optimizer"] = distributed.get_optimizer_state_dict(model, optimizer, options=options)
    return state


def load_full_state(state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Put what `full_state` gave into a model and its optimizer; only the first process needs the state, all must call."""
    from torch.distributed.checkpoint import state_dict as distributed

    options = distributed.StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized())
    distributed.set_model_state_dict(model, state.get("model", {}), options=options)
    if optimizer is not None:
        distributed.set_optimizer_state_dict(model, optimizer, state.get("optimizer", {}), options=options)


def leave() -> None:
    """Leave the default process group at the end of a script, in place of `torch.distributed.destroy_process_group()`.

    All processes must call it when their work is done; it raises torch's error if one of them is gone. Without a process
    group it does nothing.

    FSDP2 keeps the group, whose threads then live until the interpreter ends. If one of them is still dropping the last
    collective, for which it needs the interpreter, gloo aborts there ("terminate called without an active exception"), after
    all work is done. So nobody goes before all collectives are through, and the threads get the interpreter first.
    """
    if not dist.is_initialized():
        return
    dist.barrier()
    time.sleep(0.1)  # lends the interpreter to the threads that wait for it
    dist.destroy_process_group()
