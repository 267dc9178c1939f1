"""Exercise 1: what does a beta in front of the KL do, and does it disentangle the latents?

    python exercises/ex1_beta_vae.py                                MNIST
    python exercises/ex1_beta_vae.py --dataset digits               drawn: factors are known
    python exercises/ex1_beta_vae.py --dataset faces --epochs 2     likewise, 64 x 64 in colour

The beta-VAE (Higgins et al. 2017) minimises recon + beta * KL. Read the KL as a rate, the nats
that a code may cost, and recon as the distortion that remains: beta is then the price of a nat,
and a sweep over beta draws the curve of what can be had for what (Alemi et al. 2018). For
disentanglement one must know what the images were made from, so it is measured on the drawn
datasets only: by the Mutual Information Gap (Chen et al. 2018) and by DCI (Eastwood &
Williams 2018).
"""

from pathlib import Path

import torch
from common import RESULTS, last_test, load_images, parse_args, plot_measures
from common import report, run, trained
from matplotlib.figure import Figure
from metrics import active_units, dci, mutual_information_gap, total_correlation

from data import Batches
from vae import reparameterize
from viz import encode_all, save, visualize_traversals

BETAS = (0.5, 1, 2, 4, 8, 16, 32)
FACES = {"model": "celeba", "latent_dim": 32, "batch_size": 32}
FACES_BETAS = (1, 8, 64)  # fewer, for faces take longer
NOT_A_FACTOR = "glyph"  # its number means another way of writing in each class
N_CODES = 10_000  # images whose codes are compared with their factors


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv, "ex1_beta_vae", __doc__, ("mnist", "digits", "faces", "fashion-mnist"))
    train_split, test_split = load_images(args)
    codes_loader = Batches(train_split.images[:N_CODES], train_split.labels[:N_CODES], 1000)
    test_loader = Batches(test_split.images, test_split.labels, 1000)
    factors = {
        key: values[:N_CODES] for key, values in train_split.factors.items() if key != NOT_A_FACTOR
    }
    rows, faces = [], args.dataset == "faces"
    for beta in FACES_BETAS if faces else BETAS:
        for seed in args.seeds:
            model, history = trained(args, seed, beta=beta, **(FACES if faces else {}))
            mu, logvar, _ = encode_all(model, codes_loader, "cpu")
            row = {"beta": beta, "seed": seed} | last_test(history)
            test_mu, _, _ = encode_all(model, test_loader, "cpu")
            row["active units"] = active_units(test_mu)
            torch.manual_seed(0)
            z = reparameterize(mu, logvar)
            row["total correlation"] = total_correlation(z)
            if factors:
                row["MIG of each factor"] = gaps = mutual_information_gap(z, factors)
                row["MIG"] = sum(gaps.values()) / len(gaps)
                row |= dci(z, factors)
            rows.append(row)
            if seed == args.seeds[0] and beta in (1, 8):
                path = RESULTS / f"{args.name}-traversals-beta{beta}.png"
                visualize_traversals(model, test_loader, "cpu", path)
    measures = {"KL, nats": ["KL"], "active units": ["active units"],
                "total correlation, nats": ["total correlation"]}
    formats = {"recon + KL": ".2f", "recon": ".2f", "KL": ".2f", "active units": ".1f"}
    formats["total correlation"] = ".3f"
    if factors:
        scores = ["MIG", "disentanglement", "completeness", "informativeness"]
        measures["of the factors"] = scores
        formats |= dict.fromkeys(scores, ".3f")
    plot_measures(rows, "beta", measures, RESULTS / f"{args.name}.png")
    plot_rate_distortion(rows, RESULTS / f"{args.name}-rate-distortion.png")
    report(args, rows, "beta", formats)


def plot_rate_distortion(rows: list[dict], path: Path) -> None:
    """A point a model: the KL that it pays and the reconstruction that it gets for it."""
    figure = Figure(figsize=(4, 3.2), layout="constrained")
    axes = figure.subplots()
    betas = list(dict.fromkeys(row["beta"] for row in rows))
    for beta in betas:
        rates, distortions = zip(*((r["KL"], r["recon"]) for r in rows if r["beta"] == beta))
        axes.plot(rates, distortions, ".", label=f"{beta:g}")
    best = min(row["recon + KL"] for row in rows)
    axes.axline((0, best), slope=-1, color="black", linewidth=0.8, linestyle=":", label="best sum")
    axes.set(xlabel="rate: KL, nats", ylabel="distortion: recon, nats")
    axes.legend(title="beta")
    axes.grid(alpha=0.3)
    save(figure, path)


if __name__ == "__main__":
    run(main)
