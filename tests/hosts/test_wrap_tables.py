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
    "module": (lambda b, f, x, c, s: f(x + attend(x, rope=s), c), Rope(), Table(dim=0, batched=False)),
    "mask": (lambda b, f, x, c, s: f(x + attend(x, s), c), NOISE[:16, :16], Table(dim=(0, 1), batched=False)),
    "batched mask": (lambda b, f, x, c, s: f(x + attend(x, s), c), NOISE[:32].view(2, 1, 16, 16), Table(dim=(2, 3))),
    "longer": (lambda b, f, x, c, s: f(x + s[: x.shape[1]][None], c), NOISE, Table(dim=0, batched=False, longer=True)),
    "several": (
        lambda b, f, x, c, s: f(x + s[0][None] + s[1].transpose(1, 2), c),
        (NOISE[:16], NOISE[None, 16:32].repeat(2, 1, 1)),
        (Table(dim=0, batched=False, item=0), Table(dim=2, item=1)),
    ),
    "dict": (
        lambda b, f, x, c, s: f(x + s["rope"][None] * s["scale"], c),
        {"rope": NOISE[:16], "scale": NOISE[0]},
        Table(dim=0, batched=False, item="rope"),
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
    model = wrapped(Side(lambda b, f, x, c, s: f(x, c), {3}), {"side": Table()})
    with pytest.raises(TypeError, match="'side' is a set, and a Table is of a tensor"), sprint.path(model, "sparse"):
        model(X, T)
    model = wrapped(Side(lambda b, f, x, c, s: f(x, c), nn.Linear(3, 3)), {"side": Table(dim=0)})
    with pytest.raises(ValueError, match="a Linear, none of whose tensors has 16 rows"), sprint.path(model, "sparse"):
        model(X, T)


def test_what_is_not_declared():
    model = wrapped(Side(CASES["dict"][0], CASES["dict"][1]))
    with pytest.raises(ValueError, match="'side' of the blocks has the shape .16, 16."), sprint.path(model, "sparse"):
        model(X, T)
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


def by_llama(b, f, x, c, s):
    """`reshape_for_broadcast` of Llama's code: the shape is asserted, then axes of 1 are put in."""
    assert s.shape == (x.shape[1], x.shape[2])
    assert s.ndim == 2
    return f(x + s.view(1, x.shape[1], x.shape[2]), c)


@pytest.mark.parametrize(
    "call",
    [
        by_llama,
        lambda b, f, x, c, s: f(x + s[: x.shape[1]].reshape([1, len(s), -1]), c),
        lambda b, f, x, c, s: f(x + s.view(len(s), 2, 8)[None].flatten(2), c),
    ],
)
def test_tables_that_the_block_cuts_and_reshapes(call):
    assert sprint.check(wrapped(Side(call, NOISE[:16]), {"side": Table(dim=0, batched=False)}), X, T, repeats=1).ok


def test_a_table_that_must_be_without_a_batch_is_advised():
    model = wrapped(Side(lambda b, f, x, c, s: f(x + s[0] + s, c), NOISE[:16]), {"side": Table(0, batched=False)})
    with pytest.raises(RuntimeError, match=r"'side', a table without a batch.*shared=True"), sprint.path(model, "sparse"):
        model(X, T)


def test_blocks_without_named_parameters():
    class Anonymous(hosts.Block):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    with pytest.raises(ValueError, match=r"names no parameter.*arguments=\('x', …\)"):
        wrapped(hosts.DiT(block=Anonymous))
    host = Host((Blocks("blocks", arguments=("x", "c")),))
    assert sprint.check(wrapped(hosts.DiT(block=Anonymous), host=host), X, T, repeats=1).ok


def test_sides_in_one_argument():
    seen = []

    class Unfolding(hosts.Block):
        def forward(self, x, c, HW):
            seen.append(HW)
            return super().forward(x.unflatten(1, HW).flatten(1, 2), c)

    class Model(hosts.DiT):
        def forward(self, x, t):
            tokens, cond = self.embed(x).flatten(2).transpose(1, 2) + self.position, t[:, None].expand(-1, 16)
            for block in self.blocks:
                tokens = block(tokens, cond, HW=(4, 4))
            return tokens

    model = wrapped(Model(block=Unfolding), host=Host((Blocks("blocks", sides="HW"),)))
    with sprint.path(model, "sparse"):
        model(X, T)
    assert seen == [(4, 4)] * 2 + [(2, 2)] * 2 + [(4, 4)] * 2


@pytest.mark.parametrize("name", ["cu_seqlens", "max_seqlen", "seq_lens", "grid_sizes"])
def test_counts_of_tokens_are_refused(name):
    class Counted(hosts.Block):
        def forward(self, x, c, **options):
            return super().forward(x, c)

    model = Side(lambda b, f, x, c, s: f(x, c), torch.tensor([16, 16]))
    model.blocks = nn.ModuleList([Counted(16) for _ in range(6)])
    model.keyword = name
    for host in (None, Host((Blocks("blocks"),))):
        counted = wrapped(model, host=host)
        assert counted(X, T).shape == X.shape
        with pytest.raises(ValueError, match=f"'{name}' of the blocks tells them how many"), sprint.path(counted, "sparse"):
            counted(X, T)
        sprint.unwrap(counted)
    with sprint.path(wrapped(model, host=Host((Blocks("blocks", others=(name,)),))), "sparse"):
        assert model(X, T).shape == X.shape


@pytest.mark.parametrize("path", ["full", "sparse"])
def test_blocks_by_turns_over_space_and_time(path):
    """As in Latte."""

    class Turns(hosts.DiT):
        def forward(self, x, t):
            tokens = self.embed(x.flatten(0, 1)).flatten(2).transpose(1, 2)  # (B F, N, C)
            cond = t[:, None].expand(-1, 16)
            for space, time in zip(self.blocks[::2], self.blocks[1::2], strict=True):
                tokens = space(tokens, cond.repeat_interleave(2, 0))
                tokens = tokens.unflatten(0, (-1, 2)).transpose(1, 2).flatten(0, 1)  # (B N, F, C)
                tokens = time(tokens, cond.repeat_interleave(16, 0))
                tokens = tokens.unflatten(0, (-1, 16)).transpose(1, 2).flatten(0, 1)
            return tokens

    for host in (None, Host((Blocks("blocks"),))):
        model = wrapped(Turns(), host=host, drop=RandomDrop(0.5))
        with pytest.raises(ValueError, match="folds its tokens anew|for a batch of 2"), sprint.path(model, path):
            model(torch.randn(2, 2, 3, 8, 8), T)


class Jit(hosts.DiT):
    """JiT in small: rotary modules whose tables are attributes, the second one with rows for tokens that join later."""

    class Rope(nn.Module):
        def __init__(self, table):
            super().__init__()
            self.cos = table

        def forward(self, q):
            length, width = self.cos.shape
            assert (q.shape[2], q.shape[3]) == (length, width)
            return self.turned(q)

        def turned(self, q):
            return q * self.cos

    class Holder(nn.Module):
        def __init__(self, rope):
            super().__init__()
            self.inner = rope

        def forward(self, q):
            return self.inner(q)

    class Block(hosts.Block):
        def forward(self, x, c, feat_rope):
            return super().forward(x + attend(x, rope=feat_rope), c)

    def __init__(self, *, start, nested=False):
        super().__init__(block=self.Block)
        hold = self.Holder if nested else lambda rope: rope
        self.start = start
        self.feat_rope = hold(self.Rope(NOISE[:16, :8]))
        self.feat_rope_incontext = hold(self.Rope(NOISE[:19, 8:]))

    def forward(self, x, t):
        tokens, cond = self.embed(x).flatten(2).transpose(1, 2) + self.position, t[:, None].expand(-1, 16)
        for i, block in enumerate(self.blocks):
            if i == self.start:
                tokens = torch.cat([self.position[:, :3].expand(len(x), -1, -1), tokens], dim=1)
            tokens = block(tokens, cond, self.feat_rope if i < self.start else self.feat_rope_incontext)
        return nn.functional.fold(self.head(tokens[:, 3:]).transpose(1, 2), x.shape[-2:], 2, stride=2)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("start", [1, 2, 3])
def test_tables_that_are_attributes_of_a_module_and_tokens_that_join_later(start, nested):
    bare = wrapped(Jit(start=6), drop=RandomDrop(0.75))
    with pytest.raises(ValueError, match="'feat_rope' of the blocks has the shape .16, 8."), sprint.path(bare, "sparse"):
        bare(X, T)
    rope = Table(dim=0, batched=False, stream="text+image")
    host = Host((Blocks("blocks", stream="text+image", tables={"feat_rope": rope}),), image_tokens=lambda *_: 16)
    model = wrapped(Jit(start=start, nested=nested), host=host)
    report = sprint.check(model, X, T, repeats=1)
    assert [finding.ok for finding in report.findings[:3]] == [True, True, True]


def test_tables_that_forward_cuts_between_its_blocks():
    """As minRF's: the rows are the kept tokens' at the first middle block, and as many as there are tokens at the next."""

    class Cutting(hosts.DiT):
        def forward(self, x, t):
            tokens, cond = self.embed(x).flatten(2).transpose(1, 2) + self.position, t[:, None].expand(-1, 16)
            for block in self.blocks:
                tokens = block(tokens, cond, feat_rope=self.rope[: tokens.shape[1]])
            return nn.functional.fold(self.head(tokens).transpose(1, 2), x.shape[-2:], 2, stride=2)

    model = wrapped(Cutting(block=hosts.RotaryBlock, rope=True), {"feat_rope": Table(dim=0, batched=False)})
    assert sprint.check(model, X, T, repeats=1).findings[2].ok


def test_rows_per_token_in_a_dictionary_are_refused():
    model = wrapped(Side(lambda b, f, x, c, s: f(x, c), {"deep": [NOISE[:16]]}))
    with pytest.raises(ValueError, match="'side' of the blocks has the shape .16, 16."), sprint.path(model, "sparse"):
        model(X, T)


def test_rows_take_part_in_functions_of_torch():
    from sprint.hosts.mechanism.rows import Rows

    table, keep = NOISE, torch.tensor([[3, 1], [0, 9]])
    rows, q = Rows(table[keep]), torch.randn(2, 5, 2, 16)
    expected = torch.stack([q[i] * table[keep[i]].cos() for i in range(2)])
    for found in (q * rows.cos(), rows.cos() * q, torch.mul(q, torch.cos(rows)), q * rows.double().cos().float()):
        assert found.allclose(expected)


def test_kept_tokens_of_unfolded_blocks_lie_where_their_groups_are():
    seen = []

    class Unfolding(hosts.Block):
        def forward(self, x, c, HW):
            seen.append(x.unflatten(1, HW))
            return x

    class Numbered(hosts.DiT):
        def forward(self, x, t):
            tokens = torch.arange(64.0)[None, :, None].expand(len(x), -1, 16)
            for block in self.blocks:
                tokens = block(tokens, t, HW=(8, 8))
            return tokens

    model = wrapped(Numbered(block=Unfolding), host=Host((Blocks("blocks", sides="HW"),)), grid=(8, 8))
    with sprint.path(model, "sparse", generator=torch.Generator().manual_seed(0)):
        model(X, T)
    kept = seen[2][..., 0].long()  # (B, 4, 4) numbers of tokens
    assert (kept // 8 // 2).equal(torch.arange(4)[:, None].expand(2, 4, 4))
    assert (kept % 8 // 2).equal(torch.arange(4).expand(2, 4, 4))
