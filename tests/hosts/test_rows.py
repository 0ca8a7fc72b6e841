"""Tables without a batch, gathered for each sample: whatever a block does with them, or an error."""

import einops
import hosts
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sprint
from sprint import Blocks, Host, StructuredDrop, Table
from sprint.hosts.mechanism.rows import Rows

TABLE = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))


def turned(q, cos, sin):
    return q * cos + torch.cat([-q[..., 4:], q[..., :4]], -1) * sin


def twice(tables):
    return [torch.cat([table, table], -1) for table in tables]


USES = {
    "[None]": lambda q, r: turned(q, r[None].cos(), r[None].sin()),
    "unsqueeze": lambda q, r: turned(q, r.cos().unsqueeze(0), r.sin().unsqueeze(0).unsqueeze(0)),
    "chunk": lambda q, r: turned(q, *twice(torch.chunk(r.cos(), 2, -1))),
    "split": lambda q, r: turned(q, *twice(r.split(4, -1))),
    "unbind": lambda q, r: turned(q, *[x.repeat(1, 2) for x in r.view(-1, 2, 4).unbind(1)]),
    "view": lambda q, r: turned(q, r.view(1, 1, -1, 8), r.reshape(1, -1, 8)),
    "permute": lambda q, r: turned(q, r.permute(1, 0).t(), r.transpose(0, 1).mT),
    "expand": lambda q, r: turned(q, r.cos()[None, None].expand(len(q), -1, -1, -1), r.sin()),
    "repeat_interleave": lambda q, r: turned(q, torch.repeat_interleave(r[:, :4], 2, -1), r[:, :4].repeat_interleave(2, -1)),
    "heads behind": lambda q, r: (q.transpose(1, 2) * r.view(-1, 1, 8)).transpose(1, 2),
    "operators": lambda q, r: q * (1 - r * 2 + r / 3) - (-r) ** 2,
    "stack": lambda q, r: q * torch.stack([r, 2 * r])[1],
    "to": lambda q, r: q * r.to(q) + r.type_as(q)[None, None],
    "mask": lambda q, r: F.scaled_dot_product_attention(q, q, q, attn_mask=r[:, :5].mm(r[:, :5].t())),
    "linear": lambda q, r: q * F.linear(r, torch.ones(8, 8)),
    "cat": lambda q, r: torch.cat([q[:, 0], r[None]], -1),
    "rearrange": lambda q, r: q * einops.rearrange(r, "n (two d) -> n 1 (two d)", two=2).transpose(0, 1),
    "repeat": lambda q, r: turned(
        q, einops.repeat(r[:, :4], "n d -> n (d 2)"), einops.repeat(r, "n d -> b 1 n d", b=len(q))
    ),
    "reduce": lambda q, r: q * einops.reduce(r, "n d -> n 1", "sum"),
    "cut": lambda q, r: q * r[: q.shape[2]][None],
}


@pytest.mark.parametrize("batch", [1, 2, 3, 4])  # also as many samples as heads
@pytest.mark.parametrize("use", USES)
def test_each_sample_has_its_own_rows(use, batch):
    generator = torch.Generator().manual_seed(batch)
    q, keep = torch.randn(batch, 4, 5, 8, generator=generator), torch.rand(batch, 9, generator=generator).argsort(1)[:, :5]
    alone = [USES[use](q[i : i + 1], TABLE[keep[i]]) for i in range(batch)]
    torch.testing.assert_close(USES[use](q, Rows(TABLE[keep])), torch.cat(alone), rtol=1e-5, atol=1e-5)  # float32


@pytest.mark.parametrize("use", ["[None]", "chunk", "permute", "operators"])
def test_rows_compile(use):
    q, keep = torch.randn(3, 4, 5, 8), torch.rand(3, 9).argsort(1)[:, :5]
    compiled = torch.compile(lambda q, rows: USES[use](q, Rows(rows)), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, TABLE[keep]), USES[use](q, Rows(TABLE[keep])))


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_where_the_batch_cannot_be_told(batch):
    q, keep = torch.randn(batch, 4, 5, 8), torch.rand(batch, 9).argsort(1)[:, :5]
    for use in (
        lambda q, r: torch.stack([q, 2 * q]) * r,  # queries and keys
        lambda q, r: q.flatten(0, 1) * r,
        lambda q, r: torch.cat([q[:, 0], r[None]], 0),
        lambda q, r: q * r[:2].mean(0),
        lambda q, r: q if r.sum() > 0 else -q,
    ):
        with pytest.raises((TypeError, RuntimeError)):
            use(q, Rows(TABLE[keep]))


def attend(q, mask=None):
    return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)


def heads_first(x, r):
    q = x.unflatten(-1, (2, 8)).permute(2, 0, 1, 3).contiguous()  # (h, B, K, D)
    return attend(q * r[:, :8]).permute(1, 2, 0, 3).flatten(2)


def heads_second(x, r):
    return attend(x.unflatten(-1, (2, 8)).transpose(1, 2) * r[:, :8]).transpose(1, 2).flatten(2)


def biased(bias):
    def use(x, r):
        return attend(x.unflatten(-1, (2, 8)).transpose(1, 2), bias(x, r)).transpose(1, 2).flatten(2)

    return use


SLOPES = torch.tensor([0.5, 2.0])[:, None, None]
AMBIGUOUS = {
    "heads first": heads_first,
    "alibi": biased(lambda x, r: SLOPES * r),
    "alibi of [None]": biased(lambda x, r: SLOPES * r[None]),
    "bias of heads": biased(lambda x, r: (x @ x.mT).mean(0, keepdim=True).repeat(2, 1, 1) * r),
    "stack": lambda x, r: (torch.stack([x, x.sin()]) * r).sum(0),
}
TOLD = {
    "heads second": heads_second,
    "one head": lambda x, r: attend(x[:, None] * r)[:, 0],
    "alibi of [None, None]": biased(lambda x, r: SLOPES * r[None, None]),
    "tokens": lambda x, r: x + r,
    "in place": lambda x, r: x.clone().mul_(2) * r,
    "sum of samples": lambda x, r: x.sum((1, 2), keepdim=True) * r,
}


def calling(use, *, dropout=0.0):
    """A model whose block uses a table, (16, 16), or a mask of that shape, and notes its batches."""

    class Block(hosts.Block):
        def __init__(self, dim):
            super().__init__(dim)
            self.dropout = nn.Dropout(dropout)

        def forward(self, x, c, side):
            batches.append(len(x))
            return super().forward(x + self.dropout(use(self.norm(x), side)), c)

    class Model(hosts.DiT):
        def forward(self, x, t):
            tokens, cond = self.embed(x).flatten(2).transpose(1, 2) + self.position, t[:, None].expand(-1, 16)
            for block in self.blocks:
                tokens = block(tokens, cond, SIDE)
            return self.head(tokens)

    batches = []
    return Model(block=Block), batches


SIDE, KEEP = torch.randn(16, 16, generator=torch.Generator().manual_seed(3)), torch.tensor([[5, 0, 9, 12], [2, 3, 15, 8]])


def sparse(model, x, t, keep, *, shared=False):
    """On the sparse path; shared draws need no rows for each sample."""

    class Drop:
        def sample(self, batch, grid, **options):
            return sprint.TokenSubset(keep, 16)

    Drop.shared = shared
    with sprint.path(model, "sparse", drop=Drop()):
        return model(x, t)


def host_of(name):
    mask = "alibi" in name or "bias" in name
    return Host((Blocks("blocks", tables={"side": Table(dim=(0, 1) if mask else 0, batched=False)}),))


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_as_many_heads_as_samples_are_not_taken_for_them(name):
    model = sprint.wrap(calling(AMBIGUOUS[name])[0].eval(), host=host_of(name))
    message = r"batch of 2 meets a tensor of the shape \(2, .*whose axis 0 is not the batch, .*table\[None, None\]"
    with pytest.raises(RuntimeError, match=message):
        sparse(model, torch.randn(2, 3, 8, 8), torch.rand(2), KEEP)


@pytest.mark.parametrize("name", TOLD)
def test_what_follows_the_samples_is_told(name):
    model, batches = calling(TOLD[name])
    sprint.wrap(model.eval(), host=host_of(name))
    x, t = torch.randn(2, 3, 8, 8), torch.rand(2)
    apart = [sparse(model, x[i : i + 1], t[i : i + 1], KEEP[i : i + 1], shared=True) for i in range(2)]
    with torch.inference_mode():
        torch.testing.assert_close(sparse(model, x, t, KEEP), torch.cat(apart), rtol=1e-4, atol=1e-5)  # float32
        batches.clear()
        sparse(model, x, t, KEEP)
    assert batches == [2] * 6  # once it is told


def test_trying_what_follows_the_samples_leaves_no_trace():
    outputs, gradients = [], []
    model = sprint.wrap(calling(TOLD["tokens"], dropout=0.5)[0].train(), host=host_of("tokens"), path_drop=0.0)
    x, t = torch.randn(2, 3, 8, 8), torch.rand(2)
    for _ in range(2):  # the second time it is told
        torch.manual_seed(0)
        model.zero_grad()
        outputs.append(sparse(model, x, t, KEEP))
        outputs[-1].square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert model.sprint.proved
    assert outputs[0].equal(outputs[1])
    assert all(one.equal(other) for one, other in zip(*gradients, strict=True))


class RotaryDiT(hosts.DiT):
    """Calls each block with a table that is made, cut or rewritten in the loop."""

    def __init__(self, rope_of):
        super().__init__(block=hosts.RotaryBlock, rope=True)
        self.rope_of, self.cos, self.sin = rope_of, torch.randn(20, 16), torch.randn(2, 20, 16)[1]
        self.buffer = torch.empty(16, 16)

    def forward(self, x, t):
        tokens, cond = self.embed(x).flatten(2).transpose(1, 2) + self.position, t[:, None].expand(-1, 16)
        for i, block in enumerate(self.blocks):
            tokens = block(tokens, cond, feat_rope=self.rope_of(self, i, tokens.shape[1]))
        return nn.functional.fold(self.head(tokens).transpose(1, 2), x.shape[-2:], 2, stride=2)


def checked(model):
    host = Host((Blocks("blocks", tables={"feat_rope": Table(dim=0, batched=False)}),))
    x, t = torch.randn(2, 3, 8, 8), torch.rand(2)
    return sprint.check(sprint.wrap(model.eval(), host=host, drop=StructuredDrop(0.75)), x, t, repeats=1)


@pytest.mark.parametrize(
    "rope_of",
    [
        lambda m, i, n: (m.cos, m.sin)[i % 2][:n],  # local and global, cut
        lambda m, i, n: m.buffer.copy_(m.cos[:16] * (1 + i)),  # one buffer, rewritten
    ],
)
def test_tables_of_blocks_that_differ(rope_of):
    assert checked(RotaryDiT(rope_of)).ok


@pytest.mark.parametrize(
    "rope_of",
    [
        lambda m, i, n: m.cos[:n],
        lambda m, i, n: (m.cos, m.rope)[i % 2][:n],
        lambda m, i, n: m.buffer.copy_(m.cos[:16] * (1 + i)),
    ],
)
def test_tables_of_blocks_that_differ_compile(rope_of):
    torch.compiler.reset()
    host = Host((Blocks("blocks", tables={"feat_rope": Table(dim=0, batched=False)}),))
    model, x, t = sprint.wrap(RotaryDiT(rope_of).eval(), host=host), torch.randn(2, 3, 8, 8), torch.rand(2)
    subset = sprint.TokenSubset.from_keep(torch.tensor([[5, 0, 9, 12], [2, 3, 15, 8]]), 16)
    with torch.no_grad(), sprint.path(model, "sparse", subset=subset):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, t), model(x, t), rtol=1e-4, atol=1e-5)  # float32


def test_a_table_made_anew_for_the_kept_tokens_is_refused():
    with pytest.raises(ValueError, match="the first ones by their number.*make the whole table once"):
        checked(RotaryDiT(lambda m, i, n: m.cos[:n] * (1 + i % 2)))
