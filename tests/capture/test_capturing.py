"""What a captured step depends on besides its arguments, when it is captured anew, and what is refused, with the reason."""

import contextlib
import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from models import tiny
from recording import RecordedGraph
from torch import nn

import sprint.flow.inputs
from sprint import FlowMatchingLoss, StructuredDrop, TrainStep
from sprint.capture import graphs as capture
from sprint.capture.graphs import CudaGraph, Graphs
from sprint.capture.state import Part

CAPTURED = {"make_graph": RecordedGraph, "warmup": 1}


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(sprint.flow.inputs, "readable", lambda tensor: False)
    RecordedGraph.made = 0


def loss(model, x):
    return model(x).square().mean()


def small(optimizer=torch.optim.AdamW, *, fused=True, model=None, loss=loss, **options):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 1)).eval()
    options = {**CAPTURED, **options}
    optimizer = optimizer(model.parameters(), lr=0.01, **({"fused": True} if fused else {}))
    return model, optimizer, TrainStep(model, loss, optimizer, **options)


X = torch.ones(2, 3)


def test_three_plain_steps_of_each_kind_and_then_captures():
    """The schedule that the documentation tells, in turns over three shapes."""
    model = tiny().train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    step = TrainStep(model, FlowMatchingLoss(), optimizer, make_graph=RecordedGraph)
    jobs = [(8, StructuredDrop(0.75)), (8, None), (4, None)]
    batches = [(torch.randn(2, 4, side, side), drop) for side, drop in jobs] * 5
    captured = [step(x, y=torch.tensor([1, 2]), drop=drop).captured for x, drop in batches]
    assert captured == [False] * 9 + [True] * 6


def test_loaded_optimizer_states_are_captured_anew_however_often():
    _, optimizer, step = small()
    state = copy.deepcopy(optimizer.state_dict())  # before the first step, and not capturable
    state["param_groups"][0]["capturable"] = False
    for _ in range(12):
        optimizer.load_state_dict(copy.deepcopy(state))
        assert [step(X).captured for _ in range(3)] == [False, True, True]
        assert optimizer.param_groups[0]["capturable"]
        assert optimizer.state[step.parameters[0]]["step"] == 3 + state["state"].get(0, {}).get("step", 0)
        state = copy.deepcopy(optimizer.state_dict())
        state["param_groups"][0]["capturable"] = False
    assert step._graphs.captured == 1


def test_groups_that_are_added_are_trained():
    results = []
    for options in (CAPTURED, {"make_graph": None}):
        torch.manual_seed(0)
        model = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)])
        optimizer = torch.optim.AdamW(model[0].parameters(), lr=0.01, fused=True)
        step = TrainStep(model, lambda m, x: loss(m[0], x) + loss(m[1], x), optimizer, **options)
        step(X)
        optimizer.add_param_group({"params": list(model[1].parameters()), "lr": 0.5})
        assert [step(X).captured for _ in range(3)] == ([False, True, True] if options is CAPTURED else [False] * 3)
        results.append(model[1].weight)
    torch.testing.assert_close(*results)


def test_modes_of_parts_and_checkpointing_are_looked_at():
    model, _, step = small()
    losses = {step(X).loss.item() for _ in range(2)}
    model[1].train()
    assert [step(X).captured for _ in range(3)] == [False, True, True]
    assert step(X).loss.item() != step(X).loss.item()
    model[1].eval()
    assert step(X).captured
    assert len(losses) == 2
    sit = tiny().eval()
    _, _, step = small(model=sit, loss=FlowMatchingLoss())
    for enabled in (False, True):
        sit.set_checkpointing(enabled)
        assert [step(torch.ones(2, 4, 8, 8), y=torch.tensor([1, 2])).captured for _ in range(2)] == [False, True]


class Counts(torch.optim.SGD):
    """Counts steps in Python, and steps by them."""

    def step(self, closure=None):
        state = self.state[self.param_groups[0]["params"][0]]
        state["calls"] = state.get("calls", 0) + 1
        super().step()


@pytest.mark.parametrize(
    ("options", "argument", "reason"),
    [
        ({"optimizer": Counts}, X, r"Counts keeps state\['calls'\] as a Python number"),
        ({}, X.clone().requires_grad_(), "an argument requires a gradient"),
        (
            {"loss": lambda model, x: loss(model, x) * float(model[0].bias.detach().sum() > 9)},
            X,
            "RuntimeError: operation not",
        ),
    ],
)
def test_what_cannot_be_captured_says_why_and_trains(options, argument, reason):
    model, optimizer, step = small(**options)
    with pytest.warns(RuntimeWarning, match=f"runs as plain code: {reason}") as caught:
        outs = [step(argument) for _ in range(4)]
    assert len(caught) == 1
    assert not any(out.captured for out in outs)
    assert all(p.grad is None for p in model.parameters())
    if isinstance(optimizer, Counts):
        assert optimizer.state[step.parameters[0]]["calls"] == 4


def test_a_capture_that_makes_states_is_undone():
    """A parameter that is used for the first time within the capture."""
    calls = []

    def late(model, x):
        calls.append(x)
        return loss(model[0], x) + (loss(model[1], x) if len(calls) > 1 else 0)

    model, optimizer, step = small(model=nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)]), loss=late)
    with pytest.warns(RuntimeWarning, match="the call replaces parameters, buffers or optimizer states"):
        assert not any(step(X).captured for _ in range(3))
    assert optimizer.state[model[1].weight]["step"] == 2
    assert all(value.isfinite().all() for state in optimizer.state.values() for value in state.values())


def test_options_that_change_from_call_to_call_are_named():
    _, optimizer, step = small()
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=80)
    with pytest.warns(RuntimeWarning, match=r"the optimizer's betas change from call to call \(OneCycleLR") as caught:
        _ = [(step(X), schedule.step()) for _ in range(70)]
    assert len(caught) == 1


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_captured(momentum):
    models = []
    for options in (CAPTURED, {}):
        model = nn.Linear(3, 1)
        model.load_state_dict({"weight": torch.ones(1, 3), "bias": torch.ones(1)})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (1 + i))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step = TrainStep(model, lambda m, x: loss(m, x) + m.bias.sum() ** 2, optimizer, **options)
            outs = []
            for _ in range(4):
                outs.append(step(X))
                schedule.step()
        assert outs[-1].captured == bool(options)
        models.append(model)
    torch.testing.assert_close(models[0].weight, models[1].weight)


def test_named_tuples_and_their_metrics():
    from collections import namedtuple

    Both = namedtuple("Both", ["loss", "size"])
    _, _, step = small(loss=lambda model, x: Both(loss(model, x), x.sum()))
    assert step(X).metrics["size"] == 6
    assert step(2 * X).metrics["size"] == 12


@pytest.mark.filterwarnings("ignore:called a synchronizing")
def test_a_call_that_waits_for_the_device_is_not_tried(monkeypatch):
    """Where the library itself waits at first (it compiles), the warm-up is longer."""
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    monkeypatch.setattr(Graphs, "_on_stream", lambda self, args, kwargs: self.function(*args, **kwargs))
    waits = {"compiles": 2, "reads": 99}

    def function(x, name):
        waits[name] -= 1
        if waits[name] >= 0:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return x + 1

    graphs = Graphs(function, device=torch.device("cpu"), state=Part(), **CAPTURED)
    graphs.stream = object()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [graphs(X, "compiles")[1] for _ in range(5)] == [False, False, False, True, True]
    with pytest.warns(RuntimeWarning, match=r"it waits for the device \(test_capturing.py, line") as caught:
        assert not any(graphs(X, "reads")[1] for _ in range(6))
    assert len([each for each in caught if each.category is RuntimeWarning]) == 1


class _BrokenCapture:
    """As torch.cuda.graph: where the capture was invalidated, its end fails too, before the stream is restored."""

    def __init__(self, graph, *, pool, stream, capture_error_mode):
        self.pool = pool

    def __enter__(self):
        assert self.pool not in _BrokenCapture.recording
        _BrokenCapture.recording.add(self.pool)

    def __exit__(self, kind, *rest):
        if kind is not None:
            raise RuntimeError("the end of the capture failed")
        _BrokenCapture.recording.discard(self.pool)


def test_a_broken_capture_leaves_its_pool_and_gives_the_first_reason(monkeypatch):
    _BrokenCapture.recording, left, revived = set(), [], []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "graph", _BrokenCapture)
    monkeypatch.setattr(
        torch.cuda, "stream", lambda stream: contextlib.closing(SimpleNamespace(close=lambda: left.append(1)))
    )
    monkeypatch.setattr(capture, "_draw_again", revived.append)
    stream = SimpleNamespace(device=torch.device("cuda", 0))
    with pytest.raises(ZeroDivisionError):
        CudaGraph(stream).capture(lambda: 1 / 0, [])
    good = CudaGraph(stream)
    assert good.capture(lambda: 2, []) == 2
    pool = CudaGraph._pool
    CudaGraph(stream).capture(lambda: 3, [])
    assert CudaGraph._pool is pool  # shared, while a graph of it is there
    del good
    CudaGraph(stream).capture(lambda: 4, [])
    assert CudaGraph._pool is not pool
    assert len(left) == 4  # the outer context restores the stream in any case
    assert revived == [stream.device]


def test_the_stand_in_keeps_no_outside_memory_alive():
    outside, graph = [torch.ones(3)], RecordedGraph()
    output = graph.capture(lambda: outside[0].mul_(2) + 1, [])
    assert outside[0].equal(torch.ones(3))  # a capture runs nothing
    assert output.isnan().all()
    assert graph.replay().equal(torch.full((3,), 3.0))
    assert graph.replay().equal(torch.full((3,), 5.0))
    outside.clear()
    with pytest.raises(RuntimeError, match="memory that was freed"):
        graph.replay()
