"""The autoencoder (chapter 2.1).

An autoencoder squeezes an image through a small code and learns to undo it. Nothing tells it where
in the latent space the codes should lie, so nobody can say which codes to decode for a new image.
A VAE is told: near N(0, I). Exercise 0 trains both and looks at the difference: make ae
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from vae import of_size


class Autoencoder(nn.Module):
    """The deterministic autoencoder: 784 -> 400 -> 20 -> 400 -> 784. It takes images of any shape
    with input_dim values, and returns them flat."""

    def __init__(self, input_dim: int = 784, hidden_dim: int = 400, latent_dim: int = 20):
        super().__init__()
        self.latent_dim = latent_dim
        self.fc1 = nn.Linear(input_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, latent_dim)
        self.fc3 = nn.Linear(latent_dim, hidden_dim)
        self.fc4 = nn.Linear(hidden_dim, input_dim)

    def encode(self, x: Tensor) -> Tensor:
        """x: (batch, ...) -> z: (batch, latent_dim), one point, no distribution."""
        h = F.relu(self.fc1(of_size(x.flatten(1), self.fc1.in_features)))
        return self.fc2(h).to(x.dtype)

    def decode_logits(self, z: Tensor) -> Tensor:
        """z: (batch, latent_dim) -> (batch, input_dim)."""
        return self.fc4(F.relu(self.fc3(z))).to(z.dtype)

    def decode(self, z: Tensor) -> Tensor:
        """z: (batch, latent_dim) -> pixels in [0, 1], (batch, input_dim)."""
        return torch.sigmoid(self.decode_logits(z))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x -> z -> x': returns (x_recon, z)."""
        z = self.encode(x)
        return self.decode(z), z

    def loss(self, images: Tensor, labels: Tensor, beta: float = 1.0) -> tuple[Tensor, ...]:
        """(total, recon, 0): the squared error ||x - x'||^2, summed over the batch. There is no KL,
        so neither beta nor the labels are used."""
        x_recon, _ = self(images)
        recon = (images.flatten(1) - x_recon).pow(2).sum()
        return recon, recon, torch.zeros_like(recon)

    @torch.no_grad()
    def sample(self, num_samples: int, device: torch.device | str | None = None) -> Tensor:
        """Decode draws from N(0, I), as a VAE does. But nothing in training put codes there."""
        device = device or next(self.parameters()).device
        return self.decode(torch.randn(num_samples, self.latent_dim).to(device))
