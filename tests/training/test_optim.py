"""Our AdamW against torch's, the Triton kernel against its plain twin (in Triton's interpreter), and weights in bfloat16."""

import copy
import importlib
import pickle

import pytest
import torch
from models import tiny
from recording import RecordedGraph
from torch import nn

import sprint.flow.inputs
from sprint import AdamW, FlowMatchingLoss, StructuredDrop, TrainStep
from sprint.training import optim
from sprint.training.optim import update
from sprint.training.shadows import Shadows

SPARSE = StructuredDrop(0.75)


def problem(steps=5):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3, bias=False))
    generator = torch.Generator().manual_seed(1)
    return model, [100 * torch.randn(4, 7, generator=generator) for _ in range(steps)]


@pytest.mark.parametrize("clip", [None, 0.3, 1e6])
@pytest.mark.parametrize("options", [{}, {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.2}])
def test_equals_adamw_of_torch(clip, options):
    model, batches = problem()
    other = copy.deepcopy(model)
    ours, theirs = AdamW(model.parameters(), lr=0.01, **options), torch.optim.AdamW(other.parameters(), lr=0.01, **options)
    for x in batches:
        for each in (model, other):
            each.zero_grad()
            each(x).square().sum().backward()
        ours.step(clip=clip)
        if clip is not None:
            norm = nn.utils.clip_grad_norm_(other.parameters(), clip)
            torch.testing.assert_close(ours.grad_norm, norm, rtol=1e-5, atol=1e-5)  # float32
        theirs.step()
    for one, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-6)  # float32


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_states_go_over_to_torch_and_back(first):
    model, batches = problem(6)
    other = copy.deepcopy(model)
    kinds = {"ours": AdamW, "theirs": torch.optim.AdamW}
    second = "theirs" if first == "ours" else "ours"
    whole = torch.optim.AdamW(other.parameters(), lr=0.01)
    half = kinds[first](model.parameters(), lr=0.01)
    for i, x in enumerate(batches):
        if i == 3:
            state = copy.deepcopy(half.state_dict())
            half = kinds[second](model.parameters(), lr=0.01)
            keep = {key: half.param_groups[0][key] for key in half.param_groups[0] if key != "params"}
            state["param_groups"][0] = {**keep, **state["param_groups"][0]}
            half.load_state_dict(state)
        for each, optimizer in ((model, half), (other, whole)):
            optimizer.zero_grad()
            each(x).square().sum().backward()
            optimizer.step()
    for one, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-6)  # float32


def test_parameters_that_are_not_used_at_every_step():
    """Each has its own count; a loaded state has them too, and averages follow what did not change."""
    models = [nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)]) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [kind(model.parameters(), lr=0.1) for kind, model in zip((AdamW, torch.optim.AdamW), models, strict=True)]
    averages = {p: p.detach().clone() + 1 for p in models[0].parameters()}
    expected = {p: a.clone() for p, a in averages.items()}
    for step, used in enumerate([(0,), (0, 1), (1,), (0,), (0, 1)]):
        if step == 3:
            optimizers[0].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            sum(model[i](torch.ones(1, 3)).square().sum() for i in used).backward()
            optimizer.step(**({"averages": averages, "average_decay": 0.9} if optimizer is optimizers[0] else {}))
        for p, average in expected.items():
            average.lerp_(p.detach(), 0.1)
    for one, other in zip(*[model.parameters() for model in models], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # float32
    for p, average in averages.items():
        torch.testing.assert_close(average, expected[p])


def test_copies_pickles_and_empty_groups():
    model, batches = problem()
    optimizer = AdamW([{"params": []}, {"params": list(model.parameters())}], lr=0.1)
    model(batches[0]).square().sum().backward()
    optimizer.step(clip=1.0)
    for again in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        parameters = again.param_groups[1]["params"]
        for p, old in zip(parameters, model.parameters(), strict=True):
            p.grad = old.grad.clone()
        assert again.grad_norm is None
        again.step(clip=1.0)
        assert not parameters[0].equal(model[0].weight)
    AdamW([{"params": []}]).step(clip=1.0)


def test_other_layouts_take_the_plain_update(monkeypatch):
    calls = []
    contiguous, last = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert optim.alike(contiguous, (contiguous, None))
    assert optim.alike(last, (last, last.bfloat16()))
    assert not optim.alike(last, (contiguous,))
    assert not optim.alike(torch.zeros(4, 6)[:, ::2], (torch.zeros(4, 6)[:, ::2],))
    assert not optim.alike(torch.zeros(4, 6), (torch.zeros(6, 4).t(),))
    monkeypatch.setattr(optim, "fastest", lambda: lambda *args, **kwargs: calls.append(args))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    weight = nn.Parameter(last)
    weight.grad = torch.ones(2, 3, 4, 5)
    version = weight._version
    AdamW([weight]).step()
    assert not calls
    weight.grad = weight.grad.to(memory_format=torch.channels_last)
    version = weight._version
    AdamW([weight]).step()
    assert len(calls) == 1
    assert weight._version > version  # though the kernel told nobody


def test_averages_follow():
    model, batches = problem()
    optimizer = AdamW(model.parameters(), lr=0.1)
    averages = {p: p.detach().clone() for p in model.parameters()}
    expected = [p.detach().clone() for p in model.parameters()]
    for x in batches:
        model.zero_grad()
        model(x).square().sum().backward()
        optimizer.step(averages=averages, average_decay=0.9)
        for old, new in zip(expected, model.parameters(), strict=True):
            old.lerp_(new.detach(), 0.1)
    for actual, wanted in zip(averages.values(), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("size", [1, 1000, 4096, 9001])
@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("extras", [False, True])
def test_the_kernel_equals_its_twin(size, gradient, extras, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    import sprint.kernels.adamw

    kernels = importlib.reload(sprint.kernels.adamw)
    results = []
    for function in (update, kernels.adamw):
        generator = torch.Generator().manual_seed(size)
        p, m, g, average = (torch.randn(size, generator=generator) for _ in range(4))
        v = torch.rand(size, generator=generator)
        shadow = torch.full((size,), float("nan"), dtype=torch.bfloat16) if extras else None
        function(
            p, g.to(gradient), m, v, shadow=shadow, average=average if extras else None, beta1=0.9, beta2=0.99, eps=1e-8,
            scalars=torch.tensor([0.01, 0.3, 0.5, 0.7]), weight_decay=0.1, average_decay=0.9,
        )  # fmt: skip
        results.append((p, m, v, average, *([shadow] if shadow is not None else [])))
    for expected, actual in zip(*results, strict=True):
        rtol = 1e-5 if actual.dtype == torch.float32 else 2**-7  # the interpreter cuts bfloat16 off, a GPU rounds it
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-6)
    monkeypatch.undo()
    importlib.reload(sprint.kernels.adamw)


def run(optimizer_class, *, steps=6, **options):
    torch.manual_seed(0)
    model = tiny().train()
    ema = copy.deepcopy(model)
    optimizer = optimizer_class(model.parameters(), lr=1e-3)
    step = TrainStep(
        model, FlowMatchingLoss(), optimizer, clip=0.5, ema=ema, ema_decay=0.9, autocast=torch.bfloat16, **options
    )
    torch.manual_seed(1)
    x, y = torch.randn(4, 4, 8, 8), torch.tensor([1, 2, 3, 4])
    outs = [step(x, y=y, drop=drop) for drop in [SPARSE, None] * steps]
    return step, torch.stack([out.loss for out in outs]), torch.stack([out.grad_norm for out in outs]), model, ema


@pytest.mark.parametrize("options", [{}, {"make_graph": RecordedGraph, "warmup": 1}], ids=["plain", "captured"])
def test_bfloat16_copies_give_autocasts_numbers(options, monkeypatch):
    monkeypatch.setattr(sprint.flow.inputs, "readable", lambda tensor: False)
    _, losses, norms, model, ema = run(torch.optim.AdamW)
    step, ours, our_norms, our_model, our_ema = run(AdamW, **options)
    assert step._shadows is not None
    assert len(step._shadows.copies) > 10
    torch.testing.assert_close(ours, losses, rtol=1e-3, atol=1e-4)  # the same bfloat16 products, another order of sums
    torch.testing.assert_close(our_norms, norms, rtol=5e-3, atol=1e-4)
    for one, expected in ((our_model, model), (our_ema, ema)):
        for a, b in zip(one.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=2e-3)
    for parameter, shadow in step._shadows.copies.items():
        assert shadow.equal(parameter.to(torch.bfloat16))
        assert shadow.grad is None
    assert all(p.dtype == torch.float32 and isinstance(p, nn.Parameter) for p in our_model.parameters())


def test_gradients_through_copies_equal_autocasts_bit_by_bit():
    model = tiny().eval()
    x, y, t = torch.randn(4, 4, 8, 8), torch.tensor([1, 2, 3, 4]), torch.linspace(0.1, 0.9, 4)
    shadows = Shadows(model, torch.bfloat16)
    gradients = []
    for use in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            if use:
                with shadows:
                    model(x, t, y).square().mean().backward()
            else:
                model(x, t, y).square().mean().backward()
        gradients.append(
            [(shadows.copies[p].grad.float() if use and p in shadows.copies else p.grad) for p in model.parameters()]
        )
        model.zero_grad()
    for one, expected in zip(*gradients, strict=True):
        assert (one is None and expected is None) or one.equal(expected)


def test_weights_changed_from_outside_are_noticed():
    step, *_, model, _ = run(AdamW, steps=1)
    assert step._shadows is not None
    with torch.no_grad():
        model.final_layer.linear.weight.zero_()
        model.final_layer.linear.bias.zero_()
    step._shadows.refresh()
    assert not step._shadows.copies[model.final_layer.linear.weight].any()
    torch.manual_seed(0)
    state = copy.deepcopy(tiny(middle_depth=2).state_dict())
    model.load_state_dict(state)
    step._shadows.refresh()
    for parameter, shadow in step._shadows.copies.items():
        assert shadow.equal(parameter.to(torch.bfloat16))


def test_bad_input():
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="must not be negative"):
        AdamW([weight], lr=-1.0)
    with pytest.raises(ValueError, match="betas in"):
        AdamW([weight], betas=(0.9, 1.0))
    with pytest.raises(TypeError, match="parameters must be float32, got torch.bfloat16"):
        AdamW([nn.Parameter(torch.ones(2, dtype=torch.bfloat16))])
    optimizer = AdamW([weight])
    with pytest.raises(TypeError, match="parameters must be float32, got torch.float64"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.float64))]})
    assert len(optimizer.param_groups) == 1
