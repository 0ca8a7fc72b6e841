"""`Velocity` of diffusers' models, wrapped or not: against loops written by hand after their pipelines."""

import diffusers
import pytest
import torch
from architectures import CASES

import sprint
from sprint import ClassifierFreeGuidance, FlowMatchingLoss, PathDropGuidance, StructuredDrop, Velocity
from sprint.diffusers import SprintPipeline

DDPM = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
FLOWS = ["sd3", "flux", "wan"]
PROMPT = ("encoder_hidden_states", "pooled_projections")
TIMES = ("hidden_states", "timestep", "img_ids", "txt_ids")


def host(name, **options):
    """A tiny model in float64, its latents, its conditions, and those of an empty prompt."""
    model, arguments = CASES[name]()
    model = model.double().eval()
    if options:
        model = sprint.wrap(model, drop=StructuredDrop(0.75), path_drop=0.0, **options)
    arguments = {key: value.double() if key != "class_labels" and isinstance(value, torch.Tensor) else value
                 for key, value in arguments.items()}  # fmt: skip
    y = {key: value for key, value in arguments.items() if key not in TIMES}
    x = arguments["hidden_states"]
    if name == "flux":  # packed: (B, N, 4 C) is what its pipeline makes of (B, C, H, W)
        x = torch.randn(2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    null = {
        key: torch.zeros_like(value) for key, value in y.items() if key in ("encoder_hidden_states", "pooled_projections")
    }
    return model, x, y, null


def velocity_by_hand(name, model, x, t, y):
    """As each pipeline calls its transformer, t being its sigma."""
    times = torch.full((len(x),), t, dtype=torch.float64)
    if name != "flux":
        return model(hidden_states=x, timestep=1000 * times, return_dict=False, **y)[0]
    pipe, (batch, channels, height, width) = diffusers.FluxPipeline, x.shape
    packed = pipe._pack_latents(x, batch, channels, height, width)
    ids = pipe._prepare_latent_image_ids(batch, height // 2, width // 2, x.device, x.dtype)
    text = torch.zeros(y["encoder_hidden_states"].shape[1], 3)
    out = model(packed, timestep=times, img_ids=ids, txt_ids=text, return_dict=False, **y)[0]
    return pipe._unpack_latents(out, 8 * height, 8 * width, 8)


@pytest.mark.parametrize("name", FLOWS)
@torch.no_grad()
def test_flow_models_are_sampled_as_by_their_pipelines(name):
    model, x, y, null = host(name)
    expected, guided = x, x
    for step in range(4):
        t = 1 - step / 4
        expected = expected - velocity_by_hand(name, model, expected, t, y) / 4
        weak, strong = (velocity_by_hand(name, model, guided, t, {**y, **conditions}) for conditions in (null, {}))
        guided = guided - (weak + 3 * (strong - weak)) / 4
    velocity = Velocity(model)
    torch.testing.assert_close(sprint.sample(velocity, x, y=y, steps=4), expected, rtol=1e-9, atol=1e-9)
    guidance = ClassifierFreeGuidance(3.0, null=null)
    torch.testing.assert_close(sprint.sample(velocity, x, y=y, steps=4, guidance=guidance), guided, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FLOWS)
def test_flow_models_are_trained_as_by_hand_and_dropped_from(name):
    model, x, y, _ = host(name, init="xavier")
    noise, t = torch.randn_like(x), torch.full((2,), 0.3, dtype=torch.float64)
    state = 0.7 * x + 0.3 * noise
    expected = (velocity_by_hand(name, model, state, 0.3, y) - (noise - x)).square().mean()
    loss = FlowMatchingLoss()
    torch.testing.assert_close(loss(Velocity(model), x, y=y, t=t, noise=noise).loss, expected, rtol=1e-9, atol=1e-9)
    with sprint.path(model, "sparse", generator=torch.Generator().manual_seed(0)):
        sparse = (velocity_by_hand(name, model, state, 0.3, y) - (noise - x)).square().mean()
    drop, generator = StructuredDrop(0.75), torch.Generator().manual_seed(0)
    dropped = loss(Velocity(model), x, y=y, t=t, noise=noise, drop=drop, generator=generator).loss
    torch.testing.assert_close(dropped, sparse, rtol=1e-9, atol=1e-9)
    assert not dropped.equal(expected)


SCHEDULERS = [
    diffusers.DDIMScheduler(**DDPM, clip_sample=False),
    diffusers.DDIMScheduler(**DDPM, clip_sample=False, prediction_type="sample"),
    diffusers.DDIMScheduler(**DDPM, clip_sample=False, prediction_type="v_prediction"),
    diffusers.DDPMScheduler(**DDPM, clip_sample=False),
    diffusers.DPMSolverMultistepScheduler(**DDPM),
    diffusers.EulerDiscreteScheduler(**DDPM),
    diffusers.HeunDiscreteScheduler(**DDPM),
]


def names(value):
    if isinstance(value, diffusers.SchedulerMixin):
        return f"{type(value).__name__}-{value.config.get('prediction_type')}"
    return None


@pytest.mark.parametrize("name", ["dit", "pixart"])
@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=names)
@torch.no_grad()
def test_noise_models_with_their_schedulers(name, scheduler):
    model, x, y, _ = host(name)
    between, z = sprint.DDPMInterpolant(), x
    scheduler.set_timesteps(5)
    x = z = x * 1.0
    z = z * scheduler.init_noise_sigma
    generator = torch.Generator().manual_seed(0)
    for k in scheduler.timesteps:
        seen = scheduler.scale_model_input(z, k)
        noise = model(hidden_states=seen, timestep=k.expand(2), **y).sample[:, :4]
        t = (k.double() + 1) / 1000
        data = (seen - between.sigma(t) * noise) / between.alpha(t)
        output = {
            "epsilon": noise,
            "sample": data,
            "v_prediction": between.alpha(t) * noise - between.sigma(t) * data,
        }[scheduler.config.prediction_type]
        options = {"generator": generator} if isinstance(scheduler, diffusers.DDPMScheduler) else {}
        z = scheduler.step(output, k, z, return_dict=False, **options)[0]
    y = y["class_labels"] if name == "dit" else y
    ours = sprint.sample(Velocity(model), x, y=y, solver=scheduler, steps=5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours, z.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
        diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ],
    ids=names,
)
@torch.no_grad()
def test_flow_models_with_their_schedulers(scheduler):
    model, x, y, _ = host("sd3")
    if scheduler.config.get("use_dynamic_shifting"):
        mu = diffusers.pipelines.flux.pipeline_flux.calculate_shift(16)  # 8x8 latents in patches of 2x2
        scheduler.set_timesteps(sigmas=[1 - step / 5 for step in range(5)], mu=mu)
    elif isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        scheduler.set_timesteps(sigmas=[1 - step / 5 for step in range(5)])
    else:
        scheduler.set_timesteps(5)
    z = x
    for k in scheduler.timesteps:
        v = model(hidden_states=z, timestep=k.expand(2).double(), return_dict=False, **y)[0]
        z = scheduler.step(v, k, z, return_dict=False)[0]
    torch.testing.assert_close(sprint.sample(Velocity(model), x, y=y, solver=scheduler, steps=5), z, rtol=1e-4, atol=1e-4)


def test_what_a_scheduler_does_not_fit():
    noise_model, x, y, _ = host("dit")
    velocity, flow = Velocity(noise_model), diffusers.FlowMatchEulerDiscreteScheduler()
    y = y["class_labels"]
    for solver, message in (
        (flow, "moves along x = .* and the model is of the DDPMInterpolant"),
        (
            diffusers.DDIMScheduler(beta_schedule="scaled_linear"),
            "another noise schedule .*'scaled_linear'.* than",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            sprint.sample(velocity, x, y=y, solver=solver)
    with pytest.raises(ValueError, match="times were given, but DDIMScheduler has a schedule of its own"):
        sprint.sample(velocity, x, y=y, solver=diffusers.DDIMScheduler(**DDPM), times=[1.0, 0.0])
    shifted = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="by the number of tokens, which this model does not tell"):
        sprint.sample(lambda x, t: x, x, solver=shifted)


@pytest.mark.parametrize("call", [FlowMatchingLoss(), sprint.sample])
def test_without_it_the_error_names_it(call):
    for name in ("dit", "sd3", "sana"):
        model, x, *_ = host(name, init="xavier")
        options = "model, prediction=…" if name == "sana" else "model"
        with pytest.raises(ValueError, match=rf"is not called as model\(x, t, y\) .* pass sprint.Velocity\({options}\)"):
            call(model, x)
    with pytest.raises(TypeError, match="SD3Transformer2DModel takes several conditions: pass y as a dictionary"):
        Velocity(host("sd3")[0])(x, torch.rand(2), torch.ones(2))


def test_a_training_step_and_guidance_of_a_wrapped_model():
    model, x, y, null = host("flux", init="xavier")
    velocity, middle = Velocity(model), []
    step = sprint.TrainStep(velocity, FlowMatchingLoss(), torch.optim.AdamW(model.parameters(), lr=1e-3), clip=1.0)
    for _ in range(2):
        assert step(x, y=y, drop=StructuredDrop(0.75)).loss.isfinite()
    model.single_transformer_blocks[0].register_forward_hook(lambda *_: middle.append(1))
    sprint.sample(velocity.eval(), x, y=y, steps=3, guidance=PathDropGuidance(2.0, null=null))
    assert len(middle) == 3


def pipeline(transformer, scheduler, **parts):
    pipe = SprintPipeline(transformer, scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_pipelines_convert_what_models_predict():
    model, x, _, _ = host("dit", init="xavier")
    pipe = pipeline(model, diffusers.DDIMScheduler(**DDPM, clip_sample=False))
    labels = [1, 2]
    images = pipe(labels, size=(8, 8), latents=x, num_inference_steps=5, output_type="latent")
    expected = sprint.sample(
        Velocity(model), x, y=torch.tensor(labels), solver=diffusers.DDIMScheduler(**DDPM, clip_sample=False), steps=5
    )
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="model is of the DDPMInterpolant"):
        pipeline(model, diffusers.FlowMatchEulerDiscreteScheduler())(labels, size=(8, 8))


def test_pipelines_of_other_models_conditions_and_schedulers():
    model, x, y, null = host("flux", init="xavier")
    for scheduler in (
        diffusers.FlowMatchHeunDiscreteScheduler(),
        diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    ):
        pipe = pipeline(model, scheduler)
        generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        options = {"size": (8, 8), "num_inference_steps": 3, "guidance": PathDropGuidance(2.0, null=null)}
        both = pipe(y, generator=generators, **options)
        assert both.shape == x.shape
        first = {name: value[:1] for name, value in y.items()}
        options["guidance"] = PathDropGuidance(2.0, null={name: value[:1] for name, value in null.items()})
        alone = pipe(first, generator=[torch.Generator().manual_seed(3)], **options)
        torch.testing.assert_close(alone, both[:1], rtol=1e-4, atol=1e-4)  # no image depends on its batch


def test_models_that_others_hold_are_known_and_refused_alike():
    peft = pytest.importorskip("peft")
    model, x, y, _ = host("dit")
    y, t, noise = y["class_labels"], torch.tensor([0.3, 0.6], dtype=torch.float64), torch.randn_like(x)
    loss = FlowMatchingLoss(error="noise")
    plain = loss(Velocity(model), x, y=y, t=t, noise=noise).loss
    options = peft.LoraConfig(target_modules=["to_q"])
    held = peft.get_peft_model(model, options)
    torch.testing.assert_close(loss(Velocity(held), x, y=y, t=t, noise=noise).loss, plain)
    for unadapted in (held, held.get_base_model().forward):
        with pytest.raises(ValueError, match="is not called as model"):
            loss(unadapted, x, y=y)
    around = peft.get_peft_model(Velocity(host("dit")[0]), options)
    torch.testing.assert_close(loss(around, x, y=y, t=t, noise=noise).loss, plain)
    assert Velocity(torch.compile(host("dit")[0], backend="eager")).prediction == "noise"


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True), "prediction_type='epsilon' and use_flow_sigmas=True"),
        (diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction"), "and use_flow_sigmas=False"),
        (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "has invert_sigmas=True, which is not known here"),
        (diffusers.DDIMInverseScheduler(**DDPM), "goes from data to noise, and samplers here the other way"),
        (diffusers.EulerDiscreteScheduler(**DDPM, interpolation_type="log_linear"), "has interpolation_type='log_linear'"),
        (
            diffusers.DPMSolverMultistepScheduler(
                use_flow_sigmas=True, prediction_type="flow_prediction", use_lu_lambdas=True
            ),
            "has use_flow_sigmas and use_lu_lambdas",
        ),
        (diffusers.IPNDMScheduler(), "IPNDMScheduler takes what it does not say: it is not known here"),
        (diffusers.DDPMScheduler(**DDPM, variance_type="learned_range"), "a velocity holds no variance: make it with"),
        (
            diffusers.EulerDiscreteScheduler(**DDPM, timestep_type="continuous", prediction_type="v_prediction"),
            "has timestep_type='continuous', which is not known here",
        ),
    ],
    ids=range(9),
)
def test_schedulers_that_are_refused(scheduler, message):
    model, x, y, _ = host("dit")
    with pytest.raises(ValueError, match=message):
        sprint.sample(Velocity(model), x, y=y["class_labels"], solver=scheduler)


def test_conditions_do_not_replace_the_state():
    model, x, y, _ = host("sd3")
    with pytest.raises(ValueError, match="y names hidden_states, timestep, which are the state and the time"):
        Velocity(model)(x, torch.rand(2).double(), {**y, "hidden_states": x, "timestep": torch.ones(2)})


def test_pipelines_follow_a_replaced_transformer_and_leave_modes():
    model, x, _, _ = host("dit", init="xavier")
    pipe = pipeline(model, diffusers.DDIMScheduler(**DDPM, clip_sample=False))
    model.train()
    model.transformer_blocks[0].eval()
    pipe([1, 2], size=(8, 8), latents=x, num_inference_steps=1)
    assert [block.training for block in model.transformer_blocks] == [False] + [True] * 5
    pipe.transformer = host("sd3")[0]
    assert pipe.model.prediction == "v"
    with pytest.raises(ValueError, match=r"latents are \(2, 4, 8, 8\), and size=\(4, 4\)"):
        pipe([1, 2], size=(4, 4), latents=x)
    with pytest.raises(ValueError, match=r"size must be \(rows, columns\) of the latents, got 8"):
        pipe([1, 2], size=8)


def test_a_vae_with_statistics_per_channel_decodes():
    torch.manual_seed(0)
    parts = {"block_out_channels": (4, 4), "norm_num_groups": 2, "down_block_types": ["DownEncoderBlock2D"] * 2}
    statistics = {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}
    vae = diffusers.AutoencoderKL(**parts, up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4, **statistics).eval()
    model, x, _, _ = host("dit", init="xavier")
    pipe = pipeline(model.float(), diffusers.DDIMScheduler(**DDPM), vae=vae)
    latents = pipe([1, 2], size=(8, 8), latents=x, num_inference_steps=1, output_type="latent")
    images = pipe([1, 2], size=(8, 8), latents=x, num_inference_steps=1)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in statistics.values())
    with torch.no_grad():
        decoded = vae.decode(latents * std / vae.config.scaling_factor + mean).sample
    torch.testing.assert_close(images, (decoded / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-4)


def test_a_model_without_a_patch_size_takes_schedulers_that_do_not_shift():
    class Plain(torch.nn.Module):
        def forward(self, x, t):
            return x * 0.5

    velocity = Velocity(Plain().eval(), prediction="v")
    x = torch.randn(2, 4, 8, 8)
    assert sprint.sample(velocity, x, solver=diffusers.FlowMatchEulerDiscreteScheduler(), steps=2).isfinite().all()
    with pytest.raises(ValueError, match="Plain tells no patch_size"):
        sprint.sample(velocity, x, solver=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
