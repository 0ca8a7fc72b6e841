"""Whose gradients a step uses, what is trained when that changes, and that copies of weights follow whoever changes them."""

import copy

import pytest
import torch
from models import tiny
from recording import RecordedGraph
from torch import nn
from torch.nn.utils import weight_norm

from sprint import AdamW, FlowMatchingLoss, TrainStep
from sprint.models.layers import Block
from sprint.training.shadows import Shadows

BF16 = {"autocast": torch.bfloat16}
KINDS = [pytest.param({}, id="plain"), pytest.param({"make_graph": RecordedGraph, "warmup": 1}, id="captured")]


def fused(parameters, **options):
    """Of torch, in the form that a CPU can capture."""
    return torch.optim.AdamW(parameters, fused=True, **options)


def two():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))


def batch(i):
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(i))


def loss(model, x, part=None):
    return (model if part is None else model[part])(x).float().square().mean()


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def close(one, other, tolerance=1e-6):  # float32
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", [AdamW, fused])
def test_only_the_steps_own_gradients_count(kind, accumulate, options):
    def train(disturb):
        model = two()
        step = TrainStep(
            model, loss, kind(model.parameters(), lr=0.01), accumulate=accumulate,
            **(BF16 if kind is AdamW else {}), **options,
        )  # fmt: skip
        for i in range(6 * accumulate):
            if disturb and i % accumulate == 0:
                loss(model, 100 * batch(99)).backward()
            if disturb and i % accumulate:
                step.optimizer.zero_grad()
            assert step(batch(i)).captured == ("make_graph" in options and i >= accumulate)
        assert all(p.grad is None for p in model.parameters())
        return weights(model)

    close(train(True), train(False))


@pytest.mark.parametrize("options", KINDS)
def test_parameters_without_a_gradient_in_a_window_stay(options):
    """Also where others of their kind, or an earlier window, gave them one; as in a loop with zero_grad()."""
    model, other = two(), two()
    ours, theirs = (torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.5, fused=True) for m in (model, other))
    step = TrainStep(model, loss, ours, accumulate=2, **options)
    parts = [(None, None), (None, 0), (0, 0)] * 6
    captured = []
    for i, pair in enumerate(parts):
        for part in pair:
            (loss(other, batch(i), part) / 2).backward()
            captured.append(step(batch(i), part=part).captured)
        theirs.step()
        theirs.zero_grad()
        close(weights(model), weights(other), 1e-5)
    assert all(captured[-6:]) == ("make_graph" in options)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_an_exception_starts_the_window_anew(accumulate):
    model, other = two(), two()

    def fails(model, x, fail=False):
        value = loss(model, x)
        if fail:
            value.register_hook(lambda gradient: 1 / 0)
        return value

    steps = [TrainStep(m, fails, torch.optim.SGD(m.parameters(), lr=0.1), accumulate=accumulate) for m in (model, other)]
    if accumulate > 1:
        steps[0](batch(7))
    loss(model, batch(3)).backward()
    with pytest.raises(ZeroDivisionError):
        steps[0](batch(0), fail=True)
    for i in range(accumulate):
        outs = [step(batch(i)) for step in steps]
    assert outs[0].updated
    close(weights(model), weights(other))


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("kind", [AdamW, fused])
def test_frozen_and_thawed_weights(kind, options):
    model = two()
    model[1].requires_grad_(False)
    ema = copy.deepcopy(model)
    step = TrainStep(model, loss, kind(model.parameters(), lr=0.01), ema=ema, ema_decay=0.5, **BF16, **options)
    for frozen in (1, 0, 1):
        model[frozen].requires_grad_(False)
        model[1 - frozen].requires_grad_(True)
        for i in range(4):
            before = weights(model)
            out = step(batch(i))
            assert [p.equal(old) for p, old in zip(model.parameters(), before, strict=True)] == (
                [False, False, True, True] if frozen else [True, True, False, False]
            )
            assert all(p.grad is None for p in model.parameters())
        assert out.captured == bool(options)
    assert not ema[1].weight.equal(two()[1].weight)


@pytest.mark.parametrize("options", KINDS)
def test_two_steps_on_one_optimizer(options):
    def other_loss(model, x):
        return loss(model, x) * 2

    models = two(), two()
    optimizers = [AdamW(m.parameters(), lr=0.01) for m in models]
    pairs = [
        [TrainStep(m, f, o, **BF16, **extra) for f in (loss, other_loss)]
        for m, o, extra in zip(models, optimizers, ({}, options), strict=True)
    ]
    for i in range(12):
        which = i // 3 % 2
        outs = [pair[which](batch(i)) for pair in pairs]
        torch.testing.assert_close(outs[0].loss, outs[1].loss)
        close(weights(models[0]), weights(models[1]))
        copies = pairs[1][which]._shadows.copies
        assert all(c.equal(p.bfloat16()) for p, c in copies.items())
    assert outs[1].captured == bool(options)


def test_weights_changed_through_data():
    model = two()
    step = TrainStep(model, loss, AdamW(model.parameters(), lr=0.0), **BF16)
    before = step(batch(0)).loss
    model[1].weight.data = 2 * model[1].weight.data  # elsewhere in memory: seen
    step(batch(0))
    assert step._shadows.copies[model[1].weight].equal(model[1].weight.bfloat16())
    model[1].bias.data.mul_(2)  # in place: not, so that it has to be said
    step.refresh()
    torch.testing.assert_close(step(batch(0)).loss, 4 * before, rtol=2e-2, atol=1e-3)  # bfloat16


def test_checkpointed_blocks_run_again_on_the_same_copies():
    seen = []

    class Watched(Block):
        def forward(self, *args, **kwargs):
            seen.append(next(m for m in self.modules() if isinstance(m, nn.Linear)).weight.dtype)
            return super().forward(*args, **kwargs)

    model = tiny().set_checkpointing()
    for module in model.modules():
        if type(module) is Block:
            module.__class__ = Watched
    step = TrainStep(model, FlowMatchingLoss(), AdamW(model.parameters()), **BF16)
    step(torch.randn(2, 4, 8, 8), y=torch.tensor([1, 2]))
    assert len(seen) == 8  # four blocks, forward and again
    assert set(seen) == {torch.bfloat16}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.hidden(self.embedding(x)))


def test_which_weights_have_copies():
    """Not those that something else holds too, nor those with hooks; and a penalty's gradient is added to the copy's."""
    model = Tied()
    assert {*Shadows(model, torch.bfloat16).copies} == {model.hidden.weight, model.hidden.bias}
    model.hidden.weight.register_hook(lambda gradient: gradient)
    assert {*Shadows(model, torch.bfloat16).copies} == {model.hidden.bias}
    with pytest.warns(FutureWarning):
        normed = weight_norm(nn.Linear(3, 3))
    assert {*Shadows(normed, torch.bfloat16).copies} == {normed.bias}
    model = two()
    assert TrainStep(model, loss, AdamW(model.parameters()), shadows=False, **BF16)._shadows is None

    def penalised(model, x, weight):
        return loss(model, x) + 10 * weight.sum()

    results = []
    for kind in (AdamW, torch.optim.AdamW):
        model = two()
        first = model[0].weight  # the float32 weight, not its copy
        step = TrainStep(model, penalised, kind(model.parameters(), lr=0.1, eps=10.0), **BF16)
        step(batch(0), first)
        results.append(weights(model))
    close(*results, 1e-4)
