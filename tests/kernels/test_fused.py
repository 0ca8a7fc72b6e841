"""Fused operations: the twins against the layers, the Triton kernels (in Triton's interpreter) against the twins."""

import copy
import importlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from kernel_cases import TWINS, modulation, rotation, run
from models import tiny
from recording import RecordedGraph

import sprint.flow.inputs
from sprint import AdamW, FlowMatchingLoss, SiT, StructuredDrop, TrainStep
from sprint.kernels import fused, launches
from sprint.models import layers
from sprint.models.layers import Attention, Block, axial_rope

SPARSE = StructuredDrop(0.75)
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2**-6, "atol": 2**-5},  # of numbers up to ten; the interpreter cuts off, a GPU rounds
}


def reload_kernels():
    for name in ("kernels.mode", "kernels.modulation", "kernels.rotary"):
        importlib.reload(importlib.import_module(f"sprint.{name}"))


@pytest.fixture
def interpreter(monkeypatch):
    """Kernels as Python; those of Triton's own library that ours call were compiled functions if Triton is imported.

    The interpreter leaves its versions of the language behind, with which nothing compiles: they are put back.
    """
    triton = pytest.importorskip("triton")
    language = triton.language
    places = language, language.core, language.math, language.core.tensor, language.core.dtype
    before = [dict(vars(place)) for place in places]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for name in ("sum", "zeros"):
        monkeypatch.setattr(language, name, triton.jit(getattr(language, name).fn))
    reload_kernels()
    yield
    monkeypatch.undo()
    for place, attributes in zip(places, before, strict=True):
        for name, value in attributes.items():
            if vars(place)[name] is not value:
                setattr(place, name, value)
    reload_kernels()


def assert_equal(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, **TOLERANCE[other.dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_twins_equal_the_layers(dtype):
    def modulate(x, shift, scale):
        return x, layers.modulate(x, shift, scale)

    def gate_and_modulate(x, branch, gate, shift, scale):
        return modulate(x + gate.unsqueeze(1) * branch, shift, scale)

    def norm_and_rotate(qkv, q_weight, k_weight, rope):
        attn = Attention(qkv.shape[-1] // 3, qkv.shape[-1] // 3 // len(q_weight))
        attn.qkv = torch.nn.Identity()
        for norm, weight in ((attn.q_norm, q_weight), (attn.k_norm, k_weight)):
            del norm.weight
            norm.weight = weight
        return attn._inputs(qkv, rope)

    for plain, layer, inputs in (
        (fused.plain_modulate, modulate, modulation(3, 5, 24, dtype=dtype, gated=False)),
        (fused.plain_gate_and_modulate, gate_and_modulate, modulation(3, 5, 24, dtype=dtype, gated=True)),
        (fused.plain_norm_and_rotate, norm_and_rotate, rotation(2, (3, 4), 3, 16, dtype=dtype)),
        (fused.plain_norm_and_rotate, norm_and_rotate, rotation(2, (3, 4), 3, 16, dtype=dtype, per_sample=True)),
    ):
        assert_equal(run(plain, inputs), run(layer, inputs))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("size", "programs"), [((1, 5, 1152), 512), ((3, 11, 24), 6), ((2, 1, 20), 512), ((2, 3, 16), 512)])
def test_modulation_kernels_equal_their_twins(interpreter, monkeypatch, *, dtype, gated, size, programs):
    """Also where the tokens of a sample are no multiple of a program's share, and C is no power of two."""
    monkeypatch.setattr(launches, "PROGRAMS", programs)
    operation = fused.gate_and_modulate if gated else fused.modulate
    inputs = modulation(*size, dtype=dtype, gated=gated)
    assert_equal(run(operation, inputs), run(TWINS[operation], inputs))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize(
    ("size", "programs"), [((1, (2, 3), 2, 72), 512), ((2, (3, 5), 3, 16), 4), ((3, (1, 2), 1, 4), 512)]
)
def test_rotary_kernels_equal_their_twin(interpreter, monkeypatch, *, dtype, per_sample, size, programs):
    """Also where a program's share of tokens crosses samples, and heads and their size are no powers of two."""
    monkeypatch.setattr(launches, "PROGRAMS", programs)
    inputs = rotation(*size, dtype=dtype, per_sample=per_sample)
    assert_equal(run(fused.norm_and_rotate, inputs), run(fused.plain_norm_and_rotate, inputs))


def test_mixed_dtypes(interpreter):
    """A float32 residual beside bfloat16 products; float32 norm weights beside bfloat16 queries and keys."""
    inputs = modulation(2, 5, 24, dtype=torch.bfloat16, gated=True, residual=torch.float32)
    outputs = run(fused.gate_and_modulate, inputs)
    assert [x.dtype for x in outputs[:4]] == [torch.float32, torch.bfloat16, torch.float32, torch.bfloat16]
    assert_equal(outputs, run(fused.plain_gate_and_modulate, inputs))
    inputs = modulation(2, 5, 24, dtype=torch.bfloat16, gated=False, residual=torch.float32)
    assert_equal(run(fused.modulate, inputs), run(fused.plain_modulate, inputs))
    inputs = rotation(2, (2, 3), 2, 8, dtype=torch.bfloat16, weight=torch.float32)
    assert_equal(run(fused.norm_and_rotate, inputs), run(fused.plain_norm_and_rotate, inputs))


def test_statistics_are_those_of_the_rounded_residual(interpreter):
    """Which the backward pass reads: those of the unrounded one would leave a mean behind."""
    r, _, stats = launches.gate_and_modulate(*modulation(2, 5, 24, dtype=torch.bfloat16, gated=True))
    torch.testing.assert_close(stats[..., 0], r.float().mean(-1), rtol=1e-5, atol=1e-6)  # float32


def test_any_layout_of_inputs_and_gradients(interpreter):
    def turned(x):
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)

    for operation, inputs in (
        (fused.modulate, modulation(3, 5, 24, dtype=torch.float32, gated=False)),
        (fused.gate_and_modulate, modulation(3, 5, 24, dtype=torch.float32, gated=True)),
        (fused.norm_and_rotate, rotation(2, (3, 4), 3, 16, dtype=torch.float32, per_sample=True)),
    ):
        strange = [turned(x) if x.ndim > 1 else torch.stack([x, x], dim=1)[:, 0] for x in inputs]
        assert not any(x.is_contiguous() for x in strange)
        assert_equal(run(operation, strange, strange=True), run(TWINS[operation], inputs, strange=True))


def test_what_costs_no_copy(interpreter):
    qkv, *others = rotation(2, (3, 4), 3, 16, dtype=torch.float32)
    q, k, v = fused.norm_and_rotate(qkv, *others)
    assert v._base is qkv or v.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
    assert q.transpose(1, 2).is_contiguous()
    assert k.transpose(1, 2).is_contiguous()
    x, shift, scale = modulation(2, 3, 8, dtype=torch.float32, gated=False)
    assert fused.modulate(x, shift, scale)[0].data_ptr() == x.data_ptr()


def test_the_gradient_of_a_blocks_tokens_is_made_in_one_place(interpreter):
    """In the backward pass of `modulate`, not added up from it and from the residual."""
    tokens = torch.randn(1, 4, 16, requires_grad=True)
    places = {}
    for kernels in ("torch", "triton"):
        block = Block(16, 2)
        block.kernels = block.attn.kernels = kernels
        nodes = [block(tokens, torch.randn(1, 16), axial_rope((2, 2), 8)).grad_fn]
        for node in nodes:
            nodes += [after for after, _ in node.next_functions if after is not None and after not in nodes]
        ends = (after for node in nodes for after, _ in node.next_functions)
        places[kernels] = sum(getattr(after, "variable", None) is tokens for after in ends)
    assert places == {"torch": 2, "triton": 1}


def test_gradients_equal_finite_differences(interpreter):
    """Of the kernels themselves, in float64."""
    for operation, inputs in (
        (fused.modulate, modulation(2, 3, 5, dtype=torch.float64, gated=False)),
        (fused.gate_and_modulate, modulation(2, 3, 5, dtype=torch.float64, gated=True)),
        (fused.norm_and_rotate, rotation(2, (1, 2), 2, 4, dtype=torch.float64)),
    ):
        leaves = [x.detach().requires_grad_(x.ndim < 4) for x in inputs]  # all but the rotary table
        assert torch.autograd.gradcheck(operation, leaves, fast_mode=True)


def test_operations_keep_the_rules_of_torch(interpreter):
    """Declared shapes, dtypes and strides are the real ones, and nothing is changed in place or aliased."""
    x, branch, gate, shift, scale = modulation(2, 5, 24, dtype=torch.bfloat16, gated=True, residual=torch.float32)
    qkv, q_weight, k_weight, rope = rotation(2, (2, 3), 2, 8, dtype=torch.bfloat16, weight=torch.float32)
    y, stats = launches.modulate(x, shift, scale)
    q, k = launches.norm_and_rotate(qkv, q_weight, k_weight, rope, 1e-6)
    for operation, inputs in (
        (launches.modulate, (x, shift, scale)),
        (launches.gate_and_modulate, (x, branch, gate, shift, scale)),
        (launches.modulate_backward, (x, y, x, scale, stats)),
        (launches.gate_and_modulate_backward, (x, y, x, branch, gate, scale, stats)),
        (launches.norm_and_rotate, (qkv, q_weight, k_weight, rope, 1e-6)),
        (launches.norm_and_rotate_backward, (q, k, k, qkv, q_weight, k_weight, rope, 1e-6)),
    ):
        torch.library.opcheck(operation, inputs, test_utils=("test_schema", "test_faketensor"))


def gradients(model, *, autocast=False, checkpointing=False):
    """Loss and gradients of a sparse step without path-drop and label-drop."""
    model = copy.deepcopy(model).eval().set_checkpointing(checkpointing)
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(1)
    x, noise = (torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = FlowMatchingLoss()(
            model, x, y=torch.tensor([1, 2]), t=torch.tensor([0.2, 0.7], dtype=dtype), noise=noise, drop=SPARSE,
            generator=generator,
        )  # fmt: skip
    out.loss.backward()
    return out.loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_sparse_step_is_the_same_with_kernels(interpreter, monkeypatch, checkpointing):
    calls = Counter()

    def counted(name, operation):
        return lambda *args: calls.update([name]) or operation(*args)

    forward = ("modulate", "gate_and_modulate", "norm_and_rotate")
    for name in [*forward, *(f"{name}_backward" for name in forward)]:
        monkeypatch.setattr(launches, name, counted(name, getattr(launches, name)))
    loss, expected = gradients(tiny())
    assert not calls
    fused_loss, actual = gradients(tiny().set_kernels("triton"), checkpointing=checkpointing)
    assert calls == dict.fromkeys(forward, 8 if checkpointing else 4) | {f"{name}_backward": 4 for name in forward}
    torch.testing.assert_close(fused_loss, loss, rtol=1e-5, atol=1e-6)  # float32
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-6, msg=name)  # float32, sums in another order


@pytest.mark.parametrize(("twins", "ratio"), [(False, 1.25), (True, 1.05)])
def test_bfloat16_gradients_are_as_close_as_the_layers(interpreter, monkeypatch, twins, ratio):
    """Relative to float64. The interpreter cuts bfloat16 off where a GPU rounds, which the twins do too."""
    if twins:
        monkeypatch.setattr(layers, "fused_modulate", fused.plain_modulate)
        monkeypatch.setattr(layers, "gate_and_modulate", fused.plain_gate_and_modulate)
        monkeypatch.setattr(layers, "norm_and_rotate", fused.plain_norm_and_rotate)

    def flat(model, autocast):
        return torch.cat([g.double().flatten() for g in gradients(model, autocast=autocast)[1].values()])

    exact = flat(tiny().double(), False)
    error = {
        name: ((flat(tiny().set_kernels(name), True) - exact).norm() / exact.norm()).item() for name in ("torch", "triton")
    }
    assert error["torch"] > 1e-4  # bfloat16 did round
    assert error["triton"] < ratio * error["torch"], error


@pytest.mark.parametrize("autocast", [False, True])
def test_a_compiled_block_is_the_plain_block(interpreter, autocast):
    torch.manual_seed(0)
    block = Block(16, 2)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    block.kernels = block.attn.kernels = "triton"
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=False)
    tokens, cond = (torch.randn(shape, requires_grad=True) for shape in ((2, 6, 16), (2, 16)))
    results = []
    for function in (block, compiled):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = function(tokens, cond, axial_rope((2, 3), 8))
        wanted = [tokens, cond, *block.parameters()]
        results.append([out, *torch.autograd.grad(out.square().sum(), wanted)])
    for actual, expected in zip(*reversed(results), strict=True):
        tolerance = 2e-2 if autocast else 1e-5  # bfloat16; float32
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_a_captured_step_with_kernels_trains_like_the_layers(interpreter, monkeypatch):
    """Weights in bfloat16 beside them, as on a GPU; a stand-in records and replays the operations."""
    monkeypatch.setattr(sprint.flow.inputs, "readable", lambda tensor: False)
    losses = {}
    for kernels in ("torch", "triton"):
        model = tiny(middle_depth=1).train().set_kernels(kernels)
        step = TrainStep(
            model, FlowMatchingLoss(), AdamW(model.parameters(), lr=1e-3), clip=1.0, autocast=torch.bfloat16, compile=False,
            warmup=1, make_graph=RecordedGraph,
        )  # fmt: skip
        torch.manual_seed(1)
        x, y = torch.randn(4, 4, 4, 4), torch.tensor([1, 2, 3, 4])
        outs = [step(x, y=y, drop=SPARSE) for _ in range(4)]
        assert [out.captured for out in outs] == [False, True, True, True]
        losses[kernels] = torch.stack([out.loss for out in outs])
    assert len(set(losses["triton"].tolist())) == 4
    torch.testing.assert_close(losses["triton"], losses["torch"], rtol=1e-2, atol=1e-2)  # bfloat16 products


def test_sampling_and_saving_do_not_notice(interpreter):
    model = tiny().eval()
    arguments = torch.randn(1, 4, 4, 4), torch.rand(1), torch.tensor([1])
    names = list(model.state_dict())
    with torch.inference_mode():
        expected = model(*arguments)
        actual = model.set_kernels("triton")(*arguments)
        again = model.set_kernels("torch")(*arguments)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)  # float32
    assert not actual.equal(expected)  # it was the kernels
    assert again.equal(expected)
    assert list(model.state_dict()) == names


def test_kernels_that_cannot_run(interpreter, monkeypatch):
    model = tiny()
    with pytest.raises(ValueError, match="kernels of SiT.set_kernels must be one of 'torch', 'triton', got the text 'cuda'"):
        model.set_kernels("cuda")
    with pytest.raises(ValueError, match="this model has qk_norm=False and positions='rope'"):
        tiny(qk_norm=False).set_kernels("triton")
    with pytest.raises(ValueError, match="this model has qk_norm=True and positions='sincos'"):
        tiny(positions="sincos").set_kernels("triton")
    tiny(positions="sincos").set_kernels("torch")
    block = Block(16, 2)
    block.kernels = block.attn.kernels = "triton"
    with pytest.raises(ValueError, match="need qk_norm=True and rotary positions in each block"):
        block(torch.randn(1, 4, 16), torch.randn(1, 16))
    with pytest.raises(ValueError, match="this model is on meta"):
        model.to("meta").set_kernels("triton")
    monkeypatch.setitem(sys.modules, "sprint.kernels.mode", None)
    with pytest.raises(ImportError, match="pip install triton, or use 'torch'"):
        model.set_kernels("triton")
    assert all(module.kernels == "torch" for module in model.modules() if isinstance(module, Attention | Block))


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reload_kernels()
    with pytest.raises(ValueError, match=r"run on CUDA devices, and this model is on cpu: move it there first"):
        tiny().set_kernels("triton")
    assert isinstance(tiny().set_kernels("torch"), SiT)


def test_kernels_compile_for_an_h100():
    pytest.importorskip("triton.backends.nvidia")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).parents[1] / "support" / "compile_kernels.py"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("compiled sprint.") == 6
