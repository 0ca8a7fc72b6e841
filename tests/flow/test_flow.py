"""Interpolants, conversions, time distributions, and the loss with its REPA term."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny
from torch import nn

import sprint
from sprint import FlowMatchingLoss, LogNormalTime, ShiftedTime, StructuredDrop, UniformTime
from sprint.flow.interpolants import INTERPOLANTS, get_interpolant

interpolants = pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS)
times = st.floats(0.01, 0.99)


def batch(size: int = 4):
    torch.manual_seed(1)
    return torch.randn(size, 4, 8, 8), torch.arange(size)


# interpolants


@interpolants
@given(times)
@settings(deadline=None)
def test_conversions_are_exact(interpolant, time):
    x0, noise = torch.randn(2, 2, 3, dtype=torch.float64)
    t = torch.full((2,), time, dtype=torch.float64)
    x, v = interpolant.interpolate(x0, noise, t), interpolant.velocity(x0, noise, t)
    close = {"rtol": 1e-10, "atol": 1e-10}  # float64
    torch.testing.assert_close(interpolant.data(v, x, t), x0, **close)
    torch.testing.assert_close(interpolant.noise(v, x, t), noise, **close)
    torch.testing.assert_close(interpolant.to_velocity(v, x, t, kind="v"), v, **close)
    torch.testing.assert_close(interpolant.to_velocity(x0, x, t, kind="x"), v, **close)
    torch.testing.assert_close(interpolant.to_velocity(noise, x, t, kind="noise"), v, **close)
    sigma = interpolant.sigma(t)[:, None]
    torch.testing.assert_close(interpolant.score(v, x, t), -noise / sigma, **close)


@interpolants
@given(times)
@settings(deadline=None)
def test_derivatives_are_those_of_alpha_and_sigma(interpolant, time):
    t = torch.tensor(time, dtype=torch.float64, requires_grad=True)
    for function, derivative in ((interpolant.alpha, interpolant.alpha_dot), (interpolant.sigma, interpolant.sigma_dot)):
        (slope,) = torch.autograd.grad(function(t), t)
        torch.testing.assert_close(derivative(t), slope)
    ratio = interpolant.sigma(t) / interpolant.alpha(t)
    torch.testing.assert_close(interpolant.time_at(ratio), t)


@interpolants
def test_ends_are_data_and_noise(interpolant):
    x0, noise = torch.randn(2, 1, 3, dtype=torch.float64)
    ends = [interpolant.interpolate(x0, noise, torch.tensor([t], dtype=torch.float64)) for t in (0.0, 1.0)]
    stops_short = 0.0064 * x0.abs().max().item() + 3e-5 * noise.abs().max().item()  # DDPM's schedule
    atol = stops_short if interpolant is INTERPOLANTS["ddpm"] else 1e-7
    torch.testing.assert_close(ends, [x0, noise], rtol=0, atol=atol)


def test_the_schedule_of_ddpm():
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(INTERPOLANTS["ddpm"].alpha(t) ** 2, (1 - beta).cumprod(0), rtol=1e-7, atol=0)


def test_what_a_model_says_it_predicts_is_checked():
    model, (x, y) = tiny(prediction="noise").eval(), batch()
    with pytest.raises(ValueError, match="prediction='v', but this model predicts 'noise': pass prediction='noise'"):
        sprint.sample(model, x, y=y, steps=1)
    with pytest.raises(ValueError, match="this model predicts 'noise'"):
        FlowMatchingLoss()(model, x, y=y)
    assert sprint.sample(model, x, y=y, steps=1, prediction="noise").shape == x.shape
    assert FlowMatchingLoss(prediction="noise")(model, x, y=y).loss > 0


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown interpolant 'vp': choose one of linear, cosine, ddpm, or pass an Interp"):
        get_interpolant("vp")
    with pytest.raises(ValueError, match="unknown time 'beta': choose one of uniform, lognormal, or pass a distrib"):
        FlowMatchingLoss(time="beta")
    with pytest.raises(ValueError, match="prediction of FlowMatchingLoss must be one of 'v', 'x', 'noise', got .* 'eps'"):
        FlowMatchingLoss(prediction="eps")


# times


def test_uniform_times():
    t = UniformTime()(50_000, INTERPOLANTS["linear"], generator=torch.Generator().manual_seed(0))
    quantiles = torch.tensor([0.1, 0.5, 0.9])
    torch.testing.assert_close(t.quantile(quantiles), quantiles, rtol=0, atol=0.01)


@interpolants
def test_log_normal_times_have_a_normal_log_noise_to_signal_ratio(interpolant):
    t = LogNormalTime(-0.5, 1.5)(50_000, interpolant, generator=torch.Generator().manual_seed(0)).double()
    log_ratio = (interpolant.sigma(t) / interpolant.alpha(t)).log()
    normal = torch.distributions.Normal(-0.5, 1.5)
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    torch.testing.assert_close(log_ratio.quantile(levels), normal.icdf(levels), rtol=0, atol=0.05)
    assert t.min() > 0
    if interpolant is INTERPOLANTS["ddpm"]:
        assert t.max() <= 1  # its schedule ends there, at a finite ratio
    else:
        assert t.max() < 1


def test_shifted_times_move_towards_noise():
    draw = {"generator": torch.Generator().manual_seed(0)}
    base = UniformTime()(1000, INTERPOLANTS["linear"], generator=torch.Generator().manual_seed(0))
    shifted = ShiftedTime(3.0)(1000, INTERPOLANTS["linear"], **draw)
    torch.testing.assert_close(shifted, 3 * base / (1 + 2 * base))
    assert (shifted >= base).all()
    still = ShiftedTime(1.0, base=LogNormalTime())(9, INTERPOLANTS["linear"], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(still, LogNormalTime()(9, INTERPOLANTS["linear"], generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("make", [lambda: ShiftedTime(0.0), lambda: LogNormalTime(std=0.0)])
def test_time_parameters_out_of_range(make):
    with pytest.raises(ValueError, match="must be positive, got 0.0"):
        make()


# loss


@interpolants
def test_loss_is_the_mean_squared_error_of_the_velocity(interpolant):
    x0, noise = torch.randn(2, 3, 5, dtype=torch.float64)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    seen = []

    def net(x, times):
        seen.append((x, times))
        return x * 2

    out = FlowMatchingLoss(interpolant=interpolant)(net, x0, t=t, noise=noise)
    by_hand = []
    for i in range(3):
        a, s = interpolant.alpha(t[i]), interpolant.sigma(t[i])
        x = a * x0[i] + s * noise[i]
        v = interpolant.alpha_dot(t[i]) * x0[i] + interpolant.sigma_dot(t[i]) * noise[i]
        torch.testing.assert_close(seen[0][0][i], x)
        by_hand.append(((2 * x - v) ** 2).mean())
    torch.testing.assert_close(out.per_sample, torch.stack(by_hand))
    torch.testing.assert_close(out.loss, torch.stack(by_hand).mean())
    assert out.t is t
    assert (out.repa, out.subset) == (None, None)


@interpolants
@pytest.mark.parametrize("prediction", ["v", "x", "noise"])
def test_a_perfect_prediction_has_no_loss(interpolant, prediction):
    x0, noise = torch.randn(2, 3, 5, dtype=torch.float64)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    truth = {"v": interpolant.velocity(x0, noise, t), "x": x0, "noise": noise}[prediction]
    loss = FlowMatchingLoss(interpolant=interpolant, prediction=prediction)
    assert loss(lambda x, t: truth, x0, t=t, noise=noise).loss.item() < 1e-20
    assert loss(lambda x, t: truth + 0.1, x0, t=t, noise=noise).loss.item() > 1e-3


def test_drop_goes_to_the_middle_and_none_means_all_tokens():
    net, (x0, y) = tiny().eval(), batch()
    shapes = []
    net.middle.blocks[0].register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    loss = FlowMatchingLoss()
    assert loss(net, x0, y=y, drop=StructuredDrop(0.75)).subset.num_kept == 4
    assert loss(net, x0, y=y).subset is None
    assert shapes == [(4, 4, 16), (4, 16, 16)]


def test_a_generator_decides_every_draw():
    net, (x0, y) = tiny(label_drop=0.5, path_drop=0.5).train(), batch(10)
    loss, drop = FlowMatchingLoss(), StructuredDrop(0.75)
    before = torch.get_rng_state()
    one, two, other = (loss(net, x0, y=y, drop=drop, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.get_rng_state().equal(before)
    assert one.loss.equal(two.loss)
    assert one.t.equal(two.t)
    assert one.subset.keep.equal(two.subset.keep)
    assert not one.loss.equal(other.loss)
    assert not loss(net, x0, y=y, drop=drop).loss.equal(loss(net, x0, y=y, drop=drop).loss)


def test_wrapped_by_data_parallel():
    """DistributedDataParallel keeps the model under `.module`."""

    class DistributedDataParallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    net, (x0, y) = tiny(), batch()
    plain, wrapped = (
        FlowMatchingLoss()(m, x0, y=y, drop=StructuredDrop(0.75), generator=torch.Generator().manual_seed(0)).loss
        for m in (net, DistributedDataParallel(net))
    )
    assert plain.equal(wrapped)


@pytest.mark.slow
def test_compiled_models_train():
    torch.compiler.reset()
    net, (x0, y) = tiny().eval(), batch()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    plain, fast = (
        FlowMatchingLoss()(m, x0, y=y, drop=StructuredDrop(0.75), t=torch.full((4,), 0.3), noise=-x0).per_sample
        for m in (net, compiled)
    )
    assert plain.shape == fast.shape == (4,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    net, (x0, y) = tiny().to(dtype), batch()
    out = FlowMatchingLoss()(net, x0.to(dtype), y=y, drop=StructuredDrop(0.75))
    assert out.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    out.loss.backward()
    gradient = net.x_embedder.proj.weight.grad
    assert gradient is not None
    assert gradient.dtype == dtype


def test_a_small_model_learns_a_flat_image():
    net, y = tiny(label_drop=0.0), torch.zeros(8, dtype=torch.int64)
    x0 = torch.tensor([1.0, -1.0, 0.5, 0.0]).view(1, 4, 1, 1).expand(8, 4, 8, 8)
    optimizer, loss = torch.optim.Adam(net.parameters(), lr=3e-3), FlowMatchingLoss()
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(150):
        out = loss(net, x0, y=y, drop=StructuredDrop(0.75), generator=generator)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


# REPA


def cosine(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


def test_repa_is_minus_the_mean_cosine():
    features, target = torch.randn(2, 2, 3, 5, dtype=torch.float64)
    by_hand = [cosine(features[b, n], target[b, n]) for b in range(2) for n in range(3)]
    assert sprint.repa_loss(features, target).item() == pytest.approx(-sum(by_hand) / 6)
    assert sprint.repa_loss(target, 3 * target).item() == pytest.approx(-1)


def test_repa_compares_kept_tokens_with_their_own_teacher_tokens():
    net, (x0, y) = tiny(repa_dim=5, repa_depth=2, repa_hidden=8).eval(), batch()
    teacher = torch.randn(4, 16, 5)
    generator = torch.Generator().manual_seed(0)
    out = FlowMatchingLoss(repa_weight=0.7)(
        net, x0, y=y, drop=StructuredDrop(0.75), repa_target=teacher, generator=generator
    )
    aligned = net(x0 * (1 - out.t.view(-1, 1, 1, 1)), out.t, y, subset=out.subset, repa=True)
    assert aligned.repa.shape == (4, 4, 5)
    assert out.repa is not None
    torch.testing.assert_close(out.loss, out.per_sample.mean() + 0.7 * out.repa)

    inner = net.projectors.register_forward_hook(lambda module, args, output: features.append(output))
    features: list[torch.Tensor] = []
    again = FlowMatchingLoss()(
        net, x0, y=y, drop=StructuredDrop(0.75), repa_target=teacher, generator=torch.Generator().manual_seed(0)
    )
    inner.remove()
    keep = again.subset.keep
    by_hand = [cosine(features[0][b, k], teacher[b, keep[b, k]]) for b in range(4) for k in range(4)]
    assert again.repa.item() == pytest.approx(-sum(by_hand) / 16, rel=1e-5)


def test_repa_sends_gradients_to_the_model_and_none_to_the_teacher():
    net, (x0, y) = tiny(repa_dim=5, repa_depth=2, repa_hidden=8), batch()
    teacher = torch.randn(4, 16, 5, requires_grad=True)
    FlowMatchingLoss()(net, x0, y=y, drop=StructuredDrop(0.75), repa_target=teacher).loss.backward()
    assert teacher.grad is None
    assert net.projectors[0].weight.grad.count_nonzero() > 0


# bad input


class Dense(nn.Module):
    def forward(self, x, t, y):
        return x


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"x0": torch.zeros(4, 4, 8, 8, dtype=torch.uint8)}, TypeError, "x0 must be floating point, got torch.uint8"),
        ({"drop": 0.75}, TypeError, r"a drop sampler such as StructuredDrop\(0.75\) or None, got 0.75"),
        ({"model": Dense(), "repa_target": torch.zeros(4, 16, 5)}, ValueError, "Dense returns no projected tokens"),
        ({"t": torch.tensor(0.5)}, ValueError, r"t must be \(4,\), one time per sample, got \(\)"),
        ({"noise": torch.zeros(1, 4, 8, 8)}, ValueError, r"noise must be \(4, 4, 8, 8\) like x0, got \(1, 4, 8, 8\)"),
        ({"model": Dense(), "drop": StructuredDrop(0.75)}, ValueError, "Dense has no token_grid, so it cannot drop"),
        ({"model": lambda x, t, y: x[:, :2]}, ValueError, r"returned \(4, 2, 8, 8\), expected \(4, 4, 8, 8\)"),
        (
            {"drop": StructuredDrop(group=(3, 3), keep=2, strict=True)},
            ValueError,
            "4x4 tokens is not divisible into groups",
        ),
        ({"y": torch.tensor([1, 2, 3, 12])}, ValueError, "class ids from 1 to 12, expected 0 to 9"),
    ],
)
def test_bad_input(options, error, message):
    x0, y = batch()
    arguments = {"model": tiny(), "x0": x0, "y": y, **options}
    with pytest.raises(error, match=message):
        FlowMatchingLoss()(arguments.pop("model"), arguments.pop("x0"), **arguments)


def test_teacher_features_that_do_not_fit():
    net, (x0, y) = tiny(repa_dim=5, repa_depth=2, repa_hidden=8), batch()
    for shape, message in (((4, 16, 6), r"\(4, 4, 6\), the model's projected tokens \(4, 4, 5\)"), ((4, 9, 5), "16")):
        with pytest.raises(ValueError, match=message):
            FlowMatchingLoss()(net, x0, y=y, drop=StructuredDrop(0.75), repa_target=torch.zeros(shape))
    assert math.isfinite(FlowMatchingLoss()(net, x0, y=y, repa_target=torch.randn(4, 16, 5)).loss.item())
