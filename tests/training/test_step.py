"""TrainStep against a training loop by hand, as plain code and with a stand-in for CUDA graphs that replays operations."""

import copy
import warnings

import hosts
import pytest
import torch
from models import tiny
from recording import RecordedGraph
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sprint
import sprint.flow.inputs
from sprint import FlowMatchingLoss, StructuredDrop, TrainStep

SPARSE = StructuredDrop(0.75)


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    """On a CPU the model looks at its inputs' values, which no graph can; on a GPU it does not."""
    monkeypatch.setattr(sprint.flow.inputs, "readable", lambda tensor: False)
    RecordedGraph.made = 0


def batch(i, side=8):
    generator = torch.Generator().manual_seed(i)
    return torch.randn(4, 4, side, side, generator=generator), torch.randint(0, 10, (4,), generator=generator)


def setup(**options):
    torch.manual_seed(0)
    model = tiny().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)  # the optimizer that is capturable on a CPU
    step = TrainStep(model, FlowMatchingLoss(), optimizer, **options)
    torch.manual_seed(1)
    return model, optimizer, step


CAPTURED = {"make_graph": RecordedGraph, "warmup": 1}
JOBS = [(8, SPARSE)] * 5 + [(8, None)] * 4 + [(16, SPARSE)] * 3  # both stages, two resolutions


def by_hand(jobs, *, clip, accumulate=1):
    """Losses, norms, weights and averaged weights of the loop that TrainStep replaces."""
    torch.manual_seed(0)
    model = tiny().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=6)
    ema, loss = copy.deepcopy(model), FlowMatchingLoss()
    torch.manual_seed(1)
    losses, norms = [], []
    for i, (side, drop) in enumerate(jobs):
        x, y = batch(i, side)
        out = loss(model, x, y=y, drop=drop)
        (out.loss / accumulate).backward()
        losses.append(out.loss.detach())
        if (i + 1) % accumulate:
            continue
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        with torch.no_grad():
            for average, parameter in zip(ema.parameters(), model.parameters(), strict=True):
                average.lerp_(parameter, 0.1)
    return torch.stack(losses), torch.stack(norms), model, ema


@pytest.mark.parametrize("options", [{}, CAPTURED], ids=["plain", "captured"])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_steps_equal_a_loop_by_hand(options, accumulate):
    losses, norms, expected, average = by_hand(JOBS, clip=0.5, accumulate=accumulate)
    torch.manual_seed(0)
    model = tiny().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=6)
    ema = copy.deepcopy(model)
    step = TrainStep(
        model, FlowMatchingLoss(), optimizer, clip=0.5, ema=ema, ema_decay=0.9, accumulate=accumulate, **options
    )
    torch.manual_seed(1)
    outs = []
    for i, (side, drop) in enumerate(JOBS):
        x, y = batch(i, side)
        outs.append(step(x, y=y, drop=drop))
        if outs[-1].updated:
            schedule.step()
    assert [out.updated for out in outs] == [(i + 1) % accumulate == 0 for i in range(len(JOBS))]
    assert any(out.captured for out in outs) == ("make_graph" in options)
    exact = {"rtol": 1e-5, "atol": 1e-6}  # float32
    torch.testing.assert_close(torch.stack([out.loss for out in outs]), losses, **exact)
    torch.testing.assert_close(torch.stack([out.grad_norm for out in outs if out.updated]), norms, **exact)
    for one, other in ((model, expected), (ema, average)):
        for actual, wanted in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(actual, wanted, **exact)


def test_one_capture_for_each_shape_and_stage_whatever_the_schedule():
    _, optimizer, step = setup(**CAPTURED)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (1 + i))
    for round_ in range(3):
        for side, drop in JOBS:
            x, y = batch(round_, side)
            step(x, y=y, drop=drop)
            schedule.step()
    assert RecordedGraph.made == 3
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(1e-3 / (1 + 3 * len(JOBS)))


def test_a_rate_set_by_hand_and_other_options():
    model, optimizer, step = setup(**CAPTURED)
    x, y = batch(0)
    for _ in range(3):
        step(x, y=y)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.param_groups[0]["weight_decay"] = 0.0
    before = [p.clone() for p in model.parameters()]
    assert not step(x, y=y).captured  # another weight decay is built into another graph
    assert step(x, y=y).captured
    assert RecordedGraph.made == 2
    assert all(p.equal(old) for p, old in zip(model.parameters(), before, strict=True))
    optimizer.param_groups[0]["lr"] = 1e-3
    assert step(x, y=y).captured
    assert RecordedGraph.made == 2
    assert not all(p.equal(old) for p, old in zip(model.parameters(), before, strict=True))


def test_replays_draw_anew_and_the_seed_decides():
    def run(seed):
        _, optimizer, step = setup(**CAPTURED)
        optimizer.param_groups[0]["lr"] = 0.0
        torch.manual_seed(seed)
        x, y = batch(0)
        return [step(x, y=y, drop=SPARSE).loss.item() for _ in range(6)]

    losses = run(3)
    assert len(set(losses)) == 6  # the same batch and weights: other times, noise and tokens
    assert run(3) == losses
    assert run(4) != losses


def test_loaded_optimizer_states_are_the_ones_that_are_used():
    _, optimizer, step = setup(**CAPTURED)
    x, y = batch(0)
    for _ in range(3):
        step(x, y=y)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = optimizer.state[step.parameters[0]]["exp_avg"].clone()
    assert not step(x, y=y).captured
    assert not optimizer.state[step.parameters[0]]["exp_avg"].equal(before)


def test_modes_and_paths_are_captured_apart():
    torch.manual_seed(0)
    model = sprint.wrap(hosts.DiT().train(), drop=SPARSE, path_drop=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.7])
    step = TrainStep(model, lambda model, x, t: model(x, t).square().mean(), optimizer, **CAPTURED)
    full, shallow = model(x, t).square().mean(), None
    with sprint.path(model, "shallow"):
        shallow = model(x, t).square().mean()
    for _ in range(2):
        losses = []
        for name in ("full", "shallow", "full"):
            with sprint.path(model, name):
                losses.append(step(x, t).loss)
        torch.testing.assert_close(torch.stack(losses), torch.stack([full, shallow, full]))
    assert RecordedGraph.made == 2
    model.eval()
    step(x, t)
    step(x, t)
    assert RecordedGraph.made == 3


def test_a_loss_that_a_graph_cannot_hold_stays_plain_and_says_so_once():
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def loss(model, x):
        output = model(x).square().mean()
        assert output.item() >= 0  # reads the device
        return {"loss": output, "size": output.detach() * 0 + 2}

    step = TrainStep(model, loss, optimizer, **CAPTURED)
    x = torch.randn(2, 3)
    with pytest.warns(RuntimeWarning, match="runs as plain code: RuntimeError: operation not permitted") as caught:
        outs = [step(x) for _ in range(4)]
    assert len(caught) == 1
    assert not any(out.captured for out in outs)
    assert outs[0].metrics["size"] == 2
    assert outs[-1].loss < outs[0].loss
    assert all(p.grad is None for p in model.parameters())


def test_more_shapes_than_the_limit_stay_plain():
    _, _, step = setup(limit=2, **CAPTURED)
    batches = [batch(0, side) for side in (4, 8, 12, 16) * 3]
    with pytest.warns(RuntimeWarning, match="2 shapes or options are captured already") as caught:
        _ = [step(x, y=y) for x, y in batches]
    assert RecordedGraph.made == 2
    assert len(caught) == 1


def test_unhashable_arguments_are_named():
    model = nn.Linear(3, 1)
    step = TrainStep(
        model, lambda model, x, names: model(x).mean(), torch.optim.AdamW(model.parameters(), fused=True), **CAPTURED
    )
    with pytest.warns(RuntimeWarning, match="neither a tensor nor hashable"):
        assert not step(torch.randn(2, 3), names={1, 2}).captured


@pytest.mark.parametrize("kind", ["torch", "diffusers"])
def test_averages_of_other_libraries(kind):
    model = nn.Linear(3, 1)
    start = model.weight.detach().clone()
    if kind == "torch":
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    else:
        training = pytest.importorskip("diffusers.training_utils")
        ema = training.EMAModel(model.parameters(), decay=0.5, min_decay=0.5)
    step = TrainStep(model, lambda model, x: model(x).mean(), torch.optim.SGD(model.parameters(), lr=1.0), ema=ema)
    for _ in range(3):
        step(torch.ones(2, 3))
    average = ema.module.weight if kind == "torch" else ema.shadow_params[0]
    assert not average.equal(start)
    assert not average.equal(model.weight)


def test_activation_checkpointing_changes_nothing():
    results = []
    for checkpointing in (False, True):
        model, _, step = setup(**CAPTURED)
        model.set_checkpointing(checkpointing)
        results.append([step(*batch(i)[:1], y=batch(i)[1], drop=SPARSE).loss for i in range(4)])
    torch.testing.assert_close(*[torch.stack(losses) for losses in results])


def test_a_plain_step_on_a_cpu_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, _, step = setup()
        x, y = batch(0)
        out = step(x, y=y, drop=SPARSE)
    assert not out.captured
    assert out.grad_norm is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"clip": 0.0}, ValueError, "clip is the largest norm"),
        ({"clip": "1"}, TypeError, "clip of TrainStep must be a number or None, got the text '1'"),
        ({"accumulate": 0}, ValueError, "accumulate must be at least 1"),
        ({"accumulate": 1.5}, TypeError, "accumulate of TrainStep must be a whole number, got 1.5"),
        ({"warmup": -1}, ValueError, "warmup must be a whole number, at least 1, got -1"),
        ({"limit": 0}, ValueError, "limit must be a whole number, at least 1"),
        ({"ema_decay": "x"}, TypeError, "ema_decay of TrainStep must be a number"),
        (
            {"autocast": "bf16"},
            TypeError,
            "autocast of TrainStep must be a dtype such as torch.bfloat16 or None, got the text 'bf16'",
        ),
        ({"autocast": True}, TypeError, "autocast of TrainStep must be a dtype"),
        ({"ema": tiny().double()}, ValueError, "of ema is .* torch.float64 cpu, of the model .* torch.float32 cpu"),
        ({"ema": tiny(in_channels=3)}, ValueError, "ema=copy.deepcopy"),
        ({"ema_decay": 1.0}, ValueError, "ema_decay must be in"),
        ({"ema": 0.999}, TypeError, "ema must be a copy of the model"),
        ({"clip": 1.0, "ema": 3}, TypeError, "ema must be a copy"),
        ({"ema": nn.Linear(4, 4)}, ValueError, "ema is not a copy of the model"),
        ({"capture": True}, ValueError, "needs a CUDA device"),
        ({"autocast": torch.float16}, ValueError, "float16 gradients vanish"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        setup(**options)


def test_bad_models_and_losses():
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        TrainStep(frozen, lambda model: None, torch.optim.SGD(frozen.parameters()))
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(TypeError, match="optimizer of TrainStep must be an Optimizer, got a generator"):
        TrainStep(model, lambda model: None, model.parameters())
    with pytest.raises(TypeError, match="model of TrainStep must be a torch.nn.Module, got a generator"):
        TrainStep(model.parameters(), lambda model: None, optimizer)
    with pytest.raises(ValueError, match="the optimizer has no parameter of this model"):
        TrainStep(nn.Linear(2, 2), lambda model: None, optimizer)
    with pytest.raises(TypeError, match="got a dictionary with 'mse', 'size'"):
        TrainStep(model, lambda model: {"mse": 1, "size": 2}, optimizer)()
    with pytest.raises(TypeError, match="loss of TrainStep must be a function"):
        TrainStep(model, 1.0, optimizer)
    with pytest.raises(ValueError, match="ema is not a copy of the model"):
        TrainStep(model, lambda model: None, optimizer, ema=model)
    step = TrainStep(model, lambda model, x: model(x), torch.optim.SGD(model.parameters()))
    with pytest.raises(TypeError, match=r"must return a scalar tensor.*got \(3, 2\)"):
        step(torch.randn(3, 2))
    with pytest.raises(ValueError, match="Linear has no list of equal blocks"):
        TrainStep(model, lambda model, x: model(x), torch.optim.SGD(model.parameters()), compile=True)


def test_a_velocity_reads_no_values_in_a_captured_step():
    velocity = sprint.Velocity(hosts.DiT(), prediction="noise", interpolant="ddpm")
    optimizer = torch.optim.AdamW(velocity.parameters(), lr=1e-3, fused=True)
    step = TrainStep(velocity, FlowMatchingLoss(error="noise", time="uniform"), optimizer, **CAPTURED)
    x, y = torch.randn(4, 3, 8, 8), torch.rand(4)
    assert [step(x, y=y).captured for _ in range(3)] == [False, True, True]
