"""Models that `wrap` takes without a declaration, what it infers, and that a declaration turns no guard off."""

import re

import hosts
import pytest
import torch
from torch import nn

import sprint
from sprint import Blocks, Host, RandomDrop, StructuredDrop

X, T = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.7])


def anonymous(**options):
    """A DiT without any attribute that tells its width, as the original one."""
    model = hosts.DiT(**options).eval()
    del model.hidden_size
    return model


def test_the_width_is_read_off_the_blocks():
    model = sprint.wrap(anonymous(), drop=StructuredDrop(0.75))
    assert model.sprint.fusion.dim == 16
    assert sprint.check(model, X, T).ok


def test_an_attribute_that_the_blocks_contradict_does_not_count():
    model = anonymous()
    model.width = 64  # of the images, say
    assert sprint.wrap(model, drop=StructuredDrop(0.75)).sprint.fusion.dim == 16
    other = hosts.DiT().eval()
    other.dim = 48
    assert sprint.wrap(other).sprint.fusion.dim == 16  # hidden_size is borne out


def test_an_ambiguous_width_is_asked_for_in_one_line():
    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.b(self.a(x))

    model = nn.Module()
    model.blocks = nn.ModuleList([Square() for _ in range(6)])
    with pytest.raises(ValueError, match=r"ambiguous \(4, 8\).*host=sprint.Host\(\(sprint.Blocks\('blocks'\),\), width"):
        sprint.wrap(model)


def test_a_wrong_width_is_noticed_at_the_first_call():
    model = sprint.wrap(anonymous(), host=Host((Blocks("blocks"),), width=lambda model: 32), drop=StructuredDrop(0.75))
    for path in ("full", "sparse", "shallow"):
        message = "are 16 wide, the fusion was made for 32.*width=lambda model: 16"
        with pytest.raises(ValueError, match=message), sprint.path(model, path):
            model(X, T)


def test_declaring_the_width_does_not_turn_the_guard_off():
    """The kept tokens would get the first rows of a table that the block cuts."""

    class Cutting(hosts.Block):
        def forward(self, x, c, feat_rope=None):
            return super().forward(x + feat_rope[: x.shape[1]], c)

    width = Host((Blocks("blocks"),), width=lambda model: 16)
    model = sprint.wrap(anonymous(block=Cutting, rope=True), host=width, drop=StructuredDrop(0.75))
    message = "'feat_rope' of the blocks has the shape .* one row per token"
    with pytest.raises(ValueError, match=message), sprint.path(model, "sparse"):
        model(X, T)


def test_a_text_of_as_many_tokens_is_declared_as_such():
    class Reading(hosts.Block):
        def forward(self, x, c, feat_rope=None):
            return super().forward(x, c) + feat_rope.mean(0)

    text = Host((Blocks("blocks", others=("feat_rope",)),))
    model = sprint.wrap(anonymous(block=Reading, rope=True), host=text, drop=StructuredDrop(0.75))
    with sprint.path(model, "sparse"):
        assert model(X, T).shape == X.shape


def test_long_skips_with_tokens_in_front_of_the_image():
    model = hosts.UViT().eval()
    model.extras = 1
    del model.embed_dim
    model = sprint.wrap(model, encoder_depth=2, decoder_depth=2, drop=StructuredDrop(0.75))
    report = sprint.check(model, X, T)
    assert report.ok, report
    seen = []
    model.mid_block.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    with sprint.path(model, "sparse"):
        model(X, T)
    assert seen == [1 + 4]


class Flux(nn.Module):
    """The original Flux's names: double blocks of image and text, single blocks of both together, one table for all."""

    class Double(hosts.Block):
        def forward(self, img, txt, vec, pe):
            both = super().forward(torch.cat([txt, img], 1) * pe[:, 0, :, :, 0, 0].repeat(1, 1, 2), vec)
            return both[:, txt.shape[1] :], both[:, : txt.shape[1]]

    class Single(hosts.Block):
        def forward(self, x, vec, pe):
            return super().forward(x * pe[:, 0, :, :, 0, 0].repeat(1, 1, 2), vec)

    def __init__(self, dim=16):
        super().__init__()
        torch.manual_seed(0)
        self.double_blocks = nn.ModuleList([self.Double(dim) for _ in range(3)])
        self.single_blocks = nn.ModuleList([self.Single(dim) for _ in range(3)])
        self.img_in, self.final = nn.Linear(3, dim), nn.Linear(dim, 3)

    skipped = ()  # numbers of double blocks

    def forward(self, img, txt, t):
        pe = torch.linspace(0.5, 1.5, (img.shape[1] + txt.shape[1]) * 8).view(1, 1, -1, 8, 1, 1).expand(-1, -1, -1, -1, 2, 2)
        img, vec = self.img_in(img), t[:, None].expand(-1, 16)
        for i, block in enumerate(self.double_blocks):
            if i not in self.skipped:
                img, txt = block(img, txt, vec, pe)
        stream = torch.cat([txt, img], 1)
        for block in self.single_blocks:
            stream = block(stream, vec, pe)
        return self.final(stream[:, txt.shape[1] :])


@pytest.mark.parametrize("depths", [(1, 1), (2, 2), (4, 1), (1, 4)])
def test_double_and_single_blocks(depths):
    model = sprint.wrap(
        Flux().eval(), encoder_depth=depths[0], decoder_depth=depths[1], drop=StructuredDrop(0.75), grid=(4, 4)
    )
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(2, 16, 3, generator=generator), torch.randn(2, 5, 16, generator=generator), T
    report = sprint.check(model, *inputs)
    assert report.ok, report


@pytest.mark.parametrize("skipped", [(1,), (0, 1)])
def test_a_middle_of_double_blocks_that_are_all_skipped(skipped):
    model = sprint.wrap(Flux().eval(), encoder_depth=1, decoder_depth=4, drop=StructuredDrop(0.75), grid=(4, 4))
    model.skipped = skipped
    generator = torch.Generator().manual_seed(1)
    images, texts = torch.randn(2, 16, 3, generator=generator), torch.randn(2, 5, 16, generator=generator)
    expected = [model(images, texts, T)]
    with sprint.path(model, "shallow"):
        expected.append(model(images, texts, T))
    model.sprint.weak_half = "second"
    torch.testing.assert_close(model(*(torch.cat([value, value]) for value in (images, texts, T))), torch.cat(expected))


def test_a_list_whose_last_block_is_of_another_class():
    model = anonymous()
    model.blocks.append(hosts.Block(16))
    model.blocks[-1].__class__ = type("Last", (hosts.Block,), {})
    assert sprint.check(sprint.wrap(model, drop=StructuredDrop(0.75)), X, T).ok


def test_several_lists_are_named_in_a_line_that_works():
    class Two(hosts.DiT):
        def __init__(self):
            super().__init__()
            self.later = nn.ModuleList([hosts.Block(16) for _ in range(3)])

        def forward(self, x, t):
            tokens = self.embed(x).flatten(2).transpose(1, 2) + self.position
            for block in (*self.blocks, *self.later):
                tokens = block(tokens, t[:, None].expand(-1, 16))
            return nn.functional.fold(self.head(tokens).transpose(1, 2), x.shape[-2:], 2, stride=2)

    with pytest.raises(ValueError, match="has 2 lists of blocks") as raised:
        sprint.wrap(Two())
    lines = re.findall(r"sprint\.wrap\(model, host=(.*?)\)(?= or|\. If|$)", str(raised.value))
    one, other, host = (eval(line, {"sprint": sprint}) for line in lines)  # as pasted
    assert (one, other) == (Host((Blocks("blocks"),)), Host((Blocks("later"),)))
    assert host == Host((Blocks("blocks"), Blocks("later")))
    assert sprint.check(sprint.wrap(Two().eval(), host=host, drop=RandomDrop(0.75)), X, T).ok


def test_lists_in_parts_are_named_in_a_line_that_works():
    class Holding(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = hosts.DiT()

        def forward(self, x, t):
            return self.inner(x, t)

    with pytest.raises(ValueError, match="but in its parts") as raised:
        sprint.wrap(Holding())
    (line,) = re.findall(r"sprint\.wrap\(model, host=(.*?\)\))\)", str(raised.value))
    host = eval(line, {"sprint": sprint})
    assert host == Host((Blocks("inner.blocks"),))
    assert sprint.check(sprint.wrap(Holding().eval(), host=host, drop=StructuredDrop(0.75)), X, T).ok


@pytest.mark.parametrize("shape", [(16, 16), (1, 16, 8)])
def test_tables_are_named_in_a_line_that_can_be_pasted(shape):
    class Taking(hosts.Block):
        def forward(self, x, c, rope):
            return super().forward(x, c)

    class Model(hosts.DiT):
        def forward(self, x, t):
            tokens, cond = self.embed(x).flatten(2).transpose(1, 2) + self.position, t[:, None].expand(-1, 16)
            for block in self.blocks:
                tokens = block(tokens, cond, torch.zeros(shape))
            return tokens

    model = sprint.wrap(Model(block=Taking), drop=StructuredDrop(0.75))
    with pytest.raises(ValueError, match="seems to hold one row") as raised, sprint.path(model, "sparse"):
        model(X, T)
    (line,) = re.findall(r"sprint\.wrap\(model, host=(.*?,\)\))\), or, if", str(raised.value))
    table = {(16, 16): sprint.Table(dim=(0, 1), batched=False), (1, 16, 8): sprint.Table(dim=1)}[shape]
    assert eval(line, {"sprint": sprint}) == Host((Blocks("blocks", tables={"rope": table}),))
