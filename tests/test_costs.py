"""The cost predictor against a formula, a FLOP counter on real tensors, and what it says where dropping will not pay."""

import hosts
import pytest
import torch
from models import tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sprint
from sprint import StructuredDrop
from sprint.costs import Hardware


def formula(dim: int, *, full_blocks: int, kept_blocks: int, tokens: int, kept: int, batch: int, patch: int) -> int:
    """FLOPs of a forward pass: twice the multiply-adds of every linear layer and of attention."""

    def block(n: int) -> int:
        return n * 12 * dim * dim + 2 * n * n * dim + 6 * dim * dim  # linear layers, attention, adaLN

    macs = full_blocks * block(tokens) + kept_blocks * block(kept)
    macs += tokens * dim * dim + kept * dim * dim + dim * dim / batch  # fusion; its mask token once per batch
    macs += tokens * patch * dim * 2 + 2 * dim * dim + (256 + dim) * dim  # patches in and out, final adaLN, time
    return round(2 * batch * macs)


@pytest.mark.parametrize(("preset", "dim", "depth"), [("S/2", 384, 12), ("B/2", 768, 12), ("XL/2", 1152, 28)])
@pytest.mark.parametrize("grid", [(16, 16), (32, 32)])
def test_presets_have_the_flops_of_the_formula(preset, dim, depth, grid):
    tokens = grid[0] * grid[1]
    cost = sprint.cost(preset, grid=grid, batch=4)
    sparse = formula(dim, full_blocks=4, kept_blocks=depth - 4, tokens=tokens, kept=tokens // 4, batch=4, patch=16)
    full = formula(dim, full_blocks=depth, kept_blocks=0, tokens=tokens, kept=tokens, batch=4, patch=16)
    assert cost.sparse.forward == pytest.approx(sparse, rel=0.002)
    assert cost.full.forward == pytest.approx(full, rel=0.002)
    assert cost.sparse.backward == pytest.approx(2 * sparse, rel=0.01)  # but no gradient of the input


def test_the_papers_ratios():
    cost = sprint.cost("XL/2", grid=(16, 16), batch=2)
    assert cost.parameters == 677_476_816
    assert cost.sparse_ratio == pytest.approx(2.81, rel=0.01)
    assert cost.guidance_ratio == pytest.approx(1.742, rel=0.01)
    assert cost.shared_ratio == pytest.approx(1.86, rel=0.01)


def counted(model, job):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = job()
        forward = counter.get_total_flops()
        output.square().mean().backward()
    return forward, counter.get_total_flops()


def test_agrees_with_a_flop_counter_on_a_sit():
    model = tiny()
    x, t, y = torch.randn(3, 4, 8, 8), torch.rand(3), torch.tensor([1, 2, 3])
    subset = StructuredDrop(0.75).sample(3, (4, 4))
    cost = sprint.cost(model, grid=(4, 4), batch=3)
    assert (cost.sparse.forward, cost.sparse.training) == pytest.approx(
        counted(model, lambda: model(x, t, y, subset=subset)), rel=0.01
    )
    assert (cost.full.forward, cost.full.training) == pytest.approx(counted(model, lambda: model(x, t, y)), rel=0.01)


@pytest.mark.parametrize("reads_values", [False, True])
def test_agrees_with_a_flop_counter_on_a_wrapped_model(reads_values):
    model = sprint.wrap(hosts.DiT().train(), drop=StructuredDrop(0.75), path_drop=0.0)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.7])
    if reads_values:  # then the cost has to be counted on real tensors
        model.embed.register_forward_hook(lambda *_: print(t.sum().item()))
    model.head.weight.grad = before = torch.ones_like(model.head.weight)
    route = model.sprint.route
    cost = sprint.cost(model, x, t)
    assert model.head.weight.grad is before
    assert before.equal(torch.ones_like(before))
    assert model.sprint.route == route
    for name in ("full", "sparse"):
        with sprint.path(model, name):
            assert getattr(cost, name).training == pytest.approx(counted(model, lambda: model(x, t))[1], rel=0.01)
    assert cost.shared is None
    assert cost.batch == 2
    assert model(x, t).isfinite().all()  # no tensor without data was left behind


def test_activations_are_the_bytes_that_autograd_keeps():
    model, stored = tiny().double(), {}
    x, t, y = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.rand(2), torch.tensor([1, 2])
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            stored[storage.data_ptr()] = storage
        return tensor

    with sdpa_kernel(SDPBackend.MATH), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x, t, y)
    expected = sum(storage.nbytes() for storage in stored.values())
    cost = sprint.cost(model, grid=(4, 4), batch=2, dtype=torch.float64)
    assert cost.full.activations == pytest.approx(expected, rel=0.02)


def test_it_says_where_dropping_will_not_pay():
    launch_bound = sprint.cost("XL/2", grid=(16, 16), batch=1)
    assert any("in eager PyTorch on H100 dropping tokens will not pay" in note for note in launch_bound.notes)
    assert "note: " in str(launch_bound)
    assert sprint.cost("XL/2", grid=(16, 16), batch=128).notes == []
    little = sprint.cost(sprint.SiT.preset("S/2", middle_depth=1), grid=(16, 16), drop=StructuredDrop(0.5))
    assert any("more middle blocks" in note for note in little.notes)


def test_the_estimate_fits_the_published_steps():
    """The prototype's captured steps on an H100, milliseconds."""
    for grid, batch, full, sparse in (((16, 16), 32, 75.7, 39.9), ((16, 16), 64, 135.2, 61.5), ((32, 32), 16, 152, 63.7)):
        seconds = sprint.cost("XL/2", grid=grid, batch=batch).estimate()
        assert 1000 * seconds["full, captured"] == pytest.approx(full, rel=0.07)
        assert 1000 * seconds["sparse, captured"] == pytest.approx(sparse, rel=0.07)


def test_frozen_weights_and_checkpointing_count():
    plain, checkpointed = tiny(), tiny().set_checkpointing()
    frozen = tiny().requires_grad_(False)
    frozen.final_layer.requires_grad_(True)
    whole, again, head = (sprint.cost(model, grid=(4, 4), batch=2).full for model in (plain, checkpointed, frozen))
    assert whole.forward == again.forward == head.forward
    assert whole.backward + 0.8 * whole.forward < again.backward < whole.training  # the blocks, once more
    assert again.activations < whole.activations / 4
    assert head.backward < 0.1 * whole.backward
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert sprint.cost(sprint.CapturedModel(tiny().eval()), grid=(4, 4), batch=2).full == whole


def test_hardware_of_your_own():
    slow = Hardware("mine", flops=1e12, update=0.0, launch=0.0)
    cost = sprint.cost("S/2", grid=(8, 8), hardware=slow)
    assert cost.estimate()["full, eager"] == cost.full.training / 1e12
    assert "on mine" in str(cost)


def test_bad_input():
    with pytest.raises(ValueError, match="give the token grid"):
        sprint.cost("XL/2")
    with pytest.raises(ValueError, match="batch at least 1"):
        sprint.cost("S/2", grid=(16, 16), batch=0)
    with pytest.raises(ValueError, match="rows, columns"):
        sprint.cost("S/2", grid=(16,))
    for options in ({"grid": 16}, {"grid": (16.0, 16.0)}, {"grid": (16, 16), "batch": 2.5}):
        with pytest.raises(ValueError, match="whole numbers, got"):
            sprint.cost("S/2", **options)
    with pytest.raises(TypeError, match="drop must be a sampler such as sprint.StructuredDrop"):
        sprint.cost("S/2", grid=(16, 16), drop=0.75)
    with pytest.raises(TypeError, match="model must be a preset's name.* got int"):
        sprint.cost(3, grid=(16, 16))
    with pytest.raises(ValueError, match="unknown preset 'XXL'"):
        sprint.cost("XXL", grid=(16, 16))
    with pytest.raises(ValueError, match="Linear is not wrapped"):
        sprint.cost(torch.nn.Linear(2, 2), torch.randn(1, 2))
    model = sprint.wrap(hosts.DiT())
    with pytest.raises(ValueError, match="give example arguments"):
        sprint.cost(model)
    with pytest.raises(ValueError, match="needs a drop sampler"):
        sprint.cost(model, torch.randn(2, 3, 8, 8), torch.rand(2))
