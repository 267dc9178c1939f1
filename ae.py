"""The autoencoder, and what goes wrong when one samples from it (chapter 2.1).

    python ae.py                      an autoencoder and a VAE, side by side, on MNIST
    python ae.py --dataset digits     the options are those of train.py

An autoencoder squeezes an image through a small code and learns to undo it. Nothing
tells it where in the latent space the codes should lie, so nobody can say which
codes to decode for a new image. A VAE of the same size is told: near N(0, I).
"""

import os
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class Autoencoder(nn.Module):
    """The deterministic autoencoder: 784 -> 400 -> 20 -> 400 -> 784.

    Takes images of any shape with input_dim values, returns them flat.
    """

    def __init__(self, input_dim: int = 784, hidden_dim: int = 400, latent_dim: int = 20):
        super().__init__()
        self.latent_dim = latent_dim
        self.fc1 = nn.Linear(input_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, latent_dim)
        self.fc3 = nn.Linear(latent_dim, hidden_dim)
        self.fc4 = nn.Linear(hidden_dim, input_dim)

    def encode(self, x: Tensor) -> Tensor:
        """x: (batch, ...) -> z: (batch, latent_dim), one point, no distribution."""
        return self.fc2(F.relu(self.fc1(x.flatten(1))))

    def decode_logits(self, z: Tensor) -> Tensor:
        """z: (batch, latent_dim) -> (batch, input_dim)."""
        return self.fc4(F.relu(self.fc3(z)))

    def decode(self, z: Tensor) -> Tensor:
        """z: (batch, latent_dim) -> pixels in [0, 1], (batch, input_dim)."""
        return torch.sigmoid(self.decode_logits(z))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x -> z -> x': returns (x_recon, z)."""
        z = self.encode(x)
        return self.decode(z), z

    def loss(
        self, images: Tensor, labels: Tensor, beta: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(total, recon, 0): the squared error ||x - x'||^2, summed over the batch.

        There is no KL, so neither beta nor the labels are used.
        """
        x_recon, _ = self(images)
        recon = (images.flatten(1) - x_recon).pow(2).sum()
        return recon, recon, torch.zeros_like(recon)

    @torch.no_grad()
    def sample(self, num_samples: int, device: torch.device | str | None = None) -> Tensor:
        """Decode draws from N(0, I), as a VAE does. Nothing has made these draws codes."""
        device = device or next(self.parameters()).device
        return self.decode(torch.randn(num_samples, self.latent_dim).to(device))


# ------------------------------------------------------------- the demonstration


@torch.no_grad()
def compare(models: dict[str, nn.Module], images: Tensor, path: str, note: str = "") -> None:
    """Print and draw where the codes of the models lie, and what noise decodes into.

    models: name -> trained model, on the CPU, all of one latent_dim; images: at least 6,
    (n, channels, height, width) in [0, 1]. The codes of a VAE are draws from q(z|x), as
    its decoder gets them.
    """
    from matplotlib.figure import Figure

    from vae import reparameterize
    from viz import interpolate_latent_space, mean_codes, save, tile

    figure = Figure(figsize=(7, 5.6), layout="constrained")
    panels = figure.subplots(4, len(models), height_ratios=(4, 3, 3, 3), sharey="row")
    statistics, noise = {}, torch.randn(24, next(iter(models.values())).latent_dim)
    for (name, model), axes in zip(models.items(), panels.T):
        codes = model.encode(images)
        z = reparameterize(*codes) if isinstance(codes, tuple) else codes
        mean, std = z.mean(dim=0), z.std(dim=0)
        error = (images.flatten(1) - model.decode(z)).pow(2).sum(dim=1).mean()
        statistics[name] = mean, std, error

        ends = mean_codes(model, images[:6])
        steps = [interpolate_latent_space(model, ends[i], ends[i + 1], 8) for i in (0, 2, 4)]
        axes[0].axhspan(-1, 1, color="tab:green", alpha=0.3, linewidth=0)
        axes[0].errorbar(range(1, len(mean) + 1), mean, std, fmt=".", color="black", linewidth=1)
        axes[0].set(title=name, xticks=[1, len(mean)])
        axes[1].imshow(tile(model.decode(noise), columns=8))
        axes[2].imshow(tile(model.decode(mean + std * noise), columns=8))
        axes[3].imshow(tile(torch.cat(steps), columns=8))
        for panel in axes[1:]:
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
    labels = "codes, mean ± std", "noise, N(0, I)", "noise, scaled\nas the codes", "interpolation"
    for axes, label in zip(panels[:, 0], labels):
        axes.set_ylabel(label)
    save(figure, path, note)

    print("\ncode dimension" + "".join(f"{name + ' mean':>18}{'std':>7}" for name in models))
    for j in range(noise.shape[1]):
        cells = (f"{mean[j]:18.2f}{std[j]:7.2f}" for mean, std, _ in statistics.values())
        print(f"{j + 1:14d}" + "".join(cells))
    errors = ", ".join(f"{name} {error:.2f}" for name, (_, _, error) in statistics.items())
    print(f"squared error of a reconstruction, mean over the images: {errors}")


def main(argv: list[str] | None = None) -> None:
    # Run as a script, this file stands on all the others; imported, on none of them.
    import train
    from data import load_dataset

    argv = sys.argv[1:] if argv is None else argv
    args = train.parse_args(argv, __doc__)
    if args.evaluate is not None or args.model != "mlp" or args.beta != 1 or args.binarize:
        raise train.UserError(
            "ae.py trains --model ae and mlp with --beta 1 on grey images of 28 x 28: leave out "
            "--model, --beta, --binarize and --evaluate, and --dataset celeba and faces"
        )
    taken = [f"{args.out}/{name}" for name in ("ae", "mlp") if args.out and not args.resume]
    for folder in filter(os.path.exists, taken):
        raise train.UserError(f"--out: {folder} exists already; name another folder")
    models = {}
    for name, title in (("ae", "autoencoder"), ("mlp", "VAE")):
        out = ["--out", f"{args.out}/{name}"] if args.out else []
        folder = train.main([*argv, "--model", name, *out])
        models[title], checkpoint = train.load_run(folder)
    config = checkpoint["config"]
    _, test = load_dataset(config["dataset"], train.find_data_dir(args.data_dir))
    torch.manual_seed(args.seed)
    path = f"{folder}/ae-vs-vae.png"
    compare(models, test.images / 255, path, config["notice"])
    print(f"saved {path}")


if __name__ == "__main__":
    from train import run_cli

    run_cli(main, "the same command with --resume and its --out, if it had one, goes on")
