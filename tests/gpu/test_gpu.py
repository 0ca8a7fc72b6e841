"""What only a GPU can show: no host synchronisation on the hot path, and the same numbers as on a CPU."""

import copy

import pytest
import torch
from kernel_cases import TWINS, modulation, rotation, run
from models import tiny

import sprint
from sprint.kernels import fused

pytestmark = pytest.mark.gpu


@pytest.fixture
def model() -> sprint.SiT:
    return tiny()


def test_sparse_training_step_never_waits_for_the_device(model):
    model = model.cuda()
    x0, y = torch.randn(4, 4, 16, 16, device="cuda"), torch.arange(4, device="cuda")
    loss = sprint.FlowMatchingLoss()
    loss(model, x0, y=y, drop=sprint.StructuredDrop(0.75)).loss.backward()  # warm-up: libraries synchronise at first use
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for drop in (sprint.StructuredDrop(0.75), sprint.RandomDrop(0.5), None):
            loss(model, x0, y=y, drop=drop).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cpu_and_gpu_agree_from_one_cpu_generator(model):
    on_gpu = copy.deepcopy(model).cuda()
    x0, y = torch.randn(4, 4, 16, 16), torch.arange(4)
    loss, drop = sprint.FlowMatchingLoss(), sprint.StructuredDrop(0.75)
    expected = loss(model, x0, y=y, drop=drop, generator=torch.Generator().manual_seed(1))
    actual = loss(on_gpu, x0.cuda(), y=y.cuda(), drop=drop, generator=torch.Generator().manual_seed(1))
    assert actual.subset is not None
    assert expected.subset is not None
    torch.testing.assert_close(actual.subset.keep.cpu(), expected.subset.keep)
    torch.testing.assert_close(actual.loss.cpu(), expected.loss, rtol=1e-3, atol=1e-4)  # float32, other kernels


def test_labels_beyond_the_classes_are_named_before_sampling(model):
    noise = torch.randn(1, 4, 16, 16, device="cuda")
    with pytest.raises(ValueError, match="class ids from 11 to 11"):
        sprint.sample(model.eval().cuda(), noise, y=torch.tensor([11], device="cuda"))


SPARSE = sprint.StructuredDrop(0.75)


def training(seed=0, *, compiled=False, capture=None, steps=8, jobs=((16, SPARSE), (16, None), (8, SPARSE))):
    torch.manual_seed(0)
    model = tiny().cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=steps)
    ema = copy.deepcopy(model)
    step = sprint.TrainStep(
        model, sprint.FlowMatchingLoss(), optimizer, clip=1.0, ema=ema, ema_decay=0.9, compile=compiled, capture=capture
    )
    torch.manual_seed(seed)
    outs = []
    for _ in range(steps):
        for side, drop in jobs:
            x = torch.ones(4, 4, side, side, device="cuda")
            outs.append(step(x, y=torch.arange(4, device="cuda"), drop=drop))
            schedule.step()
    return torch.stack([out.loss for out in outs]), [*model.parameters(), *ema.parameters()], outs


def test_captured_steps_equal_plain_ones():
    """Also the random numbers: a replay draws what the plain step would have drawn."""
    plain, expected, outs = training(capture=False)
    assert not any(out.captured for out in outs)
    captured, actual, outs = training()
    assert [out.captured for out in outs] == [False] * 9 + [True] * (len(outs) - 9)
    torch.testing.assert_close(captured, plain, rtol=1e-3, atol=1e-4)  # float32; atomics add in any order
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)


def test_captured_runs_follow_their_seed():
    losses, _, _ = training(1, jobs=((16, SPARSE),))
    again, _, _ = training(1, jobs=((16, SPARSE),))
    other, _, _ = training(2, jobs=((16, SPARSE),))
    torch.testing.assert_close(losses, again, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(losses, other, rtol=1e-2)
    assert len(set(losses.tolist())) == len(losses)


def test_compiled_and_captured_steps_are_close_to_plain_ones():
    plain, _, _ = training(capture=False)
    compiled, _, outs = training(compiled=True)
    assert outs[-1].captured
    torch.testing.assert_close(compiled, plain, rtol=1e-2, atol=1e-2)


@pytest.mark.filterwarnings("error")
def test_accumulation_is_captured():
    torch.manual_seed(0)
    model = tiny().cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    step = sprint.TrainStep(model, sprint.FlowMatchingLoss(), optimizer, accumulate=2, compile=False)
    x, y = torch.randn(4, 4, 16, 16, device="cuda"), torch.arange(4, device="cuda")
    outs = [step(x, y=y, drop=SPARSE) for _ in range(10)]
    assert [out.updated for out in outs] == [False, True] * 5
    assert outs[-1].captured
    assert outs[-2].captured


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16])
def test_the_adamw_kernel_equals_its_twin(gradient, extras):
    from sprint.kernels.adamw import adamw
    from sprint.training.optim import update

    results = []
    for function, device in ((update, "cpu"), (adamw, "cuda")):
        generator = torch.Generator().manual_seed(0)
        p, m, g, average = (torch.randn(100_001, generator=generator).to(device) for _ in range(4))
        v = torch.rand(100_001, generator=generator).to(device)
        shadow = torch.full_like(p, float("nan"), dtype=torch.bfloat16) if extras else None
        function(
            p, g.to(gradient), m, v, shadow=shadow, average=average if extras else None, beta1=0.9, beta2=0.99, eps=1e-8,
            scalars=torch.tensor([0.01, 0.3, 0.5, 0.7], device=device), weight_decay=0.1, average_decay=0.9,
        )  # fmt: skip
        results.append([tensor.cpu() for tensor in (p, m, v, average, *([shadow] if shadow is not None else []))])
    for expected, actual in zip(*results, strict=True):
        rtol = 1e-5 if actual.dtype == torch.float32 else 2**-7  # one step of bfloat16, where float32 differs in its last
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "grid", "per_sample"), [(8, (16, 16), False), (8, (8, 16), True), (3, (5, 7), True)])
@pytest.mark.parametrize("operation", TWINS)
def test_fused_kernels_equal_their_twins(operation, batch, grid, per_sample, dtype):
    """At the sizes of XL/2, outputs and gradients, against the twin in float64; and equal bits from equal inputs."""
    if operation is fused.norm_and_rotate:
        inputs = rotation(batch, grid, 16, 72, dtype=dtype, device="cuda", per_sample=per_sample, weight=torch.float32)
    else:
        gated = operation is fused.gate_and_modulate
        inputs = modulation(batch, grid[0] * grid[1], 1152, dtype=dtype, device="cuda", gated=gated)
    actual = run(operation, inputs)
    exact = run(TWINS[operation], [x.to(torch.float64) for x in inputs], rounded=dtype)
    for one, expected in zip(actual, exact, strict=True):
        error = (one.double() - expected).norm() / expected.norm()
        assert error < (1e-5 if dtype == torch.float32 else 2**-8), error  # a rounding of bfloat16 is up to 2^-9
    for one, again in zip(actual, run(operation, inputs), strict=True):
        assert one.equal(again)


@pytest.mark.parametrize("compiled", [False, True])
def test_captured_steps_with_kernels_train_like_the_layers(compiled):
    losses = {}
    for kernels in ("torch", "triton"):
        torch.manual_seed(0)
        model = tiny().cuda().train().set_kernels(kernels)
        step = sprint.TrainStep(
            model, sprint.FlowMatchingLoss(), sprint.AdamW(model.parameters(), lr=1e-3), clip=1.0, compile=compiled,
            autocast=torch.bfloat16,
        )  # fmt: skip
        torch.manual_seed(1)
        x, y = torch.randn(4, 4, 16, 16, device="cuda"), torch.arange(4, device="cuda")
        outs = [step(x, y=y, drop=drop) for drop in [SPARSE, None] * 8]
        assert outs[-1].captured
        losses[kernels] = torch.stack([out.loss for out in outs])
    torch.testing.assert_close(losses["triton"], losses["torch"], rtol=1e-2, atol=1e-2)  # bfloat16 products


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_with_kernels_equals_one_with_layers(model, checkpointing):
    gradients = []
    for kernels in ("torch", "triton"):
        each = copy.deepcopy(model).cuda().eval().set_kernels(kernels).set_checkpointing(checkpointing)
        x, y, t = torch.ones(4, 4, 16, 16), torch.arange(4), torch.linspace(0.1, 0.9, 4)
        generator = torch.Generator().manual_seed(0)
        out = sprint.FlowMatchingLoss()(
            each, x.cuda(), y=y.cuda(), t=t.cuda(), noise=-x.cuda(), drop=SPARSE, generator=generator
        )
        out.loss.backward()
        gradients.append([p.grad for p in each.parameters() if p.grad is not None])
    for one, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-3, atol=1e-5)  # float32


@pytest.mark.parametrize("capture", [False, None])
def test_bfloat16_copies_train_like_autocast(capture):
    def run(optimizer_class):
        torch.manual_seed(0)
        model = tiny().cuda().train()
        step = sprint.TrainStep(
            model, sprint.FlowMatchingLoss(), optimizer_class(model.parameters(), lr=1e-3), clip=1.0, compile=False,
            autocast=torch.bfloat16, capture=capture,
        )  # fmt: skip
        torch.manual_seed(1)
        x, y = torch.randn(4, 4, 16, 16, device="cuda"), torch.arange(4, device="cuda")
        return torch.stack([step(x, y=y, drop=SPARSE).loss for _ in range(12)])

    torch.testing.assert_close(run(sprint.AdamW), run(torch.optim.AdamW), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "guidance", [None, sprint.ClassifierFreeGuidance(2.0), sprint.PathDropGuidance(2.0, interval=(0.2, 0.8))]
)
def test_captured_sampling_equals_plain_sampling(model, guidance):
    model = model.cuda().eval()
    noise, y = torch.randn(2, 4, 16, 16, device="cuda"), torch.tensor([1, 2], device="cuda")
    expected = sprint.sample(model, noise, y=y, guidance=guidance, steps=8)
    fast = sprint.CapturedModel(model, compile=False)
    actual = sprint.sample(fast, noise, y=y, guidance=guidance, steps=8)
    assert fast._graphs is not None
    assert fast._graphs.captured > 0
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)  # float32


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_bfloat16_gradients_are_as_close_as_eager_autocasts(model, kernels):
    """Relative to float64, of the compiled blocks that TrainStep runs."""
    from sprint.capture.compiling import compile_blocks

    x, y, t = torch.randn(8, 4, 16, 16), torch.arange(8) % 10, torch.linspace(0.1, 0.9, 8)
    noise = torch.randn_like(x)
    subset_drop = sprint.StructuredDrop(0.75)

    def gradients(model, autocast):
        model.eval()  # no path-drop, no label-drop
        device = next(model.parameters()).device
        dtype = next(model.parameters()).dtype
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            out = sprint.FlowMatchingLoss()(
                model, x.to(device, dtype), y=y.to(device), t=t.to(device), noise=noise.to(device, dtype), drop=subset_drop,
                generator=torch.Generator().manual_seed(0),
            )  # fmt: skip
        out.loss.backward()
        return torch.cat([p.grad.double().cpu().flatten() for p in model.parameters() if p.grad is not None])

    exact = gradients(copy.deepcopy(model).double(), False)
    eager = gradients(copy.deepcopy(model).cuda(), True)
    compiled = copy.deepcopy(model).cuda().set_kernels(kernels)
    compile_blocks(compiled)
    fast = gradients(compiled, True)
    error = {name: ((g - exact).norm() / exact.norm()).item() for name, g in (("eager", eager), ("fast", fast))}
    assert error["fast"] < 1.2 * error["eager"], error
