"""Every declared architecture: identity, order of tokens, the three paths, gradients, checkpointing, unwrapping."""

import inspect
import math

import pytest
import torch
from architectures import CASES

import sprint
from sprint import RandomDrop, StructuredDrop
from sprint.hosts.declare import declaration, declared
from sprint.hosts.mechanism.keep import Keeper
from sprint.hosts.outputs import first_tensor

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("timm")

from sprint.diffusers import from_pretrained, path_drop_guidance  # noqa: E402

GRIDS = {"sana_wm_refiner": (2, 4, 4)}  # whose arguments do not tell it
DROPS = {
    "minimax_h3": StructuredDrop(0.75, shared=True),
    **dict.fromkeys(("sana_video", "wan_animate"), StructuredDrop(group=(1, 2, 2), keep=1)),
}
UNORDERED = {"sana", "sana_video", "wan_animate"}  # whose tokens must stay in the order of the grid
UNMASKED = {"sana", "sana_video"}  # where check says that it is not proved
MIXING = {"hidream", "consisid", "framepack", "kandinsky5", "minimax_h3"}  # take no single sample, or mix those of a batch
WHOLE_BATCH = {"bria_fibo", "qwen_image21", "wan_animate"}  # work with the whole batch between their blocks
PADDED = {
    "lumina2",
    "lumina2_ragged",
    "hunyuan_video",
    "hunyuan_video_first_frame",
    "ltx",
    "qwen_image",
    "qwen_image_edit",
    "mochi",
    "hunyuan_image",
    "allegro",
    "hunyuan_video15",
    "framepack",
    "motif_video",
    "joyimage_plus",
    "ltx2",
    "ltx2_split",
}
architectures = pytest.mark.parametrize("name", CASES)


def wrapped(name, **options):
    model, arguments = CASES[name]()
    drop = DROPS.get(name, StructuredDrop(0.75))
    return sprint.wrap(model, **{"drop": drop, "path_drop": 0.0, "grid": GRIDS.get(name), **options}), arguments


def kept_tokens(model, arguments):
    """What the sparse path keeps, row by row."""
    seen, gather = [], sprint.TokenSubset.gather

    def spy(subset, tokens):
        seen.append(subset.keep)
        return gather(subset, tokens)

    with pytest.MonkeyPatch.context() as patch, sprint.path(model, "sparse"), torch.no_grad():
        patch.setattr(sprint.TokenSubset, "gather", spy)
        model(**arguments)
    return seen[0]


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
    found = {finding.name: finding.ok for finding in report.findings}
    assert report.ok == (name not in UNMASKED)
    assert found.pop("padded text is not seen", None) is (True if name in PADDED else None)
    assert found == {
        "full path = the host itself": None,  # the fusion starts at random here
        "all tokens in any order = full": None if name in UNORDERED else True,
        "fewer tokens = masked attention": None if name in UNMASKED else True,
        "dropped tokens are the image's": True,
        "samples alone = in their batch": None if name in MIXING else True,
        "a guided batch = its two halves": None if name in MIXING | WHOLE_BATCH else True,
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
        grid = Keeper(model.sprint, model, arguments, drop=None, generator=None).grid(image)
        assert full - sparse == math.prod(grid) * 3 // 4


@pytest.mark.parametrize(
    ("name", "always"),
    [
        ("qwen_image_edit", range(16, 20)),
        ("hunyuan_video_first_frame", range(16)),
        ("framepack", range(16 + 4 + 1)),
        ("flux_reference", range(16, 20)),
        ("flux3", range(16, 20)),
        ("bria_fibo2", range(16, 20)),
        ("joyimage", range(16, 32)),
        ("joyimage_plus", range(16, 22)),
        ("hidream", range(32, 36)),
    ],
)
@torch.no_grad()
def test_references_first_frames_and_padding_are_always_kept(name, always):
    model, arguments = wrapped(name)
    for row in kept_tokens(model, arguments).tolist():
        assert set(always) <= set(row)
        assert len(set(row)) == len(row) < max(always) + 32


NOT_CHECKPOINTED = {
    **dict.fromkeys(("hunyuan_dit", "timm_vit", "sana_wm_refiner"), "has none of its own"),
    "hunyuan_image": "raises in diffusers 0.42, wrapped or not",
}
CHECKPOINTED = [name for name in CASES if name not in NOT_CHECKPOINTED]


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_the_hosts_own_checkpointing_gives_the_same_gradients(name):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model, arguments = wrapped(name, path_drop=0.5, init="xavier")
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


@pytest.mark.parametrize(
    "name", ["sd3", "flux", "chroma", "auraflow", "hunyuan_video", "bria_fibo", "flux3", "hidream", "kandinsky6", "ltx2"]
)
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
    model, arguments = wrapped(name, init="xavier", grid=(4, 4) if name == "flux" else None)  # img_ids cannot be read
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


@pytest.mark.parametrize("name", ["flux", "chroma", "flux2", "longcat", "krea2", "ovis", "bria", "bria_fibo"])
def test_packed_latents_tell_their_grid(name):
    model, arguments = wrapped(name, grid=(2, 8))
    message = r"say that its token grid is \(4, 4\), and grid=\(2, 8\) was given: leave that out"
    with pytest.raises(ValueError, match=message), sprint.path(model, "sparse"):
        model(**arguments)
    with sprint.path(model, "sparse", grid=(4, 4)):
        model(**arguments)
    key = "position_ids" if name == "krea2" else "img_ids"
    places = torch.stack(
        [torch.zeros(16), torch.arange(16) // 8, torch.arange(16) % 8 + 3], dim=1
    )  # another place and shape
    rest = arguments[key].shape[1] - 3
    arguments[key] = torch.cat([arguments[key][:-16], torch.nn.functional.pad(places, (0, rest))])
    model, _ = wrapped(name)
    for row in kept_tokens(model, arguments).tolist():
        assert sorted((n // 8 // 2, n % 8 // 2) for n in row) == [(0, 0), (0, 1), (0, 2), (0, 3)]


def test_tokens_that_are_no_grid_can_be_dropped_at_random():
    model, arguments = wrapped("flux")
    arguments["img_ids"] = arguments["img_ids"][torch.arange(16).roll(1)]
    message = "token grid of FluxTransformer2DModel is unknown for 16 tokens: give it"
    with pytest.raises(ValueError, match=message), sprint.path(model, "sparse"):
        model(**arguments)
    with sprint.path(model, "sparse", drop=RandomDrop(0.75)):
        model(**arguments)
    with sprint.path(model, "sparse", grid=(2, 8)):
        model(**arguments)


def test_ids_are_read_once(monkeypatch):
    copies, cpu = [], torch.Tensor.cpu
    model, arguments = wrapped("flux_reference")
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copies.append(tensor) or cpu(tensor))
    with sprint.path(model, "sparse"):
        for _ in range(3):
            model(**arguments)
        assert len(copies) == 1
        arguments["img_ids"] += torch.tensor([0, 1, 1])
        model(**arguments)
        assert len(copies) == 2
        with torch.inference_mode():
            model(**arguments | {"img_ids": arguments["img_ids"].clone()})
        assert len(copies) == 3


@pytest.mark.parametrize("drop", [StructuredDrop(0.75), RandomDrop(0.75)])
def test_where_ids_cannot_be_read_the_grid_is_to_be_given(drop, monkeypatch):
    model, arguments = wrapped("flux_reference", drop=drop)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(ValueError, match="token grid of FluxTransformer2DModel is unknown for 20 tokens"):
        kept_tokens(model, arguments)
    with sprint.path(model, "full", grid=(4, 4)):
        assert kept_tokens(model, arguments)[:, -4:].tolist() == [[16, 17, 18, 19]] * 2


def test_images_of_several_sizes_in_one_batch():
    model, arguments = wrapped("qwen_image", drop=RandomDrop(0.75))
    arguments["img_shapes"] = [[(1, 4, 4)], [(1, 2, 8)]]
    assert kept_tokens(model, arguments).shape == (2, 4)
    with pytest.raises(ValueError, match="unknown for 16 tokens"), sprint.path(model, "sparse", drop=StructuredDrop(0.75)):
        model(**arguments)
    arguments["img_shapes"] = [[(1, 4, 4)], [(1, 4, 2), (1, 4, 2)]]
    with pytest.raises(ValueError, match=r"images of \[8, 16\] tokens in one batch"), sprint.path(model, "sparse"):
        model(**arguments)


NO_IMAGES = {
    "AceStepTransformer1DModel": "makes sound",
    "MiniMaxMusic3Transformer1DModel": "makes sound",
    "Transformer2DModel": "a part of other models, also of U-Nets",
    "TransformerTemporalModel": "a part of U-Nets",
}


def test_every_transformer_of_diffusers_is_declared_or_refused_with_a_reason():
    for name in dir(diffusers):
        kind = getattr(diffusers, name)
        if "Transformer" in name and name.endswith("Model") and issubclass(kind, torch.nn.Module) and name not in NO_IMAGES:
            said = declared(kind)
            assert said, f"{name} is neither declared nor refused in sprint.hosts.known"
            if isinstance(said, str):
                with pytest.raises(ValueError, match=f"{name} cannot be wrapped, since its .*"):
                    declaration(kind.__new__(kind))
            else:
                assert any(f'"{name}"' in inspect.getsource(case) for case in CASES.values()), f"{name} has no trials"


def test_a_refused_architecture():
    model = diffusers.LatteTransformer3DModel(num_attention_heads=1, in_channels=4, patch_size=2, caption_channels=4)
    with pytest.raises(ValueError, match="LatteTransformer3DModel cannot be wrapped, since its blocks work by turns"):
        sprint.wrap(model)


@pytest.mark.parametrize("path", ["full", "sparse", "shallow"])
def test_the_middle_ends_before_a_decoder_of_other_tokens(path):
    model, arguments = wrapped("motif_video", decoder_depth=0)
    message = "last 1 blocks of MotifVideoTransformer3DModel work on other tokens .*decoder_depth=1 or more"
    with pytest.raises(ValueError, match=message), sprint.path(model, path):
        model(**arguments)


def test_video_blocks_that_unfold_their_tokens_keep_all_frames():
    model, arguments = wrapped("sana_video", drop=StructuredDrop(group=(2, 2, 2), keep=1))
    with pytest.raises(ValueError, match=r"one token per group can be kept, in every frame, got 1 of \(2, 2, 2\)"):
        kept_tokens(model, arguments)


def test_sana_needs_one_token_per_group():
    model, arguments = wrapped("sana", drop=RandomDrop(0.75))
    with pytest.raises(ValueError, match="unfolds its tokens into a grid inside its blocks"), sprint.path(model, "sparse"):
        model(**arguments)


def test_cells_that_are_not_all_whole_are_refused_where_blocks_unfold_them():
    model, arguments = wrapped("sana", drop=StructuredDrop(0.75, multiple_of=3))
    with pytest.raises(ValueError, match="every group keeps one token: 1 of 2x2 .* no multiple of 3"):
        kept_tokens(model, arguments)


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
