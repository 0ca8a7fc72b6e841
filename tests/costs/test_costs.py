"""The cost predictor against a formula, a FLOP counter on real tensors, and what it says where dropping will not pay."""

import re

import hosts
import numpy as np
import pytest
import torch
from models import tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sprint
from sprint import RandomDrop, StructuredDrop
from sprint.costs import hardware
from sprint.costs import paths as path_costs
from sprint.costs import predict as costs
from sprint.costs.counting import count
from sprint.costs.hardware import KNOWN, Hardware


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


def on_real_tensors(model, forward, name):
    with sprint.path(model, name, drop=StructuredDrop(0.75) if name == "sparse" else None):
        return count(model, forward)


def wrapped_dit():
    model = sprint.wrap(hosts.DiT().train(), drop=StructuredDrop(0.75), path_drop=0.0)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.7])
    return model, (x, t), {}


def wrapped_diffusers():
    diffusers = pytest.importorskip("diffusers")
    host = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=6, sample_size=8, num_embeds_ada_norm=10
    )
    arguments = {"timestep": torch.tensor([3, 5]), "class_labels": torch.tensor([1, 2]), "return_dict": False}
    return sprint.wrap(host.train(), drop=StructuredDrop(0.75)), (torch.randn(2, 4, 8, 8),), arguments


@pytest.mark.parametrize("build", [wrapped_dit, wrapped_diffusers])
def test_a_wrapped_model_without_data_asks_for_what_it_asks_for_with_data(build):
    model, args, kwargs = build()
    cost = sprint.cost(model, *args, **kwargs)

    def forward():
        output = model(*args, **kwargs)
        return output if isinstance(output, torch.Tensor) else output[0]

    for name in ("full", "sparse", "shallow"):
        real, without_data = on_real_tensors(model, forward, name), getattr(cost, name)
        assert without_data.operations == pytest.approx(real.operations, rel=0.02)
        assert without_data.activations == pytest.approx(real.activations, rel=0.02)  # weights are none
        assert (without_data.forward, without_data.backward) == (real.forward, real.backward)


def test_a_sit_without_data_asks_for_what_it_asks_for_with_data():
    model = tiny()
    x, t, y = torch.randn(3, 4, 8, 8), torch.rand(3), torch.tensor([1, 2, 3])
    real = count(model, lambda: model(x, t, y))
    cost = sprint.cost(model, grid=(4, 4), batch=3, dtype=torch.float32)
    assert cost.full.operations == pytest.approx(real.operations, rel=0.02)


def test_only_what_a_device_has_to_do_is_an_operation():
    weight, x = torch.nn.Parameter(torch.randn(4, 4)), torch.randn(4, 4)

    def forward():
        y = (x @ weight).view(2, 8).t()[:3].detach()  # one product; views are free, and so is an allocation
        torch.empty_like(y)
        return y.exp() + 1

    counted = count(torch.nn.ParameterList([weight]), forward)
    assert (counted.operations, counted.forward, counted.backward) == (3, 2 * 4**3, 0)
    assert counted.traffic == 4 * (2 * 6 + 2 * 6)  # exp and the sum read and write six numbers each
    layer = torch.nn.Linear(4, 4)
    with torch.inference_mode():  # where the layer comes whole
        assert count(layer, lambda: layer(x)).forward == 2 * 4**3


@pytest.mark.parametrize("options", [{}, {"learnable_mask": True}, {"num_classes": None, "cond_dim": 8, "encoder_depth": 3}])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_one_block_counted_is_all_blocks_counted(options, checkpointed, monkeypatch):
    model = tiny(**{"encoder_depth": 2, "middle_depth": 5, "decoder_depth": 3, **options}).set_checkpointing(checkpointed)
    multiplied = sprint.cost(model, grid=(4, 4), batch=2, hardware="H100")
    monkeypatch.setattr(path_costs, "_uniform", lambda model: False)
    assert sprint.cost(model, grid=(4, 4), batch=2, hardware="H100") == multiplied


def test_blocks_that_differ_are_all_counted():
    plain, one = tiny(middle_depth=5), tiny(middle_depth=5)
    one.middle.blocks[3].recompute = True
    frozen = tiny(middle_depth=5)
    frozen.middle.blocks[3].requires_grad_(False)
    whole, again, less = (sprint.cost(model, grid=(4, 4), batch=2).full for model in (plain, one, frozen))
    assert again.backward == pytest.approx(whole.backward + whole.forward / 7, rel=0.05)
    assert less.backward == pytest.approx(whole.backward * 13 / 14, rel=0.05)


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
    large = Hardware("large", flops=380e12, update=24e-12, launch=8e-6, memory=200 * 2**30)
    assert sprint.cost("XL/2", grid=(16, 16), batch=128, hardware=large).notes == []
    little = sprint.cost(sprint.SiT.preset("S/2", middle_depth=1), grid=(16, 16), drop=StructuredDrop(0.5))
    assert any("more middle blocks" in note for note in little.notes)
    nothing = sprint.cost(tiny().requires_grad_(False), grid=(4, 4), hardware="H100")
    assert any("no parameter is trained" in note for note in nothing.notes)


@pytest.mark.parametrize(
    ("rates", "says"),
    [
        ({"launch": 1e-2}, "waits for launches"),
        ({"update": 1e-3}, "the update of .* takes most .* larger batch"),
    ],
)
def test_a_note_names_what_takes_the_time(rates, says):
    """On a CPU, where the terms add up."""
    cpu = Hardware("cpu", **{"flops": 1e12, "update": 0.0, "launch": 0.0, "captures": False, **rates})
    model = sprint.SiT.preset("S/2")
    (note,) = sprint.cost(model, grid=(4, 4), hardware=cpu).notes
    assert re.search(says, note)
    assert "sprint.TrainStep" not in note  # there are no graphs to capture


class Remembers(hosts.DiT):
    """Its forward counts calls, draws, and, as a part of it, reads a value."""

    def __init__(self, reads):
        super().__init__()
        self.register_buffer("calls", torch.tensor(3))
        self.reads = reads

    def forward(self, x, t):
        self.calls += 1
        x = x + torch.rand(()) * (self.calls.item() if self.reads else 1)
        return super().forward(x, t)


@pytest.mark.parametrize("reads", [False, True])
def test_counting_leaves_buffers_and_random_streams(reads):
    model, before = sprint.wrap(Remembers(reads), drop=RandomDrop(0.75)), torch.get_rng_state()
    sprint.cost(model, torch.randn(2, 3, 8, 8, generator=torch.Generator()), torch.rand(2, generator=torch.Generator()))
    assert model.calls == 3
    assert torch.get_rng_state().equal(before)


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
    assert "batch 1; mine, rates given" in str(cost)


def test_hardware_by_name():
    named = sprint.cost("S/2", grid=(8, 8), hardware="a100")
    assert named.hardware is KNOWN["A100"]
    assert "A100, rates scaled from the H100 by data sheets, not measured" in str(named)
    assert named.estimate("H200") == sprint.cost("S/2", grid=(8, 8), hardware="H200").estimate()
    with pytest.raises(
        ValueError, match="unknown hardware 'B200': choose one of 'H100', 'H200', 'A100', 'RTX 4090', 'this ma"
    ):
        sprint.cost("S/2", grid=(8, 8), hardware="B200")
    with pytest.raises(TypeError, match="hardware of cost must be a Hardware or text or None"):
        sprint.cost("S/2", grid=(8, 8), hardware=80)


def test_a_real_model_gets_the_estimate_of_its_machine_and_a_preset_that_of_a_gpu(monkeypatch):
    cpu, asked = Hardware("slow CPU", flops=1e10, update=1e-9, launch=1e-5, captures=False), []
    monkeypatch.setattr(hardware, "_MEASURED", {})
    monkeypatch.setattr(Hardware, "measure", lambda *of: asked.append(of) or cpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here = sprint.cost(tiny(), grid=(4, 4))
    assert asked == []  # measured when seconds are asked for, not before
    assert here.hardware is cpu
    assert list(here.estimate()) == ["full, eager", "sparse, eager"]
    work = here.full
    assert here.estimate()["full, eager"] == work.training / 1e10 + work.operations * 1e-5 + here.trained * 1e-9
    assert "captured" not in str(here).replace("slow CPU", "")
    assert sprint.cost(tiny(), grid=(4, 4), dtype=torch.bfloat16).full.activations < here.full.activations  # float32
    assert sprint.cost("S/2", grid=(8, 8), hardware="this machine").hardware is cpu
    assert sprint.cost("S/2", grid=(8, 8)).hardware.name == "H100"
    with torch.device("meta"):
        assert sprint.cost(tiny(), grid=(4, 4)).hardware.name == "H100"


def test_memory_beside_what_the_device_has():
    cost = sprint.cost("XL/2", grid=(32, 32), batch=32, hardware="RTX 4090")
    assert (cost.weights, cost.trained) == (4 * cost.parameters, cost.parameters - 1152)  # the mask token is frozen
    assert cost.states == 12 * cost.trained
    assert cost.memory("full") == cost.weights + cost.states + cost.full.activations
    assert "weights 2.5 GiB, gradients and AdamW 7.6 GiB, and activations, of 24 GiB" in str(cost)
    assert any("full and sparse steps do not fit into the 24 GiB of RTX 4090" in note for note in cost.notes)
    assert not any("do not fit" in note for note in sprint.cost("S/2", grid=(8, 8)).notes)
    little = Hardware("little", flops=1e12, update=0.0, launch=0.0, memory=2**20)
    assert any("weights and states alone take" in note for note in sprint.cost("S/2", grid=(8, 8), hardware=little).notes)
    halves = sprint.cost(tiny().bfloat16(), grid=(4, 4), hardware="H100")
    assert (
        halves.full.activations == sprint.cost(tiny(), grid=(4, 4), dtype=torch.bfloat16, hardware="H100").full.activations
    )
    double = sprint.cost(tiny().double(), grid=(4, 4), hardware="H100")
    assert double.full.activations > 2.9 * halves.full.activations


def test_several_processes_are_said_plainly():
    alone, eight = (sprint.cost("XL/2", grid=(16, 16), batch=4, processes=n) for n in (1, 8))
    assert "step, captured" in str(alone)
    assert "step, captured" not in str(eight)
    assert any("8 processes: batch, seconds and memory are those of one" in note for note in eight.notes)
    assert any("sprint.TrainStep" in note for note in alone.notes)
    assert not any("sprint.TrainStep" in note or "even captured" in note for note in eight.notes)


def test_two_digits_and_never_zero():
    assert [costs._time(s) for s in (0.0000123, 0.0099949, 0.0774, 0.99999, 123.4)] == [
        "12 µs",
        "10 ms",
        "77 ms",
        "1 s",
        "120 s",
    ]
    assert [costs._bytes(n) for n in (5, 2**30 - 1, 18.2 * 2**30)] == ["5 B", "1 GiB", "18 GiB"]
    fast = Hardware("fast", flops=1e18, update=0.0, launch=0.0)
    assert " 0 " not in str(sprint.cost(tiny(), grid=(4, 4), hardware=fast))


def test_bad_input():
    with pytest.raises(ValueError, match="give the token grid"):
        sprint.cost("XL/2")
    with pytest.raises(ValueError, match="batch at least 1"):
        sprint.cost("S/2", grid=(16, 16), batch=0)
    with pytest.raises(ValueError, match=r"grid of cost must be 2 whole numbers, in a tuple or None, got \(16,\)"):
        sprint.cost("S/2", grid=(16,))
    for options in ({"grid": 16}, {"grid": (16.0, 16.0)}, {"grid": (16, 16), "batch": 2.5}):
        with pytest.raises(TypeError, match="whole number.*, got"):
            sprint.cost("S/2", **options)
    with pytest.raises(TypeError, match="drop of cost must be a drop sampler such as .* got 0.75"):
        sprint.cost("S/2", grid=(16, 16), drop=0.75)
    with pytest.raises(TypeError, match="model of cost must be a torch.nn.Module or text, got 3"):
        sprint.cost(3, grid=(16, 16))
    with pytest.raises(ValueError, match="unknown preset 'XXL'"):
        sprint.cost("XXL", grid=(16, 16))
    with pytest.raises(ValueError, match="Linear is not wrapped"):
        sprint.cost(torch.nn.Linear(2, 2), torch.randn(1, 2))
    model = sprint.wrap(hosts.DiT())
    with pytest.raises(ValueError, match="give example arguments"):
        sprint.cost(model)
    for options in ({"grid": (4, 4)}, {"batch": 4}, {"dtype": torch.bfloat16}):
        with pytest.raises(ValueError, match="grid, batch and dtype are for a SiT"):
            sprint.cost(model, torch.randn(2, 3, 8, 8), torch.rand(2), **options)
    for processes in (0, -1, 1.5, "8", True):
        with pytest.raises((ValueError, TypeError), match="processes .*must be a whole number"):
            sprint.cost("S/2", grid=(4, 4), processes=processes)
    with pytest.raises(TypeError, match="drop of cost must be a drop sampler such as .* got the class StructuredDrop"):
        sprint.cost("S/2", grid=(4, 4), drop=StructuredDrop)
    cost = sprint.cost("S/2", grid=(4, 4), batch=np.int64(2))
    assert cost.batch == 2
    with pytest.raises(TypeError, match="hardware of Cost.estimate must be a Hardware or text or None, got 3"):
        cost.estimate(3)
    with pytest.raises(ValueError, match="unknown path 'dense'"):
        cost.memory("dense")
    with pytest.raises(ValueError, match="needs a drop sampler"):
        sprint.cost(model, torch.randn(2, 3, 8, 8), torch.rand(2))
