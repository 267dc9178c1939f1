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
from vae import VAE, CelebAVAE, ConvVAE, VAEEncoder, reparameterize, vae_loss
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
    assert x_recon.shape == (32, 784) and z.shape == (32, 20)
    assert_close(z, linear(ae, "fc2", linear(ae, "fc1", x).relu()))
    assert_close(x_recon, linear(ae, "fc4", linear(ae, "fc3", z).relu()).sigmoid())
    assert parameters(ae) == 644_804
    assert ae.decode(torch.randn(10, 20)).shape == (10, 784)


def test_section_2_3_reparameterization():
    encoder = VAEEncoder(input_dim=784, hidden_dim=400, latent_dim=20)
    x = torch.randn(32, 784)
    mu, logvar = encoder(x)
    h = linear(encoder, "fc1", x).relu()
    assert_close((mu, logvar), (linear(encoder, "fc_mu", h), linear(encoder, "fc_logvar", h)))
    z = reparameterize(mu, logvar)
    assert mu.shape == logvar.shape == z.shape == (32, 20)
    z.sum().backward()
    assert encoder.fc_mu.weight.grad is not None and encoder.fc_logvar.weight.grad is not None
    # It clips the log-variance to [-10, 10]: so do the encoders.
    with torch.no_grad():
        encoder.fc_logvar.bias.copy_(torch.linspace(-1000, 1000, 20))
    logvar = encoder(torch.rand(4, 784))[1]
    assert logvar.min() == -10 and logvar.max() == 10


def test_section_2_4_mlp():
    vae = VAE(input_dim=784, hidden_dim=400, latent_dim=20)
    x = torch.rand(32, 784)
    x_recon, mu, logvar = vae(x)
    assert x_recon.shape == (32, 784) and mu.shape == logvar.shape == (32, 20)
    assert all(term.dim() == 0 for term in vae_loss(x_recon, x, mu, logvar))
    h = linear(vae, "encoder_fc1", x).relu()
    heads = linear(vae, "encoder_fc_mu", h), linear(vae, "encoder_fc_logvar", h)
    assert_close((mu, logvar), heads)
    expected = linear(vae, "decoder_fc2", linear(vae, "decoder_fc1", mu).relu()).sigmoid()
    assert_close(vae.decode(mu), expected)
    assert parameters(vae) == 652_824
    assert vae.sample(num_samples=10, device="cpu").shape == (10, 784)


@pytest.mark.parametrize("architecture, size, side, channels, names, count", [
    (ConvVAE, 28, 3, [1, 32, 64, 128], ("encoder_conv", "decoder_conv"), 772_801),
    (CelebAVAE, 64, 4, [3, 32, 64, 128, 256], ("encoder", "decoder"), 4_531_779),
])
def test_sections_2_4_and_2_7_convolutions(architecture, size, side, channels, names, count):
    """The models as the chapter calls them; and layer by layer what the chapter's are."""
    first, *_, last = channels  # the chapter's codes are as wide as the last layer
    model, norm = architecture(input_channels=first, latent_dim=last), architecture is CelebAVAE
    x, z = torch.rand(16, first, size, size), 3 * torch.randn(16, last)
    x_recon, mu, logvar = model(x)
    assert x_recon.shape == x.shape and mu.shape == logvar.shape == (16, last)
    assert parameters(model) == count

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
    nn.ModuleDict(parts).load_state_dict(model.state_dict())  # the same names, too
    assert_close(model.encode(x), tuple(head(encoder(x).flatten(1)) for head in heads.values()))
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
    assert test_loss < train_loss and test_loss == pytest.approx(test_recon + test_kl)
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

    # The chapter's loop flattens every batch, so it cannot train a convolutional model.
    conv = ConvVAE(input_channels=1, latent_dim=128)
    first = train.train_epoch(conv, train_loader, optim.Adam(conv.parameters(), lr=1e-3), device)
    assert train.test_epoch(conv, test_loader, device)[0] < first[0]
