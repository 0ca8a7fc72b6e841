"""SiT: sizes, grids, conditions, paths, gradients against the written-out twin, compilation, autocast, and bad input."""

import dataclasses
from typing import get_args

import pytest
import reference
import torch
from models import TINY, tiny
from torch._dynamo.testing import CompileCounterWithBackend

from sprint import PathDropGuidance, RandomDrop, SiT, SiTConfig, StructuredDrop, TokenSubset
from sprint.models.config import PRESETS, Options, Preset


def inputs(batch: int = 2, *, size: tuple[int, int] = (8, 8), dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(batch, 4, *size, dtype=dtype), torch.rand(batch, dtype=dtype), torch.arange(batch)


# sizes


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_sizes_of_the_paper(name):
    with torch.device("meta"):
        model = SiT.preset(name)
    d, heads, *depths = PRESETS[name]
    assert [len(model.encoder), len(model.middle.blocks), len(model.decoder)] == depths
    block = (4 * d * d + 4 * d + 2 * d // heads) + (8 * d * d + 5 * d) + (6 * d * d + 6 * d)  # attention, MLP, adaLN
    embedders = (16 * d + d) + (256 * d + d + d * d + d) + 1001 * d
    fusion, final = 2 * d * d + d + d, 2 * d * d + 2 * d + 16 * d + 16
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == embedders + sum(depths) * block + fusion + final
    assert (count == 677_476_816) == (name == "XL/2")


def test_preset_takes_any_field():
    model = SiT.preset("S/2", middle_depth=1, num_classes=10, path_drop=0.2)
    assert (len(model.middle.blocks), model.config.num_classes, model.middle.fusion.path_drop) == (1, 10, 0.2)
    with pytest.raises(ValueError, match="unknown preset 'XXL/2': choose one of S/2, B/2, L/2, XL/2"):
        SiT.preset("XXL/2")
    with pytest.raises(TypeError, match="depth"):
        SiT.preset("S/2", depth=3)


@pytest.mark.parametrize(("patch_size", "size"), [(1, (4, 6)), (2, (8, 8)), (2, (4, 12)), (4, (8, 16)), (3, (6, 9))])
def test_any_grid_and_patch_size(patch_size, size):
    model = tiny(patch_size=patch_size)
    x, t, y = inputs(size=size)
    subset = RandomDrop(0.5).sample(2, model.token_grid(x))
    assert model(x, t, y).shape == x.shape
    assert model(x, t, y, subset=subset).shape == x.shape
    assert model(x, t, y, path="shallow").shape == x.shape


@pytest.mark.parametrize("depths", [(0, 2, 0), (1, 0, 1), (2, 1, 0)])
def test_any_depths(depths):
    names = ("encoder_depth", "middle_depth", "decoder_depth")
    model = tiny(**dict(zip(names, depths, strict=True)))
    x, t, y = inputs()
    assert model(x, t, y, subset=StructuredDrop(0.75).sample(2, (4, 4))).shape == x.shape


# the numbers


@pytest.mark.parametrize("ratio", [0.75, 0.0])
def test_equals_the_plain_formulas_in_outputs_and_gradients(ratio):
    model = tiny().double().eval()
    x, t, y = inputs(size=(8, 12), dtype=torch.float64)
    x.requires_grad_()
    subset = StructuredDrop(ratio).sample(2, (4, 6))
    expected = reference.sit(dict(model.named_parameters()), model.config, x, t, y, keep=subset.keep)
    actual = model(x, t, y, subset=subset)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)  # float32 angles
    if ratio == 0:
        torch.testing.assert_close(actual, model(x, t, y), rtol=1e-12, atol=1e-12)
    trained = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    direction = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, trained, direction),
        torch.autograd.grad(expected, trained, direction),
        rtol=1e-5,
        atol=1e-6,
    )


def test_shallow_path_runs_no_middle_block_and_depends_on_none():
    model = tiny().eval()
    calls = []
    for block in model.middle.blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    x, t, y = inputs()
    model(x, t, y)
    assert len(calls) == 2
    model(x, t, y, path="shallow").sum().backward()
    assert len(calls) == 2
    assert all(parameter.grad is None for parameter in model.middle.blocks.parameters())
    assert model.get_parameter("encoder.0.mlp.fc1.weight").grad is not None


def test_both_paths_from_one_encoder():
    model = tiny().eval()
    x, t, y = inputs()
    calls = []
    model.encoder[0].register_forward_hook(lambda *_: calls.append(1))
    strong, weak = model(x, t, y, path="both")
    assert len(calls) == 1
    assert strong.equal(model(x, t, y))
    assert weak.equal(model(x, t, y, path="shallow"))
    subset = StructuredDrop(0.75).sample(2, (4, 4))
    assert model(x, t, y, path="both", subset=subset)[0].equal(model(x, t, y, subset=subset))
    guided = PathDropGuidance(3.0, weak="same")(model, x, 0.5, y)
    strong, weak = model(x, torch.full((2,), 0.5), y, path="both")
    torch.testing.assert_close(guided, weak + 3 * (strong - weak))


def test_order_of_kept_tokens_does_not_matter():
    model = tiny().double().eval()
    x, t, y = inputs(dtype=torch.float64)
    keep = StructuredDrop(0.75).sample(2, (4, 4)).keep
    outputs = [model(x, t, y, subset=TokenSubset.from_keep(order, 16)) for order in (keep, keep.flip(1))]
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)


def test_every_trained_parameter_gets_a_gradient():
    model = tiny(repa_dim=5, repa_depth=2, repa_hidden=8)
    x, t, y = inputs()
    out = model(x, t, y, subset=StructuredDrop(0.75).sample(2, (4, 4)), repa=True)
    (out.v.square().sum() + out.repa.sum()).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or p.grad.count_nonzero() == 0]
    assert without == ["middle.fusion.mask_token"]  # frozen, as in the reference


def test_a_fresh_model_predicts_zero():
    x, t, y = inputs()
    assert SiT(SiTConfig(**TINY))(x, t, y).count_nonzero() == 0


def test_training_draws_follow_the_generator():
    model = tiny(label_drop=0.5, path_drop=0.5).train()
    x, t, y = inputs(batch=8)
    before = torch.get_rng_state()
    first, second, other = (model(x, t, y, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert first.equal(second)
    assert not first.equal(other)
    assert torch.get_rng_state().equal(before)


# conditions


def test_vector_condition_and_none():
    x, t, _ = inputs()
    model = tiny(num_classes=None, cond_dim=5).eval()
    y = torch.randn(2, 5)
    assert not model(x, t, y).equal(model(x, t, model.null_condition(2)))
    free = tiny(num_classes=None).eval()
    assert free(x, t).shape == x.shape
    with pytest.raises(ValueError, match="has no null condition"):
        free.null_condition(2)


def test_null_condition_is_the_row_after_the_classes():
    assert tiny().null_condition(3).tolist() == [10, 10, 10]


# REPA


@pytest.mark.parametrize(("depth", "tokens"), [(1, 16), (2, 4), (3, 4), (4, 16)])
def test_repa_taps_after_the_given_number_of_blocks(depth, tokens):
    """Encoder and decoder blocks give all tokens, middle blocks the kept ones."""
    model = tiny(repa_dim=5, repa_depth=depth, repa_hidden=8).eval()
    x, t, y = inputs()
    subset = StructuredDrop(0.75).sample(2, (4, 4))
    seen = []
    block = [*model.encoder, *model.middle.blocks, *model.decoder][depth - 1]
    block.register_forward_hook(lambda module, args, output: seen.append(output))
    out = model(x, t, y, subset=subset, repa=True)
    assert out.repa.shape == (2, tokens, 5)
    assert out.repa.equal(model.projectors(seen[0]))
    assert (out.repa_subset is subset) == (tokens == 4)
    assert out.v.equal(model(x, t, y, subset=subset))
    assert model(x, t, y, repa=True).repa.shape == (2, 16, 5)


def test_repa_that_cannot_be():
    x, t, y = inputs()
    with pytest.raises(ValueError, match="needs a REPA head: build the model with repa_dim"):
        tiny()(x, t, y, repa=True)
    with pytest.raises(ValueError, match="REPA head's depth is unknown"):
        tiny(repa_dim=5)(x, t, y, repa=True)
    with pytest.raises(ValueError, match="no middle block runs"):
        tiny(repa_dim=5, repa_depth=2)(x, t, y, repa=True, path="shallow")
    with pytest.raises(ValueError, match="gives no REPA tokens"):
        tiny(repa_dim=5, repa_depth=2)(x, t, y, repa=True, path="both")


# compilation and precision


@pytest.mark.slow
@pytest.mark.parametrize("path", ["full", "sparse", "shallow"])
def test_compiles_whole_and_once_per_path(path):
    torch.compiler.reset()
    model = tiny()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    model.eval()
    x, t, y = inputs()
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        subset = StructuredDrop(0.75).sample(2, (4, 4), generator=generator) if path == "sparse" else None
        actual, expected = (net(x, 0.7 * t + seed / 10, y, path=path, subset=subset) for net in (compiled, model))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)  # float32
        gradients = [torch.autograd.grad(v.square().mean(), model.x_embedder.proj.weight)[0] for v in (actual, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
    assert counter.frame_count == 1


def test_compiled_training_draws_labels_and_paths():
    torch.compiler.reset()
    model = tiny(label_drop=0.5, path_drop=0.5).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, t, y = inputs()
    outputs = [compiled(x, t, y, subset=StructuredDrop(0.75).sample(2, (4, 4))) for _ in range(8)]
    assert len({output.sum().item() for output in outputs}) > 1


@pytest.mark.parametrize("path", ["full", "sparse", "shallow"])
def test_bf16_autocast(path):
    model = tiny().eval()
    x, t, y = inputs()
    subset = StructuredDrop(0.75).sample(2, (4, 4)) if path == "sparse" else None
    expected = model(x, t, y, path=path, subset=subset)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = model(x, t, y, path=path, subset=subset)
        actual.float().square().mean().backward()
    assert ((actual.float() - expected).norm() / expected.norm()).item() < 0.03  # bfloat16 has 8 bits
    gradient = model.get_parameter("x_embedder.proj.weight").grad
    assert gradient is not None
    assert gradient.dtype == torch.float32
    assert gradient.isfinite().all()


def test_bf16_weights():
    model = tiny().eval()
    x, t, y = inputs()
    expected = model(x, t, y)
    actual = model.bfloat16()(x.bfloat16(), t, y)
    assert actual.dtype == torch.bfloat16
    assert ((actual.float() - expected).norm() / expected.norm()).item() < 0.05


@pytest.mark.slow
def test_compiles_for_any_batch_in_training():
    """With a symbolic batch, as torch.compile makes it at the second size; random draws included."""
    torch.compiler.reset()
    compiled = torch.compile(tiny().train(), fullgraph=True, backend="aot_eager")
    for batch in (2, 3, 5):
        x, t, y = inputs(batch)
        assert compiled(x, t, y, subset=StructuredDrop(0.75).sample(batch, (4, 4))).shape == x.shape


# bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, 8)}, ValueError, r"x must be \(B, 4, H, W\).*got \(2, 3, 8\)"),
        ({"x": torch.zeros(2, 3, 8, 8)}, ValueError, r"x must be \(B, 4, H, W\).*got \(2, 3, 8, 8\)"),
        ({"x": torch.zeros(2, 4, 8, 7)}, ValueError, "divisible by the patch size 2"),
        ({"x": torch.zeros(2, 4, 8, 8).double()}, TypeError, "x is torch.float64, the model torch.float32: convert"),
        ({"x": torch.zeros(2, 4, 8, 8, device="meta")}, ValueError, "x is on meta, the model on cpu"),
        ({"t": torch.zeros(3)}, ValueError, r"t must be \(2,\).*got \(3,\)"),
        ({"t": torch.tensor(0.5)}, ValueError, r"t must be \(2,\).*got \(\)"),
        ({"t": torch.zeros(2, dtype=torch.int64)}, ValueError, "floating point, got .* torch.int64"),
        ({"t": torch.tensor([0.5, 500.0])}, ValueError, "times from 0.5 to 500, expected 0 \\(data\\) to 1 \\(noise\\)"),
        (
            {"subset": torch.tensor([[0], [1]])},
            TypeError,
            "subset of SiT.forward must be a TokenSubset.* got a Tensor of shape",
        ),
        ({"y": [1, 2]}, TypeError, r"y of SiT.forward must be a tensor or None, got \[1, 2\]: torch.tensor"),
        ({"y": None}, ValueError, "y is missing: pass class ids or vectors, or model.null_condition"),
        ({"y": torch.tensor([1])}, ValueError, r"y must be \(2,\) int64 class ids, got \(1,\)"),
        ({"y": torch.tensor([1.0, 2.0])}, ValueError, "int64 class ids, got .* torch.float32"),
        ({"y": torch.tensor([1, 11])}, ValueError, r"class ids from 1 to 11, expected 0 to 9 \(or 10, the null class\)"),
        ({"y": torch.tensor([-1, 1])}, ValueError, "class ids from -1 to 1"),
        (
            {"path": "dense"},
            ValueError,
            "path of SiT.forward must be one of 'full', 'sparse', 'shallow', 'both' or None, got the text 'dense'",
        ),
        ({"path": "sparse"}, ValueError, "path='sparse' needs subset"),
        ({"subset": TokenSubset.from_keep(torch.tensor([[0], [1]]), 9)}, ValueError, r"\(2, 9, ...\), got \(2, 16, 16\)"),
        ({"subset": TokenSubset.from_keep(torch.tensor([[0]]), 16)}, ValueError, "for 1 samples"),
    ],
)
def test_bad_input(change, error, message):
    x, t, y = inputs()
    arguments = {"x": x, "t": t, "y": y, **change}
    with pytest.raises(error, match=message):
        tiny()(**arguments)


def test_conditions_that_do_not_fit():
    x, t, y = inputs()
    with pytest.raises(ValueError, match="has no condition: leave y out"):
        tiny(num_classes=None)(x, t, y)
    with pytest.raises(ValueError, match=r"y must be \(2, 5\) floating point, got \(2,\) torch.int64"):
        tiny(num_classes=None, cond_dim=5)(x, t, y)
    with pytest.raises(TypeError, match=r"y is torch.float64, the model torch.float32"):
        tiny(num_classes=None, cond_dim=5)(x, t, torch.zeros(2, 5).double())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 18}, "dim=18 does not split into 2 heads of a multiple of 4 channels.*multiple of 8"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"middle_depth": -1}, "middle_depth must not be negative, got -1"),
        ({"label_drop": 2.0}, r"label_drop is a probability in \[0, 1\], got 2.0"),
        ({"path_drop": -1.0}, r"path_drop is a probability in \[0, 1\], got -1.0"),
        ({"cond_dim": 5}, "num_classes=10 and cond_dim=5: set one of them to None"),
        ({"repa_depth": 2}, "no REPA head to tap for"),
        ({"repa_dim": 5, "repa_depth": 5}, r"repa_depth must be 1 to 4 \(the number of blocks\), got 5"),
        ({"sources": "dense"}, "sources of SiTConfig must be one of"),
    ],
)
def test_bad_configuration(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_options_for_completion_are_the_fields_of_the_configuration():
    hints, fields = Options.__annotations__, {field.name: field.type for field in dataclasses.fields(SiTConfig)}
    assert hints == fields
    assert set(get_args(Preset)) == set(PRESETS)
