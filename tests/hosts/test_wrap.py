"""`wrap` on plain PyTorch models: identity, the paths by hand, what keeps working around it, and what is refused."""

import copy

import hosts
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import sprint
from sprint import Blocks, Host, RandomDrop, StructuredDrop, Table, TokenSubset
from sprint.hosts import declare

X, T = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.7])
KEEP = TokenSubset.from_keep(torch.tensor([[5, 0, 9, 12], [2, 3, 15, 8]]), 16)
ROPE = Host((Blocks("blocks", tables={"feat_rope": Table(dim=0, batched=False)}),))


@pytest.fixture(autouse=True)
def _own_register(monkeypatch):
    monkeypatch.setattr(declare, "_HOSTS", dict(declare._HOSTS))


def wrapped(model=None, **options):
    return sprint.wrap(model or hosts.DiT().eval(), **{"drop": StructuredDrop(0.75), "path_drop": 0.0, **options})


def by_hand(model, x, t, subset):
    """The sparse path of a wrapped `hosts.DiT`, written out."""
    blocks, fusion = [nn.Module.__call__.__get__(block) for block in model.blocks], model.sprint.fusion
    tokens, cond = model.embed(x).flatten(2).transpose(1, 2) + model.position, t[:, None].expand(-1, 16)
    for block in blocks[:2]:
        tokens = block(tokens, cond)
    deep = subset.gather(tokens)
    for block in blocks[2:4]:
        deep = block(deep, cond)
    tokens = fusion(tokens, deep, subset)
    for block in blocks[4:]:
        tokens = block(tokens, cond)
    return nn.functional.fold(model.head(tokens).transpose(1, 2), (8, 8), 2, stride=2)


def test_a_wrapped_model_is_the_host_until_told_otherwise():
    model = hosts.DiT().eval()
    expected, keys, kind = model(X, T), list(model.state_dict()), type(model)
    assert wrapped(model) is model
    assert model(X, T).equal(expected)  # bit by bit
    assert isinstance(model, kind)
    new = [key for key in model.state_dict() if key not in keys]
    assert new == ["sprint.fusion.mask_token", "sprint.fusion.proj.weight", "sprint.fusion.proj.bias"]
    assert sprint.unwrap(model) is model
    assert (type(model), type(model.blocks), list(model.state_dict())) == (kind, nn.ModuleList, keys)
    assert model(X, T).equal(expected)
    assert "sprint" not in repr(model)


def test_sparse_path_and_its_gradients_equal_the_steps_by_hand():
    model = wrapped(init="xavier")
    parameters = [p for p in model.parameters() if p.requires_grad]
    with sprint.path(model, "sparse", subset=KEEP):
        actual = model(X, T)
    expected = by_hand(model, X, T, KEEP)
    assert actual.equal(expected)
    for a, b in zip(*(torch.autograd.grad(v.square().sum(), parameters) for v in (actual, expected)), strict=True):
        assert a.equal(b)


def test_shallow_path_runs_no_middle_block():
    model, calls = wrapped(init="xavier"), []
    for block in model.blocks[2:4]:
        block.register_forward_hook(lambda *_: calls.append(1))
    with sprint.path(model, "shallow"):
        model(X, T)
    assert calls == []
    model(X, T)
    assert len(calls) == 2


def test_path_is_state_that_the_mode_does_not_touch():
    model = wrapped(init="xavier")
    full = model(X, T)
    assert model.train()(X, T).equal(full)
    sprint.path(model, "shallow")  # from now on
    shallow = model(X, T)
    assert not shallow.equal(full)
    with sprint.path(model, "full"):
        assert model(X, T).equal(full)
    assert model.eval()(X, T).equal(shallow)


def test_each_sample_draws_its_own_tokens_and_the_generator_decides():
    model = wrapped(init="xavier")
    outputs = []
    for seed in (0, 0, 1):
        with sprint.path(model, "sparse", generator=torch.Generator().manual_seed(seed)):
            outputs.append(model(X, T))
    assert outputs[0].equal(outputs[1])
    assert not outputs[0].equal(outputs[2])


def test_path_drop_gives_the_shallow_path_of_the_dropped_samples():
    model = wrapped(init="xavier", path_drop=0.5).train()
    x, t = X.repeat(8, 1, 1, 1), T.repeat(8)
    with sprint.path(model, "shallow"):
        shallow = model(x, t)
    full = model.eval()(x, t)
    mixed = model.train()(x, t)
    for got, deep, weak in zip(mixed, full, shallow, strict=True):
        assert torch.isclose(got, deep, atol=1e-6).all() or torch.isclose(got, weak, atol=1e-6).all()
    assert not torch.allclose(mixed, full)
    assert not torch.allclose(mixed, shallow)


@pytest.mark.parametrize("merge", ["residual", "routing", "mask"])
def test_merges(merge):
    model = wrapped(merge=merge)
    expected = hosts.DiT().eval()(X, T)
    assert model(X, T).equal(expected)  # all of them are the host on the full path
    with sprint.path(model, "sparse", subset=KEEP):
        sparse = model(X, T)
    assert not sparse.equal(expected)
    captured = {}
    model.blocks[1].register_forward_hook(lambda *a: captured.update(encoder=a[2]))
    model.blocks[4].register_forward_pre_hook(lambda *a: captured.update(fused=a[1][0]))
    with sprint.path(model, "sparse", subset=KEEP):
        model(X, T)
    elsewhere = {
        "residual": model.sprint.fusion.mask_token if merge != "routing" else None,
        "mask": model.sprint.fusion.mask_token if merge != "routing" else None,
        "routing": captured["encoder"],
    }[merge]
    torch.testing.assert_close(captured["fused"][~KEEP.mask], elsewhere.expand(2, 16, 16)[~KEEP.mask])


# what keeps working around it


def test_rotary_tables_follow_their_tokens():
    model = wrapped(hosts.DiT(block=hosts.RotaryBlock, rope=True).eval(), host=ROPE)
    report = sprint.check(model, X, T)
    assert report.ok
    assert "FAILED" not in str(report)


def test_check_finds_a_table_that_is_gathered_wrongly():
    wrong = Host(
        (Blocks("blocks", tables={"feat_rope": Table(dim=1, batched=False)}),)
    )  # the channels: 16, as there are tokens
    model = wrapped(hosts.DiT(block=hosts.RotaryBlock, rope=True).eval(), host=wrong)
    with pytest.raises((ValueError, RuntimeError), match="not right|size of tensor"):
        sprint.check(model, X, T)


def test_check_reports_times_and_leaves_the_model_as_it_was():
    model = wrapped().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = sprint.check(model, X, T)
    assert {"forward, full", "forward, sparse", "forward, shallow"} <= report.seconds.keys()
    assert report.saved["forward, full"] == 0
    assert report.saved["forward, shallow"] == 1 - report.seconds["forward, shallow"] / report.seconds["forward, full"]
    assert model.training
    assert model.sprint.route[0] == "full"
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_check_compares_with_the_host():
    model = sprint.wrap(hosts.DiT().eval(), drop=StructuredDrop(0.75))
    identity = sprint.check(model, X, T).findings[0]
    assert identity.ok
    assert identity.detail == "bit by bit"
    with torch.no_grad():
        model.sprint.fusion.proj.bias.add_(1)
    identity = sprint.check(model, X, T).findings[0]
    assert identity.ok is None
    assert "the fusion is not the identity" in identity.detail


def test_long_skips_and_prefix_tokens():
    host = Host(
        (
            Blocks("in_blocks", stream="text+image"),
            Blocks("mid_block", stream="text+image"),
            Blocks("out_blocks", stream="text+image"),  # its skips come from middle blocks, and have the kept tokens already
        ),
        image_tokens=lambda model, arguments, length: length - 1,
    )
    model = hosts.UViT().eval()
    expected = model(X, T)
    wrapped(model, host=host)
    assert model(X, T).equal(expected)
    assert sprint.check(model, X, T).ok
    with sprint.path(model, "sparse"):
        assert model(X, T).shape == expected.shape


def test_a_sequential_of_blocks():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.dim = 16
            self.layers = nn.Sequential(
                *[nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True) for _ in range(6)]
            )

        def forward(self, x):
            return self.layers(x)

    model, tokens = Plain(), torch.randn(2, 16, 16)
    expected = model.eval()(tokens)
    wrapped(model, drop=RandomDrop(0.75))
    torch.testing.assert_close(model(tokens), expected)
    assert sprint.check(model, tokens).ok


def test_blocks_called_by_index():
    class ByIndex(hosts.DiT):
        def forward(self, x, t):
            tokens, cond = self.embed(x).flatten(2).transpose(1, 2) + self.position, t[:, None].expand(-1, 16)
            for i in range(len(self.blocks)):
                tokens = self.blocks[i](tokens, cond)
            return tokens

    model = wrapped(ByIndex().eval())
    assert sprint.check(model, X, T).ok


@pytest.mark.parametrize("training", [False, True])
def test_checkpointing_by_the_host_gives_the_same_gradients(training):
    class Checkpointed(hosts.DiT):
        def forward(self, x, t):
            tokens, cond = self.embed(x).flatten(2).transpose(1, 2) + self.position, t[:, None].expand(-1, 16)
            for block in self.blocks:
                tokens = checkpoint(block, tokens, cond, use_reentrant=False)
            return self.head(tokens)

    class Same(Checkpointed):
        def forward(self, x, t):
            tokens, cond = self.embed(x).flatten(2).transpose(1, 2) + self.position, t[:, None].expand(-1, 16)
            for block in self.blocks:
                tokens = block(tokens, cond)
            return self.head(tokens)

    results = []
    for kind in (Checkpointed, Same):
        model = kind().train(training)
        torch.manual_seed(1)
        wrapped(model, init="xavier", path_drop=0.5)
        torch.manual_seed(2)
        with sprint.path(model, "sparse"):
            loss = model(X, T).square().sum() + model(2 * X, T).square().sum()  # two forwards before one backward
        loss.backward()
        results.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # float32


def test_our_own_checkpointing_recomputes_and_gives_the_same_gradients():
    results, calls = [], []
    for recompute in (False, True):
        torch.manual_seed(1)
        model = wrapped(hosts.DiT(), init="xavier", path_drop=0.5, checkpoint=recompute)
        model.blocks[3].register_forward_pre_hook(lambda *_: calls.append(1))
        torch.manual_seed(2)
        with sprint.path(model, "sparse"):
            model(X, T).square().sum().backward()
        results.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(calls) == 1 + 2
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # float32


def test_deepcopy_ema_and_state_dict_round_trip():
    model = wrapped(init="xavier")
    twin = copy.deepcopy(model)
    average = torch.optim.swa_utils.AveragedModel(model)
    other = wrapped(hosts.DiT().eval(), init="xavier")
    other.load_state_dict(model.state_dict())
    for m in (model, twin, average.module, other):
        with sprint.path(m, "sparse", subset=KEEP):
            assert m(X, T).equal(by_hand(model, X, T, KEEP))
    with sprint.path(twin, "shallow"):
        assert model(X, T).equal(other(X, T))  # a copy's path is its own


class _Loop(nn.Module):
    """Six blocks, called in a way of one's own."""

    def __init__(self, call, block=None):
        super().__init__()
        self.hidden_size, self.call = 8, call
        self.blocks = nn.ModuleList([(block or (lambda: nn.Linear(8, 8)))() for _ in range(6)])

    def forward(self, x):
        return self.call(list(self.blocks) if self.call is not _halves else self.blocks, x)


def _halves(blocks, x):
    for block in blocks[:3]:
        x = block(x)
    for block in blocks[3:]:
        x = block(x)
    return x


def _each(blocks, x):
    for block in blocks:
        x = block(x)
    return x


TOKENS = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))


def test_lists_called_in_slices():
    model = wrapped(_Loop(_halves).eval(), drop=RandomDrop(0.75), init="xavier")
    assert sprint.check(model, TOKENS).ok
    assert isinstance(model.blocks[:3], nn.ModuleList)  # outside of its forward it is what it was


@pytest.mark.parametrize(
    "call", [lambda blocks, x: _each(blocks[::-1], x), lambda blocks, x: _each(blocks, _each(blocks, x))]
)
def test_blocks_out_of_order_or_twice_are_refused(call):
    with pytest.raises(RuntimeError, match="must run once and in the order of the list"):
        wrapped(_Loop(call))(TOKENS)


def test_blocks_that_are_one_module():
    shared = nn.Linear(8, 8)
    model = wrapped(_Loop(_each, lambda: shared).eval(), drop=RandomDrop(0.75), init="xavier")
    report = sprint.check(model, TOKENS)
    assert {f.name: f.ok for f in report.findings}["shallow path skips the middle"] is None


def test_blocks_whose_results_or_parameters_are_not_what_was_declared():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    class Anything(nn.Linear):
        def forward(self, *args):
            return super().forward(*args)

    def pairs(blocks, x):
        for block in blocks:
            x, _ = block(x)
        return x

    with pytest.raises(ValueError, match="return 2 values, declared are \\('image',\\)"):
        wrapped(_Loop(pairs, lambda: Pair(8, 8)))(TOKENS)
    with pytest.raises(ValueError, match="names no parameter"):
        wrapped(_Loop(_each, lambda: Anything(8, 8)))


def test_hooks_and_dtype_moves():
    model, seen = hosts.DiT().eval(), []
    model.blocks[3].register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
    wrapped(model)
    with sprint.path(model, "sparse"):
        model(X, T)
        assert model.double()(X.double(), T.double()).dtype == torch.float64
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model.float()(X, T).isfinite().all()
    assert seen == [4, 4, 4]


@pytest.mark.parametrize("name", ["full", "sparse", "shallow"])
def test_compiles_without_graph_breaks(name):
    torch.compiler.reset()
    model = wrapped(init="xavier")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with sprint.path(model, name, subset=KEEP if name == "sparse" else None):
        torch.testing.assert_close(compiled(X, T), model(X, T), rtol=1e-4, atol=1e-5)


def test_training_steps_compile_once():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = wrapped(hosts.DiT().train(), init="xavier", path_drop=0.1)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with sprint.path(model, "sparse"):
        for _ in range(4):
            compiled(X, T).square().mean().backward()
    assert counter.frame_count == 1


def test_guidance_and_loss_find_the_paths():
    model, y = wrapped(init="xavier"), torch.tensor([1.0, 2.0])
    guided = sprint.PathDropGuidance(3.0, null=torch.zeros(2))(model, X, 0.5, y)
    t = torch.full((2,), 0.5)
    with sprint.path(model, "shallow"):
        weak = model(X, t, torch.zeros(2))
    torch.testing.assert_close(guided, weak + 3 * (model(X, t, y) - weak))
    images = sprint.sample(model, X, y=y, guidance=sprint.PathDropGuidance(2.0, weak="same"), steps=2)
    assert images.shape == X.shape
    shapes = []
    model.blocks[2].register_forward_hook(lambda module, args, output: shapes.append(output.shape[1]))
    sprint.FlowMatchingLoss()(model, X, y=y, drop=StructuredDrop(0.75)).loss.backward()
    assert shapes == [4]


# what is refused


def test_undeclared_tables_are_named():
    model = wrapped(hosts.DiT(block=hosts.RotaryBlock, rope=True).eval())
    assert model(X, T).shape == X.shape
    message = r"'feat_rope' of the blocks has the shape \(16, 16\).*host=sprint.Host\(\(sprint.Blocks\('blocks', tables"
    with pytest.raises(ValueError, match=message), sprint.path(model, "sparse"):
        model(X, T)
    assert model(X, T).shape == X.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder_depth": 3, "decoder_depth": 3}, "leave no middle of the 6 blocks of DiT"),
        ({"encoder_depth": -1}, "leave no middle"),
        ({"merge": "sum"}, "merge of wrap must be one of 'residual', 'routing', 'mask', got the text 'sum'"),
        ({"host": Host((Blocks("layers"),))}, "DiT has no blocks at 'layers'"),
        ({"host": Host((Blocks("blocks", image="hidden"),))}, "no parameter 'hidden', they take x, c"),
        ({"host": Host((Blocks("blocks"),), width="model_dim")}, "DiT has no attribute 'model_dim', as declared"),
    ],
)
def test_what_cannot_be_wrapped(options, message):
    model = hosts.DiT()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        wrapped(model, **options)
    assert type(model) is hosts.DiT
    assert list(model.state_dict()) == keys


def test_other_refusals():
    model = wrapped()
    with pytest.raises(ValueError, match=r"wrapped already: sprint.unwrap\(model\) first"):
        wrapped(model)
    with pytest.raises(ValueError, match="unknown path 'dense': choose one of full, sparse, shallow"):
        sprint.path(model, "dense")
    with pytest.raises(ValueError, match="leave drop and subset out"):
        sprint.path(model, "full", subset=KEEP)
    with pytest.raises(ValueError, match="needs a drop sampler"):
        sprint.path(wrapped(hosts.DiT(), drop=None), "sparse")
    for function in (sprint.unwrap, sprint.check, lambda m: sprint.path(m, "full")):
        with pytest.raises(ValueError, match="this Linear is not wrapped"):
            function(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="Linear has no list of equal blocks among its attributes"):
        sprint.wrap(nn.Linear(1, 1))
    moved = hosts.DiT()
    moved.head = nn.Linear(16, 12, device="meta")
    with pytest.raises(ValueError, match=r"parameters are on \['cpu', 'meta'\]: move it to one device"):
        wrapped(moved)
    with pytest.raises(ValueError, match="return text, but have no text parameter"):
        sprint.register(hosts.DiT, Host((Blocks("blocks", returns=("image", "text")),)))
    with pytest.raises(ValueError, match="'DiT' names no class by itself"):
        sprint.register("DiT", ROPE)
    for nowhere in ("hosts.Nowhere", "nowhere.DiT"):
        with pytest.raises(ValueError, match=f"there is no class {nowhere}"):
            sprint.register(nowhere, ROPE)
    with pytest.raises(TypeError, match="model of register must be a class of Module or text"):
        sprint.register(int, ROPE)


def test_a_grid_that_does_not_match_the_tokens():
    model = wrapped(grid=(3, 5))
    with pytest.raises(ValueError, match=r"token grid of DiT is \(3, 5\) for 16 tokens"), sprint.path(model, "sparse"):
        model(X, T)


def test_a_forward_that_bypasses_the_list_is_noticed():
    class Bypass(hosts.DiT):
        def forward(self, x, t):
            tokens = self.embed(x).flatten(2).transpose(1, 2)
            for block in self.blocks.children():
                tokens = block(tokens, t[:, None].expand(-1, 16))
            return tokens

    with pytest.raises(RuntimeError, match="did not call its blocks through blocks, so nothing was dropped"):
        wrapped(Bypass())(X, T)


def test_registering_a_class_covers_its_subclasses():
    class Mine(hosts.DiT):
        pass

    sprint.register(hosts.DiT, ROPE)
    assert "hosts.DiT" in sprint.hosts.registered()
    assert sprint.check(wrapped(Mine(block=hosts.RotaryBlock, rope=True).eval()), X, T).ok


def test_a_registration_is_of_a_class_and_not_of_its_name():
    sprint.register("hosts.DiT", ROPE)
    assert wrapped(hosts.DiT(block=hosts.RotaryBlock, rope=True)).sprint.declared
    other = type("DiT", (nn.Module,), {})()  # of another repository
    other.blocks = nn.ModuleList([hosts.Block(16) for _ in range(6)])
    assert not wrapped(other).sprint.declared
