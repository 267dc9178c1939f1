"""The variational autoencoder: the mathematics and the networks (chapter 2.2 - 2.4, 2.7).

A VAE describes how an image x comes about: draw a code z from the prior
p(z) = N(0, I), then draw x from p(x|z), whose parameters a decoder computes.
The likelihood log p(x) is intractable, so an encoder proposes
q(z|x) = N(mu, diag(sigma^2)), and training maximises a lower bound of log p(x):

    ELBO(x) = E_q(z|x)[ log p(x|z) ] - KL( q(z|x) || p(z) )  <=  log p(x)

Everything here works with the negative ELBO, a loss to be minimised, in nats:

    total = recon + beta * KL        (beta = 1: -ELBO, estimated from one draw of z)

Sources: Kingma & Welling 2013 (arXiv:1312.6114); Rezende, Mohamed & Wierstra
2014 (arXiv:1401.4082); for beta, Higgins et al. 2017; for several draws of z,
Burda, Grosse & Salakhutdinov 2016 (arXiv:1509.00519).
"""

import math
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

    mu, logvar: (batch, latent_dim), with logvar = log sigma^2. Returns z of the
    same shape. The randomness sits in epsilon, which depends on no parameter, so
    z is a differentiable function of mu and sigma (Kingma & Welling 2013, 2.4).
    """
    std = torch.exp(0.5 * logvar)  # exp(log sigma^2 / 2) = sigma, not sigma^2
    epsilon = torch.randn_like(std)
    return mu + std * epsilon


def kl_divergence_gaussian(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL( N(mu, sigma^2) || N(0, I) ) per image: (batch, latent_dim) -> (batch,), nats.

    KL = -1/2 sum_j (1 + log sigma_j^2 - mu_j^2 - sigma_j^2)
    (Kingma & Welling 2013, appendix B). It is never negative, and 0 only where
    mu = 0 and sigma = 1.
    """
    # expm1(logvar) is sigma^2 - 1 without the rounding of exp(logvar) near 1, in which
    # a small KL would drown: at logvar = 1e-4 float32 would give 0 instead of 2.5e-9.
    return 0.5 * (mu.pow(2) + torch.expm1(logvar) - logvar).sum(dim=1)


def bce_from_logits(x_logits: Tensor, x: Tensor) -> Tensor:
    """Binary cross-entropy per image, summed over its pixels: (batch,), nats.

    x: images in [0, 1]; x_logits: as many logits, any real numbers, flat or not. For
    pixels of 0 and 1 it is -log p(x|z) of Bernoulli pixels with mean sigmoid(x_logits).
    On grey pixels it still has its minimum at the right mean, but it is no likelihood.

    With p = sigmoid(l) the cross-entropy is -x log p - (1 - x) log(1 - p). Since
    log p = l - softplus(l) and log(1 - p) = -softplus(l), with
    softplus(l) = log(1 + e^l), this is softplus(l) - x l: finite for every finite
    logit, with the exact gradient sigmoid(l) - x. Through the sigmoid itself it would
    break: in float32 sigmoid(17) is 1, so log(1 - p) is -inf.
    """
    x = x.reshape(x_logits.shape)
    return (F.softplus(x_logits) - x * x_logits).flatten(1).sum(dim=1)


def squared_error(x_logits: Tensor, x: Tensor) -> Tensor:
    """||x - sigmoid(x_logits)||^2 per image: (batch,).

    Up to a constant this is -log p(x|z) in nats of a Gaussian with mean
    sigmoid(x_logits) and variance 1/2. For another variance s^2 it would be
    squared_error / (2 s^2), so with this loss beta = 2 s^2 does the same as that variance.
    """
    x = x.reshape(x_logits.shape)
    return (x - torch.sigmoid(x_logits)).pow(2).flatten(1).sum(dim=1)


def vae_loss(
    x_logits: Tensor,
    x: Tensor,
    mu: Tensor,
    logvar: Tensor,
    beta: float = 1.0,
    recon_loss: Callable[[Tensor, Tensor], Tensor] = bce_from_logits,
) -> tuple[Tensor, Tensor, Tensor]:
    """The negative ELBO, its KL weighted by beta: (total, recon, kl), summed over the batch.

    x_logits, x: the same images, (batch, ...); mu, logvar: (batch, latent_dim);
    recon_loss: bce_from_logits or squared_error. Three scalars in nats (but recon in the
    units of recon_loss), total = recon + beta * kl. recon is a one-sample Monte Carlo
    estimate of -E_q(z|x)[log p(x|z)]; kl is exact.
    """
    recon = recon_loss(x_logits, x).sum()
    kl = kl_divergence_gaussian(mu, logvar).sum()
    return recon + beta * kl, recon, kl


# ------------------------------------------------- the likelihood, by importance sampling


def log_weights(
    model: nn.Module, x: Tensor, mu: Tensor, logvar: Tensor, epsilon: Tensor, beta: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The logarithms of the importance weights w_i = p(x|z_i) p(z_i) / q(z_i|x).

    x: (batch, ...), q(z|x) by its mu and logvar: (batch, latent_dim); epsilon: noise from
    N(0, I), (k, batch, latent_dim), for the draws z_i = mu + sigma epsilon_i. Returns log w,
    and -log p(x|z), which is a part of it: both (k, batch), nats. Over draws from q the
    expectation of w is p(x), that of log w is the ELBO. A beta other than 1 (KL annealing)
    weighs log p(z) / q(z|x), whose expectation is -KL, as it weighs the KL in `vae_loss`.
    """
    z = mu + torch.exp(0.5 * logvar) * epsilon
    x = x.expand(len(epsilon), *x.shape).flatten(0, 1)  # as many copies as draws
    recon = model.recon_loss(model.decode_logits(z.flatten(0, 1)), x).view(epsilon.shape[:2])
    # log p(z) - log q(z|x), in which the two -1/2 log 2 pi cancel
    log_ratio = 0.5 * (epsilon.pow(2) + logvar - z.pow(2)).sum(dim=2)
    return beta * log_ratio - recon, recon


def importance_weighted_bound(log_w: Tensor) -> Tensor:
    """log( 1/k sum_i w_i ) of every image: (k, batch) -> (batch,), nats.

    Its expectation L_k (Burda et al. 2016, eq. 8) is the ELBO for k = 1, never falls as k
    grows, and goes to log p(x). logsumexp takes the largest log w out of the sum, for
    exp(log w) itself is 0 in float32 below e^-104, and images are less probable than that.
    """
    return torch.logsumexp(log_w, dim=0) - math.log(len(log_w))


@torch.no_grad()
def draw_log_weights(
    model: nn.Module, x: Tensor, num_samples: int, chunk_size: int = 250
) -> Tensor:
    """log w of num_samples draws from q(z|x) of one image x, (1, ...): (num_samples, 1), nats.

    At most chunk_size draws are decoded at a time. Put the model in evaluation mode.
    """
    mu, logvar = model.encode(x)
    epsilon = torch.randn(num_samples, *mu.shape, dtype=mu.dtype, device=mu.device)
    parts = epsilon.split(chunk_size)
    return torch.cat([log_weights(model, x, mu, logvar, part)[0] for part in parts])


def log_likelihood(
    model: nn.Module, x: Tensor, num_samples: int, chunk_size: int = 250
) -> Tensor:
    """Estimate log p(x) of every image from num_samples draws: (batch, ...) -> (batch,), nats.

    On average it is too low (it is the bound L_k), the less so the more draws; in the
    literature 5,000 is usual. Image by image, so memory does not grow with the batch. Put
    the model in evaluation mode.
    """
    log_w = (draw_log_weights(model, image[None], num_samples, chunk_size) for image in x)
    return torch.cat([importance_weighted_bound(image_log_w) for image_log_w in log_w])


def active_units(mu: Tensor) -> int:
    """How many latents the encoder uses: those whose mean varies by more than 0.01 between
    images, Var_x(mu_j) > 0.01 (Burda et al. 2016, section 5). mu: (n, latent_dim)."""
    return int((mu.var(dim=0, correction=0) > 0.01).sum())


# ------------------------------------------------------------------- the networks


ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}


def hidden_stack(
    input_dim: int, hidden_dim: int, hidden_layers: int, activation: str
) -> nn.Sequential:
    """input_dim -> hidden_dim -> ... -> hidden_dim, an activation after each layer."""
    sizes = [input_dim] + hidden_layers * [hidden_dim]
    layers = [(nn.Linear(a, b), ACTIVATIONS[activation]()) for a, b in zip(sizes, sizes[1:])]
    return nn.Sequential(*(module for layer in layers for module in layer))


class VAEEncoder(nn.Module):
    """The recognition network q(z|x): one hidden layer or more, then mu and log sigma^2."""

    def __init__(
        self,
        input_dim: int = 784,
        hidden_dim: int = 400,
        latent_dim: int = 20,
        hidden_layers: int = 1,
        activation: str = "relu",
    ):
        super().__init__()
        self.hidden = hidden_stack(input_dim, hidden_dim, hidden_layers, activation)
        self.fc_mu = nn.Linear(hidden_dim, latent_dim)
        self.fc_logvar = nn.Linear(hidden_dim, latent_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (batch, ...) with input_dim values an image -> mu, logvar: (batch, latent_dim)."""
        h = self.hidden(x.flatten(1))
        return self.fc_mu(h), self.fc_logvar(h).clamp(*LOGVAR_RANGE)


class GaussianVAE(nn.Module):
    """What every VAE here does, whatever its networks are.

    A subclass is an architecture: it sets `latent_dim` and defines
    `encode(x) -> (mu, logvar)` and `decode_logits(z)`. `recon_loss` is the -log p(x|z)
    that it is trained on, `importance_samples` the k of the bound L_k.
    """

    recon_loss = staticmethod(bce_from_logits)
    importance_samples = 1

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

    def loss(
        self, images: Tensor, labels: Tensor, beta: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(total, recon, kl) of a batch, as `vae_loss`. The labels are not used.

        With k = importance_samples > 1, total is one estimate of -L_k (for beta = 1; Burda et al.
        2016), on average no more than recon + kl, which are the terms of -ELBO all the same.
        """
        if self.importance_samples == 1:
            x_logits, mu, logvar = self(images)
            return vae_loss(x_logits, images, mu, logvar, beta, self.recon_loss)
        mu, logvar = self.encode(images)
        shape = (self.importance_samples, *mu.shape)
        epsilon = torch.randn(shape, dtype=mu.dtype, device=mu.device)
        log_w, recon = log_weights(self, images, mu, logvar, epsilon, beta)
        kl = kl_divergence_gaussian(mu, logvar)
        return -importance_weighted_bound(log_w).sum(), recon.mean(dim=0).sum(), kl.sum()

    @torch.no_grad()
    def sample(self, num_samples: int, device: torch.device | str | None = None) -> Tensor:
        """Draw z from the prior and decode it: (num_samples, ...), pixel means in [0, 1].

        device: by default the model's own.
        """
        device = device or next(self.parameters()).device
        # Drawn on the CPU, so a seed gives the same codes whatever the device.
        return self.decode(torch.randn(num_samples, self.latent_dim).to(device))


class VAE(GaussianVAE):
    """The MLP VAE (chapter 2.4): 784 -> 400 -> 20 -> 400 -> 784 by default.

    With hidden_layers = 2 there are two layers of hidden_dim on either side of the code; the
    activation is one of ACTIVATIONS. Takes images of any shape with input_dim values, returns
    them flat.
    """

    def __init__(
        self,
        input_dim: int = 784,
        hidden_dim: int = 400,
        latent_dim: int = 20,
        hidden_layers: int = 1,
        activation: str = "relu",
    ):
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder = VAEEncoder(input_dim, hidden_dim, latent_dim, hidden_layers, activation)
        self.decoder = hidden_stack(latent_dim, hidden_dim, hidden_layers, activation)
        self.decoder_fc = nn.Linear(hidden_dim, input_dim)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (batch, ...) -> mu, logvar: (batch, latent_dim)."""
        return self.encoder(x)

    def decode_logits(self, z: Tensor) -> Tensor:
        """z: (batch, latent_dim) -> (batch, input_dim)."""
        return self.decoder_fc(self.decoder(z))


class ConvVAE(GaussianVAE):
    """The convolutional VAE for 28 x 28 images (chapter 2.4)."""

    def __init__(self, input_channels: int = 1, latent_dim: int = 128):
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder_conv = nn.Sequential(
            # 28 -> 14
            nn.Conv2d(input_channels, 32, kernel_size=4, stride=2, padding=1),
            nn.ReLU(),
            # 14 -> 7
            nn.Conv2d(32, 64, kernel_size=4, stride=2, padding=1),
            nn.ReLU(),
            # 7 -> 3
            nn.Conv2d(64, 128, kernel_size=4, stride=2, padding=1),
            nn.ReLU(),
        )
        self.fc_mu = nn.Linear(128 * 3 * 3, latent_dim)
        self.fc_logvar = nn.Linear(128 * 3 * 3, latent_dim)
        self.decoder_fc = nn.Linear(latent_dim, 128 * 3 * 3)
        # On its way down, 7 / 2 was rounded to 3; output_padding=1 makes up for it.
        # Without it this goes 3 -> 6 -> 12 -> 24, and the image is too small.
        self.decoder_conv = nn.Sequential(
            # 3 -> 7
            nn.ConvTranspose2d(128, 64, kernel_size=4, stride=2, padding=1, output_padding=1),
            nn.ReLU(),
            # 7 -> 14
            nn.ConvTranspose2d(64, 32, kernel_size=4, stride=2, padding=1),
            nn.ReLU(),
            # 14 -> 28
            nn.ConvTranspose2d(32, input_channels, kernel_size=4, stride=2, padding=1),
        )

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (batch, channels, 28, 28) -> mu, logvar: (batch, latent_dim)."""
        h = self.encoder_conv(x).flatten(1)  # (batch, 128 * 3 * 3)
        return self.fc_mu(h), self.fc_logvar(h).clamp(*LOGVAR_RANGE)

    def decode_logits(self, z: Tensor) -> Tensor:
        """z: (batch, latent_dim) -> (batch, channels, 28, 28)."""
        h = self.decoder_fc(z).view(-1, 128, 3, 3)
        return self.decoder_conv(h)


class CelebAVAE(GaussianVAE):
    """The convolutional VAE for 64 x 64 colour images (chapter 2.7).

    BatchNorm normalises by the batch in training mode, and by running averages in
    evaluation mode: call eval() before you decode or sample.
    """

    def __init__(self, input_channels: int = 3, latent_dim: int = 256):
        super().__init__()
        self.latent_dim = latent_dim

        def down(channels_in: int, channels_out: int) -> list[nn.Module]:
            conv = nn.Conv2d(channels_in, channels_out, kernel_size=4, stride=2, padding=1)
            return [conv, nn.BatchNorm2d(channels_out), nn.ReLU()]

        def up(channels_in: int, channels_out: int) -> list[nn.Module]:
            conv = nn.ConvTranspose2d(channels_in, channels_out, kernel_size=4, stride=2, padding=1)
            return [conv, nn.BatchNorm2d(channels_out), nn.ReLU()]

        # 64 -> 32 -> 16 -> 8 -> 4
        self.encoder = nn.Sequential(
            *down(input_channels, 32), *down(32, 64), *down(64, 128), *down(128, 256)
        )
        self.fc_mu = nn.Linear(256 * 4 * 4, latent_dim)
        self.fc_logvar = nn.Linear(256 * 4 * 4, latent_dim)
        self.decoder_fc = nn.Linear(latent_dim, 256 * 4 * 4)
        # 4 -> 8 -> 16 -> 32 -> 64
        self.decoder = nn.Sequential(
            *up(256, 128), *up(128, 64), *up(64, 32),
            nn.ConvTranspose2d(32, input_channels, kernel_size=4, stride=2, padding=1),
        )

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (batch, channels, 64, 64) -> mu, logvar: (batch, latent_dim)."""
        h = self.encoder(x).flatten(1)  # (batch, 256 * 4 * 4)
        return self.fc_mu(h), self.fc_logvar(h).clamp(*LOGVAR_RANGE)

    def decode_logits(self, z: Tensor) -> Tensor:
        """z: (batch, latent_dim) -> (batch, channels, 64, 64)."""
        h = self.decoder_fc(z).view(-1, 256, 4, 4)
        return self.decoder(h)
