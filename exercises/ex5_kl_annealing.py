"""Exercise 5: does it help to let the KL in slowly?

    python exercises/ex5_kl_annealing.py                    MNIST
    python exercises/ex5_kl_annealing.py --dataset digits   no download

Early in training z is noise to the decoder, and the quickest way to a lower loss is to drop the
KL. A decoder that can do without z may then never come back to it. Bowman et al. (2016), whose
decoder was a language model, raise the weight of the KL from 0 to 1 during training (along a
sigmoid), so that z can become useful first. Here it rises in a line, min(1, epoch / n) with n = 5
and epochs that count from 1: the weights are 0.2, 0.4, 0.6, 0.8 and then 1.

Two models, with and without: the MLP VAE, whose decoder has nothing but z, and one like
Bowman's, whose decoder sees every row of pixels before it predicts the next. Test losses
are of the true objective (weight 1) after every epoch.
"""

from pathlib import Path

import torch
import torch.nn as nn
from common import RESULTS, last_test, load_images, parse_args, report, run, trained
from matplotlib.figure import Figure
from metrics import active_units, linear_probe
from torch import Tensor

from data import Batches
from train import MODELS
from vae import BaseVAE, VAEEncoder, reparameterize, vae_loss
from viz import encode_all, save

ANNEAL = 5  # epochs until the weight is 1
N_CODES = 10_000  # training images whose codes the linear probe learns from


class RowVAE(BaseVAE):
    """A VAE for 28 x 28 images whose decoder is autoregressive over the rows of pixels:

    p(x|z) = prod_r p(row_r | z, rows above r), by a GRU that starts from z and reads the rows.
    It decodes only beside an image, so `forward`, `decode` and `sample` are not for it.
    """

    def __init__(self, hidden_dim: int = 128, latent_dim: int = 20):
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder = VAEEncoder(28 * 28, 400, latent_dim)
        self.start = nn.Linear(latent_dim, hidden_dim)
        self.gru = nn.GRU(28, hidden_dim, batch_first=True)
        self.out = nn.Linear(hidden_dim, 28)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (batch, 1, 28, 28) -> mu, logvar: (batch, latent_dim)."""
        return self.encoder(x)

    def decode_logits(self, z: Tensor, x: Tensor) -> Tensor:
        """z: (batch, latent_dim), x: (batch, 1, 28, 28) -> logits (batch, 28, 28), of which row r
        depends on z and on the rows of x above r."""
        above = nn.functional.pad(x[:, 0, :-1], (0, 0, 1, 0))  # nothing is above the first row
        states, _ = self.gru(above, torch.tanh(self.start(z))[None])
        return self.out(states)

    def loss(self, images: Tensor, labels: Tensor, beta: float = 1.0) -> tuple:
        mu, logvar = self.encode(images)
        x_logits = self.decode_logits(self.reparameterize(mu, logvar), images)
        return vae_loss(x_logits, images, mu, logvar, beta, self.recon_loss)


MODELS["rows"] = RowVAE  # so that train.train_run can build it


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv, "ex5_kl_annealing", __doc__, ("mnist", "digits", "fashion-mnist"))
    train_split, test_split = load_images(args)
    loaders = [
        Batches(train_split.images[:N_CODES], train_split.labels[:N_CODES], 1000),
        Batches(test_split.images, test_split.labels, 1000),
    ]
    rows, curves = [], {}
    for kind in ("mlp", "rows"):
        for anneal in (0, min(ANNEAL, args.epochs)):
            label = f"{kind}, annealed" if anneal else kind
            for seed in args.seeds:
                model, history = trained(args, seed, model=kind, kl_anneal=anneal)
                row = {"run": label, "seed": seed} | last_test(history)
                torch.manual_seed(seed)
                codes = []
                for loader in loaders:
                    mu, logvar, labels = encode_all(model, loader, "cpu")
                    codes += [reparameterize(mu, logvar), labels]
                row["active units"] = active_units(mu)  # of the test images
                row["class found in z"] = linear_probe(*codes)
                rows.append(row)
                curves.setdefault(label, []).append(history)
    plot(curves, RESULTS / f"{args.name}.png")
    formats = {"recon + KL": ".2f", "recon": ".2f", "KL": ".2f", "active units": ".1f"}
    formats["class found in z"] = ".3f"
    report(args, rows, "run", formats, curves=curves)


def plot(curves: dict[str, list[list[dict]]], path: Path) -> None:
    """Test loss (at weight 1) and KL of every epoch, a line a seed."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    for axes_row, kind in zip(figure.subplots(2, 2), ("mlp", "rows")):
        for name, colour in ((kind, "tab:blue"), (f"{kind}, annealed", "tab:orange")):
            for i, history in enumerate(curves[name]):
                epochs = [row["epoch"] for row in history]
                for axes, term in zip(axes_row, ("loss", "kl")):
                    values = [row[f"test_{term}"] for row in history]
                    label = None if i else name
                    axes.plot(epochs, values, ".-", color=colour, linewidth=1, label=label)
        for axes, label in zip(axes_row, ("test loss, nats", "test KL, nats")):
            axes.set(xlabel="epoch", ylabel=label)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
            axes.legend()
    save(figure, path)


if __name__ == "__main__":
    run(main)
