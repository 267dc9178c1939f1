"""The autoencoder, and its demonstration."""

import math

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from conftest import overfit
from hypothesis import given
from PIL import Image

from ae import Autoencoder, compare
from vae import VAE


@given(st.integers(1, 9), st.integers(1, 30))
def test_shapes_ranges_and_loss(batch, latent_dim):
    model, x = Autoencoder(latent_dim=latent_dim), torch.rand(batch, 1, 28, 28)
    x_recon, z = model(x)
    assert z.shape == (batch, latent_dim) and x_recon.shape == (batch, 784)
    assert x_recon.min() >= 0 and x_recon.max() <= 1
    assert model.sample(batch).shape == (batch, 784)
    assert torch.equal(model(x)[0], x_recon)  # no noise anywhere
    total, recon, kl = model.loss(x, None, beta=3.0)
    expected = F.mse_loss(x_recon, x.flatten(1), reduction="sum")
    torch.testing.assert_close(total, expected)
    assert torch.equal(total, recon) and kl == 0


def test_overfits_64_images(drawn):
    losses = overfit(Autoencoder(), drawn.images[:64] / 255, steps=100)
    assert losses[-1] < 0.2 * losses[0]


def test_the_comparison_prints_where_the_codes_lie(drawn, tmp_path, capsys):
    """Codes that are always 7, beside draws from N(0, 2^2)."""
    autoencoder, vae = Autoencoder(latent_dim=3), VAE(latent_dim=3)
    with torch.no_grad():
        for layer, bias in ((autoencoder.fc2, 7.0), (vae.encoder.fc_mu, 0.0)):
            layer.weight.zero_()
            layer.bias.fill_(bias)
        vae.encoder.fc_logvar.weight.zero_()
        vae.encoder.fc_logvar.bias.fill_(2 * math.log(2))
    decoded, decode = [], autoencoder.decode
    autoencoder.decode = lambda z: decoded.append(z) or decode(z)
    compare({"AE": autoencoder, "VAE": vae}, drawn.images / 255, tmp_path / "c.png")
    noise, scaled = (z for z in decoded if len(z) == 24)  # beside the codes and their lines
    assert noise.std() > 0.7 and noise.mean().abs() < 0.5
    torch.testing.assert_close(scaled, torch.full_like(scaled, 7.0))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    table = torch.tensor([[float(v) for v in row] for row in rows if row and row[0].isdigit()])
    expected = torch.tensor([7.0, 0.0, 0.0, 2.0]).expand(3, 4)  # mean, std, mean, std
    torch.testing.assert_close(table[:, 1:], expected, rtol=0, atol=0.15)
    assert Image.open(tmp_path / "c.png").size[0] > 500
