"""A captured model gives the samples of the model itself, with any guidance."""

import copy
import dataclasses

import hosts
import pytest
import torch
from models import tiny
from recording import RecordedGraph

import sprint.flow.inputs
from sprint import CapturedModel, ClassifierFreeGuidance, PathDropGuidance, SparseGuidance, StructuredDrop
from sprint.capture.graphs import Graphs
from sprint.capture.state import Part

Y = torch.tensor([1, 2])
NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(sprint.flow.inputs, "readable", lambda tensor: False)
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
    for _ in range(2):  # one plain call, in which optimizers and compilers would find their way
        torch.testing.assert_close(fast(NOISE, t, Y), model(NOISE, t, Y))
    assert RecordedGraph.made == 2
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][5]
    linear.weight = torch.nn.Parameter(linear.weight + 1)  # one weight among many, another tensor
    torch.testing.assert_close(fast(NOISE, t, Y), model(NOISE, t, Y))


def test_results_survive_the_next_call():
    model = tiny().eval()
    fast = CapturedModel(model, warmup=0, make_graph=RecordedGraph)
    t = torch.tensor([0.5, 0.5])
    first = fast(NOISE, t, Y)
    kept = first.clone()
    fast(-NOISE, t, Y)
    assert first.equal(kept)
    assert not first.requires_grad


class Squares(torch.nn.Module):
    """A little model that a test can ask for this and that."""

    def __init__(self):
        super().__init__()
        self.linear, self.config = torch.nn.Linear(3, 3), {"size": 3}
        self.eval()

    def forward(self, x, how=None):
        y = self.linear(x)
        if how == "data class":
            return Opaque(y)
        if isinstance(how, float | int):
            return y * (100 if isinstance(how, bool) else 10 if isinstance(how, float) else 1)
        return y


@dataclasses.dataclass
class Opaque:
    y: torch.Tensor


def test_what_a_graph_cannot_hold_stays_plain_and_says_why():
    fast, x = CapturedModel(Squares(), warmup=1, make_graph=RecordedGraph), torch.randn(2, 3)
    with pytest.warns(RuntimeWarning, match="the result has a Opaque, which torch does not open"):
        results = [fast(x + i, "data class") for i in range(3)]
    assert not results[0].y.equal(results[2].y)
    fast = CapturedModel(Squares(), warmup=0, make_graph=RecordedGraph)
    with pytest.warns(RuntimeWarning, match="the result has a Opaque"):
        fast(x, "data class")
    fast(x)
    with pytest.warns(RuntimeWarning, match="an argument requires a gradient"):
        fast(x.clone().requires_grad_())
    assert sum(entry.plain for entry in fast._graphs.entries.values()) == 2
    graphs = Graphs(lambda x, g: x, device=torch.device("xpu"), state=Part(), warmup=0, make_graph=RecordedGraph)
    with pytest.warns(RuntimeWarning, match="a generator on cpu draws outside of a graph"):
        graphs(x, torch.Generator())


def test_what_tells_calls_apart():
    model = Squares()
    fast, x = CapturedModel(model, warmup=0, make_graph=RecordedGraph), torch.randn(2, 3)
    for how in (1, True, 1.0, 1):
        torch.testing.assert_close(fast(x, how), model(x, how).detach())
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(x, 1).dtype == torch.bfloat16
    assert fast(x, 1).dtype == torch.float32
    with torch.inference_mode():
        fast(x, 1)
    assert fast(x, 1).dtype == torch.float32


def test_a_pipeline_of_diffusers_takes_it():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=1, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3, sample_size=8
    ).eval()
    parts = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    vae = diffusers.AutoencoderKL(latent_channels=4, block_out_channels=(32,), **parts)
    images = []
    for transformer in (model, CapturedModel(model, warmup=1, make_graph=RecordedGraph)):
        pipe = diffusers.DiTPipeline(transformer=transformer, vae=vae, scheduler=diffusers.DDIMScheduler())
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(pipe([1, 2], num_inference_steps=3, generator=generator, output_type="np").images)
    torch.testing.assert_close(*map(torch.from_numpy, images))
    assert RecordedGraph.made == 1


class Around(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.transformer = model

    def forward(self, *args):
        return self.transformer(*args)

    def null_condition(self, batch):
        return None


def test_the_path_of_a_model_inside_is_found():
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.7])
    model = sprint.wrap(hosts.DiT().eval(), init="xavier")
    guidance = SparseGuidance(2.0, drop=StructuredDrop(1 / 4))
    assert guidance(Around(CapturedModel(model)), x, 0.5, None).shape == x.shape
    with sprint.path(CapturedModel(model), "shallow"):
        shallow = model(x, t)
    assert not shallow.equal(model(x, t))


def test_it_has_the_models_attributes():
    fast = CapturedModel(Squares())
    assert fast.config == {"size": 3}
    assert copy.deepcopy(fast).config == {"size": 3}
    with pytest.raises(AttributeError, match="Squares.* has no attribute 'missing'"):
        _ = fast.missing


def test_refusals():
    for options, error, message in (
        ({"autocast": "bf16"}, TypeError, "autocast of .* must be a dtype such as torch.bfloat16"),
        ({"warmup": -1}, ValueError, "warmup must be a whole number, at least 0, got -1"),
        ({"limit": 0}, ValueError, "limit must be a whole number, at least 1, got 0"),
    ):
        with pytest.raises(error, match=message):
            CapturedModel(Squares(), **options)
    with pytest.raises(TypeError, match="model of CapturedModel must be a torch.nn.Module, got the text"):
        CapturedModel("x")

    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        CapturedModel(tiny().train())
    with pytest.raises(ValueError, match="needs a CUDA device"):
        CapturedModel(tiny().eval(), capture=True)
    with pytest.raises(ValueError, match="on one device, got no parameters"):
        CapturedModel(torch.nn.Identity().eval())
