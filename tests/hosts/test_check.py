"""`check`: what it proves of models whose output shows little, and that it leaves no trace."""

import dataclasses
import math

import hosts
import pytest
import torch
from torch import nn

import sprint
from sprint import StructuredDrop

X, T = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.7])
SPARSE = StructuredDrop(0.75)


class OwnPositions(hosts.Block):
    """Numbers its tokens itself, which cannot work with kept tokens."""

    def forward(self, x, c):
        return super().forward(x + torch.linspace(-1, 1, x.shape[1])[:, None], c)


class Gated(hosts.Block):
    """adaLN-zero in small: a gate that starts closed."""

    def __init__(self, dim):
        super().__init__(dim)
        self.gate = nn.Parameter(torch.zeros(dim))

    def forward(self, x, c):
        return x + self.gate * super().forward(x, c)


class GatedOwnPositions(Gated, OwnPositions):
    pass


@pytest.mark.parametrize("block", [OwnPositions, GatedOwnPositions])
@pytest.mark.parametrize("zero_head", [True, False])
def test_a_fresh_model_hides_nothing(block, zero_head):
    model = hosts.DiT(block=block)
    if zero_head:
        nn.init.zeros_(model.head.weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sprint.wrap(model, drop=SPARSE)
    with pytest.raises(ValueError, match="FAILED all tokens in any order"):
        sprint.check(model, X, T)
    assert all(model.state_dict()[name].equal(value) for name, value in before.items())  # bit by bit


def test_a_sound_fresh_model_passes_and_an_unprovable_one_is_named():
    model = sprint.wrap(hosts.DiT(block=Gated), drop=SPARSE)
    assert sprint.check(model, X, T).ok

    class Blind(hosts.DiT):
        def forward(self, x, t):
            return 0 * super().forward(x, t)

    report = sprint.check(sprint.wrap(Blind(), drop=SPARSE), X, T)
    assert [(finding.ok, finding.detail[:10]) for finding in report.findings[1:3]] == [(None, "NOT PROVED")] * 2
    assert not report.failed
    assert not report.ok  # nothing failed, and nothing was proved


def test_modes_and_random_streams_stay_as_they_were():
    model = sprint.wrap(hosts.DiT().train(), drop=SPARSE)
    model.blocks[1].eval()
    modes, stream = [m.training for m in model.modules()], torch.get_rng_state()
    sprint.check(model, X, T)
    assert [m.training for m in model.modules()] == modes
    assert torch.get_rng_state().equal(stream)


def test_frozen_models_averages_and_no_grad():
    model = sprint.wrap(hosts.DiT(), drop=SPARSE)
    assert sprint.check(torch.optim.swa_utils.AveragedModel(model), X, T).ok
    with torch.no_grad():
        assert sprint.check(model, X, T).findings[-1].ok
    frozen = {f.name: f.detail for f in sprint.check(model.requires_grad_(False), X, T).findings}
    assert frozen["sparse gradients reach parameters"] == "no parameter requires gradients"


def test_features_of_kept_tokens_are_reported():
    class Repa(hosts.DiT):
        def forward(self, x, t):
            tokens, cond = self.embed(x).flatten(2).transpose(1, 2) + self.position, t[:, None].expand(-1, 16)
            features = []
            for block in self.blocks:
                tokens = block(tokens, cond)
                features.append(tokens)
            return self.head(tokens), features[2]

    report = sprint.check(sprint.wrap(Repa(), drop=SPARSE), X, T)
    found = {f.name: (f.ok, f.detail) for f in report.findings}
    assert found["outputs of kept tokens only"] == (None, "output 1: (2, 4, 16), full (2, 16, 16)")


class Counting(hosts.Block):
    """Depends on how many tokens there are: right with all of them in any order, wrong with fewer."""

    def forward(self, x, c):
        return super().forward(x * (x.shape[1] / 16), c)


class Padded(hosts.Block):
    """As in Mochi: how many tokens are text is taken from the longest sequence, and the rest may not be seen."""

    def forward(self, x, c):
        text = 17 - (x.shape[1] - 2)  # one of two, with all image tokens
        q = self.norm(x)[:, None]
        mask = torch.ones(1, x.shape[1], dtype=torch.bool)
        mask[0, :2] = torch.arange(2) < text
        return x + nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)[:, 0] + self.mlp(x)


def findings(model, **options):
    return {f.name: f for f in sprint.check(sprint.wrap(model, **{"drop": SPARSE, **options}), X, T, repeats=1).findings}


FEWER = "fewer tokens = masked attention"


def test_fewer_tokens_are_compared_with_masked_attention():
    assert findings(hosts.DiT().eval())[FEWER].ok
    with pytest.raises(ValueError, match="ok     all tokens in any order(.|\n)*FAILED fewer tokens = masked attention"):
        findings(hosts.DiT(block=Counting).eval())


def test_lengths_that_blocks_compute_from_all_tokens_are_caught():
    class WithText(hosts.DiT):
        def forward(self, x, t):
            image = self.embed(x).flatten(2).transpose(1, 2) + self.position
            stream = torch.cat([torch.ones(len(x), 2, 16), image], dim=1)
            for block in self.blocks:
                stream = block(stream, t[:, None].expand(-1, 16))
            return nn.functional.fold(self.head(stream[:, 2:]).transpose(1, 2), x.shape[-2:], 2, stride=2)

    host = sprint.Host((sprint.Blocks("blocks", stream="text+image"),), image_tokens=lambda model, arguments, n: n - 2)
    with pytest.raises(ValueError, match="FAILED fewer tokens = masked attention"):
        findings(WithText(block=Padded).eval(), host=host)
    report = sprint.check(sprint.wrap(WithText().eval(), host=host, drop=SPARSE), X, T, repeats=1)
    assert report.findings[2].ok
    assert str(report).startswith("WithText: image tokens 16 of 18, grid 4x4, kept 4 (25 %)\n")


class Plain(hosts.Block):
    """Attention by hand."""

    def forward(self, x, c):
        q = self.norm(x)
        return x + (q @ q.transpose(1, 2)).softmax(-1) @ q + self.mlp(x)


class Linear(hosts.Block):
    """Attention without a softmax."""

    def forward(self, x, c):
        q = self.norm(x)
        return x + q.relu() @ (q.relu().transpose(1, 2) @ q) + self.mlp(x)


def test_attention_of_other_kinds():
    assert findings(hosts.DiT(block=Plain).eval())[FEWER].ok
    report = sprint.check(sprint.wrap(hosts.DiT(block=Linear).eval(), drop=SPARSE), X, T, repeats=1)
    assert report.findings[2].detail.startswith("NOT PROVED: attention goes through neither")
    assert report.findings[1].ok
    assert not report.ok  # the order of tokens says nothing of fewer
    assert not report.failed
    assert "not proved, so not ok" in str(report)
    ordered = sprint.check(sprint.wrap(hosts.DiT(block=Linear).eval()), X, T, repeats=1)
    assert ordered.ok  # nothing is ever dropped


class Scaled(Plain):
    """By the number of tokens, which their order does not show."""

    def forward(self, x, c):
        return super().forward(x * math.log(x.shape[1]), c)


class Pooled(Plain):
    def forward(self, x, c):
        return super().forward(x * x.mean(1, keepdim=True).sigmoid(), c)


class Positions(hosts.Block):
    """Positions of its own, which are zero in a fresh model."""

    def __init__(self, dim):
        super().__init__(dim)
        self.own = nn.Parameter(torch.zeros(1, 16, dim))

    def forward(self, x, c):
        return super().forward(x + self.own[:, : x.shape[1]], c)


class Buffered(hosts.Block):
    """Positions of its own, in a buffer that is zero, or in a plain attribute."""

    kind = staticmethod(nn.Buffer)

    def __init__(self, dim):
        super().__init__(dim)
        self.own = self.kind(torch.zeros(1, 16, dim))

    def forward(self, x, c):
        return super().forward(x + self.own[:, : x.shape[1]], c)


class Attribute(Buffered):
    kind = staticmethod(lambda tensor: tensor)


@pytest.mark.parametrize("block", [Scaled, Pooled, Positions, Buffered, Attribute])
def test_what_only_fewer_tokens_or_other_parameters_show(block):
    with pytest.raises(ValueError, match="FAILED"):
        findings(hosts.DiT(block=block).eval())


def test_zeros_of_buffers_come_back():
    model = sprint.wrap(hosts.DiT().eval(), drop=SPARSE)
    model.register_buffer("mask", torch.tensor([0.0, float("-inf"), 0.5]))
    model.register_buffer("switch", torch.tensor(0.0))
    model.counts = torch.zeros(3, dtype=torch.long)
    assert sprint.check(model, X, T, repeats=1).ok
    assert model.mask.tolist() == [0.0, float("-inf"), 0.5]
    assert model.switch == 0
    assert not model.counts.any()


def test_a_table_that_is_written_past_its_version_is_caught():
    class Past(hosts.DiT):
        def forward(self, x, t):
            tokens, cond = self.embed(x).flatten(2).transpose(1, 2) + self.position, t[:, None].expand(-1, 16)
            table = torch.empty(16, 16)
            for i, block in enumerate(self.blocks):
                table.data.copy_(self.rope * (1 + i))
                tokens = block(tokens, cond, feat_rope=table)
            return self.head(tokens)

    host = sprint.Host((sprint.Blocks("blocks", tables={"feat_rope": sprint.Table(dim=0, batched=False)}),))
    with pytest.raises(ValueError, match=f"FAILED {FEWER}"):
        findings(Past(block=hosts.RotaryBlock, rope=True).eval(), host=host)


@pytest.mark.parametrize("init", ["identity", "xavier"])
@pytest.mark.parametrize("asks", [lambda m, b: type(b) is hosts.Block, lambda m, b: b is m.second])
def test_a_forward_that_tells_its_blocks_apart_by_what_they_are(asks, init):
    class Asking(hosts.DiT):
        def __init__(self):
            super().__init__()
            self.__dict__["second"] = self.blocks[2]

        def forward(self, x, t):
            tokens, cond = self.embed(x).flatten(2).transpose(1, 2) + self.position, t[:, None].expand(-1, 16)
            for block in self.blocks:
                tokens = block(2 * tokens if asks(self, block) else tokens, cond)
            return self.head(tokens)

    with pytest.raises(ValueError, match=r"FAILED full path = the host itself .* type\(block\), or use `is`"):
        findings(Asking().eval(), init=init)


@pytest.mark.parametrize("drop", [SPARSE, None])
def test_a_loop_of_another_model_over_the_blocks(drop):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = sprint.wrap(hosts.DiT().eval(), drop=drop)

        def forward(self, x, t):
            tokens = self.inner.embed(x).flatten(2).transpose(1, 2)
            for block in self.inner.blocks:
                tokens = block(tokens, t[:, None].expand(-1, 16))
            return self.inner.head(tokens)

    with pytest.raises(
        ValueError, match="Outer was called, and the forward of the wrapped DiT did not run.*loop of its own"
    ):
        sprint.check(Outer(), X, T, repeats=1)


class Alternating(hosts.DiT):
    """Attention of torch, twice, and by hand, by turns."""

    class Twice(hosts.Block):
        def forward(self, x, c):
            q = self.norm(x)[:, None]
            return super().forward(x, c) + nn.functional.scaled_dot_product_attention(q, q, q)[:, 0]

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([(self.Twice, Plain)[i % 2](16) for i in range(6)])


def test_blocks_of_several_kinds_of_attention():
    assert findings(Alternating().eval())[FEWER].ok


@pytest.mark.parametrize("texts", [5, 16])
def test_a_text_of_as_many_tokens_as_the_image(texts):
    class Across(hosts.Block):
        def forward(self, x, c, text):
            q, text = self.norm(x)[:, None], text[:, None]
            return super().forward(x, c) + nn.functional.scaled_dot_product_attention(q, text, text)[:, 0]

    class Model(hosts.DiT):
        def forward(self, x, t, text):
            tokens = self.embed(x).flatten(2).transpose(1, 2) + self.position
            for block in self.blocks:
                tokens = block(tokens, t[:, None].expand(-1, 16), text)
            return nn.functional.fold(self.head(tokens).transpose(1, 2), x.shape[-2:], 2, stride=2)

    host = sprint.Host((sprint.Blocks("blocks", others=("text",)),))
    model = sprint.wrap(Model(block=Across).eval(), host=host, drop=SPARSE)
    assert sprint.check(model, X, T, torch.randn(2, texts, 16), repeats=1).ok


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


@pytest.mark.parametrize(("factor", "message"), [(float("nan"), "not finite for"), (0.0, "none for"), (0.5, "apart from")])
def test_gradients_that_are_wrong_with_fewer_tokens(factor, message):
    class Block(hosts.Block):
        def forward(self, x, c):
            return super().forward(x if x.shape[1] == 16 else Broken.apply(x, factor), c)

    host = hosts.DiT(block=Block).eval()
    host.blocks[2].norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=f"FAILED sparse gradients reach parameters +.*{message}"):
        findings(host)


def test_bfloat16_has_a_tolerance_of_its_own():
    assert sprint.check(sprint.wrap(hosts.DiT().eval().bfloat16(), drop=SPARSE), X.bfloat16(), T.bfloat16(), repeats=1).ok


def test_numbers_that_are_not_finite_never_pass():
    model = hosts.DiT().eval()
    model.head.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="FAILED"):
        findings(model)


def test_one_draw_for_the_whole_batch():
    """For hosts that need it, the trials draw so too."""

    class Unpacking(hosts.Block):
        def forward(self, x, c, feat_rope=None):
            rows, width = feat_rope.flatten(1).shape
            return super().forward(x + feat_rope.view(1, rows, width), c)

    host = sprint.Host((sprint.Blocks("blocks", tables={"feat_rope": sprint.Table(dim=0, batched=False)}),))
    found = findings(hosts.DiT(block=Unpacking, rope=True).eval(), host=host, drop=StructuredDrop(0.75, shared=True))
    assert found["all tokens in any order = full"].ok
    assert found[FEWER].ok


def test_what_is_too_small_to_time_is_said():
    report = sprint.check(sprint.wrap(hosts.DiT().eval(), drop=SPARSE), X, T)
    quick, slow = ({job: i * unit for i, job in enumerate(report.seconds, start=1)} for unit in (1e-4, 1.0))
    assert "too small to time" in str(dataclasses.replace(report, seconds=quick))
    assert "forward, sparse                   2000.0 ms, -100% saved" in str(dataclasses.replace(report, seconds=slow))


def test_predictions_in_dictionaries_and_ragged_lists():
    class Named(hosts.DiT):
        def forward(self, x, t):
            return {"x": super().forward(x, t), "loss": None}

    model = sprint.wrap(Named().eval(), drop=SPARSE)
    with pytest.raises(TypeError, match=r"returned dict, in which no prediction was found: say where it is.*output=lambda"):
        sprint.check(model, X, T)
    assert sprint.check(model, X, T, output=lambda returned: returned["x"], repeats=1).ok

    class Ragged(hosts.DiT):
        def forward(self, x, t):
            return [image[:, : 8 - 2 * i] for i, image in enumerate(super().forward(x, t))]

    assert sprint.check(sprint.wrap(Ragged().eval(), drop=SPARSE), X, T, repeats=1).ok


ALONE, HALVES, PADDED = "samples alone = in their batch", "a guided batch = its two halves", "padded text is not seen"


def test_samples_that_depend_on_their_batch_only_with_fewer_tokens_are_caught():
    class Mixing(hosts.Block):
        def forward(self, x, c):
            return super().forward(x, c) + (0 if x.shape[1] == 16 else x.mean(0))

    with pytest.raises(ValueError, match=f"FAILED {ALONE}"):
        findings(hosts.DiT(block=Mixing).eval())


def test_what_a_host_does_to_its_batch_itself_is_not_blamed_on_wrap():
    class Mixing(hosts.DiT):
        def forward(self, x, t):
            return super().forward(x - x.mean(0), t)

    found = findings(Mixing().eval())
    assert found[ALONE].detail == "NOT PROVED: in the host itself, samples depend on their batch"
    found = findings(hosts.DiT().eval())
    assert found[ALONE].ok
    assert found[HALVES].ok


class Reading(hosts.Block):
    """Attends to a text with a mask, which comes in a dictionary."""

    def forward(self, x, c, options):
        q, text, mask = self.norm(x)[:, None], options["text"][:, None], options["mask"]
        if mask is not None:
            mask = mask[:, None, None]
        return super().forward(x, c) + nn.functional.scaled_dot_product_attention(q, text, text, attn_mask=mask)[:, 0]


class TextDiT(hosts.DiT):
    def __init__(self, *, block=Reading):
        super().__init__(block=block)

    def forward(self, x, t, text, text_mask):
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            tokens = block(tokens, t[:, None].expand(-1, 16), {"text": text, "mask": self.seen(tokens, text_mask)})
        return nn.functional.fold(self.head(tokens).transpose(1, 2), x.shape[-2:], 2, stride=2)

    def seen(self, tokens, mask):
        return mask


def test_rows_of_a_guided_batch_never_mix_whatever_holds_them():
    text = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(5))
    model = sprint.wrap(TextDiT().eval(), drop=SPARSE)
    found = {f.name: f for f in sprint.check(model, X, T, text, torch.ones(2, 5).bool(), repeats=1).findings}
    assert found[HALVES].ok
    assert found[ALONE].ok
    assert found[PADDED].ok


def test_padding_that_is_seen_with_fewer_tokens_is_caught():
    class Reckoning(Reading):
        """Takes the mask for one of all tokens, as with lengths that were reckoned for them."""

        def forward(self, x, c, options):
            return super().forward(x, c, options if x.shape[1] == 16 else {**options, "mask": None})

    class Seeing(TextDiT):
        def seen(self, tokens, mask):
            return None

    text, mask = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(5)), torch.ones(2, 5).bool()
    with pytest.raises(ValueError, match=f"FAILED {PADDED}"):
        sprint.check(sprint.wrap(TextDiT(block=Reckoning).eval(), drop=SPARSE), X, T, text, mask)
    report = sprint.check(sprint.wrap(Seeing().eval(), drop=SPARSE), X, T, text, mask, repeats=1)
    assert {f.name: f.detail for f in report.findings}[PADDED] == "the host itself sees it"
    assert mask.all()


def test_reentrant_checkpoints_and_hooks_of_optimizers():
    class Checkpointing(hosts.DiT):
        def forward(self, x, t):
            tokens, cond = self.embed(x).flatten(2).transpose(1, 2) + self.position, t[:, None].expand(-1, 16)
            for block in self.blocks:
                tokens = torch.utils.checkpoint.checkpoint(block, tokens, cond, use_reentrant=True)
            return nn.functional.fold(self.head(tokens).transpose(1, 2), x.shape[-2:], 2, stride=2)

    model = sprint.wrap(Checkpointing().eval(), drop=SPARSE)
    model.head.weight.grad = kept = torch.ones_like(model.head.weight)
    stepped = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(stepped.append)
    assert sprint.check(model, X, T, repeats=1).ok
    assert model.head.weight.grad is kept
    assert model.embed.weight.grad is None
    assert not stepped
    model(X, T).sum().backward()
    assert stepped  # the hooks are still there
