"""Every declared architecture: identity, order of tokens, the three paths, gradients, checkpointing, unwrapping."""

import inspect

import pytest
import torch
from architectures import CASES

import sprint
from sprint import RandomDrop, StructuredDrop
from sprint.hosts.outputs import first_tensor

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("timm")

from sprint.diffusers import from_pretrained, path_drop_guidance  # noqa: E402

GRIDS = dict.fromkeys(
    ("flux", "chroma", "flux2", "longcat", "krea2"), (4, 4)
)  # packed latents whose arguments do not tell their grid
UNMASKED = {"sana", "lumina2", "lumina2_ragged", "prx", "mochi"}  # where check says that it is not proved
architectures = pytest.mark.parametrize("name", CASES)


def wrapped(name, **options):
    model, arguments = CASES[name]()
    drop = RandomDrop(0.75) if name.startswith("z_image") else StructuredDrop(0.75)
    options = {"drop": drop, "path_drop": 0.0, "grid": GRIDS.get(name), **options}
    return sprint.wrap(model, **options), arguments


@architectures
@torch.no_grad()
def test_wrapping_changes_nothing_and_can_be_undone(name):
    model, arguments = CASES[name]()
    keys, expected = list(model.state_dict()), first_tensor(model(**arguments))
    wrapped_model = sprint.wrap(model)
    assert first_tensor(wrapped_model(**arguments)).equal(expected)  # bit by bit
    assert [key for key in model.state_dict() if key not in keys] == [
        "sprint.fusion.mask_token",
        "sprint.fusion.proj.weight",
        "sprint.fusion.proj.bias",
    ]
    sprint.unwrap(model)
    assert list(model.state_dict()) == keys
    assert first_tensor(model(**arguments)).equal(expected)


@architectures
def test_check_passes(name):
    model, arguments = wrapped(name, init="xavier")
    report = sprint.check(model, repeats=1, tolerance=1e-5, **arguments)
    assert {finding.name: finding.ok for finding in report.findings} == {
        "full path = the host itself": None,  # the fusion starts at random here
        "all tokens in any order = full": None if name == "sana" else True,
        "fewer tokens = masked attention": None if name in UNMASKED else True,
        "shallow path skips the middle": True,
        "sparse gradients reach parameters": True,
    }


@architectures
@torch.no_grad()
def test_middle_blocks_see_the_kept_tokens_only(name):
    model, arguments = wrapped(name, init="xavier")
    lengths = {}
    for path in ("full", "sparse"):
        seen, index = [], 0
        hooks = []
        for place, _ in model.sprint.places:
            for block in model.get_submodule(place.blocks.name):
                if model.sprint.first <= index <= model.sprint.last:

                    def measure(module, args, kwargs, place=place, seen=seen):
                        tokens = kwargs[place.image] if place.image in kwargs else args[0]
                        seen.append((tokens.shape[1], place.blocks.stream))

                    hooks.append(block.register_forward_pre_hook(measure, with_kwargs=True))
                index += 1
        with sprint.path(model, path):
            model(**arguments)
        for hook in hooks:
            hook.remove()
        lengths[path] = seen
    for (full, stream), (sparse, _) in zip(lengths["full"], lengths["sparse"], strict=True):
        image = model.sprint.host.image_tokens(model, arguments, full) if model.sprint.host.image_tokens else full
        if stream != "image" and model.sprint.host.image_tokens is None:
            image = lengths["full"][0][0] if lengths["full"][0][1] == "image" else full - 5
        kept = model.sprint.host.always_kept
        droppable = image - (sum(kept(model, arguments)) if kept else 0)
        assert full - sparse == droppable * 3 // 4


@pytest.mark.parametrize(("name", "always"), [("qwen_image_edit", range(16, 20)), ("hunyuan_video_first_frame", range(16))])
@torch.no_grad()
def test_references_and_first_frames_are_always_kept(name, always):
    model, arguments = wrapped(name, drop=StructuredDrop(group=(1, 4, 4), keep=1))
    seen = []
    gather = sprint.TokenSubset.gather

    def spy(subset, tokens):
        seen.append(subset.keep)
        return gather(subset, tokens)

    with pytest.MonkeyPatch.context() as patch, sprint.path(model, "sparse"):
        patch.setattr(sprint.TokenSubset, "gather", spy)
        model(**arguments)
    for row in seen[0].tolist():
        assert set(always) <= set(row)
        assert len(set(row)) == len(row) < arguments["hidden_states"].numel()


CHECKPOINTED = [name for name in CASES if name not in ("hunyuan_dit", "timm_vit")]  # they have none of their own


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_the_hosts_own_checkpointing_gives_the_same_gradients(name):
    gradients = []
    for checkpointing in (False, True):
        model, arguments = CASES[name]()
        torch.manual_seed(1)
        drop = RandomDrop(0.75) if name.startswith("z_image") else StructuredDrop(0.75)
        sprint.wrap(model, drop=drop, path_drop=0.5, init="xavier", grid=GRIDS.get(name))
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.train()
        torch.manual_seed(2)
        with sprint.path(model, "sparse"):
            first_tensor(model(**arguments)).square().mean().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], expected, rtol=1e-4, atol=1e-6, msg=f"{name}: {key}")  # float32


@pytest.mark.parametrize("name", ["sd3", "flux", "chroma", "auraflow", "hunyuan_video"])
@torch.no_grad()
def test_a_path_dropped_sample_of_a_joint_model_is_its_shallow_path(name):
    model, arguments = wrapped(name, init="xavier", path_drop=1.0)
    with sprint.path(model, "shallow"):
        shallow = first_tensor(model(**arguments))
    model.sprint.train()
    torch.testing.assert_close(first_tensor(model(**arguments)), shallow, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dit", "sd3", "flux", "wan", "ltx"])
@torch.no_grad()
def test_compiles_without_graph_breaks(name):
    torch.compiler.reset()
    model, arguments = wrapped(name, init="xavier")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for path in ("full", "shallow"):
        with sprint.path(model, path):
            expected = first_tensor(model(**arguments))
            torch.testing.assert_close(first_tensor(compiled(**arguments)), expected, rtol=1e-4, atol=1e-5)
    with sprint.path(model, "sparse"):
        assert first_tensor(compiled(**arguments)).shape == expected.shape


@pytest.mark.slow
@torch.no_grad()
def test_regional_compilation():
    torch.compiler.reset()
    model, arguments = wrapped("sd3", init="xavier")
    expected = {}
    for path in ("full", "shallow"):
        with sprint.path(model, path):
            expected[path] = first_tensor(model(**arguments))
    for block in model.transformer_blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    for path, output in expected.items():
        with sprint.path(model, path):
            torch.testing.assert_close(first_tensor(model(**arguments)), output, rtol=1e-4, atol=1e-5)
    with sprint.path(model, "sparse"):
        assert first_tensor(model(**arguments)).isfinite().all()


def test_residual_controlnets_are_refused_before_anything_runs():
    model, arguments = wrapped("sd3")
    residuals = [torch.zeros(2, 16, 16)]
    assert model(**arguments, block_controlnet_hidden_states=residuals) is not None
    with (
        pytest.raises(ValueError, match="cannot be given on the sparse path, because the model's own loop adds full-length"),
        sprint.path(model, "sparse"),
    ):
        model(**arguments, block_controlnet_hidden_states=residuals)
    twice = {name: torch.cat([value] * 2) for name, value in arguments.items()}
    residuals = [torch.cat([residual] * 2) for residual in residuals]
    message = "block_controlnet_hidden_states cannot be given with weak_half"
    with path_drop_guidance(model, weak_half="first"):
        assert model(**twice) is not None
        with pytest.raises(ValueError, match=message):
            model(**twice, block_controlnet_hidden_states=residuals)


def test_context_parallelism_is_refused_on_the_sparse_path(monkeypatch):
    model, arguments = wrapped("dit")
    monkeypatch.setattr(model, "_parallel_config", object())
    model(**arguments)
    with pytest.raises(ValueError, match="context parallelism splits the tokens"), sprint.path(model, "sparse"):
        model(**arguments)


def test_the_signature_of_forward_stays():
    model, _ = CASES["sd3"]()
    before = inspect.signature(model.forward)
    sprint.wrap(model)
    assert inspect.signature(model.forward) == before  # modular pipelines filter arguments by it


def test_packed_latents_need_their_grid():
    model, arguments = wrapped("flux", grid=None)
    message = "token grid of FluxTransformer2DModel is unknown for 16 tokens: give it"
    with pytest.raises(ValueError, match=message), sprint.path(model, "sparse"):
        model(**arguments)
    with sprint.path(model, "sparse", grid=(2, 8)):
        model(**arguments)


def test_sana_needs_one_token_per_group():
    model, arguments = wrapped("sana", drop=RandomDrop(0.75))
    with pytest.raises(ValueError, match="unfolds its tokens into a grid inside its blocks"), sprint.path(model, "sparse"):
        model(**arguments)


def test_lora_before_and_after_wrapping():
    peft = pytest.importorskip("peft")
    outputs = []
    for before in (True, False):
        model, arguments = CASES["sd3"]()
        config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights="gaussian")
        for step in ("adapter", "wrap") if before else ("wrap", "adapter"):
            torch.manual_seed(3)
            if step == "wrap":
                sprint.wrap(model, drop=StructuredDrop(0.75))
            else:
                model.add_adapter(config)
        lora = {key: p for key, p in model.named_parameters() if "lora" in key}
        assert lora
        assert not any(key.startswith("sprint") for key in lora)
        with sprint.path(model, "sparse", generator=torch.Generator().manual_seed(0)):
            outputs.append(first_tensor(model(**arguments)))
        outputs[-1].square().mean().backward()
        assert all(p.grad is not None for key, p in lora.items() if "transformer_blocks.5.attn.add" not in key)
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize(("name", "kind"), [("dit", "DiTTransformer2DModel"), ("flux", "FluxTransformer2DModel")])
@pytest.mark.parametrize("merge", ["residual", "routing", "mask"])
@torch.no_grad()
def test_save_pretrained_and_back(name, kind, merge, tmp_path):
    model, arguments = wrapped(name, init="xavier", merge=merge, encoder_depth=1)
    model.save_pretrained(tmp_path)
    again = from_pretrained(getattr(diffusers, kind), tmp_path, drop=StructuredDrop(0.75))
    if name == "dit":
        for block in again.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0
    for path in ("full", "sparse", "shallow"):
        generator = [torch.Generator().manual_seed(0) for _ in range(2)]
        with sprint.path(model, path, generator=generator[0]), sprint.path(again.eval(), path, generator=generator[1]):
            assert first_tensor(again(**arguments)).equal(first_tensor(model(**arguments)))


def test_folders_without_a_wrapped_model(tmp_path):
    model, _ = CASES["dit"]()
    model.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no sprint.json, so no wrapped model was saved there"):
        from_pretrained(diffusers.DiTTransformer2DModel, tmp_path)


def test_a_plain_model_saved_over_a_wrapped_one(tmp_path):
    model, _ = wrapped("dit")
    model.save_pretrained(tmp_path)
    sprint.unwrap(model).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="hold no fusion, though sprint.json is there.*delete sprint.json"):
        from_pretrained(diffusers.DiTTransformer2DModel, tmp_path)


def test_averages_of_diffusers_are_saved_with_the_fusion(tmp_path):
    training = pytest.importorskip("diffusers.training_utils")
    model, arguments = wrapped("dit")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = lambda model, x: first_tensor(model(x, *list(arguments.values())[1:])).mean()  # noqa: E731
    losing = training.EMAModel(model.parameters(), model_cls=diffusers.DiTTransformer2DModel, model_config=model.config)
    with pytest.raises(ValueError, match="would save a plain model, without the fusion.*ema.copy_to"):
        sprint.TrainStep(model, loss, optimizer, ema=losing)
    ema = training.EMAModel(model.parameters(), decay=0.5)
    sprint.TrainStep(model, loss, optimizer, ema=ema)(next(iter(arguments.values())))
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    model.save_pretrained(tmp_path)
    ema.restore(model.parameters())
    again = from_pretrained(diffusers.DiTTransformer2DModel, tmp_path)
    for parameter, shadow in zip(again.parameters(), ema.shadow_params, strict=True):
        assert parameter.equal(shadow)
