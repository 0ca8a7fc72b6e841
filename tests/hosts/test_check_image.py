"""`check`: what may be dropped is of the image, stands where the grid says, and nobody counts it."""

import hosts
import pytest
import torch
from torch import nn

import sprint
from sprint import Blocks, Host, RandomDrop, StructuredDrop

X, T = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.7])
TEXT = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
SPARSE, IMAGE = StructuredDrop(0.75), "dropped tokens are the image's"


class Stream(hosts.DiT):
    """Other tokens behind those of the image."""

    def forward(self, x, t, *others):
        tokens, cond = self.embed(x).flatten(2).transpose(1, 2) + self.position, t[:, None].expand(-1, 16)
        tokens = torch.cat([tokens, *others], dim=1)
        for block in self.blocks:
            tokens = block(tokens, cond)
        return nn.functional.fold(self.head(tokens[:, :16]).transpose(1, 2), x.shape[-2:], 2, stride=2)


def check(model, *args, **options):
    return sprint.check(sprint.wrap(model.eval(), **{"drop": SPARSE, **options}), X, T, *args, repeats=1)


def test_a_stream_in_the_other_order():
    count = {"image_tokens": lambda model, arguments, length: 16}
    assert check(Stream(), TEXT, host=Host((Blocks("blocks", stream="image+text"),), **count)).ok
    with pytest.raises(ValueError, match=f"FAILED {IMAGE} +5 of 16 do not depend on 'x' .token 11, 12"):
        check(Stream(), TEXT, host=Host((Blocks("blocks", stream="text+image"),), **count))


def test_references_that_make_another_grid():
    more = [torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]  # 64 tokens: 8x8
    with pytest.raises(ValueError, match=f"FAILED {IMAGE} +48 of 64 do not depend on 'x'"):
        check(Stream(), *more)
    registers = torch.ones(2, 4, 16)
    with pytest.raises(ValueError, match=f"FAILED {IMAGE} +4 of 20"):
        check(Stream(), registers, drop=RandomDrop(0.75), grid=(20,))


def test_a_grid_of_other_sides():
    class Strips(hosts.DiT):
        def __init__(self):
            super().__init__()
            self.embed = nn.Conv2d(3, 16, (4, 1), (4, 1))

        def forward(self, x, t):
            tokens = self.embed(x).flatten(2).transpose(1, 2) + self.position
            for block in self.blocks:
                tokens = block(tokens, t[:, None].expand(-1, 16))
            return self.head(tokens)

    with pytest.raises(ValueError, match=rf"FAILED {IMAGE} +the last pixel .* token 3 of a grid .4, 4., but in 7"):
        check(Strips())
    assert check(Strips(), grid=(2, 8)).ok


def test_the_original_flux_with_the_image_first():
    class Double(hosts.Block):
        def forward(self, img, txt, vec, pe):
            both = super().forward(torch.cat([img, txt], 1) * pe[:, 0, :, :, 0, 0].repeat(1, 1, 2), vec)
            return both[:, : img.shape[1]], both[:, img.shape[1] :]

    class Single(hosts.Block):
        def forward(self, x, vec, pe):
            return super().forward(x * pe[:, 0, :, :, 0, 0].repeat(1, 1, 2), vec)

    class Model(hosts.DiT):
        def __init__(self):
            super().__init__()
            del self.blocks
            self.double_blocks = nn.ModuleList([Double(16) for _ in range(2)])
            self.single_blocks = nn.ModuleList([Single(16) for _ in range(6)])

        def forward(self, x, t, txt):
            img, vec = self.embed(x).flatten(2).transpose(1, 2), t[:, None].expand(-1, 16)
            pe = torch.linspace(0.5, 1.5, 21 * 8).view(1, 1, -1, 8, 1, 1).expand(len(x), -1, -1, -1, 2, 2)
            for block in self.double_blocks:
                img, txt = block(img, txt, vec, pe)
            stream = torch.cat([img, txt], 1)
            for block in self.single_blocks:
                stream = block(stream, vec, pe)
            return self.head(stream[:, :16])

    with pytest.raises(ValueError, match=f"FAILED {IMAGE} +5 of 16 do not depend"):
        check(Model(), TEXT, encoder_depth=3)


@pytest.mark.parametrize("grid", [(20,), (4, 5), (5, 4)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_registers_that_are_made_of_the_image(grid, packed, first):
    class Registers(hosts.DiT):
        def forward(self, x, t):
            patches = x if packed else nn.functional.unfold(x, 2, stride=2).transpose(1, 2)  # (B, 16, 12)
            tokens, cond = patches @ self.embed.weight.flatten(1).T + self.position, t[:, None].expand(-1, 16)
            registers = tokens.mean(1, keepdim=True) * torch.arange(1.0, 5.0)[:, None]
            tokens = torch.cat([registers, tokens] if first else [tokens, registers], dim=1)
            for block in self.blocks:
                tokens = block(tokens, cond)
            return self.head(tokens)

    image = nn.functional.unfold(X, 2, stride=2).transpose(1, 2) if packed else X
    model = sprint.wrap(Registers().eval(), drop=RandomDrop(0.75), grid=grid)
    with pytest.raises(ValueError, match=f"FAILED {IMAGE} +4 of 20 depend on both ends of 'x'"):
        sprint.check(model, image, T, repeats=1)


def test_an_image_that_is_normalised_as_a_whole():
    class Normalised(hosts.DiT):
        def forward(self, x, t):
            return super().forward(x - x.mean((1, 2, 3), keepdim=True), t)

    assert check(Normalised()).ok


class Counted(hosts.DiT):
    """Blocks that are told how many tokens each sample has."""

    name = "lengths"

    class Block(hosts.Block):
        def forward(self, x, c, lengths=None, held=None):
            return super().forward(x, c)

    def __init__(self):
        super().__init__(block=self.Block)

    def forward(self, x, t):
        tokens, cond = self.embed(x).flatten(2).transpose(1, 2) + self.position, t[:, None].expand(-1, 16)
        for block in self.blocks:
            tokens = block(tokens, cond, **{self.name: torch.full((len(x),), 16)})
        return nn.functional.fold(self.head(tokens).transpose(1, 2), x.shape[-2:], 2, stride=2)


def test_lengths_under_any_name():
    model = sprint.wrap(Counted(), drop=SPARSE)
    with pytest.raises(ValueError, match="'lengths' of the blocks tells them how many"), sprint.path(model, "sparse"):
        model(X, T)
    model = Counted()
    model.name = "held"
    with pytest.raises(ValueError, match="FAILED no argument counts tokens +'held' of the blocks is the number of all"):
        check(model)
    assert check(model, host=Host((Blocks("blocks", others=("held",)),))).ok if sprint.unwrap(model) else None


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("length", [6, 10, 16, 64])
def test_batches_of_other_sizes_are_tried(batch, length):
    """A shared vector of six numbers is no half of a guided batch of six."""

    class Weighing(hosts.Block):
        def forward(self, x, c, w):
            return super().forward(x, c) * w.mean()

    class Model(hosts.DiT):
        def forward(self, x, t):
            tokens, cond = self.embed(x).flatten(2).transpose(1, 2) + self.position, t[:, None].expand(-1, 16)
            for block in self.blocks:
                tokens = block(tokens, cond, torch.linspace(0.5, 1.5, length))
            return nn.functional.fold(self.head(tokens).transpose(1, 2), x.shape[-2:], 2, stride=2)

    model = sprint.wrap(Model(block=Weighing).eval(), drop=SPARSE)
    with pytest.raises(ValueError, match="FAILED a guided batch = its two halves .*'w' is as long as the batch, and halved"):
        sprint.check(model, X[:batch], T[:batch], repeats=1)


def test_what_no_batch_that_is_tried_is_as_long_as():
    class Weighing(hosts.Block):
        def forward(self, x, c, w, odd):
            return super().forward(x, c) * w.mean() * odd.mean()

    class Model(hosts.DiT):
        def forward(self, x, t):
            tokens, cond = self.embed(x).flatten(2).transpose(1, 2) + self.position, t[:, None].expand(-1, 16)
            for block in self.blocks:
                tokens = block(tokens, cond, torch.linspace(0.5, 1.5, 256), torch.linspace(0.5, 1.5, 7))
            return nn.functional.fold(self.head(tokens).transpose(1, 2), x.shape[-2:], 2, stride=2)

    report = sprint.check(sprint.wrap(Model(block=Weighing).eval(), drop=SPARSE), X, T, repeats=1)
    assert report.ok
    assert "not tried in a batch as long as 'w' of 256, which would be halved" in str(report)
