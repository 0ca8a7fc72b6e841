"""Sampling: solver orders measured, SDE marginals, counted calls, custom solvers, states on the way, bad input."""

import itertools
import math

import pytest
import torch
from models import tiny

import sprint
from sprint import ClassifierFreeGuidance, EulerMaruyama, PathDropGuidance
from sprint.flow.interpolants import INTERPOLANTS
from sprint.flow.sampling import SOLVERS
from sprint.random import normal

interpolants = pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS)
MEAN, STD = 1.5, 0.5  # of the one-dimensional data below


def gaussian_velocity(interpolant):
    """The exact velocity when the data are N(MEAN, STD²), and the exact flow of a point from noise (t = 1) to a time."""

    def velocity(x, t):
        t = t.double().reshape(-1, *[1] * (x.ndim - 1))
        a, s, a_dot, s_dot = (getattr(interpolant, name)(t) for name in ("alpha", "sigma", "alpha_dot", "sigma_dot"))
        variance = a**2 * STD**2 + s**2
        return a_dot * MEAN + (a * a_dot * STD**2 + s * s_dot) / variance * (x - a * MEAN)

    def at(t):
        a, s = (getattr(interpolant, name)(torch.tensor(t, dtype=torch.float64)) for name in ("alpha", "sigma"))
        return a * MEAN, (a**2 * STD**2 + s**2).sqrt()

    def flow(noise, t=0.0):
        (mean, std), (first_mean, first_std) = at(t), at(1.0)
        return mean + std * (noise - first_mean) / first_std

    return velocity, flow


NOISE, Y = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2])


# accuracy


@interpolants
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(interpolant, solver, order):
    velocity, flow = gaussian_velocity(interpolant)
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    end = 0.2 if interpolant is INTERPOLANTS["ddpm"] else 0.0  # its velocity has no bound at 0
    errors = []
    for steps in (64, 128, 256):
        times = torch.linspace(1, end, steps + 1, dtype=torch.float64).tolist()
        x = sprint.sample(velocity, noise, solver=solver, times=times, interpolant=interpolant)
        errors.append((x - flow(noise, end)).abs().max().item())
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert orders == pytest.approx([order] * 2, abs=0.15)


@interpolants
def test_sde_has_the_marginals_of_the_data(interpolant):
    velocity, _ = gaussian_velocity(interpolant)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(40_000, 1, dtype=torch.float64, generator=generator)
    x = sprint.sample(velocity, noise, solver="sde", steps=200, interpolant=interpolant, generator=generator)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert x.std().item() == pytest.approx(STD, abs=0.02)
    correlation = torch.corrcoef(torch.stack([x[:, 0], noise[:, 0]]))[0, 1].item()
    limit = 0.7 if interpolant is INTERPOLANTS["ddpm"] else 0.5  # w(t) = 2t is little on its schedule
    assert abs(correlation) < limit  # new noise on the way: the ODE's correlation is 1


def test_sde_follows_its_generator():
    velocity, _ = gaussian_velocity(INTERPOLANTS["linear"])
    noise, before = torch.zeros(3, 1, dtype=torch.float64), torch.get_rng_state()
    one, two, other = (
        sprint.sample(velocity, noise, solver="sde", steps=5, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    assert one.equal(two)
    assert not one.equal(other)
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("prediction", ["x", "noise"])
@interpolants
def test_predictions_of_x_and_noise_sample_the_same(interpolant, prediction):
    """The same model, its velocity converted by hand into what it predicts."""
    velocity, _ = gaussian_velocity(interpolant)

    def predicting(x, t):
        return {"x": interpolant.data, "noise": interpolant.noise}[prediction](velocity(x, t), x, t)

    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    options = {"steps": 20, "interpolant": interpolant}
    if prediction == "noise":  # says nothing about the data at t = 1
        options["times"] = torch.linspace(0.99, 0, 21).tolist()
    expected = sprint.sample(velocity, noise, **options)
    actual = sprint.sample(predicting, noise, prediction=prediction, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)  # float64


@interpolants
def test_a_noise_prediction_starts_where_it_says_something(interpolant):
    velocity, flow = gaussian_velocity(interpolant)
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    x = sprint.sample(
        lambda x, t: interpolant.noise(velocity(x, t), x, t), noise, prediction="noise", steps=500, interpolant=interpolant
    )
    torch.testing.assert_close(x, flow(noise), rtol=0.02, atol=0.02)


# what is called, and with what


@pytest.mark.parametrize(("solver", "calls"), [("euler", 6), ("heun", 11), ("sde", 6)])
def test_calls_per_solver(solver, calls):
    seen = []

    def velocity(x, t):
        seen.append((x.dtype, t))
        return -x

    sprint.sample(velocity, torch.ones(3, 2), solver=solver, steps=6)
    assert len(seen) == calls
    assert all(dtype == torch.float32 and t.shape == (3,) and t.dtype == torch.float32 for dtype, t in seen)
    assert all(a[1][0] >= b[1][0] for a, b in itertools.pairwise(seen))


def test_middle_blocks_that_path_drop_guidance_skips():
    model, counts = tiny().eval(), [0, 0]

    def count(place):
        counts[place] += 1

    model.encoder[0].register_forward_hook(lambda *_: count(0))
    model.middle.blocks[0].register_forward_hook(lambda *_: count(1))
    for guidance, expected in (
        (None, [5, 5]),
        (ClassifierFreeGuidance(3.0), [10, 10]),
        (PathDropGuidance(3.0), [10, 5]),
        (PathDropGuidance(3.0, weak="same"), [5, 5]),
        (PathDropGuidance(3.0, interval=(0.3, 0.7)), [7, 5]),  # of t = 1, 0.8, 0.6, 0.4, 0.2
    ):
        counts[:] = [0, 0]
        sprint.sample(model, NOISE, y=Y, guidance=guidance, steps=5)
        assert counts == expected


def test_state_is_float64_and_the_model_sees_its_own_dtype():
    model = tiny().eval().bfloat16()
    states = list(sprint.trajectory(model, NOISE.bfloat16(), y=Y, steps=2))
    assert [state.x.dtype for state in states] == [torch.float64] * 3
    assert sprint.sample(model, NOISE.bfloat16(), y=Y, steps=2).dtype == torch.bfloat16
    (*_, last) = sprint.trajectory(tiny().eval(), NOISE, y=Y, steps=2, state_dtype=torch.float32)
    assert last.x.dtype == torch.float32


def test_float64_state_adds_up_steps_that_float32_loses():
    noise, steps = torch.zeros(1, 1), 1000
    errors = [
        (sprint.sample(lambda x, t: -torch.ones_like(x), noise, steps=steps, state_dtype=dtype) - 1).abs().item()
        for dtype in (torch.float64, torch.float32)
    ]
    assert errors[0] < 1e-7
    assert errors[0] < errors[1]


def test_states_on_the_way():
    velocity, _ = gaussian_velocity(INTERPOLANTS["linear"])
    noise = torch.ones(2, 1)
    states = list(sprint.trajectory(velocity, noise, steps=4))
    assert [(state.step, state.t) for state in states] == [(0, 1.0), (1, 0.75), (2, 0.5), (3, 0.25), (4, 0.0)]
    assert states[0].x.float().equal(noise)
    assert sprint.sample(velocity, noise, steps=4).equal(states[-1].x.float())
    for now, then in itertools.pairwise(states):
        torch.testing.assert_close(then.x, now.x - 0.25 * velocity(now.x.float(), torch.full((2,), now.t)).double())


def test_gradients_are_off_in_the_step_and_untouched_around_it():
    model = tiny().eval()
    for _ in sprint.trajectory(model, NOISE, y=Y, steps=2):
        assert torch.is_grad_enabled()
    assert not sprint.sample(model, NOISE.clone().requires_grad_(), y=Y, steps=2).requires_grad


def test_times_of_your_own():
    seen = []
    sprint.sample(lambda x, t: seen.append(t[0].item()) or x, torch.ones(1, 1), times=[0.9, 0.5, 0.1], steps=99)
    assert seen == pytest.approx([0.9, 0.5])


def test_a_solver_of_your_own():
    class Midpoint(sprint.Euler):
        def step(self, velocity, x, t, t_next, *, interpolant, generator):
            middle = (t + t_next) / 2
            return x + (t_next - t) * velocity(x + (middle - t) * velocity(x, t), middle)

    velocity, flow = gaussian_velocity(INTERPOLANTS["linear"])
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    by_solver = {
        solver: (sprint.sample(velocity, noise, solver=solver, steps=32) - flow(noise)).abs().max().item()
        for solver in ("euler", Midpoint())
    }
    euler, midpoint = by_solver.values()
    assert midpoint < euler / 100


def test_grids():
    assert SOLVERS["euler"].times(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert SOLVERS["sde"].times(4) == pytest.approx([1.0, 0.68, 0.36, 0.04, 0.0])
    assert EulerMaruyama(last=0.1).times(2) == pytest.approx([1.0, 0.1, 0.0])


def test_compiled_models_sample_the_same():
    torch.compiler.reset()
    model = tiny().eval()
    compiled = torch.compile(model, backend="aot_eager")
    options = {"y": Y, "guidance": PathDropGuidance(3.0), "steps": 3}
    torch.testing.assert_close(
        sprint.sample(compiled, NOISE, **options), sprint.sample(model, NOISE, **options), rtol=1e-4, atol=1e-5
    )


def test_progress_bar_counts_steps(capsys):
    sprint.sample(lambda x, t: x, torch.ones(1, 1), steps=3, progress=True)
    assert "3/3" in capsys.readouterr().err
    sprint.sample(lambda x, t: x, torch.ones(1, 1), steps=3)
    assert capsys.readouterr().err == ""


# bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"solver": "rk4"}, ValueError, "unknown solver 'rk4': choose one of euler, heun, sde, or pass a Solver"),
        ({"steps": 0}, ValueError, "steps must be a whole number, at least 1, got 0"),
        ({"steps": 2.5}, TypeError, "steps of sample must be a whole number, got 2.5"),
        (
            {"guidance": 3.0},
            TypeError,
            r"guidance of sample must be a guidance such as .* got 3.0",
        ),
        ({"solver": "sde", "steps": 1}, ValueError, "SDE solver needs at least 2 steps, got 1"),
        ({"interpolant": "vp"}, ValueError, "unknown interpolant 'vp'"),
        ({"prediction": "eps"}, ValueError, "prediction of sample must be one of"),
        ({"noise": torch.ones(2, 4, 8, 8, dtype=torch.int64)}, TypeError, "noise must be floating point, got torch.int64"),
        ({"y": torch.tensor([1, 2, 3])}, ValueError, "y holds 3 conditions for 2 samples"),
        ({"y": torch.tensor([1, 12])}, ValueError, "class ids from 1 to 12, expected 0 to 9"),
        ({"times": [0.0, 1.0]}, ValueError, "times must decrease"),
        ({"times": [1.0]}, ValueError, "times must decrease"),
        ({"times": [1.2, 0.0]}, ValueError, "times must decrease, from at most 1"),
        ({"y": None}, ValueError, "y is missing"),
    ],
)
def test_bad_input(options, error, message):
    arguments = {"noise": NOISE, "y": Y, **options}
    with pytest.raises(error, match=message):
        sprint.sample(tiny().eval(), **arguments)


def test_bad_input_is_named_before_the_first_step():
    with pytest.raises(ValueError, match="unknown solver"):
        sprint.trajectory(lambda x, t: x, torch.ones(1, 1), solver="rk4")


def test_models_in_training_mode_are_refused():
    with pytest.raises(ValueError, match=r"training mode.*call model.eval\(\) first"):
        sprint.sample(tiny(), NOISE, y=Y)


@pytest.mark.parametrize("last", [0.0, 1.0])
def test_last_time_of_the_sde_out_of_range(last):
    with pytest.raises(ValueError, match="last must lie between 0 and 1"):
        EulerMaruyama(last=last)


def test_one_generator_per_sample_makes_samples_independent_of_their_batch():
    def run(numbers):
        streams = [torch.Generator().manual_seed(i) for i in numbers]
        noise = normal((len(numbers), 2, 4), generator=streams)
        return sprint.sample(lambda x, t: 0.3 * x, noise, solver="sde", steps=5, generator=streams)

    whole = run([0, 1, 2, 3])
    torch.testing.assert_close(whole, torch.cat([run([0]), run([1, 2]), run([3])]))
    assert not torch.allclose(whole[0], whole[1])
    with pytest.raises(ValueError, match="2 generators for 3 samples"):
        normal((3, 2), generator=[torch.Generator(), torch.Generator()])
