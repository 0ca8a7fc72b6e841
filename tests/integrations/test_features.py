"""What diffusers and torch offer for a host's modules keeps working when it is wrapped."""

import copy

import pytest
import torch
from architectures import CASES
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import sprint
from sprint import StructuredDrop
from sprint.hosts.outputs import first_tensor

pytest.importorskip("diffusers")


def wrapped(name):
    model, arguments = CASES[name]()
    return sprint.wrap(model, drop=StructuredDrop(0.75), init="xavier"), arguments


def paths(model, arguments) -> torch.Tensor:
    """The predictions on all three paths, the sparse one with the same tokens every time."""
    outputs = []
    grid = (2, 4, 4) if arguments["hidden_states"].ndim == 5 else (4, 4)
    subset = StructuredDrop(0.75).sample(2, grid, generator=torch.Generator().manual_seed(0))
    for name in ("full", "sparse", "shallow"):
        with sprint.path(model, name, subset=subset if name == "sparse" else None):
            outputs.append(first_tensor(model(**arguments)))
    return torch.stack(outputs)


@pytest.mark.parametrize("name", ["sd3", "wan", "flux"])
@pytest.mark.parametrize(
    "offload", [{"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}]
)
@torch.no_grad()
def test_group_offload(name, offload):
    model, arguments = wrapped(name)
    expected = paths(model, arguments)
    cpu = torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, **offload)
    assert paths(model, arguments).equal(expected)


@pytest.mark.parametrize("name", ["sd3", "wan", "flux"])
@torch.no_grad()
def test_layerwise_casting(name):
    model, arguments = wrapped(name)
    expected = paths(model, arguments)
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    torch.testing.assert_close(paths(model, arguments), expected, rtol=0.02, atol=0.02)  # weights rounded to bfloat16


@torch.no_grad()
def test_first_block_cache_keeps_the_branches_of_path_drop_guidance_apart():
    from diffusers import FirstBlockCacheConfig

    model, arguments = wrapped("wan")
    expected = paths(model, arguments)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    for context, name, output in (("cond", "full", expected[0]), ("uncond", "shallow", expected[2])):
        with model.cache_context(context), sprint.path(model, name):
            assert first_tensor(model(**arguments)).equal(output)


@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_blocks_in_checkpoint_wrappers(name):
    """Gradients too: a recomputation finds the tokens that its forward pass drew, and draws path-drop no second time."""
    plain, arguments = wrapped(name)
    model, _ = CASES[name]()
    blocks = model.get_submodule("blocks" if name == "wan" else "transformer_blocks")
    for i in range(len(blocks)):
        blocks[i] = checkpoint_wrapper(blocks[i])
    sprint.wrap(model, drop=StructuredDrop(0.75), init="xavier")
    model.sprint.load_state_dict(plain.sprint.state_dict())
    gradients = []
    for each in (plain.train(), model.train()):
        torch.manual_seed(0)
        with sprint.path(each, "sparse"):
            outputs = [first_tensor(each(**arguments)) for _ in range(2)]  # two forward passes before one backward
        torch.stack(outputs).square().sum().backward()
        gradients.append([p.grad for p in each.parameters() if p.requires_grad])
    assert len(gradients[0]) == len(gradients[1])
    for one, other in zip(*gradients, strict=True):
        if one is None or other is None:  # the last joint block has no text output
            assert one is other
        else:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # float32


def test_dropout_draws_the_same_in_a_recomputation():
    model, arguments = CASES["dit"]()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    sprint.wrap(model, drop=StructuredDrop(0.75), init="xavier").train()
    gradients = []
    for checkpointing in (False, True):
        each = copy.deepcopy(model)
        if checkpointing:
            each.enable_gradient_checkpointing()
        torch.manual_seed(0)
        with sprint.path(each, "sparse"):
            first_tensor(each(**arguments)).square().sum().backward()
        gradients.append([p.grad for p in each.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # float32


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dit", "sd3", "flux"])
def test_inductor(name):
    torch._dynamo.reset()
    model, arguments = wrapped(name)
    eager = paths(model, arguments)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(paths(compiled, arguments), eager, rtol=1e-4, atol=1e-4)  # float32
    gradients = []
    for each in (model, compiled):
        model.zero_grad()
        paths(each, arguments).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)  # float32
