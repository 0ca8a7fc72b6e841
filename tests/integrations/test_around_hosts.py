"""Wrapped models of diffusers, timm and PEFT in what people do with them: precision, adapters, hooks, files."""

import json
import logging

import pytest
import torch
from architectures import CASES

import sprint
from sprint import StructuredDrop
from sprint.hosts.outputs import first_tensor

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("timm")

from sprint.diffusers import PathDropGuidance, from_pretrained, path_drop_guidance  # noqa: E402

BF16 = torch.bfloat16


@pytest.mark.parametrize("name", ["pixart", "auraflow", "sana", "lumina2", "z_image", "ltx", "krea2", "timm_vit", "dit"])
@torch.no_grad()
def test_wrapping_changes_nothing_under_autocast(name):
    model, arguments = CASES[name]()
    with torch.autocast("cpu", dtype=BF16):
        expected = first_tensor(model(**arguments))
        assert first_tensor(sprint.wrap(model)(**arguments)).equal(expected)  # bit by bit


@torch.no_grad()
def test_a_model_that_keeps_some_parameters_in_float32():
    model, arguments = CASES["wan"]()
    model.to(BF16)
    for module in model.modules():
        if isinstance(getattr(module, "scale_shift_table", None), torch.nn.Parameter):
            module.scale_shift_table.data = module.scale_shift_table.float()  # as from_pretrained does
    arguments = {key: value.to(BF16) if value.is_floating_point() else value for key, value in arguments.items()}
    expected = first_tensor(model(**arguments))
    sprint.wrap(model, drop=StructuredDrop(0.75))
    assert {p.dtype for p in model.sprint.parameters()} == {BF16}
    assert first_tensor(model(**arguments)).equal(expected)


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("path", ["sparse", "full"])
def test_a_float32_fusion_learns_in_a_host_of_half_precision(dtype, path):
    model, arguments = CASES["sd3"]()
    sprint.wrap(model.to(dtype).requires_grad_(False), drop=StructuredDrop(0.75), path_drop=0.0).sprint.float()
    weight = model.sprint.fusion.proj.weight.requires_grad_()
    optimizer = torch.optim.AdamW([weight], lr=1e-4, weight_decay=0)
    with torch.autocast("cpu", dtype=dtype), sprint.path(model, path):
        first_tensor(model(**arguments)).float().square().mean().backward()
    optimizer.step()
    assert weight.dtype == torch.float32
    assert weight.diagonal().ne(1).float().mean() > 0.9  # in bfloat16 such a step next to 1 is lost


def test_peft_models():
    peft = pytest.importorskip("peft")
    model, arguments = CASES["sd3"]()
    sprint.wrap(model, drop=StructuredDrop(0.75), path_drop=0.0)
    with pytest.raises(ValueError, match=r"wrap the model inside, sprint.wrap\(model.get_base_model\(\)"):
        sprint.wrap(peft.get_peft_model(CASES["sd3"]()[0], peft.LoraConfig(target_modules=["to_q"])))
    expected = first_tensor(model(**arguments))
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], modules_to_save=["sprint"])
    adapted = peft.get_peft_model(model, config)
    torch.testing.assert_close(first_tensor(adapted(**arguments)), expected)
    with sprint.path(adapted, "sparse"):  # the documented recipe, and sparse gradients
        first_tensor(adapted(**arguments)).square().mean().backward()
    learned = {key: p for key, p in adapted.named_parameters() if p.requires_grad}
    fusion = [p for key, p in learned.items() if "sprint.modules_to_save" in key]
    assert len(fusion) == 3
    assert all(p.grad is not None and p.grad.any() for p in fusion)
    with torch.no_grad():
        next(p for key, p in learned.items() if "sprint.modules_to_save" in key and key.endswith("bias")).add_(1)
    assert not first_tensor(adapted(**arguments)).allclose(expected)  # the adapter's fusion is the one that runs
    with adapted.disable_adapter():
        torch.testing.assert_close(first_tensor(adapted(**arguments)), expected)
    assert any("sprint" in key for key in peft.get_peft_model_state_dict(adapted))


def test_guidance_on_a_peft_model():
    peft = pytest.importorskip("peft")
    import hosts

    model = sprint.wrap(hosts.DiT().eval(), init="xavier")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["cond"]))
    x, y = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 2.0])
    guidance = sprint.PathDropGuidance(3.0, null=torch.zeros(2))
    torch.testing.assert_close(guidance(adapted, x, 0.5, y), guidance(model, x, 0.5, y))


@pytest.mark.parametrize(
    "offload", [{"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}]
)
@torch.no_grad()
def test_offloading_before_wrapping(offload):
    model, arguments = CASES["sd3"]()
    plain = sprint.wrap(CASES["sd3"]()[0], drop=StructuredDrop(0.75), init="xavier")
    cpu = torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, **offload)
    sprint.wrap(model, drop=StructuredDrop(0.75), init="xavier")
    model.sprint.load_state_dict(plain.sprint.state_dict())
    for name in ("full", "sparse", "shallow"):
        outputs = []
        for each in (plain, model):
            with sprint.path(each, name, generator=torch.Generator().manual_seed(0)):
                outputs.append(first_tensor(each(**arguments)))
        assert outputs[0].equal(outputs[1])


@pytest.fixture
def accelerator():
    """Whatever an earlier test told accelerate's state, which a process has one of."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate_before_and_after(accelerator):
    model, arguments = CASES["dit"]()
    calls = []
    for block in model.transformer_blocks[2:4]:
        block.register_forward_hook(lambda m, a, out: calls.append(out.shape[1]))
    prepared = sprint.wrap(accelerator.prepare(model), drop=StructuredDrop(0.75))
    with sprint.path(prepared, "sparse"):
        prepared(**arguments)
    assert calls == [4, 4]
    later = accelerator.prepare(sprint.wrap(CASES["dit"]()[0]))
    assert first_tensor(sprint.unwrap(later)(**arguments)).isfinite().all()


@torch.no_grad()
def test_features_of_timm_follow_the_path_or_refuse():
    model, arguments = CASES["timm_vit"]()
    sprint.wrap(model, drop=StructuredDrop(0.75))
    assert model.forward_features(arguments["x"]).isfinite().all()
    sprint.path(model, "shallow")
    for call in (model.forward_features, model.get_intermediate_layers):
        with pytest.raises(RuntimeError, match="runs the blocks outside of forward, where the shallow path is not taken"):
            call(arguments["x"])
    assert first_tensor(model(**arguments)).isfinite().all()


@torch.no_grad()
def test_the_half_of_a_batch_is_seen_whatever_the_order_of_arguments():
    model, arguments = CASES["sd3"]()
    sprint.wrap(model, init="xavier")
    rows = []
    model.transformer_blocks[2].register_forward_hook(lambda m, a, out: rows.append(len(out[1])))
    arguments["hidden_states"] = arguments["hidden_states"][:1].repeat(2, 1, 1, 1)
    with path_drop_guidance(model, weak_half="first"):
        model(**dict(reversed(arguments.items())))
    assert rows == [1]


@pytest.mark.parametrize("skipped", [[2], [3], [1, 2, 3]])
@torch.no_grad()
def test_skipped_layers_of_sd3(skipped):
    model, arguments = CASES["sd3"]()
    expected = first_tensor(model(**arguments, skip_layers=skipped))
    sprint.wrap(model, drop=StructuredDrop(0.75))
    assert first_tensor(model(**arguments, skip_layers=skipped)).equal(expected)
    for name in ("sparse", "shallow"):
        with sprint.path(model, name):
            assert first_tensor(model(**arguments, skip_layers=skipped)).isfinite().all()


def test_an_announced_call_that_takes_no_route_is_noticed():
    model, _ = CASES["wan"]()
    sprint.wrap(model)
    with (
        pytest.raises(RuntimeError, match="no unconditional prediction was seen"),
        path_drop_guidance(model),
        model.cache_context("uncond"),
    ):
        pass


def test_a_guider_after_a_call_that_failed():
    model, _ = CASES["dit"]()
    sprint.wrap(model)
    for _ in range(2):
        guider = PathDropGuidance(guidance_scale=3.0)
        guider.set_state(step=0, num_inference_steps=2, timestep=torch.tensor(500))
        paths = []
        for _ in range(2):
            guider.prepare_models(model)
            paths.append(model.sprint.route[0])
        assert paths == ["full", "shallow"]  # and here the call raises, so that nothing is cleaned up
    guider.cleanup_models(model)
    assert model.sprint.route[0] == "full"


# files


@torch.no_grad()
def test_variants_shards_and_subfolders(tmp_path, caplog):
    model, _ = CASES["dit"]()
    kind = diffusers.DiTTransformer2DModel
    sprint.wrap(model, init="xavier")
    one = {key: value.clone() for key, value in model.sprint.state_dict().items()}
    model.save_pretrained(tmp_path / "part", max_shard_size="30KB")
    for parameter in model.sprint.parameters():
        parameter.add_(1)
    model.save_pretrained(tmp_path / "part", variant="other")
    diffusers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        for variant, shift in ((None, 0), ("other", 1)):
            again = from_pretrained(kind, tmp_path, subfolder="part", variant=variant)
            for key, value in again.sprint.state_dict().items():
                torch.testing.assert_close(value, one[key] + shift)
    assert "were not used" not in caplog.text
    assert kind._keys_to_ignore_on_load_unexpected is None
    half = from_pretrained(kind, tmp_path, subfolder="part", torch_dtype=BF16)
    assert {p.dtype for p in half.parameters()} == {BF16}
    assert json.loads((tmp_path / "part" / "sprint.json").read_text())["init"] == "xavier"
    with pytest.raises(
        FileNotFoundError, match=r"no diffusion_pytorch_model.ema.safetensors, there is .*choose the variant"
    ):
        from_pretrained(kind, tmp_path, subfolder="part", variant="ema")
    model.save_pretrained(tmp_path / "bin", safe_serialization=False)
    with pytest.raises(FileNotFoundError, match=r"there is diffusion_pytorch_model.bin: .*safe_serialization=True"):
        from_pretrained(kind, tmp_path / "bin")


@pytest.mark.parametrize("fill", ["mask", "shallow"])
def test_peft_trains_all_of_the_fusion_unless_its_mask_token_is_frozen_again(fill):
    peft = pytest.importorskip("peft")
    model = sprint.wrap(CASES["sd3"]()[0], fill=fill)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["to_q"], modules_to_save=["sprint"]))
    trained = {key.split(".")[-1] for key, p in adapted.named_parameters() if p.requires_grad and "fusion" in key}
    assert trained == {"weight", "bias"} | ({"mask_token"} if fill == "mask" else set())
    if fill == "mask":
        model.sprint.fusion.mask_token.requires_grad_(False)
        frozen = [p for key, p in adapted.named_parameters() if "modules_to_save" in key and "mask_token" in key]
        assert [p.requires_grad for p in frozen] == [False]
