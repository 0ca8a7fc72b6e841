"""What the tiny random-weight models and their inputs are made of."""

import torch


def randomise(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)  # zero-initialised gates and outputs would hide errors
    return model.eval()


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def diffusers_model(name, **config):
    import diffusers

    torch.manual_seed(0)
    return randomise(getattr(diffusers, name)(**config))


T = torch.tensor([0.3, 0.7])


def packed(text_width, *, ids=True):
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    places = torch.stack([torch.zeros(16), rows.flatten(), columns.flatten()], dim=1)
    arguments = {"hidden_states": noise(2, 16, 4), "encoder_hidden_states": noise(2, 5, text_width), "timestep": T}
    return arguments | ({"img_ids": places, "txt_ids": torch.zeros(5, 3)} if ids else {})
