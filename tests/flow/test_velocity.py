"""`Velocity`: conventions against hand-written ones, what it refuses, and what takes it."""

import copy
import functools
import types

import hosts
import pytest
import torch
from models import tiny
from torch import nn

import sprint
from sprint import ClassifierFreeGuidance, FlowMatchingLoss, PathDropGuidance, StructuredDrop, Velocity

X, T = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.7])
Y = torch.tensor([0.5, 1.0])


class Original(hosts.DiT):
    """In the manner of the original DiT and SiT: labels, and perhaps a variance behind the prediction."""

    def __init__(self, *, variance: bool = False) -> None:
        super().__init__()
        self.in_channels, self.variance = 3, variance
        self.y_embedder = nn.Module()
        self.y_embedder.num_classes, self.y_embedder.embedding_table = 10, nn.Embedding(11, 16)

    def forward(self, x, t, y):
        out = super().forward(x, t / 100, self.y_embedder.embedding_table(y).mean(1))
        return torch.cat([out, out + 1], dim=1) if self.variance else out


LABELS = torch.tensor([1, 2])


@torch.no_grad()
def test_dit_and_sit_are_what_their_papers_say():
    dit, sit = Original(variance=True).eval(), Original().eval()
    ddpm = sprint.DDPMInterpolant()
    noise = dit(X, 1000 * T - 1, LABELS)[:, :3]
    torch.testing.assert_close(
        Velocity(dit, like="DiT")(X, T, LABELS), ddpm.to_velocity(noise, X, T, kind="noise"), rtol=1e-4, atol=1e-4
    )
    assert Velocity(sit, like="SiT")(X, T, LABELS).equal(-sit(X, 1 - T, LABELS))
    assert Velocity(dit, like="DiT").null_condition(2).tolist() == [10, 10]


@torch.no_grad()
def test_sit_is_sampled_as_by_its_own_loop():
    sit = Original().double().eval()
    x = X.double()
    for step in range(8):  # its time runs from noise to data
        s = torch.full((2,), step / 8, dtype=torch.float64)
        x = x + sit(x, s, LABELS) / 8
    torch.testing.assert_close(sprint.sample(Velocity(sit, like="SiT"), X.double(), y=LABELS, steps=8), x)


@pytest.mark.parametrize("interpolant", ["linear", "cosine", "ddpm"])
@pytest.mark.parametrize("prediction", ["v", "x", "noise"])
def test_a_loss_through_it_is_the_loss_of_the_prediction(prediction, interpolant):
    """Both ways to say what a model predicts, and the loss in each quantity, against their definitions."""
    model, noise = hosts.DiT().double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    x0, t = X.double(), T.double()
    between = Velocity(model, prediction="v", interpolant=interpolant).interpolant
    x = between.interpolate(x0, noise, t)
    v = between.to_velocity(model(x, t, Y), x, t, kind=prediction)
    truth = {"v": between.velocity(x0, noise, t), "x": x0, "noise": noise}
    guess = {"v": v, "x": between.data(v, x, t), "noise": between.noise(v, x, t)}
    velocity = Velocity(model, prediction=prediction, interpolant=interpolant)
    for kind, exact in truth.items():
        expected = (guess[kind] - exact).square().mean()
        through = FlowMatchingLoss(error=kind)(velocity, x0, y=Y, t=t, noise=noise).loss
        said = FlowMatchingLoss(error=kind, prediction=prediction, interpolant=interpolant)(model, x0, y=Y, t=t, noise=noise)
        torch.testing.assert_close(through, expected)
        torch.testing.assert_close(said.loss, expected)


def test_options_of_ones_own():
    class Mine(nn.Module):
        def forward(self, latent, sigma, *, text):
            return {"x": latent * sigma.view(-1, 1, 1, 1) + text.mean()}

    velocity = Velocity(
        Mine(),
        prediction="x",
        interpolant="cosine",
        time=lambda t: 10 * t,
        call=lambda model, x, t, y: model(x, t, **y)["x"],
    )
    text = torch.ones(2, 4)
    cosine = sprint.CosineInterpolant()
    expected = cosine.to_velocity(X * 10 * T.view(-1, 1, 1, 1) + 1, X, T, kind="x")
    torch.testing.assert_close(velocity(X, T, {"text": text}), expected)
    assert "prediction='x', interpolant=CosineInterpolant(), time=<lambda>" in repr(velocity)


def test_a_wrapped_model_within_is_dropped_from_guided_and_trained():
    model = sprint.wrap(hosts.DiT().eval(), drop=StructuredDrop(0.75), init="xavier", path_drop=0.5)
    velocity, lengths = Velocity(model, prediction="v", reverse=True), []
    model.blocks[2].register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    guided = PathDropGuidance(3.0, null=torch.zeros(2))(velocity, X, 0.25, Y)
    t = torch.full((2,), 0.75)
    with sprint.path(model, "shallow"):
        weak = model(X, t, torch.zeros(2))
    torch.testing.assert_close(guided, -(weak + 3 * (model(X, t, Y) - weak)))
    assert lengths == [16, 16]
    velocity.train()
    step = sprint.TrainStep(velocity, FlowMatchingLoss(), torch.optim.SGD(model.parameters(), lr=0.1),
                            ema=copy.deepcopy(velocity))  # fmt: skip
    before = model.head.weight.clone()
    assert step(X, y=Y, drop=StructuredDrop(0.75)).updated
    assert lengths[2:] == [4]
    assert not model.head.weight.equal(before)
    torch.testing.assert_close(sprint.CapturedModel(velocity.eval())(X, T, Y), velocity(X, T, Y))


def test_a_generator_draws_path_drop_too_and_leaves_the_chosen_path():
    model = sprint.wrap(hosts.DiT().train(), drop=StructuredDrop(0.75), init="xavier", path_drop=0.5)
    for chosen in ("full", "sparse"):
        sprint.path(model, chosen)
        one, two = (
            FlowMatchingLoss()(model, X, y=Y, generator=torch.Generator().manual_seed(0)).per_sample for _ in range(2)
        )
        assert one.equal(two)
        assert model.sprint.route[0] == chosen


def test_an_adapter_of_ones_own_may_hold_the_wrapped_model():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = sprint.wrap(hosts.DiT().eval(), init="xavier")

        def forward(self, x, t, y):
            return -self.inner(x, 1 - t, y)

    lengths, mine = [], Mine()
    mine.inner.blocks[2].register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    FlowMatchingLoss()(mine, X, y=Y, drop=StructuredDrop(0.75))
    assert lengths == [4]


def test_a_wrapped_model_with_a_token_grid_of_its_own_is_still_wrapped():
    class Grid(hosts.DiT):
        def token_grid(self, x):
            return 4, 4

        def forward(self, x, t, y=None, **unused):
            return super().forward(x, t, y)

    lengths, model = [], sprint.wrap(Grid().eval())
    model.blocks[2].register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    FlowMatchingLoss()(model, X, y=Y, drop=StructuredDrop(0.75))
    assert lengths == [4]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Velocity(lambda x, t: x, prediction="v"), TypeError, "model of .* must be a torch.nn.Module, got a func"),
        (lambda: Velocity(hosts.DiT()), ValueError, "not known what DiT predicts.*like='DiT' or like='SiT'"),
        (lambda: Velocity(hosts.DiT(), like="sit"), ValueError, "unknown convention 'sit': choose one of DiT, SiT"),
        (lambda: Velocity(hosts.DiT(), prediction="eps"), ValueError, "prediction of .* must be one of 'v'.* 'eps'"),
        (lambda: Velocity(Original(), like="DiT", prediction="v"), ValueError, "predict 'noise' on the ddpm .* say it all"),
        (lambda: Velocity(tiny()), ValueError, r"SiT is called as model\(x, t, y\) already"),
        (lambda: Velocity(Original(variance=True), prediction="v")(X, T, LABELS), ValueError, "Velocity.model, channels=3."),
        (lambda: Velocity(Own(), prediction="v")(X, T), TypeError, "Own returned dict, in which no prediction"),
        (lambda: FlowMatchingLoss()(Own(), X), TypeError, "Own returned dict, in which no prediction"),
        (lambda: sprint.sample(Own().eval(), X), TypeError, "Own returned dict, in which no prediction"),
        (lambda: sprint.sample(noisy(), X, prediction="noise"), ValueError, "a Velocity gives velocities"),
        (lambda: sprint.sample(noisy(), X, interpolant="linear"), ValueError, "'linear', but this Velocity is on"),
        (lambda: FlowMatchingLoss(interpolant="cosine")(noisy(), X), ValueError, "but this Velocity is on the DDPM"),
        (lambda: sprint.sample(noisy().train(), X), ValueError, "in training mode"),
        (lambda: sprint.sample(half_trained(), X), ValueError, "in training mode"),
        (lambda: ClassifierFreeGuidance(2.0)(noisy(), X, 0.5, Y), ValueError, "DiT has no null condition of its own"),
        (lambda: Velocity(Own(), prediction="v", time=lambda t: t).options(), ValueError, "time=.* cannot be written"),
    ],
)  # fmt: skip
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


class Own(nn.Module):
    def forward(self, x, t, y=None):
        return {"x": x}


def noisy():
    return Velocity(hosts.DiT().eval(), prediction="noise", interpolant="ddpm")


def half_trained():
    velocity = noisy()
    velocity.model.train()
    return velocity


def test_a_noise_model_starts_a_little_later():
    states = [*sprint.trajectory(noisy(), X, steps=2)]
    assert [state.t for state in states] == [0.999, 0.5, 0.0]


def test_options_can_be_written_and_make_the_same_again():
    options = {"prediction": "x", "interpolant": "cosine", "time": 1000, "reverse": True}
    assert Velocity(hosts.DiT(), **options).options() == options
    assert Velocity(Original(), like="SiT").options() == {"like": "SiT"}


class Holder(nn.Module):
    """Someone's module around a Velocity."""

    def __init__(self, net):
        super().__init__()
        self.module = net

    def forward(self, x, t, y=None):
        return self.module(x, t, y)


def test_a_velocity_within_a_holder_keeps_its_interpolant():
    velocity, noise, t = noisy(), torch.randn_like(X), torch.tensor([0.3, 0.7])
    loss = FlowMatchingLoss(error="noise")
    assert loss(Holder(velocity), X, noise=noise, t=t).loss.equal(loss(velocity, X, noise=noise, t=t).loss)
    assert sprint.sample(Holder(velocity).eval(), X, steps=3).equal(sprint.sample(velocity, X, steps=3))


def test_it_leaves_the_modes_of_its_model():
    model = hosts.DiT().train()
    model.blocks[0].eval()
    Velocity(model, prediction="v")
    assert not model.blocks[0].training
    assert model.blocks[1].training


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"time": 0}, ValueError, "time must be a positive factor, such as 1000, or a function of t, got 0"),
        ({"time": True}, TypeError, "time of Velocity must be a number or a function or None, got True"),
        ({"time": float("nan")}, ValueError, "time of Velocity must be a number .* got nan"),
        ({"channels": -4}, ValueError, "channels must be a whole number, at least 1, got -4"),
        ({"reverse": "no"}, TypeError, "reverse of Velocity must be True or False or None, got the text 'no'"),
        ({"call": "x"}, TypeError, "call of Velocity must be a function or None, got the text"),
        ({"null": torch.ones(2)}, TypeError, "null of Velocity must be a function or None, got a Tensor"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        Velocity(hosts.DiT(), prediction="v", **options)


@pytest.mark.parametrize("interpolant", ["linear", "cosine"])
def test_noise_models_start_where_there_is_data_on_any_grid(interpolant):
    velocity = Velocity(hosts.DiT().eval(), prediction="noise", interpolant=interpolant)
    assert sprint.sample(velocity, X, times=[1.0, 0.5, 0.0]).isfinite().all()


def test_times_that_a_loss_draws_are_inside():
    class Ends:
        def __call__(self, batch, interpolant, *, device=None, generator=None):
            return torch.tensor([0.0, 1.0], dtype=torch.float64)

    for prediction, error in (("noise", "noise"), ("x", "x"), ("noise", "v")):
        for interpolant in ("linear", "ddpm"):
            velocity = Velocity(hosts.DiT().double(), prediction=prediction, interpolant=interpolant)
            assert FlowMatchingLoss(time=Ends(), error=error)(velocity, X.double()).loss.isfinite()
    with pytest.raises(ValueError, match="t holds times from 300 to 700, expected 0 .* divide steps by their count"):
        FlowMatchingLoss()(Velocity(hosts.DiT(), prediction="v"), X, t=torch.tensor([300.0, 700.0]))
    for time, message in (
        (lambda batch, interpolant, **_: torch.rand(1), r"t must be \(2,\), one time per sample, got \(1,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            FlowMatchingLoss(time=time)(hosts.DiT(), X)
    with pytest.raises(ValueError, match="times of sample must be a sequence of numbers or None"):
        sprint.sample(noisy(), X, times=[1.0, float("nan"), 0.0])
    for solver in (3, None, sprint.Heun):
        with pytest.raises(TypeError, match="solver must be one of euler, heun, sde, a scheduler of diffusers or a Solver"):
            sprint.sample(noisy(), X, solver=solver)


def within_a_function():
    velocity = noisy()
    return lambda x, t: velocity(x, t).clone()


def of_a_task(task):
    return lambda x, t: task.velocity(x, t).clone()


class Task:
    """Someone's object with models."""

    def __init__(self):
        self.velocity, self.nets = noisy(), {"ema": noisy()}
        self.other = Velocity(hosts.DiT().eval(), prediction="v")

    def denoise(self, x, t):
        return self.velocity(x, t)

    @torch.no_grad()
    def guessed(self, x, t):
        return self.velocity(x, t)

    def __call__(self, x, t):
        return self.nets["ema"](x, t)


class Unregistered(nn.Module):
    def __init__(self):
        super().__init__()
        self.nets = [noisy()]

    def forward(self, x, t):
        return self.nets[0](x, t)


HELD = {
    "lambda": within_a_function(),
    "decorated": torch.no_grad()(within_a_function()),
    "partial": functools.partial(noisy()),
    "forward": noisy().forward,
    "default": lambda x, t, model=noisy(): model(x, t),  # noqa: B008
    "method": Task().denoise,
    "object": Task(),
    "decorated method": Task().guessed,
    "attribute": of_a_task(Task()),
    "unregistered": Unregistered().eval(),
}


@pytest.mark.parametrize("model", HELD.values(), ids=HELD)
def test_what_calls_a_velocity_is_of_its_interpolant(model):
    assert sprint.sample(model, X, steps=3).equal(sprint.sample(noisy(), X, steps=3))
    options = {"noise": torch.randn_like(X), "t": T}
    assert FlowMatchingLoss()(model, X, **options).loss.equal(FlowMatchingLoss()(noisy(), X, **options).loss)
    with pytest.raises(ValueError, match="prediction='noise', but a Velocity gives velocities"):
        sprint.sample(model, X, prediction="noise")
    with pytest.raises(ValueError, match="interpolant=Cosine.*, but this Velocity is on the DDPM"):
        FlowMatchingLoss(interpolant="cosine")(model, X)


def test_models_of_several_interpolants_ask_for_one():
    one, two = noisy(), Velocity(hosts.DiT().eval(), prediction="v")
    for model in (Pair(one, two).eval(), lambda x, t: one(x, t) + two(x, t)):
        with pytest.raises(ValueError, match="several models of different interpolants .*DDPM.* and one .*Linear"):
            sprint.sample(model, X)
        assert sprint.sample(model, X, interpolant="ddpm", steps=2).isfinite().all()
        with pytest.raises(ValueError, match="interpolant='cosine', but this Velocity is on"):
            sprint.sample(model, X, interpolant="cosine")


class Pair(nn.Module):
    def __init__(self, one, two):
        super().__init__()
        self.one, self.two = one, two

    def forward(self, x, t):
        return self.one(x, t) + self.two(x, t)


def test_a_model_that_says_how_it_was_trained_is_heard_through_what_holds_it():
    model = tiny(prediction="noise").eval()
    model.recipe = sprint.models.Recipe(interpolant="cosine")
    x, y = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    options = {"y": y, "steps": 2, "prediction": "noise"}
    expected = sprint.sample(model, x, **options)
    for around in (Holder(model).eval(), lambda x, t, y: model(x, t, y).clone(), functools.partial(model, path="full")):
        assert sprint.sample(around, x, **options).equal(expected)
        with pytest.raises(ValueError, match="prediction='v', but this model predicts 'noise': pass prediction='noise'"):
            sprint.sample(around, x, y=y)
    assert Velocity(Holder(model), prediction="noise").interpolant is model_interpolant("cosine")
    with pytest.raises(ValueError, match="interpolant='linear', but this model was trained with 'cosine'"):
        Velocity(Holder(model), prediction="noise", interpolant="linear")
    with pytest.raises(ValueError, match="prediction='noise', but a Velocity gives velocities"):
        Velocity(Holder(noisy()), prediction="noise")


def model_interpolant(name):
    return sprint.flow.interpolants.INTERPOLANTS[name]


def test_interpolants_of_ones_own_are_told_apart_by_what_they_hold():
    class Power(sprint.LinearInterpolant):
        def __init__(self, power):
            self.power = power

    velocity = Velocity(hosts.DiT().eval(), prediction="v", interpolant=Power(2))
    assert sprint.sample(velocity, X, interpolant=Power(2), steps=1).isfinite().all()
    with pytest.raises(ValueError, match="but this Velocity is on the Power"):
        sprint.sample(velocity, X, interpolant=Power(3))


def test_partials_and_forwards_are_the_model_itself():
    model, x, y = tiny(), torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    for around in (model.forward, functools.partial(model, path="full")):
        with pytest.raises(ValueError, match="in training mode"):
            sprint.sample(around, x, y=y)
    expected = FlowMatchingLoss()(model, x, y=y, drop=StructuredDrop(0.75), generator=torch.Generator().manual_seed(0))
    again = FlowMatchingLoss()(model.forward, x, y=y, drop=StructuredDrop(0.75), generator=torch.Generator().manual_seed(0))
    assert again.loss.equal(expected.loss)


def test_conditions_and_times_that_do_not_fit_are_refused_alike():
    outside, dit = (lambda batch, interpolant, **_: torch.full((batch,), 300.0)), Velocity(hosts.DiT(), prediction="v")
    x, y = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    for call in (
        lambda: FlowMatchingLoss(time=outside)(tiny(), x, y=y),
        lambda: FlowMatchingLoss(time=outside)(dit, X),
        lambda: FlowMatchingLoss(time=outside)(hosts.DiT(), X),
        lambda: dit(X, torch.tensor([0.5, 300.0])),
    ):
        with pytest.raises(ValueError, match="t holds times from .* to 300, expected 0"):
            call()
    for call in (
        lambda y: FlowMatchingLoss()(dit, X, y=y),
        lambda y: sprint.sample(Velocity(hosts.DiT().eval(), prediction="v"), X, y=y),
    ):
        with pytest.raises(ValueError, match="y holds 1 conditions for 2 samples: give one per sample"):
            call(Y[:1])
        with pytest.raises(ValueError, match=r"y of y is \(1, 3\), one condition for 2 samples.*y.expand\(2, -1\)"):
            call({"y": torch.ones(1, 3)})
        with pytest.raises(ValueError, match="mask of y is .* one condition for 2 samples"):
            call({"added": {"mask": torch.ones(1)}})
    with pytest.raises(ValueError, match="y holds class ids from 3 to 11, expected 0 to 9"):
        Velocity(Original(), like="DiT")(X, T, torch.tensor([3, 11]))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: sprint.sample(noisy(), X, steps=True), TypeError, "steps of sample must be a whole number, got True"),
        (lambda: sprint.sample(noisy(), X, steps="3"), TypeError, "steps of .* must be a whole number, got the text '3'"),
        (lambda: Velocity(hosts.DiT(), prediction=""), ValueError, "prediction of .* must be one of 'v'.* got the text ''"),
        (lambda: Velocity(hosts.DiT(), prediction="v", interpolant=""), ValueError, "unknown interpolant ''"),
        (lambda: FlowMatchingLoss(repa_weight=float("nan")), ValueError, "repa_weight of .* must be a number, got nan"),
        (lambda: FlowMatchingLoss(repa_weight=True), TypeError, "repa_weight of .* must be a number, got True"),
        (lambda: FlowMatchingLoss(time=sprint.UniformTime), TypeError, r"got the class UniformTime: an object of it"),
        (lambda: FlowMatchingLoss(time=0.5), TypeError, r"time of .* must be text or a distribution of times .* got 0.5"),
        (lambda: sprint.ShiftedTime(3.0, sprint.UniformTime), TypeError, r"base of .* must be a distribution of times"),
        (lambda: sprint.ShiftedTime(float("inf")), ValueError, "shift must be a finite number, got inf"),
        (lambda: sprint.LogNormalTime(float("nan")), ValueError, "mean of LogNormalTime must be a number, got nan"),
        (lambda: PathDropGuidance(True), TypeError, "scale of .* must be a number.* got True"),
    ],
)  # fmt: skip
def test_values_that_are_none(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_model_may_say_what_it_predicts_by_a_property():
    class Said(hosts.DiT):
        @property
        def config(self):
            return types.SimpleNamespace(prediction="noise")

    for model in (Said().eval(), Holder(Said()).eval()):
        with pytest.raises(ValueError, match="prediction='v', but this model predicts 'noise'"):
            sprint.sample(model, X)
