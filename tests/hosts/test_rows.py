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
