"""An original SiT, written here from its paper and its key layout, and our model of its weights compute the same."""

import math

import pytest
import torch
import torch.nn.functional as F
from models import tiny
from torch import nn

import sprint
from sprint.models.original import from_original, to_original


class OriginalBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        batch, tokens, dim = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        h = F.layer_norm(x, (dim,), eps=1e-6) * (1 + scale1) + shift1
        q, k, v = self.attn["qkv"](h).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1)
        x = x + gate1 * self.attn["proj"]((weights @ v).transpose(1, 2).reshape(batch, tokens, dim))
        h = F.layer_norm(x, (dim,), eps=1e-6) * (1 + scale2) + shift2
        return x + gate2 * self.mlp["fc2"](F.gelu(self.mlp["fc1"](h), approximate="tanh"))


class OriginalSiT(nn.Module):
    """Time 0 is noise and 1 data, the velocity is data minus noise, and half of the output channels are dropped."""

    def __init__(self, dim=16, heads=2, depth=6, classes=10, side=4):
        super().__init__()
        self.dim = dim
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(4, dim, 2, 2)})
        self.t_embedder = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, dim)})
        self.pos_embed = nn.Parameter(self.positions(side), requires_grad=False)
        self.blocks = nn.ModuleList(OriginalBlock(dim, heads) for _ in range(depth))
        final = {"linear": nn.Linear(dim, 2 * 2 * 8), "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))}
        self.final_layer = nn.ModuleDict(final)

    def positions(self, side):
        rows = []
        for row in range(side):
            for column in range(side):
                values = []
                for place in (column, row):
                    omega = [10000 ** (-i / (self.dim / 4)) for i in range(self.dim // 4)]
                    values += [math.sin(place * w) for w in omega] + [math.cos(place * w) for w in omega]
                rows.append(values)
        return torch.tensor(rows)[None]

    def forward(self, x, t, y):
        frequency = torch.exp(-math.log(10000) * torch.arange(128) / 128)
        angle = t[:, None] * frequency
        c = self.t_embedder["mlp"](torch.cat([angle.cos(), angle.sin()], dim=1).to(x.dtype))
        c = c + self.y_embedder["embedding_table"](y)
        h = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.final_layer["adaLN_modulation"](c)[:, None].chunk(2, dim=-1)
        h = self.final_layer["linear"](F.layer_norm(h, (self.dim,), eps=1e-6) * (1 + scale) + shift)
        side = x.shape[-1] // 2
        h = h.reshape(len(x), side, side, 2, 2, 8)
        return torch.einsum("nhwpqc->nchpwq", h).reshape(len(x), 8, 2 * side, 2 * side)[:, :4]


def original():
    torch.manual_seed(0)
    model = OriginalSiT()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


X, T, Y = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0.0, 0.3, 1.0]), torch.arange(3)


@torch.no_grad()
def test_the_same_velocity_with_time_and_sign_turned():
    theirs = original()
    ours = from_original(theirs.state_dict(), heads=2, num_classes=10).eval()
    torch.testing.assert_close(ours(X, T, Y), -theirs(X, 1 - T, Y), rtol=1e-4, atol=1e-5)  # float32
    assert ours.config.middle_depth == 2


@torch.no_grad()
def test_the_same_samples():
    """Their Euler steps from noise at 0 to data at 1."""
    theirs = original()
    ours = from_original(theirs.state_dict(), heads=2, num_classes=10).eval()
    x = X.double()
    for i in range(5):
        x = x + theirs(x.float(), torch.full((3,), i / 5), Y).double() / 5
    torch.testing.assert_close(sprint.sample(ours, X, y=Y, steps=5), x.float(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_there_and_back():
    theirs = original()
    ours = from_original(theirs.state_dict(), heads=2, num_classes=10, encoder_depth=1, decoder_depth=2)
    again = OriginalSiT()
    again.load_state_dict(to_original(ours, grid=(4, 4)))
    torch.testing.assert_close(again(X, T, Y), theirs(X, T, Y), rtol=1e-4, atol=1e-5)


STEPS = torch.tensor([0.0, 300.0, 999.0])


@torch.no_grad()
def test_dit_predicts_the_same_noise_at_its_steps():
    """An original DiT is the same network, called with a step, and its output is noise, with nothing turned."""
    theirs = original()
    ours = from_original(theirs.state_dict(), heads=2, num_classes=10, kind="dit").eval()
    expected = theirs(X, STEPS, Y)
    torch.testing.assert_close(ours(X, (STEPS + 1) / 1000, Y), expected, rtol=1e-3, atol=1e-4)  # float32 angles up to 1000
    assert (ours.config.prediction, ours.config.time_scale) == ("noise", 1000.0)
    again = OriginalSiT()
    again.load_state_dict(to_original(ours, grid=(4, 4)))
    torch.testing.assert_close(again(X, STEPS, Y), expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_dit_samples_as_ddim_does():
    """Many small steps of our ODE and of DDIM (arXiv 2010.02502) on DiT's own schedule end in the same image."""
    theirs = original()
    ours = from_original(theirs.state_dict(), heads=2, num_classes=10, kind="dit").eval()
    bars = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    x = X.double()
    for k in range(999, 199, -1):  # the schedule's stiff end is left out of the comparison
        noise = theirs(x.float(), torch.full((3,), float(k)), Y).double()
        data = (x - (1 - bars[k]).sqrt() * noise) / bars[k].sqrt()
        x = bars[k - 1].sqrt() * data + (1 - bars[k - 1]).sqrt() * noise
    times = [k / 1000 for k in range(1000, 199, -1)]
    options = {"times": times, "solver": "heun", "interpolant": "ddpm", "prediction": "noise"}
    actual = sprint.sample(ours, X, y=Y, **options)
    assert (actual.double() - x).norm() < 0.02 * x.norm()


@torch.no_grad()
def test_repa_has_our_time_and_velocity_and_its_heads_are_left_out():
    theirs = original()
    state = theirs.state_dict() | {"projectors.0.0.weight": torch.randn(4, 16), "projectors.0.0.bias": torch.randn(4)}
    ours = from_original(state, heads=2, num_classes=10, kind="repa").eval()
    torch.testing.assert_close(ours(X, T, Y), theirs(X, T, Y), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"has no tensor projectors.0.0.weight"):
        from_original(state, heads=2, num_classes=10)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_taken_off(prefix):
    state = original().state_dict()
    plain = from_original(state, heads=2, num_classes=10).state_dict()
    wrapped = from_original({prefix + name: tensor for name, tensor in state.items()}, heads=2, num_classes=10)
    assert all(tensor.equal(plain[name]) for name, tensor in wrapped.state_dict().items() if "mask_token" not in name)


@torch.no_grad()
def test_a_model_without_a_null_row_keeps_all_its_classes():
    theirs = original()  # 11 rows
    ours = from_original(theirs.state_dict(), heads=2, num_classes=11).eval()
    last = torch.tensor([10, 10, 10])
    torch.testing.assert_close(ours(X, T, last), -theirs(X, 1 - T, last), rtol=1e-4, atol=1e-5)
    assert (ours.config.num_classes, ours.config.label_drop) == (11, 0.0)
    assert ours.null_condition(1).tolist() == [11]
    with pytest.warns(UserWarning, match="null condition of this SiT was never trained .*label_drop=0.*weak='same'"):
        sprint.ClassifierFreeGuidance(2.0)(ours, X, 0.5, Y)
    with pytest.raises(ValueError, match="11 rows: pass num_classes=10 if the last row is the null .* num_classes=11 if"):
        from_original(theirs.state_dict(), heads=2)
    with pytest.raises(ValueError, match="11 rows, and num_classes=9 was given: pass num_classes=10 if"):
        from_original(theirs.state_dict(), heads=2, num_classes=9)


def test_the_converted_model_trains_sparse_and_saves(tmp_path):
    ours = from_original(original().state_dict(), heads=2, num_classes=10)
    out = sprint.FlowMatchingLoss()(ours, X, y=Y, drop=sprint.StructuredDrop(0.75))
    out.loss.backward()
    assert all(p.grad is not None for p in ours.parameters() if p.requires_grad)
    ours.eval().save(tmp_path / "model.safetensors")
    again = sprint.SiT.load(tmp_path / "model.safetensors").eval()
    assert again(X, T, Y).equal(ours(X, T, Y))
    with pytest.raises(ValueError, match="rotary positions and qk_norm, got .*positions='sincos'"):
        ours.to_reference()


def test_what_cannot_be_converted():
    state = original().state_dict()
    with pytest.raises(ValueError, match="no checkpoint of the original SiT, it has no x_embedder"):
        from_original({}, heads=2)
    with pytest.raises(ValueError, match="leave no middle of 6 blocks"):
        from_original(state, heads=2, num_classes=10, encoder_depth=4)
    with pytest.raises(ValueError, match="not the fixed table"):
        from_original(state | {"pos_embed": state["pos_embed"] + 1}, heads=2, num_classes=10)
    with pytest.raises(ValueError, match="has no tensor extra"):
        from_original(state | {"extra": torch.zeros(1)}, heads=2, num_classes=10)
    with pytest.raises(ValueError, match="kind of from_original must be one of 'sit', 'dit', 'repa', got the text 'uvit'"):
        from_original(state, heads=2, num_classes=10, kind="uvit")
    with pytest.raises(ValueError, match="has prediction='x', time_scale=1"):
        to_original(tiny(positions="sincos", qk_norm=False, prediction="x"))
    with pytest.raises(ValueError, match="has sincos positions"):
        to_original(tiny())
    ours = from_original(state, heads=2, num_classes=10)
    with torch.no_grad():
        ours.middle.fusion.proj.bias.add_(1)
    with pytest.raises(ValueError, match="the fusion was trained"):
        to_original(ours)
    with pytest.raises(ValueError, match="positions of SiTConfig must be one of"):
        sprint.SiT.preset("S/2", positions="learned")
