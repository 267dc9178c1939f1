"""Exercise 6: how good is a VAE, in the unit of the papers? log p(x), and what the bound misses.

    python exercises/ex6_likelihood.py runs/mnist-mlp    evaluate a run
    python exercises/ex6_likelihood.py --recipe conv     train that first (or go on with it)
    python exercises/ex6_likelihood.py --recipe conv --dataset mnist-validation --lr 1e-3 --out DIR

Many papers give nats of log p(x) on binarized MNIST: every pixel is 0 or 1, drawn with its grey
value as the probability of 1. The ELBO only bounds it. For draws z_1 ... z_k from q(z|x)

    L_k = E[ log( 1/k sum_i p(x|z_i) p(z_i) / q(z_i|x) ) ]

is one, too: L_1 is the ELBO, L_k never falls as k grows, and goes to log p(x) (Burda, Grosse &
Salakhutdinov 2016, arXiv:1509.00519). Maximised, it makes an IWAE. What the ELBO misses is
KL( q(z|x) || p(z|x) ): with two latents, posterior.png shows it.
"""

import argparse
import contextlib
import json
import math
import time
from pathlib import Path

import torch
import torch.nn as nn
from common import run, train
from matplotlib.figure import Figure
from metrics import active_units
from torch import Tensor

from data import UserError, binarize_once, show_status, write_atomically
from vae import LOGVAR_RANGE, BaseVAE, kl_divergence_gaussian
from viz import save

BOUND_SIZES = (1, 5, 50, 500, 5000)  # each a multiple of the one before
ROWS = 500  # decoded at a time: they fit into a processor's cache

# ------------------------------------------------------------------- importance sampling


def log_weights(model: nn.Module, x: Tensor, mu: Tensor, logvar: Tensor, epsilon: Tensor,
                beta: float = 1.0) -> tuple[Tensor, Tensor]:
    """The logarithms of the importance weights w_i = p(x|z_i) p(z_i) / q(z_i|x).

    x: (batch, ...); mu, logvar of q(z|x): (batch, latent_dim); epsilon: noise from N(0, I),
    (k, batch, latent_dim), for z_i = mu + sigma epsilon_i. Returns log w, and -log p(x|z), a part
    of it: both (k, batch), nats. Over draws from q the mean of w is p(x), that of log w the ELBO.
    beta (KL annealing) weighs log p(z) / q(z|x), whose mean is -KL, as in `vae_loss`.
    """
    z = mu + torch.exp(0.5 * logvar) * epsilon
    x = x.expand(len(epsilon), *x.shape).flatten(0, 1)  # as many copies as draws
    recon = model.recon_loss(model.decode_logits(z.flatten(0, 1)), x).view(epsilon.shape[:2])
    # log p(z) - log q(z|x), in which the two -1/2 log 2 pi cancel
    log_ratio = 0.5 * (epsilon.pow(2) + logvar - z.pow(2)).sum(dim=2)
    return beta * log_ratio - recon, recon


def importance_weighted_bound(log_w: Tensor) -> Tensor:
    """log( 1/k sum_i w_i ) of every image: (k, batch) -> (batch,), nats. Its mean is L_k."""
    # logsumexp takes out the largest log w, for exp(-104) is 0 in float32, and some are below.
    return torch.logsumexp(log_w, dim=0) - math.log(len(log_w))


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, mu: Tensor, logvar: Tensor, num_samples: int) -> Tensor:
    """The bounds L_k of log p(x) of every image x, (batch, ...), from num_samples draws, for the k
    in BOUND_SIZES up to num_samples: (sizes, batch), nats. The last is closest to log p(x), and
    still far below it where q misses the posterior.

    L_k is the mean over the first k draws, the next k, and so on. Decodes at most ROWS codes at a
    time (or one an image). x: pixels 0 or 1; mu, logvar: as for `log_weights`.
    """
    epsilon = torch.randn(num_samples, *mu.shape, dtype=mu.dtype, device=mu.device)
    parts = epsilon.split(max(1, ROWS // len(x)))
    log_w = torch.cat([log_weights(model, x, mu, logvar, part)[0] for part in parts])
    groups = [log_w.unflatten(0, (-1, k)) for k in BOUND_SIZES if k <= num_samples]
    return torch.stack([importance_weighted_bound(g.transpose(0, 1)).mean(dim=0) for g in groups])


# ------------------------------------------------------------------- what the bound misses


@torch.no_grad()
def posterior_on_grid(model: nn.Module, x: Tensor, line: Tensor) -> tuple[Tensor, float]:
    """log p(z|x) of one image, (1, ...), for the codes z = (a, b), a and b from line: a matrix;
    and log p(x), nats, p(x) being the sum of p(x|z) p(z) times the area of a cell of this grid."""
    z = torch.cartesian_prod(line, line)
    parts = [model.recon_loss(model.decode_logits(part), x.expand(len(part), *x.shape[1:]))
             for part in z.split(ROWS)]
    log_joint = -torch.cat(parts) - 0.5 * z.pow(2).sum(dim=1) - math.log(2 * math.pi)
    log_p_x = torch.logsumexp(log_joint, dim=0) + 2 * math.log(line[1] - line[0])
    return (log_joint - log_p_x).view(len(line), -1), log_p_x.item()


def gaussian_on_grid(mu: Tensor, logvar: Tensor, line: Tensor) -> Tensor:
    """log q(z|x) of one image, mu and logvar (1, 2), on the same grid."""
    a, b = -0.5 * ((line - mu.T) ** 2 / logvar.exp().T + logvar.T + math.log(2 * math.pi))
    return a[:, None] + b


@torch.enable_grad()
def optimise(model: nn.Module, x: Tensor, mu: Tensor, logvar: Tensor, steps: int = 400) -> tuple:
    """The mu and logvar of a (local) maximum of the ELBO of every image by itself: Adam from these.

    What that gains over the encoder's is the amortization gap, at least: the price of one encoder
    for all images, and for unseen ones. The rest of KL( q(z|x) || p(z|x) ) is the approximation
    gap, the price of independent Gaussians (Cremer, Li & Duvenaud 2018, arXiv:1801.03558).
    """
    mu, logvar = (part.detach().clone().requires_grad_() for part in (mu, logvar))
    optimizer = torch.optim.Adam([mu, logvar])
    for step in range(steps):
        epsilon = torch.randn(16, *mu.shape, dtype=mu.dtype, device=mu.device)
        _, recon = log_weights(model, x, mu, logvar, epsilon)
        loss = (recon.mean(dim=0) + kl_divergence_gaussian(mu, logvar)).sum()
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        mu.grad, logvar.grad = torch.autograd.grad(loss, [mu, logvar])
        optimizer.step()
    return mu.detach(), logvar.detach()


@torch.no_grad()
def visualize_posterior(model: nn.Module, x: Tensor, path: Path, note: str = "") -> None:
    """For each image x, (n, ...), the posterior p(z|x) on a grid, and over it q(z|x) at 1 and 2
    sigma: the encoder's, and, dashed, the best one near the mode. Below, in nats, that
    ELBO + KL( q(z|x) || p(z|x) ) = log p(x). model: of two latents."""
    figure = Figure(figsize=(2.5 * len(x), 4.2), layout="constrained")
    line = torch.linspace(-6, 6, 501, device=x.device)  # fine enough for a sigma above 0.02
    grid, cell = line.cpu().numpy(), (line[1] - line[0]) ** 2
    for image, (above, axes) in zip(x.split(1), figure.subplots(2, len(x), squeeze=False).T):
        above.imshow(image.view(28, 28).cpu().numpy(), cmap="gray_r")
        above.axis("off")
        posterior, log_p_x = posterior_on_grid(model, image, line)
        density = posterior.exp().T.cpu().numpy()
        axes.pcolormesh(grid, grid, density, cmap="Blues", shading="gouraud")
        ours, mode = model.encode(image), line[(posterior == posterior.max()).nonzero()[:1]]
        kl = []
        for (mu, logvar), style in ((ours, "-"), (optimise(model, image, mode, ours[1]), "--")):
            log_q = gaussian_on_grid(mu, logvar, line)
            kl.append(((log_q.exp() * (log_q - posterior)).sum() * cell).item())
            sigmas = (-2 * log_q - logvar.sum() - 2 * math.log(2 * math.pi)).T.cpu().numpy()
            axes.contour(grid, grid, sigmas, (1, 4), colors="tab:red", linestyles=style)
        elbo, l_5, l_50, _, l_5000 = evaluate(model, image, *ours, 5000)[:, 0].tolist()
        near, reach = line[(posterior > posterior.max() - 7).nonzero()], 2.5 * (ours[1] / 2).exp()
        low, high = torch.cat([near, ours[0] - reach, ours[0] + reach]).aminmax(dim=0)
        middle, half = (low + high).cpu() / 2, (high - low).max().cpu() / 2
        xlim, ylim = torch.stack([middle - half, middle + half], dim=1).tolist()
        axes.set(aspect="equal", xlim=xlim, ylim=ylim, xlabel=f"ELBO {elbo:.2f} + KL {kl[0]:.2f} "
                 f"= {elbo + kl[0]:.2f}\nlog p(x) {log_p_x:.2f}\n$L_5$ {l_5:.2f}, $L_{{50}}$ "
                 f"{l_50:.2f}, $L_{{5000}}$ {l_5000:.2f}\nKL of the best q {kl[1]:.2f}")
    save(figure, path, note)


# ------------------------------------------------------------------- the models and the recipes


class PaperVAE(BaseVAE):
    """The network of Burda et al. with one stochastic layer: 784-200-200-50 and back, tanh."""

    def __init__(self, input_dim: int = 784, hidden_dim: int = 200, latent_dim: int = 50):
        super().__init__()
        self.latent_dim, n = latent_dim, hidden_dim
        self.encoder = nn.Sequential(nn.Linear(input_dim, n), nn.Tanh(), nn.Linear(n, n), nn.Tanh())
        self.fc_mu, self.fc_logvar = nn.Linear(n, latent_dim), nn.Linear(n, latent_dim)
        hidden = nn.Linear(latent_dim, n), nn.Tanh(), nn.Linear(n, n), nn.Tanh()
        self.decoder = nn.Sequential(*hidden, nn.Linear(n, input_dim))

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
        epsilon = torch.randn(self.importance_samples, *mu.shape, dtype=mu.dtype, device=mu.device)
        log_w, recon = log_weights(self, images, mu, logvar, epsilon, beta)
        kl = kl_divergence_gaussian(mu, logvar)
        return -importance_weighted_bound(log_w).sum(), recon.mean(dim=0).sum(), kl.sum()


train.MODELS |= {"paper": PaperVAE, "iwae": IWAE}  # so that train.train_run can build them

COSINE = "--binarize --lr-schedule cosine --lr 1e-3 "
PAPER = COSINE + "--batch-size 100 --kl-anneal 20 "
RECIPES = {  # the rows of the table in README.md, section 6: options of train.py
    "vae": PAPER + "--model paper --epochs 800",
    "iwae": PAPER + "--model iwae --epochs 120",
    "conv": COSINE + "--model conv --latent-dim 64 --batch-size 64 --epochs 240 --amp",
    "mlp": "",  # make train-mnist itself, on grey pixels
    "plane": "--binarize --latent-dim 2",
}

# ------------------------------------------------------------------- the evaluation


def evaluate_run(folder: Path, args: argparse.Namespace) -> None:
    """Evaluate a run on all binarized test images, the same draw of them (seed 0) for every run,
    whatever the pixels were in training. The results are kept in evaluation.json; after Ctrl-C,
    what has been measured, and the same command goes on from there."""
    model, checkpoint = train.load_run(folder)
    config, path = checkpoint["config"], folder / "evaluation.json"
    if config["recon"] != "bce" or config["model"] == "celeba":
        raise UserError(f"{folder}: {config['model']} on {config['dataset']} with --recon "
                        f"{config['recon']}: evaluate a VAE of grey images with --recon bce")
    test = train.load_test_split(config, args.data_dir)
    images = binarize_once(test.images).to(device := train.find_device(args.device, "ieee")) / 255
    model.to(device).requires_grad_(False)
    asked = {"epochs": len(checkpoint["history"]), "num_samples": args.num_samples,
             "images": len(images), "notice": config["notice"]}
    result = asked | {"seconds": 0.0, "values": []}
    with contextlib.suppress(OSError, TypeError, ValueError, KeyError):  # damaged: measured anew
        found = json.loads(path.read_bytes())
        result = found if all(found[key] == asked[key] for key in asked) else result
    print(f"{folder}: {config['dataset']}, {len(images):,} binarized test images, "
          f"{args.num_samples:,} draws of z each", flush=True)
    values, begun, start = result["values"], len(result["values"]), time.monotonic()
    try:
        while (done := len(values)) < len(images):
            torch.manual_seed(done)  # so that it can go on from here
            x = images[done:][: max(1, ROWS // args.num_samples)]
            values += evaluate(model, x, *model.encode(x), args.num_samples).T.tolist()
            left = (time.monotonic() - start) / (len(values) - begun) * (len(images) - len(values))
            show_status(f"{len(values):,} of {len(images):,} images, {left:.0f} s left")
        show_status("")
        if "gaps" not in result:
            result |= summary(model, images, torch.tensor(values).double(), args.num_samples)
    finally:
        result["seconds"] += time.monotonic() - start
        with write_atomically(path) as file:
            file.write(json.dumps(result).encode() + b"\n")
    print("-ELBO {neg_elbo:.2f}  -log p(x) <= {neg_log_likelihood:.2f} +- {standard_error:.2f} nats"
          "  active units {active_units}  {seconds:.0f} s  {notice}\nof the gap, of 100 images: "
          "amortization {gaps[amortization]:.2f}, approximation {gaps[approximation]:.2f}"
          .format(**result))
    if config["latent_dim"] == 2:
        shown, path = images[result["shown"]], folder / "posterior.png"
        visualize_posterior(model, shown, path, config["notice"])


def summary(model: nn.Module, images: Tensor, values: Tensor, num_samples: int) -> dict:
    """What evaluation.json tells beside values, the bounds of every image: (images, sizes)."""
    bounds, every = values.mean(dim=0).tolist(), max(1, len(images) // 100)
    x, few, (mu, logvar) = images[::every], values[::every], model.encode(images)
    best = optimise(model, x, mu[::every], logvar[::every])
    best_elbo, *_, log_p_x = evaluate(model, x, *best, num_samples).double().cpu()
    log_p_x = log_p_x.maximum(few[:, -1])  # two bounds: the higher one is closer
    gaps = {"amortization": best_elbo - few[:, 0], "approximation": log_p_x - best_elbo}
    order, n = (log_p_x - few[:, 0]).argsort().tolist(), len(x)
    shown = [order[n // 10], order[n // 2], order[-1], gaps["approximation"].argmax().item()]
    return {
        "bounds": dict(zip(BOUND_SIZES, bounds)),
        "neg_elbo": -bounds[0],
        "neg_log_likelihood": -bounds[-1],
        "standard_error": values[:, -1].std().item() / len(values) ** 0.5,
        "active_units": active_units(mu),
        "shown": [every * index for index in shown],
        "gaps": {name: gap.mean().item() for name, gap in gaps.items()},
        "gap_errors": {name: gap.std().item() / n**0.5 for name, gap in gaps.items()},
    }


def main(argv: list[str] | None = None) -> None:
    parser = train.Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("run", nargs="?", metavar="RUN", help="the folder of a run to evaluate")
    add("--num-samples", type=int, choices=BOUND_SIZES[1:], default=5000, help="draws of z (5000)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="as for train.py")
    add("--data-dir", metavar="DIR", help="as for train.py")
    add("--recipe", nargs=argparse.REMAINDER, help=f"{', '.join(RECIPES)}: train that before, in "
        "runs/likelihood/RECIPE; what follows are options of train.py")
    args = parser.parse_args(argv)
    if args.recipe and args.recipe[0] in RECIPES and not args.run:
        name, *more = args.recipe
        recipe = train.parse_args([*RECIPES[name].split(), "--device", args.device, *more])
        recipe.out, recipe.resume = recipe.out or f"runs/likelihood/{name}", True
        recipe.data_dir = recipe.data_dir or args.data_dir
        train.draw_run(*train.train_run(recipe))
        args.run, args.device, args.data_dir = recipe.out, recipe.device, recipe.data_dir
    elif args.recipe is not None or not args.run:
        parser.error(f"name the folder of a run, or --recipe and one of {', '.join(RECIPES)}")
    evaluate_run(Path(args.run), args)


if __name__ == "__main__":
    run(main)
