"""`check`: what it proves of models whose output shows little, and that it leaves no trace."""

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
    assert "parameters perturbed" in sprint.check(model, X, T).findings[1].detail

    class Blind(hosts.DiT):
        def forward(self, x, t):
            return 0 * super().forward(x, t)

    finding = sprint.check(sprint.wrap(Blind(), drop=SPARSE), X, T).findings[1]
    assert (finding.ok, finding.detail[:10]) == (None, "NOT PROVED")


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
