"""Exercise 4: the squared error or the binary cross-entropy as the reconstruction loss?

    python exercises/ex4_mse_vs_bce.py                    MNIST
    python exercises/ex4_mse_vs_bce.py --dataset digits   no download

The squared error SE = ||x - x'||^2 is a likelihood, too: Gaussian pixels of one variance s^2 have

    -log p(x|z) = SE / (2 s^2) + D/2 log(2 pi s^2)        (D pixels)

so minimising SE + beta * KL is maximising the ELBO for s^2 = beta / 2, whatever one had in mind:
the plain squared error says s = 0.71, on pixels between 0 and 1. A mean over the pixels in place of
the sum is another such choice. The best s^2 for a set of images is the mean of their SE / D; with
it put in, the mean of -log p(x|z) is

    D/2 (log(2 pi s^2) + 1)                              (s^2 = mean SE / D)

a loss with nothing left to choose (Rybkin, Daniilidis & Levine 2021: the optimal sigma-VAE).
"""

import math
from pathlib import Path

import torch
from common import RESULTS, load_images, parse_args, report, run, spread, trained
from matplotlib.figure import Figure
from metrics import active_units, sample_quality, train_classifier
from torch import Tensor

from data import Batches
from train import MODELS
from vae import VAE, bce_from_logits, kl_divergence_gaussian, squared_error
from viz import encode_all, save, save_tiles


class SigmaVAE(VAE):
    """The MLP VAE with Gaussian pixels of the variance that suits each batch best."""

    def loss(self, images: Tensor, labels: Tensor, beta: float = 1.0) -> tuple:
        x_logits, mu, logvar = self(images)
        error = squared_error(x_logits, images).mean()
        recon = len(images) * best_gaussian(error, images[0].numel())
        kl = kl_divergence_gaussian(mu, logvar).sum()
        return recon + beta * kl, recon, kl


def best_gaussian(error: Tensor, pixels: int) -> Tensor:
    """-log p(x|z) per image, nats, with the best variance, error / pixels.

    error: the mean squared error of an image, summed over its pixels.
    """
    return pixels / 2 * (torch.log(2 * math.pi * error / pixels) + 1)


MODELS["sigma"] = SigmaVAE  # so that train.train_run can build it

LOSSES = {
    "bce": {},
    "mse, variance 0.5": {"recon": "mse"},
    "mse, variance 0.05": {"recon": "mse", "beta": 0.1},
    "mse, variance 0.005": {"recon": "mse", "beta": 0.01},
    "mse, learned": {"model": "sigma"},
}
# Also judged on the way, on both measures, which one run's history does not tell: as runs of
# fewer epochs, which are the beginnings of the long one.
FOLLOWED = ("bce", "mse, variance 0.5", "mse, learned")


def judge(model: VAE, loader: Batches) -> dict[str, float]:
    """Both reconstruction losses, from one draw of z an image, and the KL, on test images."""
    torch.manual_seed(0)
    sums = torch.zeros(3, dtype=torch.float64)
    for x, _ in loader:
        x_logits, mu, logvar = model(x)
        bce, error = bce_from_logits(x_logits, x), squared_error(x_logits, x)
        sums += torch.stack([bce, error, kl_divergence_gaussian(mu, logvar)]).sum(dim=1)
    bce, error, kl = (sums / len(loader.images)).tolist()
    pixels = loader.images[0].numel()
    density = best_gaussian(torch.tensor(error), pixels).item() + kl
    return {
        "BCE": bce, "squared error": error, "KL": kl, "BCE + KL": bce + kl,
        "best variance": error / pixels, "-ELBO, Gaussian": density,
    }


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv, "ex4_mse_vs_bce", __doc__, ("mnist", "digits", "fashion-mnist"))
    _, test = load_images(args)
    test_loader = Batches(test.images, test.labels, 1000)
    classifier, accuracy = train_classifier(args)
    real = test.images[::2] / 255  # not the first half: MNIST's test set is not in random order
    rows, on_the_way, pictures = [], [], [test.images[:10] / 255]
    for loss, options in LOSSES.items():
        for seed in args.seeds:
            for epochs in sorted({1, 2, 5, args.epochs} if loss in FOLLOWED else {args.epochs}):
                if epochs > args.epochs:
                    continue
                model, _ = trained(args, seed, epochs, **options)
                row = {"loss": loss, "seed": seed, "epochs": epochs} | judge(model, test_loader)
                on_the_way.append(row)
            mu, _, _ = encode_all(model, test_loader, "cpu")
            torch.manual_seed(seed)
            samples = model.sample(len(real))
            row |= {"active units": active_units(mu)} | sample_quality(classifier, samples, real)
            rows.append(row)
            if seed == args.seeds[0]:
                pictures += [model.decode(mu[:10]), samples[:10]]
    labels = ["input"] + [f"{loss}{what}" for loss in LOSSES for what in ("", ": samples")]
    pictures = [picture.reshape(10, 1, 28, 28) for picture in pictures]
    save_tiles(torch.cat(pictures), 10, RESULTS / f"{args.name}-images.png", row_labels=labels)
    plot(on_the_way, rows, RESULTS / f"{args.name}.png")
    formats = {"BCE": ".1f", "squared error": ".2f", "KL": ".2f", "best variance": ".4f"}
    formats |= {"BCE + KL": ".1f", "-ELBO, Gaussian": ".0f", "active units": ".1f"}
    formats |= dict.fromkeys(["confidence", "precision", "coverage"], ".3f")
    more = {"on_the_way": on_the_way, "classifier_accuracy": accuracy}
    report(args, rows, "loss", formats, **more)
    print(f"the classifier is right on {accuracy:.2%} of the test images")


def plot(on_the_way: list[dict], rows: list[dict], path: Path) -> None:
    """Both measures over the epochs; the squared error that each model buys for its KL."""
    figure = Figure(figsize=(8.5, 2.8), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, measure in zip(panels, ("BCE", "squared error")):
        for loss in FOLLOWED:
            followed = [row for row in on_the_way if row["loss"] == loss]
            epochs = list(dict.fromkeys(row["epochs"] for row in followed))
            means, stds = zip(*(spread(followed, "epochs", epoch, measure) for epoch in epochs))
            axes.errorbar(epochs, means, stds, fmt=".-", capsize=2, label=loss)
        axes.set(xlabel="epoch", ylabel=f"test {measure}")
        axes.xaxis.get_major_locator().set_params(integer=True)
    for loss in LOSSES:
        points = [(row["KL"], row["squared error"]) for row in rows if row["loss"] == loss]
        panels[2].plot(*zip(*points), ".", label=loss)
    panels[2].set(xlabel="KL, nats", ylabel="test squared error")
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6)
    save(figure, path)


if __name__ == "__main__":
    run(main)
