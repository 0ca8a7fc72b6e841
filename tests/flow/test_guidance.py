"""CFG and PDG: their equation, what runs how often, intervals, null conditions, and bad input."""

from functools import partial

import hosts
import pytest
import torch
from models import tiny
from torch import nn

from sprint import (
    ClassifierFreeGuidance,
    PathDropGuidance,
    SiT,
    SparseDenseResidual,
    SparseGuidance,
    SparseMiddle,
    StructuredDrop,
    path,
    wrap,
)
from sprint.flow.guidance import guide

BOTH = pytest.mark.parametrize("guidance", [ClassifierFreeGuidance, PathDropGuidance])


@pytest.fixture
def model() -> SiT:
    return tiny(encoder_depth=2, middle_depth=3, decoder_depth=2).eval()


X, Y = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2])
T = torch.full((2,), 0.5)


def calls_of(model: SiT, run) -> tuple[int, int, int]:
    """How many encoder, middle and decoder blocks run."""
    counts = [0, 0, 0]

    def count(part, *_):
        counts[part] += 1

    blocks = [*model.encoder, *model.middle.blocks, *model.decoder]
    parts = [0] * len(model.encoder) + [1] * len(model.middle.blocks) + [2] * len(model.decoder)
    hooks = [b.register_forward_hook(partial(count, part)) for b, part in zip(blocks, parts, strict=True)]
    run()
    for hook in hooks:
        hook.remove()
    return counts[0], counts[1], counts[2]


def test_equation():
    weak, strong = torch.randn(2, 5)
    for w in (0.0, 1.0, 3.0):
        torch.testing.assert_close(guide(weak, strong, w), (1 - w) * weak + w * strong)


@torch.no_grad()
def test_cfg_and_pdg_are_their_definitions(model):
    strong, null = model(X, T, Y), model.null_condition(2)
    weak = {
        ClassifierFreeGuidance(3.0): model(X, T, null),
        PathDropGuidance(3.0): model(X, T, null, path="shallow"),
        PathDropGuidance(3.0, weak="same"): model(X, T, Y, path="shallow"),
    }
    for guidance, prediction in weak.items():
        torch.testing.assert_close(guidance(model, X, 0.5, Y), prediction + 3 * (strong - prediction))


@pytest.mark.parametrize(
    ("guidance", "calls"),
    [
        (ClassifierFreeGuidance(3.0), (4, 6, 4)),
        (PathDropGuidance(3.0), (4, 3, 4)),  # the weak branch truly skips the middle
        (PathDropGuidance(3.0, weak="same"), (2, 3, 4)),  # and here the encoder runs once
        (ClassifierFreeGuidance(1.0), (2, 3, 2)),  # off
        (PathDropGuidance(1.0), (2, 3, 2)),
        (PathDropGuidance(3.0, interval=(0.6, 0.8)), (2, 3, 2)),
        (ClassifierFreeGuidance(3.0, interval=(0.0, 0.4)), (2, 3, 2)),
        (PathDropGuidance(3.0, interval=(0.5, 0.5)), (4, 3, 4)),
    ],
)
def test_blocks_that_run(model, guidance, calls):
    assert calls_of(model, lambda: guidance(model, X, 0.5, Y)) == calls


@BOTH
def test_scale_one_is_the_conditional_prediction(model, guidance):
    assert guidance(1.0)(model, X, 0.5, Y).equal(model(X, T, Y))


@BOTH
def test_outside_the_interval_it_is_off(model, guidance):
    inside = guidance(3.0, interval=(0.3, 0.8))
    for t, acts in ((0.29, False), (0.3, True), (0.8, True), (0.81, False)):
        plain = model(X, torch.full((2,), t), Y)
        assert inside(model, X, t, Y).equal(plain) != acts


@BOTH
def test_null_condition_is_the_models_or_yours(model, guidance):
    default = guidance(3.0)(model, X, 0.5, Y)
    assert guidance(3.0, null=torch.tensor([10, 10]))(model, X, 0.5, Y).equal(default)
    assert guidance(3.0, null=torch.tensor([10]))(model, X, 0.5, Y).equal(default)
    assert not guidance(3.0, null=torch.tensor([3]))(model, X, 0.5, Y).equal(default)
    assert guidance(3.0)(tiny(num_classes=5).eval(), X, 0.5, Y).shape == X.shape  # another number of classes


@torch.no_grad()
def test_vector_conditions():
    model, y = tiny(num_classes=None, cond_dim=6).eval(), torch.randn(2, 6)
    weak = model(X, T, model.null_condition(2), path="shallow")
    torch.testing.assert_close(PathDropGuidance(3.0)(model, X, 0.5, y), weak + 3 * (model(X, T, y) - weak))


def test_same_condition_needs_no_condition_at_all():
    model = tiny(num_classes=None).eval()
    strong, weak = model(X, T, path="both")
    torch.testing.assert_close(PathDropGuidance(2.0, weak="same")(model, X, 0.5, None), weak + 2 * (strong - weak))


class Own(nn.Module):
    """Someone's model with a sparse middle in its block list and a forward that knows nothing of paths."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(
            nn.Linear(4, 4), SparseMiddle([nn.Linear(4, 4)], SparseDenseResidual(4)), nn.Linear(4, 4)
        )

    def forward(self, x, t, y):
        return self.blocks(x + t[:, None, None] + y[:, None, None])


@pytest.mark.parametrize("weak", ["null", "same"])
def test_models_of_your_own(weak):
    model, x = Own().eval(), torch.randn(2, 6, 4)
    options = {"null": torch.tensor([0, 0])} if weak == "null" else {"weak": "same"}
    guided = PathDropGuidance(3.0, **options)(model, x, 0.5, Y)
    with model.blocks[1].routed(path="shallow"):
        shallow = model(x, T, torch.tensor([0, 0]) if weak == "null" else Y)
    torch.testing.assert_close(guided, shallow + 3 * (model(x, T, Y) - shallow))


@pytest.mark.slow
@torch.no_grad()
def test_compiled_models(model):
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    for guidance in (ClassifierFreeGuidance(3.0), PathDropGuidance(3.0), PathDropGuidance(3.0, weak="same")):
        torch.testing.assert_close(guidance(compiled, X, 0.5, Y), guidance(model, X, 0.5, Y), rtol=1e-4, atol=1e-5)


def test_rescaling_gives_the_strong_predictions_deviation():
    weak, strong = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(guide(weak, strong, 3.0, rescale=1.0).flatten(1).std(1), strong.flatten(1).std(1))
    half = guide(weak, strong, 3.0, rescale=0.5)
    torch.testing.assert_close(half, (guide(weak, strong, 3.0) + guide(weak, strong, 3.0, rescale=1.0)) / 2)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [ClassifierFreeGuidance, PathDropGuidance])
def test_guidances_rescale(model, guidance):
    plain = guidance(3.0)(model, X, 0.5, Y)
    strong = model(X, T, Y)
    rescaled = guidance(3.0, rescale=1.0)(model, X, 0.5, Y)
    factor = strong.flatten(1).std(1) / plain.flatten(1).std(1)
    torch.testing.assert_close(rescaled, plain * factor.view(-1, 1, 1, 1))


@torch.no_grad()
def test_sparse_guidance_of_our_model_and_of_a_wrapped_one(model):
    drop, t = StructuredDrop(0.75), T
    guidance = SparseGuidance(2.0, drop, generator=torch.Generator().manual_seed(0))
    subset = drop.sample(2, (4, 4), generator=torch.Generator().manual_seed(0))
    strong, weak = model(X, t, Y), model(X, t, Y, subset=subset)
    torch.testing.assert_close(guidance(model, X, 0.5, Y), weak + 2 * (strong - weak))
    assert SparseGuidance(1.0, drop)(model, X, 0.5, Y).equal(strong)

    host, x, y = wrap(hosts.DiT().eval(), init="xavier"), torch.randn(2, 3, 8, 8), torch.tensor([0.5, 1.0])
    guided = SparseGuidance(2.0, drop, generator=torch.Generator().manual_seed(0))(host, x, 0.5, y)
    with path(host, "sparse", subset=subset):
        weak = host(x, t, y)
    torch.testing.assert_close(guided, weak + 2 * (host(x, t, y) - weak))


def test_rescaling_predictions_without_deviation():
    zero = torch.zeros(2, 3, 4)
    assert guide(zero, zero, 3.0, rescale=1.0).equal(zero)


@pytest.mark.parametrize("rescale", [-0.1, 1.1])
def test_bad_rescaling(rescale):
    with pytest.raises(ValueError, match=r"rescale must be from 0 \(off\) to 1"):
        ClassifierFreeGuidance(2.0, rescale=rescale)


@BOTH
@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_bad_scales(guidance, scale):
    with pytest.raises(ValueError, match="scale must be a finite number, 1 for off|scale of .* must be a number.*got nan"):
        guidance(scale)


@BOTH
@pytest.mark.parametrize("interval", [(-0.1, 0.5), (0.8, 0.3), (0.5, 1.1), (0.5,)])
def test_bad_intervals(guidance, interval):
    with pytest.raises(
        ValueError,
        match=r"interval must be \(low, high\) with 0 <= low|interval of .* must be 2 numbers",
    ):
        guidance(2.0, interval=interval)


def test_what_cannot_be_guided(model):
    with pytest.raises(ValueError, match="pass y, or sample without guidance"):
        ClassifierFreeGuidance(2.0)(model, X, 0.5, None)
    with pytest.raises(ValueError, match=r"function has no null_condition\(batch\): pass null="):
        ClassifierFreeGuidance(2.0)(lambda x, t, y: x, X, 0.5, Y)
    with pytest.raises(ValueError, match="one SparseMiddle, or a wrapped one, Linear has 0: use ClassifierFreeGuidance"):
        PathDropGuidance(2.0)(nn.Linear(1, 1), X, 0.5, Y)
    with pytest.raises(ValueError, match="one SparseMiddle, or a wrapped one, function has 0"):
        PathDropGuidance(2.0)(lambda x, t, y: x, X, 0.5, Y)
    with pytest.raises(ValueError, match="weak of PathDropGuidance must be one of 'null', 'same', got the text 'none'"):
        PathDropGuidance(2.0, weak="none")
    with pytest.raises(ValueError, match="leave null out, or choose weak='null'"):
        PathDropGuidance(2.0, weak="same", null=Y)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [ClassifierFreeGuidance, PathDropGuidance])
def test_scales_of_time_and_of_each_sample(model, guidance):
    weak, strong = guidance(0.0)(model, X, 0.5, Y), model(X, T, Y)
    each = torch.tensor([1.0, 4.0])
    expected = weak + each.view(-1, 1, 1, 1) * (strong - weak)
    torch.testing.assert_close(guidance(each)(model, X, 0.5, Y), expected)
    torch.testing.assert_close(guidance(lambda t: 2 * t * each)(model, X, 0.5, Y), expected)
    torch.testing.assert_close(guidance(lambda t: 1 + 2 * t)(model, X, 0.5, Y), weak + 2 * (strong - weak))
    assert calls_of(model, lambda: guidance(lambda t: 1.0)(model, X, 0.5, Y)) == (2, 3, 2)  # off at this time
    assert guidance(each, interval=(0.6, 1.0))(model, X, 0.5, Y).equal(strong)


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        (torch.ones(3), ValueError, r"scale is \(3,\) for 2 samples: give one number, or one per sample"),
        (torch.ones(2, 2), ValueError, r"scale must be one number, or one per sample, \(B,\), got \(2, 2\)"),
        (lambda t: float("nan"), ValueError, r"scale\(0.5\) must be a finite number, 1 for off, got nan"),
        (lambda t: None, TypeError, r"scale\(0.5\) must be a number, .* or a function of t, got NoneType"),
        ("3", TypeError, "scale of ClassifierFreeGuidance must be a number or .* got the text '3'"),
    ],
)
def test_bad_scales_of_time_and_sample(model, scale, error, message):
    with pytest.raises(error, match=message):
        ClassifierFreeGuidance(scale)(model, X, 0.5, Y)


def test_null_of_a_dictionary_names_what_differs():
    def model(x, t, y):
        return x * (y["text"].mean((1, 2)) + y["size"]).view(-1, 1, 1, 1)

    y = {"text": torch.ones(2, 3, 4), "size": torch.tensor([1.0, 2.0])}
    guided = ClassifierFreeGuidance(3.0, null={"text": torch.zeros(1, 3, 4)})(model, X, 0.5, y)
    weak, strong = X * y["size"].view(-1, 1, 1, 1), X * (1 + y["size"]).view(-1, 1, 1, 1)
    torch.testing.assert_close(guided, weak + 3 * (strong - weak))
    with pytest.raises(ValueError, match=r"null has pooled, which y has not: name conditions of y \(text, size\)"):
        ClassifierFreeGuidance(3.0, null={"pooled": torch.zeros(1, 3)})(model, X, 0.5, y)
