"""`CapturedModel`: a model for sampling whose forward passes are replayed from CUDA graphs.

A guided step is two passes, or one and a sixth with Path-Drop Guidance, and each is bound by launches at the batches that
people sample. Captured are the passes; guidance and solver, a dozen launches, stay plain code, so that any of them can be
used.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from sprint.arguments import checked
from sprint.capture.compiling import compile_blocks
from sprint.capture.graphs import LIMIT, WARMUP, Graph, Graphs, check_autocast, check_counts
from sprint.capture.state import ModelState


@checked
class CapturedModel(nn.Module):
    """A model in `eval()` with compiled blocks and one CUDA graph for each shape and path; on a CPU, the model itself.

    It is called like the model, has its attributes, and is for `sprint.sample`, guidance and pipelines. No gradient flows.
    Once a call is captured no Python runs in it: attributes that a forward pass reads, and hooks, have no further effect
    (modes, paths, weights and buffers have).

    Args:
        model: a `SiT`, a wrapped model, or another; bfloat16 weights are fastest: `model.to(torch.bfloat16)`.
        autocast: dtype of the products, for a model with float32 weights.
        compile: compile the blocks; by default on a GPU.
        capture: capture CUDA graphs; by default on a GPU.
        warmup: plain calls before a shape is captured.
        limit: graphs kept at most.
        make_graph: for tests.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a model in training mode, without parameters or on several devices, or numbers out of range.

    Examples:
        >>> from sprint import PathDropGuidance, SiT, sample
        >>> model = CapturedModel(SiT.preset("S/2", middle_depth=1, num_classes=10).eval())
        >>> y = torch.tensor([3, 7])
        >>> sample(model, torch.randn(2, 4, 8, 8), y=y, guidance=PathDropGuidance(2.0), steps=2).shape
        torch.Size([2, 4, 8, 8])
    """

    def __repr__(self) -> str:
        how = "captured in CUDA graphs" if self._graphs is not None else "plain"
        return f"CapturedModel({type(self.module).__name__}, autocast={self.autocast}; {how} on {self._device})"

    def __init__(
        self,
        model: nn.Module,
        *,
        autocast: torch.dtype | None = None,
        compile: bool | None = None,  # noqa: A002  # torch's word
        capture: bool | None = None,
        warmup: int = WARMUP,
        limit: int = LIMIT,
        make_graph: Callable[[], Graph] | None = None,
    ) -> None:
        super().__init__()
        check_autocast(autocast)
        check_counts(warmup, limit, least=0)
        if model.training:
            raise ValueError("the model is in training mode, where labels and paths are dropped at random: model.eval()")
        self.module = model
        self.autocast = autocast
        self.eval()
        devices = {parameter.device for parameter in model.parameters()}
        if len(devices) != 1:
            raise ValueError(f"the model must be on one device, got {sorted(map(str, devices)) or 'no parameters'}")
        device = devices.pop()
        on_gpu = device.type == "cuda"
        if capture and not on_gpu and make_graph is None:
            raise ValueError(f"capture=True needs a CUDA device, the model is on {device}: leave capture out")
        self._device = device
        if on_gpu if compile is None else compile:
            compile_blocks(model)
        self._graphs: Graphs | None = None
        if capture is not False and (on_gpu or make_graph is not None):
            state = ModelState(model)
            self._graphs = Graphs(self._run, device=device, state=state, warmup=warmup, limit=limit, make_graph=make_graph)

    def __getattr__(self, name: str) -> Any:
        """As the model's (`config`, `dtype`), where this wrapper has none of its own."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self.__dict__.get("_modules", {}).get("module")
            if model is None or name == "routed":  # by which guidance finds the one part that has paths
                raise
            return getattr(model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's forward."""
        if self._graphs is None:
            return self._run(*args, **kwargs)
        output, _ = self._graphs(*args, **kwargs)
        return output

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), nullcontext() if self.autocast is None else torch.autocast(self._device.type, self.autocast):
            return self.module(*args, **kwargs)
