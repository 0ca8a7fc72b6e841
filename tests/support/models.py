"""A small model for tests."""

import torch

from sprint import SiT, SiTConfig

TINY = {"dim": 16, "heads": 2, "encoder_depth": 1, "middle_depth": 2, "decoder_depth": 1, "num_classes": 10}


def tiny(**options) -> SiT:
    """A model whose every parameter matters: a fresh one is zero at its gates and its output."""
    torch.manual_seed(0)
    model = SiT(SiTConfig(**{**TINY, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model
