"""A captured model gives the samples of the model itself, with any guidance."""

import hosts
import pytest
import torch
from models import tiny
from recording import RecordedGraph

import sprint.sit
from sprint import CapturedModel, ClassifierFreeGuidance, PathDropGuidance, SparseGuidance, StructuredDrop

Y = torch.tensor([1, 2])
NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(sprint.sit, "check_inputs", lambda *args, **kwargs: None)
    RecordedGraph.made = 0


@pytest.mark.parametrize(
    ("guidance", "graphs"),
    [
        (None, 1),
        (ClassifierFreeGuidance(2.0), 1),
        (PathDropGuidance(2.0), 2),
        (PathDropGuidance(2.0, weak="same"), 1),
        (PathDropGuidance(2.0, interval=(0.2, 0.7)), 2),
    ],
)
@pytest.mark.parametrize("captured", [True, False])
def test_samples_are_the_models(guidance, graphs, captured):
    model = tiny().eval()
    expected = sprint.sample(model, NOISE, y=Y, guidance=guidance, steps=8)
    fast = CapturedModel(model, warmup=1, make_graph=RecordedGraph if captured else None)
    for _ in range(2):
        torch.testing.assert_close(sprint.sample(fast, NOISE, y=Y, guidance=guidance, steps=8), expected)
    assert RecordedGraph.made == (graphs if captured else 0)


def test_sparse_guidance_draws_anew():
    model = sprint.wrap(hosts.DiT().eval(), init="xavier")
    fast = CapturedModel(model, warmup=1, make_graph=RecordedGraph)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    samples = []
    for one in (model, fast):
        guidance = SparseGuidance(2.0, drop=StructuredDrop(0.75), generator=torch.Generator().manual_seed(0))
        samples.append(sprint.sample(one, x, guidance=guidance, steps=4))
    torch.testing.assert_close(*samples)


def test_subsets_that_never_come_back_do_not_pile_up():
    model = tiny().eval()
    fast = CapturedModel(model, warmup=1, make_graph=RecordedGraph)
    guidance = SparseGuidance(2.0, drop=StructuredDrop(0.75), generator=torch.Generator().manual_seed(0))
    with pytest.warns(RuntimeWarning, match="most of which did not come back"):
        actual = sprint.sample(fast, NOISE, y=Y, guidance=guidance, steps=80)
    guidance = SparseGuidance(2.0, drop=StructuredDrop(0.75), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(actual, sprint.sample(model, NOISE, y=Y, guidance=guidance, steps=80))
    assert len(fast._graphs.entries) <= 64
    assert RecordedGraph.made == 1  # the strong prediction


def test_a_changed_model_is_captured_anew():
    model = tiny().eval()
    fast = CapturedModel(model, warmup=0, make_graph=RecordedGraph)
    t = torch.tensor([0.5, 0.5])
    fast(NOISE, t, Y)
    with torch.no_grad():
        model.final_layer.linear.bias.add_(1)
    torch.testing.assert_close(fast(NOISE, t, Y), model(NOISE, t, Y))  # in place: the same graph
    assert RecordedGraph.made == 1
    model.double().float()  # elsewhere in memory
    torch.testing.assert_close(fast(NOISE, t, Y), model(NOISE, t, Y))
    assert RecordedGraph.made == 2


def test_results_survive_the_next_call():
    model = tiny().eval()
    fast = CapturedModel(model, warmup=0, make_graph=RecordedGraph)
    t = torch.tensor([0.5, 0.5])
    first = fast(NOISE, t, Y)
    kept = first.clone()
    fast(-NOISE, t, Y)
    assert first.equal(kept)
    assert not first.requires_grad


def test_refusals():
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        CapturedModel(tiny().train())
    with pytest.raises(ValueError, match="needs a CUDA device"):
        CapturedModel(tiny().eval(), capture=True)
    with pytest.raises(ValueError, match="on one device, got no parameters"):
        CapturedModel(torch.nn.Identity().eval())
