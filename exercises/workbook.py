"""The workbook: build the chapter's VAE yourself, in eleven steps, and have each of them checked.

    cp exercises/workbook.py my_answers.py                   a copy to write in
    .venv/bin/python exercises/check.py my_answers.py        how far you are; as often as you like

Put your own lines where it says `raise NotImplementedError`. Each step is checked by itself, and
lent what you do not have yet: stop anywhere, leave one out, go on tomorrow. When steps 1 to 5 and 7
are right, your VAE is trained and draws digits.

- Images are floats in [0, 1]: a batch is (batch, 1, 28, 28), or flat, (batch, 784).
- logvar is log sigma^2, the logarithm of the variance (chapter 2.3).
- A decoder returns logits, any real numbers; the image is their sigmoid. (The chapter has the
  sigmoid in the decoder. Here the loss has it; step 3 shows why.)
- Losses are in nats, and sums over pixels and latents, never means.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


def reparameterize(mu: Tensor, logvar: Tensor) -> Tensor:
    """Step 1 (chapter 2.3): draw z ~ N(mu, sigma^2) so that gradients reach mu and logvar.

    mu, logvar: (batch, latent_dim). Returns z of the same shape, mu + sigma * epsilon, where
    epsilon ~ N(0, 1) is drawn for every image and latent.
    """
    raise NotImplementedError


def kl_divergence_gaussian(mu: Tensor, logvar: Tensor) -> Tensor:
    """Step 2 (chapter 2.2): KL( N(mu, sigma^2) || N(0, I) ) of every image, in closed form.

    mu, logvar: (batch, latent_dim). Returns (batch,). Source: Kingma & Welling 2013, appendix B.
    """
    raise NotImplementedError


def bce_from_logits(x_logits: Tensor, x: Tensor) -> Tensor:
    """Step 3 (chapter 2.2): the binary cross-entropy of every image, a sum over its pixels.

    It is -x log p - (1 - x) log(1 - p), with p = sigmoid(x_logits). x_logits: (batch, ...), x: as
    many pixels, flat or not, whatever x_logits are. Returns (batch,); also for logits of 1000.
    """
    raise NotImplementedError


def vae_loss(x_logits: Tensor, x: Tensor, mu: Tensor, logvar: Tensor,
             beta: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Step 4 (chapter 2.2, exercise 1): the negative ELBO, with a weight beta for the KL.

    Returns (total, recon, kl), three scalars, summed over the batch: the cross-entropy recon, the
    KL without its weight, and total = recon + beta * kl (Higgins et al. 2017).
    """
    raise NotImplementedError


class VAE(nn.Module):
    """Step 5 (chapter 2.4): the MLP VAE, 784 -> 400 -> 20 -> 400 -> 784, ReLU on the 400s.

    The layers are given; write encode, decode_logits and forward.
    """

    def __init__(self, input_dim: int = 784, hidden_dim: int = 400, latent_dim: int = 20):
        super().__init__()
        self.encoder_fc1 = nn.Linear(input_dim, hidden_dim)
        self.encoder_fc_mu = nn.Linear(hidden_dim, latent_dim)
        self.encoder_fc_logvar = nn.Linear(hidden_dim, latent_dim)
        self.decoder_fc1 = nn.Linear(latent_dim, hidden_dim)
        self.decoder_fc2 = nn.Linear(hidden_dim, input_dim)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: a batch of images, flat or not -> mu, logvar: (batch, latent_dim)."""
        raise NotImplementedError

    def decode_logits(self, z: Tensor) -> Tensor:
        """z: (batch, latent_dim) -> x_logits, flat: (batch, input_dim)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x, by a draw of z -> (x_logits, mu, logvar)."""
        raise NotImplementedError


class ConvVAE(nn.Module):
    """Step 6 (chapter 2.4): the decoder of the convolutional VAE, for 28 x 28 images.

    The encoder goes 28 -> 14 -> 7 -> 3. Write the way back, and in __init__ its layers. With
    kernels of 4, stride 2 and padding 1 throughout it ends at 24 x 24. (A transposed convolution
    of n rows has (n - 1) * stride - 2 * padding + kernel_size + output_padding of them.)
    """

    def __init__(self, input_channels: int = 1, latent_dim: int = 128):
        super().__init__()
        raise NotImplementedError

    def decode_logits(self, z: Tensor) -> Tensor:
        """z: (batch, latent_dim) -> x_logits: (batch, input_channels, 28, 28)."""
        raise NotImplementedError


def train_step(model: nn.Module, images: Tensor, optimizer: torch.optim.Optimizer,
               beta: float) -> float:
    """Step 7 (chapter 2.5): one step of the optimizer on a batch, with the loss of step 4.

    model: has the forward of step 5; images: (batch, 1, 28, 28). Minimise total / batch, the mean
    of the images. (The chapter takes the sum.) Returns this mean, before the step, as a number.
    """
    raise NotImplementedError


def squared_error(x_logits: Tensor, x: Tensor) -> Tensor:
    """Step 8 (exercise 4): ||x - x'||^2 of every image; x' is the image that x_logits stand for.

    x_logits, x and what is returned: as in step 3.
    """
    raise NotImplementedError


def kl_weight(epoch: int, kl_anneal: int) -> float:
    """Step 9 (exercise 5): the weight of the KL, epoch / kl_anneal, and never more than 1.

    Epochs are counted from 1. If kl_anneal is 0 the weight is always 1.
    """
    raise NotImplementedError


class CVAE(nn.Module):
    """Step 10 (exercise 3): the MLP VAE, told which of ten classes an image is of.

    Both networks are told: the class, as a one-hot vector, stands beside the image and beside z.
    Write __init__, encode(x, labels), decode_logits(z, labels) and forward(x, labels), which return
    what those of step 5 do. labels: (batch,), whole numbers from 0 to 9. Source: Sohn et al. 2015.
    """

    def __init__(self, input_dim: int = 784, hidden_dim: int = 400, latent_dim: int = 20):
        super().__init__()
        raise NotImplementedError


def importance_weighted_bound(log_w: Tensor) -> Tensor:
    """Step 11 (exercise 6): log( 1/k sum_i w_i ) of every image, from log w_i of k draws of z.

    log_w: (k, batch). Returns (batch,). A w_i may be e^1000 or e^-1000, which no float can hold.
    Source: Burda, Grosse & Salakhutdinov 2016.
    """
    raise NotImplementedError
