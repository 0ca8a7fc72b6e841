"""Checkpoints around wrapped models and their blocks: the same gradients, or an error that says why not."""

import hosts
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import sprint
from sprint import RandomDrop, StructuredDrop, TokenSubset
from sprint.hosts.mechanism.recompute import draws

X, T = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.7])
KEEP = TokenSubset.from_keep(torch.tensor([[5, 0, 9, 12], [2, 3, 15, 8]]), 16)


class Reentrant(hosts.DiT):
    """As the original DiT: each block in a checkpoint with a backward pass of its own."""

    recomputed = range(6)

    def forward(self, x, t):
        tokens, cond = self.embed(x).flatten(2).transpose(1, 2) + self.position, t[:, None].expand(-1, 16)
        for i, block in enumerate(self.blocks):
            tokens = checkpoint(block, tokens, cond, use_reentrant=True) if i in self.recomputed else block(tokens, cond)
        return self.head(tokens)


def gradients(model, name, **options):
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    torch.manual_seed(2)
    with sprint.path(model, name, **options):
        model(X, T).square().sum().backward()
    return [p.grad for p in parameters]


@pytest.mark.parametrize("name", ["full", "sparse", "shallow"])
@pytest.mark.parametrize("depths", [(2, 2), (3, 2), (0, 0)])  # also one middle block, and no decoder
def test_reentrant_checkpoints_give_the_same_gradients(name, depths):
    encoder, decoder = depths
    model = sprint.wrap(Reentrant(), encoder_depth=encoder, decoder_depth=decoder, path_drop=0.5, init="xavier").train()
    options = {"drop": RandomDrop(0.75)} if name == "sparse" else {}
    actual = gradients(model, name, **options)
    model.recomputed = ()
    for one, other in zip(actual, gradients(model, name, **options), strict=True):
        if one is None or other is None:  # the last middle block's, on the shallow path
            assert not any(g is not None and g.any() for g in (one, other))
        else:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)  # float32


def test_reentrant_checkpoints_of_the_last_middle_block_only():
    model = sprint.wrap(Reentrant(), init="xavier")
    model.recomputed = (3,)
    with pytest.raises(RuntimeError, match="last middle block with use_reentrant=True, but not its first one"):
        gradients(model, "full")


def test_a_recomputation_does_not_turn_the_generator():
    class Same(hosts.DiT):
        def forward(self, x, t):
            tokens, cond = self.embed(x).flatten(2).transpose(1, 2) + self.position, t[:, None].expand(-1, 16)
            for block in self.blocks:
                tokens = checkpoint(block, tokens, cond, use_reentrant=False)
            return self.head(tokens)

    model, generator = sprint.wrap(Same(), drop=StructuredDrop(0.75)), torch.Generator().manual_seed(0)
    with sprint.path(model, "sparse", generator=generator):
        loss = model(X, T).sum()
        state = generator.get_state()
        loss.backward()
    assert generator.get_state().equal(state)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_around_the_whole_model(use_reentrant):
    model, x = sprint.wrap(hosts.DiT(), drop=StructuredDrop(0.75), init="xavier"), X.clone().requires_grad_()

    def loss():
        return checkpoint(model, x, T, use_reentrant=use_reentrant).square().sum()

    with (
        sprint.path(model, "sparse", generator=torch.Generator().manual_seed(0)),
        pytest.raises(RuntimeError, match=r"around the whole DiT .* the generator would draw other tokens"),
    ):
        loss().backward()
    with sprint.path(model, "sparse"):
        late = loss()
    with pytest.raises(RuntimeError, match="another path is chosen than in the forward pass"):
        late.backward()
    results = []
    for recompute in (True, False):  # the global stream is turned back, and the path is the same
        model.zero_grad()
        torch.manual_seed(0)
        with sprint.path(model, "sparse"):
            (loss() if recompute else model(x, T).square().sum()).backward()
        results.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # float32


def test_random_state_is_kept_for_blocks_that_draw():
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1)
    assert draws(block)
    assert not draws(block.eval())
    assert not draws(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0))
    kept = []

    class Spy(hosts.Block):
        def forward(self, x, c):
            return super().forward(x, c)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sprint.hosts.mechanism.route.checkpoint", lambda f, *a, **o: (kept.append(o["preserve_rng_state"]), f(*a))[1]
        )
        model = sprint.wrap(hosts.DiT(block=Spy), checkpoint=True)
        model.blocks[1].dropout = nn.Dropout(0.5)
        model(X, T)
    assert kept == [False, True, False, False, False, False]


@pytest.mark.parametrize("name", ["full", "sparse", "shallow"])
def test_blocks_in_place_are_refused_where_they_are_recomputed(name):
    class InPlace(hosts.Block):
        def forward(self, x, c):
            x += super().forward(x * 1, c)
            return x

    model = sprint.wrap(hosts.DiT(block=InPlace), drop=StructuredDrop(0.75), checkpoint=True)
    with sprint.path(model, name), pytest.raises(RuntimeError, match=r"in place, .* write x = x \+ …, or wrap without"):
        model(X, T)
    with sprint.path(model, name), torch.no_grad():
        assert model(X, T).shape == X.shape
