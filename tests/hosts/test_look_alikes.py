"""Models that look like others and work otherwise: right, or refused in words."""

import copy
from dataclasses import dataclass
from typing import NamedTuple

import hosts
import pytest
import torch
from torch import nn

import sprint
from sprint import Blocks, Host, RandomDrop, StructuredDrop, Table

X, T = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.7])
SPARSE = StructuredDrop(0.75)


def wrapped(model, **options):
    return sprint.wrap(model.eval(), **{"drop": SPARSE, "path_drop": 0.0, **options})


class Loop(hosts.DiT):
    """A DiT whose loop over its blocks is a method."""

    def __init__(self, *, block=hosts.Block):
        super().__init__(block=block)

    def run(self, tokens, cond):
        for block in self.blocks:
            tokens = block(tokens, cond)
        return tokens

    def tokens(self, x):
        return self.embed(x).flatten(2).transpose(1, 2) + self.position

    def forward(self, x, t):
        tokens = self.run(self.tokens(x), t[:, None].expand(-1, 16))
        return nn.functional.fold(self.head(tokens).transpose(1, 2), x.shape[-2:], 2, stride=2)


# classes


def test_a_method_that_a_subclass_overrides_stays():
    class Doubled(Loop):
        def run(self, tokens, cond):
            return 2 * super().run(tokens, cond) + 1

    model = Doubled().eval()
    expected = model(X, T)
    assert wrapped(model)(X, T).equal(expected)
    assert sprint.check(model, X, T, repeats=1).ok
    sprint.path(model, "sparse")
    with pytest.raises(RuntimeError, match="Doubled.run runs the blocks outside of forward"):
        model.run(model.tokens(X), T[:, None].expand(-1, 16))


def test_copies_made_within_a_path_are_on_the_full_one():
    model = wrapped(Loop())
    with sprint.path(model, "sparse"):
        twin = copy.deepcopy(model)
    assert twin.sprint.route[0] == "full"
    sprint.path(model, "sparse")  # from now on
    assert copy.deepcopy(model).sprint.route[0] == "sparse"


# blocks


class InPlace(hosts.Block):
    def forward(self, x, c):
        x += super().forward(x * 1, c)
        return x


@pytest.mark.parametrize("depths", [(2, 2), (0, 2)])
def test_blocks_that_change_their_tokens_in_place(depths):
    class Same(hosts.Block):
        def forward(self, x, c):
            return x + super().forward(x, c)

    results = []
    for block in (InPlace, Same):
        torch.manual_seed(1)
        model = wrapped(Loop(block=block), encoder_depth=depths[0], decoder_depth=depths[1], init="xavier")
        output = model(X, T)
        results.append([output, *torch.autograd.grad(output.square().mean(), [model.sprint.fusion.proj.weight])])
        assert sprint.check(model, X, T, repeats=1).ok
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)  # float32


class Returning(hosts.Block):
    kind = tuple

    def forward(self, x, c):
        return self.kind([super().forward(x, c)])


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize("depth", [2, 0])
def test_blocks_that_return_a_tuple_of_one(kind, depth):
    class Model(Loop):
        def run(self, tokens, cond):
            for block in self.blocks:
                (tokens,) = block(tokens, cond)
            return tokens

    model = wrapped(Model(block=type("Returning", (Returning,), {"kind": kind})), encoder_depth=depth)
    assert sprint.check(model, X, T, repeats=1).ok


class Special(hosts.Block):
    pass


def test_blocks_are_equal_to_themselves():
    class Comparing(Loop):
        def __init__(self):
            super().__init__()
            self.skipped = {self.blocks[1]}

        def run(self, tokens, cond):
            for i, block in enumerate(self.blocks):
                assert (block is self.blocks[3]) == (i == 3)
                assert (block == self.blocks[3]) == (i == 3)
                assert (block in [*self.skipped]) == (block in self.skipped) == (i == 1)
                tokens = block(tokens, cond)
            return tokens

    wrapped(Comparing())(X, T)


class Reading(hosts.Block):
    def forward(self, x, c, y):
        return super().forward(x, c) + y.mean(1, keepdim=True)


class Turning(hosts.Block):
    def forward(self, x, c, rope):
        return super().forward(x + rope, c)


def test_blocks_of_two_signatures_in_turns():
    class Turns(Loop):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([(Turning, Reading)[i % 2](16) for i in range(6)])
            self.rope = torch.randn(16, 16)

        def forward(self, x, t, y):
            tokens, cond = self.tokens(x), t[:, None].expand(-1, 16)
            for block in self.blocks:
                tokens = block(tokens, cond, y if isinstance(block, Reading) else self.rope)
            return nn.functional.fold(self.head(tokens).transpose(1, 2), x.shape[-2:], 2, stride=2)

    host = Host((Blocks("blocks", tables={"rope": Table(dim=0, batched=False)}, others=("y",)),))
    for texts in (5, 16):
        text = torch.randn(2, texts, 16)
        assert sprint.check(wrapped(Turns(), host=host), X, T, text, repeats=1).ok
    undeclared = wrapped(Turns())
    with pytest.raises(ValueError, match="'rope' of the blocks has the shape"), sprint.path(undeclared, "sparse"):
        undeclared(X, T, text)


# what holds a table


class Named(NamedTuple):
    c: torch.Tensor
    rope: torch.Tensor


@dataclass(frozen=True)
class Fields:
    c: torch.Tensor
    rope: torch.Tensor


class Attributes(dict):
    __getattr__ = dict.__getitem__


@pytest.mark.parametrize(("kind", "item"), [(Named, 1), (Fields, "rope"), (Attributes, "rope")])
def test_contexts_stay_what_they_are(kind, item):
    class Block(hosts.Block):
        def forward(self, x, context):
            assert type(context) is kind
            return super().forward(x + context.rope, context.c)

    class Model(Loop):
        def run(self, tokens, cond):
            context = kind(c=cond.contiguous(), rope=self.position[0].detach())
            for block in self.blocks:
                tokens = block(tokens, context)
            return tokens

    bare = wrapped(Model(block=Block))
    message = r"'context' of the blocks has the shape \(16, 16\)"
    with pytest.raises(ValueError, match=message), sprint.path(bare, "sparse"):
        bare(X, T)
    host = Host((Blocks("blocks", tables={"context": Table(dim=0, batched=False, item=item)}),))
    model = wrapped(Model(block=Block), host=host)
    report = sprint.check(model, X, T, repeats=1)
    assert report.ok
    model.sprint.weak_half = "first"
    with torch.no_grad():
        assert model(X.repeat(2, 1, 1, 1), T.repeat(2)).shape == (4, 3, 8, 8)


# batches


@pytest.mark.parametrize("own", [nn.Parameter, nn.Buffer])
def test_a_shared_vector_is_not_halved_because_it_is_as_long_as_the_batch(own):
    class Weighing(hosts.Block):
        def forward(self, x, c, w):
            assert len(w) == 4
            return super().forward(x, c) * w.mean()

    class Model(Loop):
        def __init__(self):
            super().__init__(block=Weighing)
            self.w = own(torch.linspace(0.5, 1.5, 4))

        def run(self, tokens, cond):
            for block in self.blocks:
                tokens = block(tokens, cond, self.w)
            return tokens

    assert sprint.check(wrapped(Model()), X, T, repeats=1).ok


class TokensFirst(Loop):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0) for _ in range(6))

    def run(self, tokens, cond):
        tokens = tokens.transpose(0, 1)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens.transpose(0, 1)


def test_a_declaration_does_not_let_tokens_come_first():
    model = wrapped(TokensFirst(), host=Host((Blocks("blocks"),)), drop=RandomDrop(0.5))
    assert model(X, T).shape == X.shape
    message = r"\(16, 2, 16\) for a batch of 2, expected \(B, N, C\): build the blocks with batch_first=True$"
    with pytest.raises(ValueError, match=message), sprint.path(model, "sparse"):
        model(X, T)


# what fails says why


def test_other_tokens_are_named():
    class Grid(Loop):
        def run(self, tokens, cond):
            return super().run(tokens.unflatten(1, (4, 4)), cond).flatten(1, 2)

    with pytest.raises(ValueError, match=r"got 'x' of the shape \(2, 4, 4, 16\), expected the tokens as one tensor"):
        wrapped(Grid(block=hosts.Block))(X, T)

    class Dict(hosts.Block):
        def forward(self, state):
            return {**state, "x": super().forward(state["x"], state["c"])}

    class Passing(Loop):
        def run(self, tokens, cond):
            state = {"x": tokens, "c": cond}
            for block in self.blocks:
                state = block(state)
            return state["x"]

    with pytest.raises(ValueError, match="got 'state' as a dict, expected the tokens as one tensor"):
        wrapped(Passing(block=Dict))(X, T)


def test_what_the_loop_adds_and_merges_between_middle_blocks():
    class Adding(Loop):
        def run(self, tokens, cond):
            first = tokens
            for block in self.blocks:
                tokens = block(tokens, cond) + first
            return tokens

    model = wrapped(Adding())
    with pytest.raises(RuntimeError, match="between its middle blocks, where it has 4 of 16"), sprint.path(model, "sparse"):
        model(X, T)

    class Merging(Loop):
        def run(self, tokens, cond):
            for i, block in enumerate(self.blocks):
                tokens = block(tokens[:, ::2] if i == 3 else tokens, cond)
            return tokens.repeat_interleave(2, 1)

    with pytest.raises(ValueError, match="changes the number of its tokens between middle blocks of 'blocks', from 16 to 8"):
        wrapped(Merging())(X, T)


def test_a_dictionary_of_blocks():
    model = Loop()
    model.blocks = nn.ModuleDict({str(i): block for i, block in enumerate(model.blocks)})
    with pytest.raises(ValueError, match="'blocks' is a ModuleDict.*keep the blocks in a ModuleList"):
        wrapped(model, host=Host((Blocks("blocks"),)))


class ClassToken(Loop):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 16))

    def forward(self, x, t):
        tokens = torch.cat([self.token.expand(len(x), -1, -1), self.tokens(x)], 1)
        return self.head(self.run(tokens, t[:, None].expand(-1, 16))[:, 1:])


class PackedClassToken(ClassToken):
    def tokens(self, x):
        return x @ self.embed.weight.flatten(1).T


@pytest.mark.parametrize("host", [None, Host((Blocks("blocks"),))])
@pytest.mark.parametrize(("kind", "x"), [(ClassToken, X), (PackedClassToken, torch.randn(2, 16, 12))])
def test_a_class_token_is_not_dropped_without_a_word(kind, x, host):
    model = wrapped(kind(), host=host, drop=RandomDrop(0.8))
    with pytest.raises(ValueError, match=r"unknown for 17 tokens: .*grid=\(17,\)"), sprint.path(model, "sparse"):
        model(x, T)
    with sprint.path(model, "sparse", grid=(17,)):
        model(x, T)


def test_an_auxiliary_loss_is_no_text():
    class Mixture(hosts.Block):
        def forward(self, x, c):
            x = super().forward(x, c)
            return x, x.square().mean()

    class Summing(Loop):
        def run(self, tokens, cond):
            for block in self.blocks:
                tokens, _ = block(tokens, cond)
            return tokens

    with pytest.raises(ValueError, match="return 2 values, declared are .*such as a loss"):
        wrapped(Summing(block=Mixture))(X, T)
    host = Host((Blocks("blocks", returns=("image", "text"), text="c"),))
    with pytest.raises(ValueError, match="return a tensor of 0 axes as the text, and got 'c' with 2"):
        wrapped(Summing(block=Mixture), host=host)(X, T)
