"""Side inputs, grids and batches of hosts: gathered as declared, or refused."""

import hosts
import pytest
import torch
from torch import nn

import sprint
from sprint import Blocks, Host, RandomDrop, StructuredDrop, Table

X, T = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.7])


def wrapped(model, tables=None, **options):
    host = None if tables is None else Host((Blocks("blocks", tables=tables),))
    return sprint.wrap(model.eval(), **{"drop": StructuredDrop(0.75), "path_drop": 0.0, "host": host, **options})


class Side(hosts.DiT):
    """Blocks that get one more argument."""

    def __init__(self, call, side):
        class Block(hosts.Block):
            def forward(self, x, c, side=None, **options):
                return call(self, super().forward, x, c, side if side is not None else options.get("rope"))

        super().__init__(block=Block)
        self.side = side

    keyword = "side"

    def forward(self, x, t):
        tokens, cond = self.embed(x).flatten(2).transpose(1, 2) + self.position, t[:, None].expand(-1, 16)
        for block in self.blocks:
            tokens = block(tokens, cond, **{self.keyword: self.side})
        return nn.functional.fold(self.head(tokens).transpose(1, 2), x.shape[-2:], 2, stride=2)


def attend(x, mask=None, rope=None):
    """Attention of two heads, (B, heads, N, D)."""
    q = x.unflatten(-1, (2, 8)).transpose(1, 2)
    q = q if rope is None else rope(q)
    return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask).transpose(1, 2).flatten(2)


class Rope(nn.Module):
    """LightningDiT's: a module with its tables as buffers, (N, D)."""

    def __init__(self):
        super().__init__()
        self.register_buffer("freqs_cos", torch.randn(16, 8, generator=torch.Generator().manual_seed(1)))

    def forward(self, q):
        return q * self.freqs_cos


NOISE = torch.randn(64, 16, generator=torch.Generator().manual_seed(2))
CASES = {
    "module": (lambda b, f, x, c, s: f(x + attend(x, rope=s), c), Rope(), Table(dim=0, batched=False, heads=True)),
    "mask": (lambda b, f, x, c, s: f(x + attend(x, s), c), NOISE[:16, :16], Table(dim=(0, 1), batched=False, heads=True)),
    "batched mask": (lambda b, f, x, c, s: f(x + attend(x, s), c), NOISE[:32].view(2, 1, 16, 16), Table(dim=(2, 3))),
    "longer": (lambda b, f, x, c, s: f(x + s[: x.shape[1]][None], c), NOISE, Table(dim=0, batched=False, longer=True)),
    "several": (
        lambda b, f, x, c, s: f(x + s[0][None] + s[1].transpose(1, 2), c),
        (NOISE[:16], NOISE[None, 16:32].repeat(2, 1, 1)),
        (Table(dim=0, batched=False, item=0), Table(dim=2, item=1)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_tables(name):
    call, side, table = CASES[name]
    assert sprint.check(wrapped(Side(call, side), {"side": table}), X, T, repeats=1).ok
    shared = wrapped(Side(call, side), {"side": table}, drop=StructuredDrop(0.75, shared=True))
    with sprint.path(shared, "sparse"):
        assert shared(X, T).isfinite().all()


def test_tables_of_blocks_that_take_any_keyword():
    model = Side(CASES["longer"][0], NOISE[:16])
    model.keyword = "rope"
    assert sprint.check(wrapped(model, {"rope": Table(dim=0, batched=False)}), X, T, repeats=1).ok


def test_tables_that_cannot_be_gathered():
    model = wrapped(Side(lambda b, f, x, c, s: f(x, c), {"rope": NOISE}), {"side": Table()})
    with pytest.raises(TypeError, match="'side' is a dict, and a Table is of a tensor"), sprint.path(model, "sparse"):
        model(X, T)
    model = wrapped(Side(lambda b, f, x, c, s: f(x, c), nn.Linear(3, 3)), {"side": Table(dim=0)})
    with pytest.raises(ValueError, match="a Linear, none of whose buffers has 16 rows"), sprint.path(model, "sparse"):
        model(X, T)


def test_what_is_not_declared():
    model = wrapped(Side(CASES["module"][0], Rope()))
    with pytest.raises(ValueError, match="'side' of the blocks has the shape .16, 8."), sprint.path(model, "sparse"):
        model(X, T)
    model = wrapped(Side(lambda b, f, x, c, s: f(x + attend(x, s), c), NOISE[:32].view(2, 1, 16, 16)))
    message = r"(?s)size.*'side' \(2, 1, 16, 16\) still has an axis of all 16: declare it"
    with pytest.raises(RuntimeError, match=message), sprint.path(model, "sparse"):
        model(X, T)


def test_conditions_are_no_tables_by_coincidence():
    model = wrapped(Side(lambda b, f, x, c, s: f(x + s[:, None, :16], c), torch.randn(16, 96)), drop=RandomDrop(0.75))
    with sprint.path(model, "sparse"):
        assert model(X.repeat(8, 1, 1, 1), T.repeat(8)).shape == (16, 3, 8, 8)  # B = N


def test_tokens_that_are_not_image_tokens():
    class Registers(hosts.DiT):
        def forward(self, x, t):
            tokens, cond = self.embed(x).flatten(2).transpose(1, 2) + self.position, t[:, None].expand(-1, 16)
            tokens = torch.cat([self.position[:, :4].expand(2, -1, -1), tokens], dim=1)
            for block in self.blocks:
                tokens = block(tokens, cond)
            return self.head(tokens[:, 4:])

    model = wrapped(Registers(), drop=RandomDrop(0.75))
    with pytest.raises(ValueError, match="unknown for 20 tokens.*class token, registers"), sprint.path(model, "sparse"):
        model(X, T)
    host = Host((Blocks("blocks", stream="text+image"),), image_tokens=lambda model, arguments, length: length - 4)
    assert sprint.check(wrapped(Registers(), host=host), X, T, repeats=1).ok


@pytest.mark.parametrize(
    ("sides", "num_tokens", "grid"),
    [((8, 8), 16, (4, 4)), ((8, 16), 32, (4, 8)), ((8, 8), 17, None), ((4, 8, 8), 32, (2, 4, 4)), ((4, 8, 8), 16, None)],
)
def test_grids_of_square_patches(sides, num_tokens, grid):
    from sprint.hosts.mechanism.keep import patch_grid

    assert patch_grid(sides, num_tokens) == grid  # (4, 8, 8) has 16 tokens as (1, 4, 4) and as (4, 2, 2)


def test_a_given_grid_must_fit_any_sampler():
    model = wrapped(hosts.DiT(), drop=RandomDrop(0.75), grid=(3, 5))
    with pytest.raises(ValueError, match=r"token grid of DiT is \(3, 5\) for 16 tokens"), sprint.path(model, "sparse"):
        model(X, T)


def test_blocks_with_the_tokens_first():
    class TokensFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.width = 16
            self.embed = nn.Conv2d(3, 16, 2, 2)
            self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0) for _ in range(6))

        def forward(self, x):
            tokens = self.embed(x).flatten(2).permute(2, 0, 1)
            for block in self.blocks:
                tokens = block(tokens)
            return tokens

    model = wrapped(TokensFirst(), drop=RandomDrop(0.5))
    assert model(X).shape == (16, 2, 16)
    with (
        pytest.raises(ValueError, match=r"\(16, 2, 16\) for a batch of 2, expected \(B, N, C\)"),
        sprint.path(model, "sparse"),
    ):
        model(X)


def test_the_image_is_the_first_argument_of_the_signature():
    model = wrapped(hosts.DiT())
    with sprint.path(model, "sparse"):
        assert model(t=T, y=torch.zeros(2), x=X).shape == X.shape
