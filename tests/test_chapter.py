"""The chapter's own calls, section by section, against these modules."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
from torch.utils.data import DataLoader, TensorDataset

import train
from ae import Autoencoder
from vae import (
    VAE,
    CelebAVAE,
    ConvVAE,
    VAEEncoder,
    bce_from_logits,
    kl_divergence_gaussian,
    reparameterize,
    vae_loss,
)
from viz import (
    interpolate_latent_space,
    visualize_interpolation,
    visualize_latent_manifold,
    visualize_latent_space_2d,
    visualize_reconstruction,
    visualize_samples,
)


@pytest.fixture(scope="module")
def loaders(drawn):
    """The chapter's DataLoaders, of (images, labels)."""
    dataset = TensorDataset(drawn.images[:600] / 255, drawn.labels[:600])
    return (DataLoader(dataset, batch_size=128, shuffle=True),
            DataLoader(dataset, batch_size=128, shuffle=False))


def test_section_2_1_autoencoder():
    ae = Autoencoder(input_dim=784, hidden_dim=400, latent_dim=20)
    x = torch.randn(32, 784)
    x_recon, z = ae(x)
    assert x_recon.shape == (32, 784) and z.shape == (32, 20)
    assert F.mse_loss(x_recon, x).item() > 0
    assert sum(p.numel() for p in ae.parameters()) == 644_804
    ae.eval()
    with torch.no_grad():
        z_samples = ae.encode(torch.randn(100, 784))
        assert z_samples.mean(dim=0)[:5].numpy().shape == (5,)
        assert ae.decode(torch.randn(10, 20)).shape == (10, 784)


def test_section_2_2_loss():
    x, x_recon = torch.rand(32, 784), torch.rand(32, 784)
    mu, logvar = torch.randn(32, 20), torch.randn(32, 20)
    assert kl_divergence_gaussian(mu, logvar).shape == (32,)
    total_loss, recon_loss, kl_loss = vae_loss(x_recon, x, mu, logvar)
    assert total_loss.item() == pytest.approx(recon_loss.item() + kl_loss.item(), rel=1e-6)
    # The chapter's formula lacks a minus sign; its code has it, and so has ours.
    formula = 0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum()
    assert kl_loss.item() == pytest.approx(-formula.item(), rel=1e-5) and kl_loss > 0


def test_section_2_3_reparameterization():
    encoder = VAEEncoder(input_dim=784, hidden_dim=400, latent_dim=20)
    mu, logvar = encoder(torch.randn(32, 784))
    z = reparameterize(mu, logvar)
    assert mu.shape == logvar.shape == z.shape == (32, 20)
    z.sum().backward()
    assert encoder.fc_mu.weight.grad is not None and encoder.fc_logvar.weight.grad is not None
    z1, z2 = reparameterize(mu, logvar), reparameterize(mu, logvar)
    assert z1[0, :5].detach().numpy().tolist() != z2[0, :5].detach().numpy().tolist()
    # Its numerical example takes the log of variances: exp(0.5 log s) is sqrt(s), not s.
    variance = torch.tensor([0.001, 1.0, 100.0])
    torch.testing.assert_close(torch.exp(0.5 * variance.log()), variance.sqrt())
    # And it clips the log-variance to [-10, 10]: so do the encoders.
    with torch.no_grad():
        encoder.fc_logvar.bias.copy_(torch.linspace(-1000, 1000, 20))
    logvar = encoder(torch.rand(4, 784))[1]
    assert logvar.min() == -10 and logvar.max() == 10


def test_section_2_4_models():
    vae = VAE(input_dim=784, hidden_dim=400, latent_dim=20)
    x = torch.rand(32, 784)
    x_recon, mu, logvar = vae(x)
    assert x_recon.shape == (32, 784) and mu.shape == logvar.shape == (32, 20)
    assert all(term.dim() == 0 for term in vae_loss(x_recon, x, mu, logvar))
    assert sum(p.numel() for p in vae.parameters()) == 652_824
    assert vae.sample(num_samples=10).shape == (10, 784)

    conv_vae = ConvVAE(input_channels=1, latent_dim=128)
    x_recon, mu, logvar = conv_vae(torch.rand(16, 1, 28, 28))
    assert x_recon.shape == (16, 1, 28, 28)  # the chapter's own decoder gives 24 x 24
    assert mu.shape == (16, 128)
    assert sum(p.numel() for p in conv_vae.parameters()) == 772_801


def test_section_2_5_and_2_6_training_and_pictures(loaders, tmp_path):
    train_loader, test_loader = loaders
    device = torch.device("cpu")
    model = VAE(input_dim=784, hidden_dim=400, latent_dim=20).to(device)
    optimizer = optim.Adam(model.parameters(), lr=1e-3)
    train_loss, train_recon, train_kl = train.train_epoch(model, train_loader, optimizer, device)
    test_loss, test_recon, test_kl = train.test_epoch(model, test_loader, device)
    assert test_loss < train_loss and test_loss == pytest.approx(test_recon + test_kl)
    visualize_reconstruction(model, test_loader, device, tmp_path / "1.png", num_samples=10)
    visualize_samples(model, device, tmp_path / "2.png", num_samples=16)

    model_2d = VAE(input_dim=784, hidden_dim=400, latent_dim=2).to(device)
    optimizer_2d = optim.Adam(model_2d.parameters(), lr=1e-3)
    train_loss, _, _ = train.train_epoch(model_2d, train_loader, optimizer_2d, device)
    visualize_latent_space_2d(model_2d, test_loader, device, tmp_path / "3.png")
    with torch.no_grad():
        mu, _ = model.encode(next(iter(test_loader))[0].view(-1, 784))
    images = interpolate_latent_space(model, mu[0], mu[1], 10)
    assert images.shape == (10, 1, 28, 28)
    visualize_interpolation(
        model, test_loader, device, num_pairs=3, num_steps=10, path=tmp_path / "4.png"
    )
    visualize_latent_manifold(model_2d, device, n=20, digit_size=28, path=tmp_path / "5.png")
    assert all((tmp_path / f"{i}.png").stat().st_size > 2000 for i in range(1, 6))


def test_section_2_7_celeba():
    """The model as the chapter calls it; and layer by layer what the chapter's is."""
    celeba_vae = CelebAVAE(input_channels=3, latent_dim=256)
    x = torch.rand(16, 3, 64, 64)
    x_recon, mu, logvar = celeba_vae(x)
    assert x_recon.shape == (16, 3, 64, 64) and mu.shape == logvar.shape == (16, 256)
    assert sum(p.numel() for p in celeba_vae.parameters()) == 4_531_779

    def chain(layer, *channels):
        layers = []
        for one, other in zip(channels, channels[1:]):
            layers += [layer(one, other, 4, 2, 1), nn.BatchNorm2d(other), nn.ReLU()]
        return layers

    encoder = nn.Sequential(*chain(nn.Conv2d, 3, 32, 64, 128, 256))
    decoder = nn.Sequential(*chain(nn.ConvTranspose2d, 256, 128, 64, 32),
                            nn.ConvTranspose2d(32, 3, 4, 2, 1), nn.Sigmoid())
    parts = {"encoder": encoder, "fc_mu": nn.Linear(4096, 256), "fc_logvar": nn.Linear(4096, 256),
             "decoder_fc": nn.Linear(256, 4096), "decoder": decoder}
    nn.ModuleDict(parts).load_state_dict(celeba_vae.state_dict())  # the same names, too
    celeba_vae.eval(), encoder.eval(), decoder.eval()
    h, z = encoder(x).flatten(1), torch.randn(16, 256)
    torch.testing.assert_close(celeba_vae.encode(x), (parts["fc_mu"](h), parts["fc_logvar"](h)))
    expected = decoder(parts["decoder_fc"](z).view(16, 256, 4, 4))
    torch.testing.assert_close(celeba_vae.decode(z), expected)


def test_section_2_5_cross_entropy_is_a_likelihood_of_binary_pixels_only():
    """exp(-BCE) sums to 1 over the pixel values {0, 1}; over [0, 1] it does not integrate to 1."""
    grey = torch.linspace(0, 1, 1001)[:, None]
    for logit in (-3.0, 0.0, 1.0):
        logits = torch.full((1001, 1), logit)
        likelihood = torch.exp(-bce_from_logits(logits, grey))
        assert likelihood[0] + likelihood[-1] == pytest.approx(1, abs=1e-6)
        assert torch.trapezoid(likelihood, dx=1e-3).item() < 0.6


def test_section_2_5_the_loop_trains_convolutional_models_too(loaders):
    """The chapter's loop flattens every batch, so it cannot."""
    model = ConvVAE(input_channels=1, latent_dim=128)
    optimizer = optim.Adam(model.parameters(), lr=1e-3)
    first = train.train_epoch(model, loaders[0], optimizer, "cpu")
    assert train.test_epoch(model, loaders[1], "cpu")[0] < first[0]


def test_section_2_4_a_sigmoid_before_the_cross_entropy_kills_the_gradient():
    """The reason for logits: at a logit of 20, float32 knows only the loss from logits."""
    for through_sigmoid, gradient in ((True, 0.0), (False, 1.0)):
        logit = torch.full((1, 1), 20.0, requires_grad=True)
        if through_sigmoid:
            loss = F.binary_cross_entropy(torch.sigmoid(logit), torch.zeros(1, 1))
        else:
            loss = vae_loss(logit, torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1))[0]
        loss.backward()
        assert logit.grad.item() == pytest.approx(gradient, abs=1e-6)
