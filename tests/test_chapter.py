"""The chapter's own calls, section by section, against these modules."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import train
from ae import Autoencoder
from vae import VAE, CelebAVAE, ConvVAE, VAEEncoder, vae_loss
from viz import interpolate_latent_space, visualize_interpolation, visualize_latent_manifold
from viz import visualize_latent_space_2d, visualize_reconstruction, visualize_samples


def parameters(model) -> int:
    return sum(p.numel() for p in model.parameters())


def linear(model, name, x):
    return F.linear(x, model.get_parameter(f"{name}.weight"), model.get_parameter(f"{name}.bias"))


def test_section_2_1_autoencoder():
    ae = Autoencoder(input_dim=784, hidden_dim=400, latent_dim=20)
    x = torch.randn(32, 784)
    x_recon, z = ae(x)
    assert_close(z, linear(ae, "fc2", linear(ae, "fc1", x).relu()))
    assert_close(x_recon, linear(ae, "fc4", linear(ae, "fc3", z).relu()).sigmoid())
    assert parameters(ae) == 644_804


def test_section_2_3_encoder():
    encoder = VAEEncoder(input_dim=784, hidden_dim=400, latent_dim=20)
    encoder.fc_logvar.weight.data *= 100
    x = torch.randn(32, 784)
    mu, logvar = encoder(x)
    h = linear(encoder, "fc1", x).relu()
    assert_close(mu, linear(encoder, "fc_mu", h))
    assert_close(logvar, linear(encoder, "fc_logvar", h).clamp(-10, 10))  # as it is clipped there
    assert logvar.min() == -10 and logvar.max() == 10


def test_section_2_4_mlp():
    vae = VAE(input_dim=784, hidden_dim=400, latent_dim=20)
    x = torch.rand(32, 784)
    x_recon, mu, logvar = vae(x)
    assert all(term.dim() == 0 for term in vae_loss(x_recon, x, mu, logvar))
    h = linear(vae, "encoder_fc1", x).relu()
    heads = linear(vae, "encoder_fc_mu", h), linear(vae, "encoder_fc_logvar", h)
    assert_close((mu, logvar), heads)
    expected = linear(vae, "decoder_fc2", linear(vae, "decoder_fc1", mu).relu()).sigmoid()
    assert_close(vae.decode(mu), expected)
    assert parameters(vae) == 652_824
    assert vae.sample(num_samples=10, device="cpu").shape == (10, 784)


@pytest.mark.parametrize("architecture, size, side, channels, names", [
    (ConvVAE, 28, 3, [1, 32, 64, 128], ("encoder_conv", "decoder_conv")),
    (CelebAVAE, 64, 4, [3, 32, 64, 128, 256], ("encoder", "decoder")),
])
def test_sections_2_4_and_2_7_convolutions(architecture, size, side, channels, names):
    """Layer by layer what the chapter's are, with BatchNorm by the batch, then by its averages."""
    first, *_, last = channels  # the chapter's codes are as wide as the last layer
    model, norm = architecture(input_channels=first, latent_dim=last), architecture is CelebAVAE
    x, z = torch.rand(16, first, size, size), 3 * torch.randn(16, last)

    def chain(layer, channels):
        for one, other in zip(channels, channels[1:]):
            yield from (layer(one, other, 4, 2, 1), *[nn.BatchNorm2d(other)] * norm, nn.ReLU())

    encoder = nn.Sequential(*chain(nn.Conv2d, channels))
    decoder = nn.Sequential(*chain(nn.ConvTranspose2d, channels[::-1]))[: -1 - norm]
    if not norm:
        decoder[0].output_padding = (1, 1)  # the chapter's own gives 24 x 24
    width = last * side * side
    heads = {"fc_mu": nn.Linear(width, last), "fc_logvar": nn.Linear(width, last)}
    parts = heads | {"decoder_fc": nn.Linear(last, width), names[0]: encoder, names[1]: decoder}
    reference = nn.ModuleDict(parts)
    reference.load_state_dict(model.state_dict())  # the same names, too
    for training in (True, False):
        model.train(training)
        reference.train(training)
        h = encoder(x).flatten(1)
        assert_close(model.encode(x), tuple(head(h) for head in heads.values()))
        expected = decoder(parts["decoder_fc"](z).view(16, last, side, side)).sigmoid()
        assert_close(model.decode(z), expected)


def test_section_2_5_and_2_6_training_and_pictures(drawn, tmp_path):
    dataset = TensorDataset(drawn.images[:600] / 255, drawn.labels[:600])
    train_loader = DataLoader(dataset, batch_size=128, shuffle=True)
    test_loader = DataLoader(dataset, batch_size=128, shuffle=False)
    device = torch.device("cpu")
    model = VAE(input_dim=784, hidden_dim=400, latent_dim=20).to(device)
    optimizer = optim.Adam(model.parameters(), lr=1e-3)
    train_loss, train_recon, train_kl = train.train_epoch(model, train_loader, optimizer, device)
    test_loss, test_recon, test_kl = train.test_epoch(model, test_loader, device)
    assert test_loss < train_loss
    visualize_reconstruction(model, test_loader, device, tmp_path / "1.png", num_samples=10)
    visualize_samples(model, device, tmp_path / "2.png", num_samples=16)

    model_2d = VAE(input_dim=784, hidden_dim=400, latent_dim=2).to(device)
    visualize_latent_space_2d(model_2d, test_loader, device, tmp_path / "3.png")
    with torch.no_grad():
        mu, _ = model.encode(next(iter(test_loader))[0].view(-1, 784))
    images = interpolate_latent_space(model, mu[0], mu[1], 10)
    assert images.shape == (10, 1, 28, 28)
    path = tmp_path / "4.png"
    visualize_interpolation(model, test_loader, device, num_pairs=3, num_steps=10, path=path)
    visualize_latent_manifold(model_2d, device, n=5, digit_size=28, path=tmp_path / "5.png")
    assert all((tmp_path / f"{i}.png").stat().st_size > 2000 for i in range(1, 6))
