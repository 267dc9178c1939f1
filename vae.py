"""The variational autoencoder: the mathematics and the networks (chapter 2.2 - 2.4, 2.7).

A VAE describes how an image x comes about: draw a code z from the prior p(z) = N(0, I), then draw
x from p(x|z), whose parameters a decoder computes. The likelihood log p(x) is intractable, so an
encoder proposes q(z|x) = N(mu, diag(sigma^2)), and training maximises a lower bound of log p(x):

    ELBO(x) = E_q(z|x)[ log p(x|z) ] - KL( q(z|x) || p(z) )  <=  log p(x)

Everything here works with the negative ELBO, a loss to be minimised, in nats:

    total = recon + beta * KL        (beta = 1: -ELBO, estimated from one draw of z)

Sources: Kingma & Welling 2013 (arXiv:1312.6114); Rezende, Mohamed & Wierstra
2014 (arXiv:1401.4082); for beta, Higgins et al. 2017.
"""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# Encoders clamp log sigma^2 to this range: sigma stays within [0.007, 148], and exp()
# cannot overflow (chapter 2.3). Outside the range no gradient reaches logvar.
LOGVAR_RANGE = (-10.0, 10.0)


# ---------------------------------------------------------------- the mathematics


def reparameterize(mu: Tensor, logvar: Tensor) -> Tensor:
    """Draw z ~ N(mu, sigma^2) such that gradients reach mu and logvar.

    mu, logvar: (batch, latent_dim), with logvar = log sigma^2. Returns z of the same shape. The
    randomness sits in epsilon, which depends on no parameter, so z is a differentiable function of
    mu and sigma (Kingma & Welling 2013, section 2.4).
    """
    std = torch.exp(0.5 * logvar)  # exp(log sigma^2 / 2) = sigma, not sigma^2
    epsilon = torch.randn_like(std)
    return mu + std * epsilon


def kl_divergence_gaussian(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL( N(mu, sigma^2) || N(0, I) ) per image: (batch, latent_dim) -> (batch,), nats.

    KL = -1/2 sum_j (1 + log sigma_j^2 - mu_j^2 - sigma_j^2)    (Kingma & Welling 2013, appendix B)

    It is never negative, and 0 only where mu = 0 and sigma = 1.
    """
    # = 1/2 sum_j (mu^2 + (sigma^2 - 1) - log sigma^2). expm1(logvar) is sigma^2 - 1 without the
    # rounding of exp(logvar) near 1: a small KL keeps its digits. The gradients are as with exp.
    return 0.5 * (mu.pow(2) + torch.expm1(logvar) - logvar).sum(dim=1)


def bce_from_logits(x_logits: Tensor, x: Tensor) -> Tensor:
    """Binary cross-entropy per image, summed over its pixels: (batch,), nats. Up to rounding it is
    what torch calls binary_cross_entropy_with_logits.

    x: images in [0, 1]; x_logits: as many logits, any real numbers, flat or not. For pixels of 0
    and 1 it is -log p(x|z) of Bernoulli pixels with mean sigmoid(x_logits). On grey pixels it still
    has its minimum at the right mean, but it is no likelihood.

    With p = sigmoid(l) the cross-entropy is -x log p - (1 - x) log(1 - p). As p = e^l / (1 + e^l),
    log p = l - softplus(l) and log(1 - p) = -softplus(l), with softplus(l) = log(1 + e^l), it is
    softplus(l) - x l: finite for every finite logit, with the exact gradient sigmoid(l) - x.
    Through the sigmoid it would break: in float32 sigmoid(17) is 1, so log(1 - p) is -inf.
    """
    x = x.reshape(x_logits.shape)
    return (F.softplus(x_logits) - x * x_logits).flatten(1).sum(dim=1)


def squared_error(x_logits: Tensor, x: Tensor) -> Tensor:
    """||x - sigmoid(x_logits)||^2 per image: (batch,). Up to a constant this is -log p(x|z) in nats
    of a Gaussian with mean sigmoid(x_logits) and variance 1/2. For another variance s^2 it would be
    squared_error / (2 s^2), so with this loss beta = 2 s^2 does the same as that variance."""
    x = x.reshape(x_logits.shape)
    return (x - torch.sigmoid(x_logits)).pow(2).flatten(1).sum(dim=1)


def vae_loss(x_logits: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, beta: float = 1.0,
             recon_loss: Callable = bce_from_logits) -> tuple[Tensor, Tensor, Tensor]:
    """The negative ELBO, its KL weighted by beta: (total, recon, kl), summed over the batch.

    x: images, (batch, ...), x_logits: as many logits; mu, logvar: (batch, latent_dim); recon_loss:
    bce_from_logits or squared_error. Three scalars, total = recon + beta * kl. kl is exact, in
    nats. recon is a one-sample Monte Carlo estimate of -E_q(z|x)[log p(x|z)]: in nats with the BCE
    of binary pixels, and up to a constant with the squared error (see there).
    """
    recon = recon_loss(x_logits, x).sum()
    kl = kl_divergence_gaussian(mu, logvar).sum()
    return recon + beta * kl, recon, kl


# ------------------------------------------------------------------- the networks


def of_size(x: Tensor, *size: int) -> Tensor:
    """x, if its images are of this size: a clearer error than PyTorch's."""
    if x.shape[1:] != size:
        raise ValueError(f"the network takes images of {size}, and is given {(*x.shape[1:],)}")
    return x


class VAEEncoder(nn.Module):
    """The recognition network q(z|x) by itself (chapter 2.3): 784 -> 400 -> mu, log sigma^2. The
    models below have theirs inside; exercises 3 and 5 use this one."""

    def __init__(self, input_dim: int = 784, hidden_dim: int = 400, latent_dim: int = 20):
        super().__init__()
        self.fc1 = nn.Linear(input_dim, hidden_dim)
        self.fc_mu = nn.Linear(hidden_dim, latent_dim)
        self.fc_logvar = nn.Linear(hidden_dim, latent_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (batch, ...) with input_dim values an image -> mu, logvar: (batch, latent_dim)."""
        h = F.relu(self.fc1(of_size(x.flatten(1), self.fc1.in_features)))
        return self.fc_mu(h).to(x.dtype), self.fc_logvar(h).to(x.dtype).clamp(*LOGVAR_RANGE)


class BaseVAE(nn.Module):
    """What every VAE here does, whatever its networks are.

    A subclass is an architecture: it sets `latent_dim` and defines `encode(x) -> (mu, logvar)` and
    `decode_logits(z)`. Both return the dtype of what they are given, so that losses are in float32
    even where autocast makes the layers bfloat16. `recon_loss` is the -log p(x|z) trained on.
    """

    recon_loss = staticmethod(bce_from_logits)

    def reparameterize(self, mu: Tensor, logvar: Tensor) -> Tensor:
        return reparameterize(mu, logvar)

    def decode(self, z: Tensor) -> Tensor:
        """z: (batch, latent_dim) -> the pixel means, in [0, 1]."""
        return torch.sigmoid(self.decode_logits(z))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x -> z -> x': returns (x_logits, mu, logvar)."""
        mu, logvar = self.encode(x)
        z = self.reparameterize(mu, logvar)
        return self.decode_logits(z), mu, logvar

    def loss(self, images: Tensor, labels: Tensor, beta: float = 1.0) -> tuple[Tensor, ...]:
        """(total, recon, kl) of a batch, as `vae_loss`. A plain VAE has no use for the labels;
        they are there for models that have, such as the conditional VAE of exercise 3."""
        x_logits, mu, logvar = self(images)
        return vae_loss(x_logits, images, mu, logvar, beta, self.recon_loss)

    @torch.no_grad()
    def sample(self, num_samples: int, device: torch.device | str | None = None) -> Tensor:
        """Draw z from the prior and decode it, on the model's device if none is given:
        (num_samples, ...), pixel means in [0, 1]."""
        device = device or next(self.parameters()).device
        # Drawn on the CPU, so a seed gives the same codes whatever the device.
        return self.decode(torch.randn(num_samples, self.latent_dim).to(device))


class VAE(BaseVAE):
    """The MLP VAE (chapter 2.4): 784 -> 400 -> 20 -> 400 -> 784 by default. It takes images of any
    shape with input_dim values, and returns them flat."""

    def __init__(self, input_dim: int = 784, hidden_dim: int = 400, latent_dim: int = 20):
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder_fc1 = nn.Linear(input_dim, hidden_dim)
        self.encoder_fc_mu = nn.Linear(hidden_dim, latent_dim)
        self.encoder_fc_logvar = nn.Linear(hidden_dim, latent_dim)
        self.decoder_fc1 = nn.Linear(latent_dim, hidden_dim)
        self.decoder_fc2 = nn.Linear(hidden_dim, input_dim)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (batch, ...) -> mu, logvar: (batch, latent_dim)."""
        x = of_size(x.flatten(1), self.encoder_fc1.in_features)
        h = F.relu(self.encoder_fc1(x))
        mu, logvar = self.encoder_fc_mu(h).to(x.dtype), self.encoder_fc_logvar(h).to(x.dtype)
        return mu, logvar.clamp(*LOGVAR_RANGE)

    def decode_logits(self, z: Tensor) -> Tensor:
        """z: (batch, latent_dim) -> (batch, input_dim)."""
        h = F.relu(self.decoder_fc1(z))
        return self.decoder_fc2(h).to(z.dtype)


class ConvVAE(BaseVAE):
    """The convolutional VAE for 28 x 28 images (chapter 2.4)."""

    def __init__(self, input_channels: int = 1, latent_dim: int = 128):
        super().__init__()
        self.latent_dim = latent_dim
        # With kernels of 4 x 4: 28 -> 14 -> 7 -> 3
        self.encoder_conv = nn.Sequential(
            nn.Conv2d(input_channels, 32, 4, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(64, 128, 4, stride=2, padding=1), nn.ReLU(),
        )
        self.fc_mu = nn.Linear(128 * 3 * 3, latent_dim)
        self.fc_logvar = nn.Linear(128 * 3 * 3, latent_dim)
        self.decoder_fc = nn.Linear(latent_dim, 128 * 3 * 3)
        # 3 -> 7 -> 14 -> 28. On its way down, 7 / 2 was rounded to 3; output_padding=1 makes up
        # for it. Without it this goes 3 -> 6 -> 12 -> 24, and the image is too small.
        self.decoder_conv = nn.Sequential(
            nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1, output_padding=1), nn.ReLU(),
            nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1), nn.ReLU(),
            nn.ConvTranspose2d(32, input_channels, 4, stride=2, padding=1),
        )

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (batch, channels, 28, 28) -> mu, logvar: (batch, latent_dim)."""
        x = of_size(x, self.encoder_conv[0].in_channels, 28, 28)
        h = self.encoder_conv(x).flatten(1)  # (batch, 128 * 3 * 3)
        return self.fc_mu(h).to(x.dtype), self.fc_logvar(h).to(x.dtype).clamp(*LOGVAR_RANGE)

    def decode_logits(self, z: Tensor) -> Tensor:
        """z: (batch, latent_dim) -> (batch, channels, 28, 28)."""
        h = self.decoder_fc(z).view(-1, 128, 3, 3)
        return self.decoder_conv(h).to(z.dtype)


class CelebAVAE(BaseVAE):
    """The convolutional VAE for 64 x 64 colour images (chapter 2.7). BatchNorm normalises by the
    batch in training mode, and by running averages in evaluation mode: call eval() before you
    decode or sample."""

    def __init__(self, input_channels: int = 3, latent_dim: int = 256):
        super().__init__()
        self.latent_dim = latent_dim
        # With kernels of 4 x 4: 64 -> 32 -> 16 -> 8 -> 4
        self.encoder = nn.Sequential(
            nn.Conv2d(input_channels, 32, 4, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, 128, 4, stride=2, padding=1), nn.BatchNorm2d(128), nn.ReLU(),
            nn.Conv2d(128, 256, 4, stride=2, padding=1), nn.BatchNorm2d(256), nn.ReLU(),
        )
        self.fc_mu = nn.Linear(256 * 4 * 4, latent_dim)
        self.fc_logvar = nn.Linear(256 * 4 * 4, latent_dim)
        self.decoder_fc = nn.Linear(latent_dim, 256 * 4 * 4)
        # 4 -> 8 -> 16 -> 32 -> 64
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(256, 128, 4, stride=2, padding=1), nn.BatchNorm2d(128), nn.ReLU(),
            nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.ConvTranspose2d(32, input_channels, 4, stride=2, padding=1),
        )

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (batch, channels, 64, 64) -> mu, logvar: (batch, latent_dim)."""
        x = of_size(x, self.encoder[0].in_channels, 64, 64)
        h = self.encoder(x).flatten(1)  # (batch, 256 * 4 * 4)
        return self.fc_mu(h).to(x.dtype), self.fc_logvar(h).to(x.dtype).clamp(*LOGVAR_RANGE)

    def decode_logits(self, z: Tensor) -> Tensor:
        """z: (batch, latent_dim) -> (batch, channels, 64, 64)."""
        h = self.decoder_fc(z).view(-1, 256, 4, 4)
        return self.decoder(h).to(z.dtype)
