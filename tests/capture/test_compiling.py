"""Which blocks are compiled, once for each shape, and that the compiled numbers are the plain ones."""

import hosts
import pytest
import torch
from models import tiny
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import sprint
from sprint import AdamW, FlowMatchingLoss, StructuredDrop, TrainStep
from sprint.capture.compiling import blocks_of, compile_blocks


def test_blocks_of_each_kind_of_model():
    assert len(blocks_of(tiny())) == 5  # four blocks and the final layer
    assert len(blocks_of(sprint.wrap(hosts.DiT()))) == 6
    assert len(blocks_of(hosts.DiT())) == 6
    with pytest.raises(ValueError, match="Linear has no list of equal blocks"):
        blocks_of(nn.Linear(2, 2))


def test_blocks_of_a_model_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=8, in_channels=4, num_layers=3,
                                            sample_size=8)  # fmt: skip
    assert {type(block).__name__ for block in blocks_of(model)} == {"BasicTransformerBlock"}


@pytest.mark.parametrize("wrapped", [False, True])
def test_each_shape_is_compiled_once(wrapped):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model = sprint.wrap(hosts.DiT(depth=10), path_drop=0.0, drop=StructuredDrop(0.75)) if wrapped else tiny(middle_depth=8)
    for block in blocks_of(model):
        block.compile(dynamic=False, backend=counter)
    compile_blocks(model)  # those that are compiled stay as they are
    loss = FlowMatchingLoss()
    for side in (8, 8) if wrapped else (8, 16, 8):
        x = torch.randn(2, 3 if wrapped else 4, side, side)
        for drop in (StructuredDrop(0.75), None):
            loss(model, x, y=None if wrapped else torch.tensor([1, 2]), drop=drop).loss.backward()
    # Kept and all tokens, of one or two sizes; this host's first blocks see a transposed layout, ours has a final layer.
    assert counter.frame_count == (2 + 1 if wrapped else 4 + 2)


def test_checkpointed_blocks_with_copies_of_their_weights():
    """The backward pass runs compiled blocks again, which must then see the same copies."""
    torch._dynamo.reset()
    model = tiny().train().set_checkpointing()
    for block in blocks_of(model):
        block.compile(dynamic=False, backend="aot_eager")
    step = TrainStep(model, FlowMatchingLoss(), AdamW(model.parameters()), autocast=torch.bfloat16)
    assert step(torch.randn(2, 4, 8, 8), y=torch.tensor([1, 2])).loss.isfinite()


@pytest.mark.slow
def test_compiled_steps_are_plain_steps():
    """With inductor, on the CPU."""
    torch._dynamo.reset()
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = tiny().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        step = TrainStep(model, FlowMatchingLoss(), optimizer, clip=1.0, compile=compiled)
        torch.manual_seed(1)
        x, y = torch.randn(4, 4, 8, 8), torch.tensor([1, 2, 3, 4])
        losses.append([step(x, y=y, drop=drop).loss for drop in (StructuredDrop(0.75), None) * 3])
    torch.testing.assert_close(*[torch.stack(values) for values in losses], rtol=1e-4, atol=1e-5)  # float32
