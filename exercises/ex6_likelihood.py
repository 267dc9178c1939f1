"""Exercise 6: how good is a VAE, in the unit of the papers? log p(x), by importance sampling.

    python exercises/ex6_likelihood.py runs/mnist-mlp              one run, or several, compared
    python exercises/ex6_likelihood.py --recipe iwae               train that first, then evaluate

Papers give nats of log p(x) on binarized MNIST: every pixel is 0 or 1, drawn with its grey value
as the probability of 1. The ELBO only bounds it. For draws z_1 ... z_k from q(z|x)

    L_k = E[ log( 1/k sum_i p(x|z_i) p(z_i) / q(z_i|x) ) ]

is a bound, too: L_1 is the ELBO, L_k never falls as k grows, and goes to log p(x) (Burda, Grosse
& Salakhutdinov 2016, arXiv:1509.00519). Maximised in place of the ELBO it makes an IWAE.
"""

import argparse
import contextlib
import json
import math
import time
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn as nn
from common import run, train
from matplotlib.figure import Figure
from metrics import active_units
from torch import Tensor

from data import Batches, UserError, binarize_once, show_status, write_atomically
from vae import LOGVAR_RANGE, BaseVAE, kl_divergence_gaussian
from viz import save

BOUND_SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)  # and that of all draws together


# ------------------------------------------------------------------- importance sampling


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

    Its expectation is L_k. logsumexp takes the largest log w out of the sum: exp(log w) itself
    is 0 in float32 below e^-104, and a typical image of MNIST is near e^-90.
    """
    return torch.logsumexp(log_w, dim=0) - math.log(len(log_w))


@torch.no_grad()
def draw_log_weights(model: nn.Module, x: Tensor, num_samples: int, rows: int = 250) -> Tensor:
    """log w of num_samples draws from q(z|x) of each image x: (num_samples, batch), nats.

    Decodes at most rows codes at a time (or one an image). Put the model in evaluation mode.
    """
    mu, logvar = model.encode(x)
    epsilon = torch.randn(num_samples, *mu.shape, dtype=mu.dtype, device=mu.device)
    parts = epsilon.split(max(1, rows // len(x)))
    return torch.cat([log_weights(model, x, mu, logvar, part)[0] for part in parts])


def log_likelihood(model: nn.Module, x: Tensor, num_samples: int, rows: int = 250) -> Tensor:
    """Estimate log p(x) of every image from num_samples draws: (batch, ...) -> (batch,), nats.

    On average it is too low (it is the bound L_k), the less so the more draws; in the
    literature 5,000 is usual. As many images at a time as make rows codes, so memory does not
    grow with the batch. Put the model in evaluation mode.
    """
    parts = x.split(max(1, rows // num_samples))
    log_w = (draw_log_weights(model, part, num_samples, rows) for part in parts)
    return torch.cat([importance_weighted_bound(part) for part in log_w])


# ------------------------------------------------------------------- the paper's models


class PaperVAE(BaseVAE):
    """The network of Burda et al. with one stochastic layer: 784-200-200-50 and back, tanh."""

    def __init__(self, input_dim: int = 784, hidden_dim: int = 200, latent_dim: int = 50):
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder = nn.Sequential(
            nn.Linear(input_dim, hidden_dim), nn.Tanh(),
            nn.Linear(hidden_dim, hidden_dim), nn.Tanh(),
        )
        self.fc_mu = nn.Linear(hidden_dim, latent_dim)
        self.fc_logvar = nn.Linear(hidden_dim, latent_dim)
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, hidden_dim), nn.Tanh(),
            nn.Linear(hidden_dim, hidden_dim), nn.Tanh(), nn.Linear(hidden_dim, input_dim),
        )

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (batch, ...) -> mu, logvar: (batch, latent_dim)."""
        h = self.encoder(x.flatten(1))
        return self.fc_mu(h).to(x.dtype), self.fc_logvar(h).to(x.dtype).clamp(*LOGVAR_RANGE)

    def decode_logits(self, z: Tensor) -> Tensor:
        """z: (batch, latent_dim) -> (batch, input_dim)."""
        return self.decoder(z).to(z.dtype)


class IWAE(PaperVAE):
    """The same, trained on the bound L_5 in place of the ELBO."""

    importance_samples = 5

    def loss(self, images: Tensor, labels: Tensor, beta: float = 1.0) -> tuple:
        """(total, recon, kl): total is an estimate of -L_k (for beta = 1), on average no more than
        recon + kl, which are the terms of -ELBO all the same."""
        mu, logvar = self.encode(images)
        shape = (self.importance_samples, *mu.shape)
        epsilon = torch.randn(shape, dtype=mu.dtype, device=mu.device)
        log_w, recon = log_weights(self, images, mu, logvar, epsilon, beta)
        kl = kl_divergence_gaussian(mu, logvar)
        return -importance_weighted_bound(log_w).sum(), recon.mean(dim=0).sum(), kl.sum()


train.MODELS |= {"paper": PaperVAE, "iwae": IWAE}  # so that train.train_run can build them

COSINE = "--binarize --lr-schedule cosine "
PAPER = COSINE + "--batch-size 100 --model "
RECIPES = {  # the rows of the table in README.md, section 6: options of train.py
    "vae": PAPER + "paper --epochs 800 --kl-anneal 40",
    "vae-plain": PAPER + "paper --epochs 400",
    "iwae": PAPER + "iwae --epochs 240",
    "conv": COSINE + "--model conv --latent-dim 64 --batch-size 64 --epochs 72",
    "mlp": "--binarize",
    "mlp-grey": "",
}


# ------------------------------------------------------------------- the evaluation


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable, num_samples: int, rows: int = 250) -> dict:
    """The bounds L_k of log p(x), k from 1 (the ELBO) to num_samples (close to log p(x) itself).

    loader: any iterable of (images, labels), pixels 0 or 1; model: in evaluation mode, on their
    device. Means over the images, in nats. The spread of L_k is the standard deviation of its
    estimates for one and the same image, as a root mean square over the images; None where an
    image has only one estimate.
    """
    start = time.monotonic()
    sizes = [k for k in BOUND_SIZES if k < num_samples] + [num_samples]
    means, moments, done = [], [], 0
    for images, _ in loader:
        means.append(model.encode(images)[0])
        for part in images.split(max(1, rows // num_samples)):
            log_w = draw_log_weights(model, part, num_samples, rows)
            # L_k from the first k draws, from the next k, and so on: (estimates, images)
            groups = [log_w[: len(log_w) // k * k].unflatten(0, (-1, k)) for k in sizes]
            estimates = [importance_weighted_bound(group.transpose(0, 1)) for group in groups]
            mean = torch.stack([e.mean(dim=0) for e in estimates])
            variance = torch.stack([e.var(dim=0, correction=min(1, len(e) - 1)) for e in estimates])
            moments.append(torch.stack([mean, variance]))
            done += len(part)
            show_status(f"{done:,} images, {time.monotonic() - start:.0f} s")
    show_status("")
    moments = torch.cat(moments, dim=2).double()
    bounds = [
        {"k": k, "bound": bound, "spread": variance**0.5 if 2 * k <= num_samples else None}
        for k, bound, variance in zip(sizes, *moments.mean(dim=2).tolist())
    ]
    elbo, log_p_x = bounds[0]["bound"], bounds[-1]["bound"]
    return {
        "images": moments.shape[2],
        "num_samples": num_samples,
        "neg_elbo": -elbo,
        "neg_log_likelihood": -log_p_x,
        "standard_error": moments[0, -1].std().item() / moments.shape[2] ** 0.5,
        "gap": log_p_x - elbo,
        "active_units": active_units(torch.cat(means)),
        "seconds": round(time.monotonic() - start, 1),
        "bounds": bounds,
    }


def evaluate_run(folder: Path, args: argparse.Namespace) -> dict:
    """Evaluate a run on all binarized test images, the same draw of them (seed 0) for every run;
    args.seed is for the draws of z. Print it, and keep it in evaluation.json.

    Whatever the pixels were in training, here the decoder's output is the mean of Bernoulli
    pixels. What has been measured already, with the same weights, is read from the file.
    """
    model, checkpoint = train.load_run(folder)
    config, path = checkpoint["config"], folder / "evaluation.json"
    if config["recon"] != "bce" or train.is_colour(config["dataset"]):
        raise UserError(f"{folder}: has no likelihood of binary pixels, being {config['model']} on "
                        f"{config['dataset']} with --recon {config['recon']}; evaluate a VAE of "
                        "grey images with --recon bce")
    asked = {"epochs": len(checkpoint["history"]), "num_samples": args.num_samples,
             "seed": args.seed, "notice": config["notice"]}
    result = {}
    with contextlib.suppress(OSError, TypeError, ValueError):  # missing or damaged: measured anew
        result = dict(json.loads(path.read_bytes()))
    if any(result.get(key) != value for key, value in asked.items()):
        device = train.find_device(args.device, "ieee")
        test = train.load_test_split(folder, config, args.data_dir)
        loader = Batches(binarize_once(test.images).to(device), test.labels.to(device), 1000)
        print(f"{folder}: {config['model']} on {config['dataset']}, {len(test.images):,} binarized "
              f"test images, {args.num_samples:,} draws of z each", flush=True)
        torch.manual_seed(args.seed)
        result = evaluate(model.to(device), loader, args.num_samples, rows_at_once(device)) | asked
        if not math.isfinite(result["neg_elbo"]):
            raise UserError(f"{folder}: the model's outputs are not finite; train it again")
        with write_atomically(path) as file:
            file.write(json.dumps(result, indent=2).encode() + b"\n")
    print(
        f"{folder}: -ELBO {result['neg_elbo']:.2f}  -log p(x) {result['neg_log_likelihood']:.2f} "
        f"+- {result['standard_error']:.2f}  gap {result['gap']:.2f} nats per image  active units "
        f"{result['active_units']} of {config['latent_dim']}  {result['seconds']:.0f} s"
    )
    return result


def rows_at_once(device: torch.device) -> int:
    """How many codes to decode at a time: what fits into a processor's cache, or half of what a
    GPU has free, at 200 kB for a row of ConvVAE."""
    if device.type == "cpu":
        return 250
    return min(2**16, torch.cuda.mem_get_info(device)[0] // 2 // 200_000)


def visualize_bounds(evaluations: dict[str, dict], path: Path) -> None:
    """The bound L_k of log p(x) against k: from the ELBO, k = 1, to the estimate of all draws.

    evaluations: name -> what `evaluate_run` has measured. Lines are means over the images;
    bands are one spread to either side (see `evaluate`).
    """
    figure = Figure(figsize=(5.4, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, evaluation in evaluations.items():
        name, points = name.replace("$", r"\$"), evaluation["bounds"]  # $ begins a formula
        line, = axes.plot(
            [p["k"] for p in points], [p["bound"] for p in points], ".-",
            label=f"{name}: {points[0]['bound']:.2f} to {points[-1]['bound']:.2f}",
        )
        points = [p for p in points if p["spread"] is not None]
        low, high = ([p["bound"] + sign * p["spread"] for p in points] for sign in (-1, 1))
        axes.fill_between([p["k"] for p in points], low, high, color=line.get_color(), alpha=0.15)
    axes.set(xscale="log", xlabel="draws k", ylabel="bound $L_k$ of log p(x), nats per image")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    notes = {evaluation["notice"]: None for evaluation in evaluations.values()}
    save(figure, path, "; ".join(filter(None, notes)))


def main(argv: list[str] | None = None) -> None:
    parser = train.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="the folder of a run; the first gets bounds.png")
    add("--recipe", choices=RECIPES, help="train this, or go on with it, in runs/likelihood/RECIPE")
    add("--num-samples", type=train.number(int, 1, 10**6), default=5000, metavar="K",
        help="draws of z for each image (5000)")
    add("--seed", type=train.number(int, 0), default=0, metavar="N", help="of the draws of z (0)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="as for train.py")
    add("--data-dir", metavar="DIR", help="as for train.py")
    args = parser.parse_args(argv)
    if args.recipe:
        recipe = train.parse_args(RECIPES[args.recipe].split())
        recipe.out, recipe.resume = f"runs/likelihood/{args.recipe}", True
        recipe.device, recipe.data_dir = args.device, args.data_dir
        train.draw_run(*train.train_run(recipe))
        args.runs.insert(0, recipe.out)
    if not args.runs:
        parser.error("name the folder of a run, or a --recipe")
    evaluations = {name: evaluate_run(Path(name), args) for name in args.runs}
    path = Path(args.runs[0]) / "bounds.png"
    visualize_bounds(evaluations, path)
    print(f"saved {path}")
    for name, evaluation in evaluations.items():
        if notice := evaluation["notice"]:
            print(f"*** REMEMBER: {name}: these are the {notice.upper()}. ***")


if __name__ == "__main__":
    run(main)
