"""What users and tools do with a wrapped model's forward, its blocks and its class."""

import copy
import functools
import threading

import hosts
import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import sprint
from sprint import Blocks, Host, RandomDrop, StructuredDrop, TokenSubset

X, T = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.7])
TOKENS = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))


def wrapped(model=None, **options):
    return sprint.wrap(model or hosts.DiT().eval(), **{"drop": StructuredDrop(0.75), "path_drop": 0.0, **options})


def lengths(model, *args, path="sparse"):
    """Tokens that each middle block saw."""
    seen = []
    hooks = [b.register_forward_hook(lambda m, a, out: seen.append(len(out[0]))) for b in list(model.blocks)[2:4]]
    with sprint.path(model, path):
        model(*args)
    for hook in hooks:
        hook.remove()
    return seen


def tokens_of(model, x, t):
    return model.embed(x).flatten(2).transpose(1, 2) + model.position, t[:, None].expand(-1, 16)


class Loop(hosts.DiT):
    """A DiT whose blocks are called in a way of one's own."""

    def __init__(self, call, *, kind=nn.ModuleList, block=hosts.Block, count=6):
        super().__init__(block=block)
        self.blocks, self.call = kind(self.blocks[:count]) if kind is nn.ModuleList else kind(*self.blocks[:count]), call

    def forward(self, x, t, y=None):
        return self.head(self.call(self, *tokens_of(self, x, t)))


def each(blocks, tokens, cond):
    for block in blocks:
        tokens = block(tokens, cond)
    return tokens


# a forward of the model's own, beside its class's: accelerate, hooks, offloading


def own_forward(model):
    inner = model.forward

    @functools.wraps(inner)
    def forward(*args, **kwargs):
        return inner(*args, **kwargs)

    model.forward = forward
    return model


@pytest.mark.parametrize("before", [True, False])
def test_a_model_with_a_forward_of_its_own(before):
    expected = hosts.DiT().eval()(X, T)
    model = wrapped(own_forward(hosts.DiT().eval())) if before else own_forward(wrapped())
    assert model(X, T).equal(expected)
    assert lengths(model, X, T) == [4, 4]
    assert lengths(model, X, T, path="shallow") == []
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert lengths(compiled._orig_mod, X, T) == [4, 4]
    del model.forward  # the hook is removed
    assert lengths(model, X, T) == [4, 4]
    own_forward(model)
    assert sprint.unwrap(model)(X, T).equal(expected)


def test_classes_of_wrapped_models_make_hosts():
    again = type(wrapped())().eval()
    assert again(X, T).equal(hosts.DiT().eval()(X, T))
    assert sprint.unwrap(wrapped(again))(X, T).equal(again(X, T))


# blocks that are used as what they are


def test_blocks_are_themselves_in_the_loop():
    def call(model, tokens, cond):
        for i, block in enumerate(model.blocks):
            assert isinstance(block, hosts.Block)
            assert isinstance(block, nn.Module)
            block.seen = block.index = block.place = i  # names of no meaning to us
            assert block.index == i
            block.gone = True
            del block.gone
            tokens = block(tokens, cond) if isinstance(block, hosts.Block) else tokens
        return tokens

    model = wrapped(Loop(call).eval())
    assert sprint.check(model, X, T).ok
    assert [(block.seen, block.index, block.place) for block in model.blocks] == [(i, i, i) for i in range(6)]
    assert not hasattr(model.blocks[0], "gone")
    torch.compiler.reset()
    expected = model(X, T)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(X, T), expected)


CALLS = {
    "sequential slices": lambda m, x, c: m.blocks[3:](m.blocks[:3](x)),
    "sum": lambda m, x, c: each(m.blocks + m.more, x, c),
    "numpy": lambda m, x, c: each([m.blocks[np.int64(i)] for i in range(-6, 0)], x, c),
    "reversed": lambda m, x, c: each(list(reversed(m.blocks))[::-1], x, c),
}


@pytest.mark.parametrize("name", CALLS)
def test_ways_to_call_a_list(name):
    options = {}
    if name == "sequential slices":

        class NoCond(hosts.Block):
            def forward(self, x):
                return super().forward(x, x[:, 0])

        options = {"kind": nn.Sequential, "block": NoCond}
    model = Loop(CALLS[name], **options).eval()
    model.more = nn.ModuleList([hosts.Block(16)]).eval()
    host = Host((Blocks("blocks"), Blocks("more"))) if name == "sum" else Host((Blocks("blocks"),))
    expected = model(X, T)
    wrapped(model, host=host, drop=RandomDrop(0.75))
    assert model(X, T).equal(expected)
    assert lengths(model, X, T) == [4, 4]


def test_a_call_within_a_call_has_its_own_route():
    class SelfConditioned(hosts.DiT):
        def forward(self, x, t, previous=None):
            tokens, cond = tokens_of(self, x, t)
            half = each(list(self.blocks)[:0], tokens, cond)
            if previous is None:
                previous = self.forward(x, t, previous=half)
            return each(self.blocks, tokens + previous, cond)

    model = SelfConditioned().eval()
    expected = model(X, T)
    assert wrapped(model)(X, T).equal(expected)
    assert lengths(model, X, T) == [4] * 4


@pytest.mark.parametrize("skipped", [(2,), (3,), (2, 3), (1, 2, 3), (0, 5)])
@pytest.mark.parametrize("path", ["full", "sparse", "shallow"])
def test_skipped_blocks(skipped, path):
    def call(model, tokens, cond):
        return each([b for i, b in enumerate(model.blocks) if i not in skipped], tokens, cond)

    model = Loop(call).eval()
    expected = model(X, T)
    wrapped(model)
    assert model(X, T).equal(expected)
    assert lengths(model, X, T, path=path) == [{"full": 16, "sparse": 4}.get(path)] * (
        0 if path == "shallow" else 2 - len({2, 3} & {*skipped})
    )
    with sprint.path(model, path):
        assert model(X, T).shape == expected.shape


def test_an_early_exit():
    model = wrapped(Loop(lambda m, x, c: each(list(m.blocks)[:3], x, c)))
    with pytest.raises(RuntimeError, match=r"ended after block 2, before the tokens were fused: .* larger decoder_depth"):
        model(X, T)


def test_methods_beside_forward_refuse_other_paths():
    class Features(hosts.DiT):
        def features(self, x, t):
            return each(self.blocks, *tokens_of(self, x, t))

        def forward(self, x, t):
            return self.head(self.features(x, t))

    model = wrapped(Features().eval())
    assert model.features(X, T).shape == (2, 16, 16)
    assert lengths(model, X, T) == [4, 4]
    sprint.path(model, "sparse")
    with pytest.raises(RuntimeError, match="Features.features runs the blocks outside of forward, where the sparse path"):
        model.features(X, T)


def test_results_are_checked_where_the_middle_does_not_run():
    class Pair(hosts.Block):
        def forward(self, x, c):
            return super().forward(x, c), None

    def call(model, tokens, cond):
        for block in model.blocks:
            tokens, _ = block(tokens, cond)
        return tokens

    model = wrapped(Loop(call, block=Pair))
    with pytest.raises(ValueError, match="return 2 values, declared are"), sprint.path(model, "shallow"):
        model(X, T)


# wrapping and unwrapping: all or nothing


def test_shared_blocks_leave_the_second_model_alone():
    one, two = hosts.DiT(), hosts.DiT()
    two.blocks = one.blocks
    wrapped(one)
    with pytest.raises(ValueError, match="belong to a wrapped model already"):
        wrapped(two)
    assert type(two) is hosts.DiT
    assert "sprint" not in two._modules


def test_unwrapping_what_was_changed_since():
    model = wrapped()
    outer = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match="OptimizedModule holds a wrapped DiT: unwrap that one"):
        sprint.unwrap(outer)
    model.scale = nn.Parameter(torch.ones(1))
    nn.utils.parametrize.register_parametrization(model, "scale", nn.Identity())
    with pytest.raises(ValueError, match="was changed after it was wrapped"):
        sprint.unwrap(model)
    assert lengths(model, X, T) == [4, 4]
    nn.utils.parametrize.remove_parametrizations(model, "scale")


def test_fully_shard_comes_after_wrapping():
    fsdp = pytest.importorskip("torch.distributed.fsdp").FSDPModule
    model = hosts.DiT()
    model.__class__ = type("FSDPDiT", (fsdp, hosts.DiT), {})
    with pytest.raises(ValueError, match=r"sharded already.*wrap it before fully_shard\(model\)"):
        wrapped(model)
    model.__class__ = hosts.DiT
    wrapped(model).__class__ = type("FSDPDiT", (fsdp, type(model)), {})
    with pytest.raises(ValueError, match="the class of this FSDPDiT was changed after it was wrapped"):
        sprint.unwrap(model)
    assert "sprint" in model._modules


def test_replaced_blocks():
    model = wrapped()
    model.blocks = nn.ModuleList(hosts.Block(16) for _ in range(6))
    with pytest.raises(RuntimeError, match=r"'blocks' of DiT was replaced .* wrap it again"):
        model(X, T)
    model = wrapped()
    model.blocks.append(hosts.Block(16))
    with pytest.raises(RuntimeError, match="has another length since it was wrapped"):
        model(X, T)


def test_a_single_block_inside_a_submodule():
    model = nn.Module()
    model.width, model.net = 16, nn.Module()
    model.net.m, model.first = hosts.Block(16), nn.ModuleList([hosts.Block(16)] * 2)
    host = Host((Blocks("first"), Blocks("net.m")))
    with pytest.raises(ValueError, match="'net.m' is one block inside a submodule, whose call cannot be seen"):
        wrapped(model, host=host, encoder_depth=1, decoder_depth=1)


# paths


def test_a_path_can_be_entered_again():
    model, seen = wrapped(), []
    model.blocks[2].register_forward_hook(lambda m, a, out: seen.append(out.shape[1]))
    sparse = sprint.path(model, "sparse")
    sprint.path(model, "full")
    for _ in range(2):
        with sparse:
            model(X, T)
            with sparse:
                model(X, T)
            model(X, T)
        model(X, T)
    assert seen == [4, 4, 4, 16] * 2


def test_models_behind_others():
    model = wrapped()
    holder = nn.ModuleDict({"student": model, "other": nn.Linear(1, 1)})
    with sprint.path(holder, "shallow"):
        assert model.sprint.route[0] == "shallow"
    holder["teacher"] = copy.deepcopy(model)
    with pytest.raises(ValueError, match="holds 2 wrapped models: pass the one that is meant"):
        sprint.path(holder, "shallow")
    with pytest.raises(ValueError, match=r"wrap the model before OptimizedModule: sprint.wrap\(model._orig_mod"):
        sprint.wrap(torch.compile(hosts.DiT()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop": 0.75}, "drop of wrap must be a drop sampler such as .* got 0.75"),
        ({"drop": StructuredDrop}, "drop of wrap must be a drop sampler .* got the class StructuredDrop"),
        ({"grid": 16}, "grid of wrap must be a sequence of whole numbers"),
        ({"host": "SD3Transformer2DModel"}, "host of wrap must be a Host or None, got the text"),
        ({"path_drop": 2, "merge": "routing"}, r"path_drop is a probability in \[0, 1\], got 2"),
        ({"path_drop": -1, "merge": "mask"}, r"path_drop is a probability in \[0, 1\], got -1"),
    ],
)
def test_bad_options_of_wrap(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        wrapped(**options)


def test_bad_options_of_path():
    model, keep = wrapped(), torch.tensor([[1, 2], [3, 4]])
    with pytest.raises(TypeError, match="subset must be a TokenSubset, got Tensor"):
        sprint.path(model, "sparse", subset=keep)
    with pytest.raises(ValueError, match="give one of them"):
        sprint.path(model, "sparse", subset=TokenSubset(keep, 16), drop=RandomDrop(0.5))
    with pytest.raises(TypeError, match="drop must be a drop sampler, got 0.5"):
        sprint.path(model, "sparse", drop=0.5)
    assert model.sprint.route[0] == "full"


def test_classes_of_the_same_name_as_a_registered_one():
    class VisionTransformer(hosts.DiT):
        pass

    model = wrapped(VisionTransformer().eval())
    assert not model.sprint.declared
    assert lengths(model, X, T) == [4, 4]


def test_two_threads_on_one_model_are_right_or_refused():
    model = sprint.wrap(hosts.DiT().eval(), drop=StructuredDrop(0.75))
    inside, go_on = threading.Event(), threading.Event()
    seen = {}

    def slow(*_):
        inside.set()
        assert go_on.wait(60)

    hook = model.blocks[0].register_forward_pre_hook(slow)

    def first():
        with torch.no_grad(), sprint.path(model, "shallow"):
            seen["first"] = model(X, T)

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(60)
    for job in (lambda: model(X, T), lambda: sprint.path(model, "sparse")):
        with pytest.raises(RuntimeError, match="at work in another thread"):
            job()
    go_on.set()
    thread.join()
    hook.remove()
    assert model.sprint.route[0] == "full"
    with torch.no_grad(), sprint.path(model, "shallow"):
        assert model(X, T).equal(seen["first"])
        assert copy.deepcopy(model).sprint.held_by == []


class AnySize(hosts.DiT):
    """Without a table of positions."""

    def forward(self, x, t, y=None):
        tokens, cond = self.embed(x).flatten(2).transpose(1, 2), t[:, None].expand(-1, 16)
        for block in self.blocks:
            tokens = block(tokens, cond)
        return torch.nn.functional.fold(self.head(tokens).transpose(1, 2), x.shape[-2:], 2, stride=2)


def graphs(sizes, path=None):
    """How many torch.compile makes for batches (B, rows, columns)."""
    torch._dynamo.reset()
    counter, model = CompileCounter(), AnySize(depth=3).eval()
    if path is not None:
        sprint.path(sprint.wrap(model, encoder_depth=1, decoder_depth=1, drop=StructuredDrop(0.75)), path)
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        for batch, rows, columns in sizes:
            compiled(torch.zeros(batch, 3, 2 * rows, 2 * columns), torch.zeros(batch))
    return counter.frame_count


def test_as_many_graphs_as_the_host():
    """Batches of several sizes: dynamo makes the second one's size a variable, and no more graphs."""
    batches = [(batch, 4, 4) for batch in (2, 3, 5, 7, 9)]
    assert graphs(batches) == graphs(batches, "full") == graphs(batches, "sparse") == 2


def test_buckets_make_as_many_graphs_as_in_the_host_and_one_per_grid_when_sparse():
    buckets = [(2, *grid) for grid in ((4, 4), (4, 6), (6, 4), (5, 7), (3, 5), (4, 4), (7, 5), (5, 7))]
    grids = len({*buckets})
    assert graphs(buckets) == graphs(buckets, "full") < grids
    assert graphs(buckets, "sparse") <= grids
    mixed = [(batch, rows, columns) for batch, (_, rows, columns) in enumerate(buckets, start=2)]
    assert graphs(mixed) == graphs(mixed, "full")
    assert graphs(mixed, "sparse") <= grids + 1  # and one when the batch becomes a variable


@pytest.mark.parametrize("merge", ["residual", "mask"])
@pytest.mark.parametrize("path", ["full", "sparse"])
def test_a_trained_mask_token_has_a_gradient_in_every_step(merge, path):
    """DistributedDataParallel waits for the gradient of each parameter that learns."""
    model = wrapped(hosts.DiT().train(), merge=merge, learnable_mask=True)
    with sprint.path(model, path):
        output = model(X, T)
    output.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.sprint.parameters())
    frozen = wrapped(hosts.DiT().train(), merge=merge, learnable_mask=False)
    assert path == "sparse" or frozen(X, T).equal(output)


def test_work_on_the_whole_batch_between_middle_blocks_is_no_guided_batch():
    class Adding(hosts.DiT):
        def forward(self, x, t):
            tokens, cond = self.embed(x).flatten(2).transpose(1, 2) + self.position, t[:, None].expand(-1, 16)
            for block in self.blocks:
                tokens = block(tokens, cond) + x.mean((1, 2, 3))[:, None, None]
            return tokens

    model = wrapped(Adding().eval())
    model.sprint.weak_half = "first"
    with torch.no_grad(), pytest.raises(ValueError, match="works with the whole batch between them: guide it in two calls"):
        model(X.repeat(2, 1, 1, 1), T.repeat(2))
